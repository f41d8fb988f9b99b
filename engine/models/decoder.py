"""The forward pass: one loop over layers for all families, which differ by what `ModelConfig` says.

    residual = embed(tokens)
    out      = residual, which is not added to itself
    each layer:
        qkv      = QKV(norm(residual += out))
        out      = output(attention(rotated q, k, v))      norms of q and k first, in some families
        out      = norm(out)                               in families with sandwich norms
        gate_up  = gate_up(norm(residual += out))
        out      = down(activation(gate) · up)
        out      = norm(out)                               in families with sandwich norms
    hidden   = norm(residual += out)

A sum and the norm behind it are one kernel, and the residual stream is updated in place. All 16-bit tensors are rounded
once per kernel; norms, RoPE, activation and softmax are computed in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.batch import StepBatch
from engine.models.config import ModelConfig
from engine.models.modules import DecoderLayer, DecoderWeights
from engine.models.rope import rope_tables
from engine.ops import Ops

if TYPE_CHECKING:
    from engine.kv.attention import Attention


class Decoder:
    """A model and its weights. Holds nothing of any step: what a sequence leaves behind is in `attention`'s cache.

    Args:
        num_positions: length of the RoPE tables; every position of a batch must be below it.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        *,
        num_positions: int,
        attention: Attention,
        ops: Ops,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.weights = weights
        self.attention = attention
        self.ops = ops
        device = weights.embedding.device
        self._ropes = [rope_tables(rope, num_positions, device) for rope in config.ropes]
        self._heads = [config.num_q_heads, config.num_kv_heads, config.num_kv_heads]
        self._norm = {"eps": config.rms_norm_eps, "weight_offset": config.norm_weight_offset}
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Hidden states behind the final norm, [num_tokens, hidden]; writes the new tokens' KV.

        Legal within CUDA graph capture as far as `attention` is.
        """
        ops, norm = self.ops, self._norm
        self.attention.begin_step(batch)
        residual = ops.embed(batch.token_ids, self.weights.embedding, self._embedding_scale)
        out, stream = residual, None  # nothing is added to the stream before the first norm
        for index, layer in enumerate(self.weights.layers):
            qkv = ops.norm_linear(out, layer.input_norm, layer.qkv, residual=stream, **norm)
            stream = residual
            out = ops.linear(self._attend(index, layer, qkv, batch), layer.output)
            if layer.attention_out_norm is not None:
                out = ops.rms_norm(out, layer.attention_out_norm, **norm)
            mlp = (layer.mlp_norm, layer.gate_up, layer.down)
            out = ops.gated_mlp(out, *mlp, residual=stream, activation=self.config.activation, **norm)
            if layer.mlp_out_norm is not None:
                out = ops.rms_norm(out, layer.mlp_out_norm, **norm)
        return ops.rms_norm(out, self.weights.final_norm, residual=stream, **norm)

    def _attend(self, index: int, layer: DecoderLayer, qkv: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """Attention of one layer: [num_tokens, num_q_heads · head_dim].

        RoPE is left to the kernel that writes K and V, unless heads are normalised first: then one kernel does both.
        """
        heads = qkv.view(qkv.shape[0], -1, self.config.head_dim)
        query, key, value = heads.split(self._heads, dim=1)
        rope = self._ropes[self.config.layer_ropes[index]]
        if layer.query_norm is not None:
            norms = {"query_norm": layer.query_norm, "key_norm": layer.key_norm}
            self.ops.qk_norm_rope(query, key, *rope, batch.positions, **norms, **self._norm)
            rope = None
        return self.attention.forward(index, query, key, value, batch, rope).flatten(1)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of hidden states, soft-capped where the model does: [num_rows, vocab] in the model's dtype.

        Args:
            hidden: [num_tokens, hidden], from `forward`.
            rows: int64 [num_rows], the rows that are wanted (`StepBatch.sampled_rows`), or None for all.
        """
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        logits = self.ops.linear(hidden, self.weights.lm_head)
        cap = self.config.logit_soft_cap
        return logits if cap is None else self.ops.soft_cap(logits, cap)
