"""The forward pass: one loop over layers for all families, which differ by what `ModelConfig` says.

    start     residual = embed(tokens)
              qkv      = QKV(norm(residual))
    each layer:
      write              cache <- rotated k, v                   norms of q and k first, in some families
      attend             attention(rotated q, k, v, cache)
      between out      = output(attended)
              out      = norm(out)                               in families with sandwich norms
              gate_up  = gate_up(norm(residual += out))
              out      = down(activation(gate) · up)
              out      = norm(out)                               in families with sandwich norms
              qkv      = the next layer's QKV(norm(residual += out)), or behind the last one only the norm

A sum and the norm behind it are one kernel, and the residual stream is updated in place. All 16-bit tensors are rounded
once per kernel; norms, RoPE, activation and softmax are computed in float32.

Only `attend` looks at a step's lengths, and `write` in the low-bit formats. The rest knows the number of tokens and the
places of their KV, so that it can be captured in CUDA graphs once per number of tokens (`engine.pieces`).
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, Protocol

import torch

from engine.batch import Places, StepBatch
from engine.models.config import ModelConfig
from engine.models.modules import DecoderWeights
from engine.models.rope import rope_tables
from engine.ops import Ops

if TYPE_CHECKING:
    from engine.kv.attention import Attention


class Pieces(Protocol):
    """What a decoder does outside of attention, for one step.

    Attributes:
        written: layers of which `start` and `between` have also done `Decoder.write`.
    """

    written: Set[int]

    def start(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`Decoder.embed` and `Decoder.start`."""

    def between(self, index: int, attended: torch.Tensor) -> torch.Tensor:
        """`Decoder.between`; the result is valid until the next call."""


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

    def forward(self, batch: StepBatch, pieces: Pieces | None = None) -> torch.Tensor:
        """Hidden states behind the final norm, [num_tokens, hidden]; writes the new tokens' KV.

        Legal within CUDA graph capture as far as `attention` is.

        Args:
            pieces: captured ones; launched kernel by kernel if None. Where they pad, so is the result.
        """
        pieces = pieces or LaunchedPieces(self)
        self.attention.begin_step(batch)
        places, keeps_key = batch.places, batch.prefill is not None
        out = pieces.start(batch.token_ids)
        for index in range(len(self.weights.layers)):
            qkv = out[: batch.num_tokens]
            if index not in pieces.written:
                self.write(index, qkv, places, keeps_key=keeps_key)
            attended = self.attention.attend(index, *self._split(qkv), batch).flatten(1)
            out = pieces.between(index, attended)
        return out

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream at its beginning: [num_tokens, hidden]."""
        return self.ops.embed(token_ids, self.weights.embedding, self._embedding_scale)

    def start(self, stream: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Query, key and value of the first layer: [num_tokens, (num_q_heads + 2 · num_kv_heads) · head_dim]."""
        layer = self.weights.layers[0]
        return self.ops.norm_linear(stream, layer.input_norm, layer.qkv, out=out, **self._norm)

    def between(
        self, index: int, attended: torch.Tensor, stream: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """From the attention of layer `index` to that of the next: its query, key and value.

        Args:
            attended: [num_tokens, num_q_heads · head_dim].
            stream: [num_tokens, hidden], the residual stream, brought up to date in place.
            out: where to put the result, or None.

        Returns:
            As `start`; behind the last layer the normed hidden states [num_tokens, hidden].
        """
        ops, norm, layers = self.ops, self._norm, self.weights.layers
        layer = layers[index]
        x = ops.linear(attended, layer.output)
        if layer.attention_out_norm is not None:
            x = ops.rms_norm(x, layer.attention_out_norm, **norm)
        mlp = (layer.mlp_norm, layer.gate_up, layer.down)
        x = ops.gated_mlp(x, *mlp, residual=stream, activation=self.config.activation, **norm)
        if layer.mlp_out_norm is not None:
            x = ops.rms_norm(x, layer.mlp_out_norm, **norm)
        if index + 1 == len(layers):
            return ops.rms_norm(x, self.weights.final_norm, residual=stream, out=out, **norm)
        behind = layers[index + 1]
        return ops.norm_linear(x, behind.input_norm, behind.qkv, residual=stream, out=out, **norm)

    def write(self, index: int, qkv: torch.Tensor, places: Places, *, keeps_key: bool) -> None:
        """Norms of the heads, where the family has them, RoPE, and K and V into the cache.

        RoPE is left to the kernel that writes K and V, unless heads are normalised first: then one kernel does both.

        Args:
            qkv: [num_tokens, ...], see `start`; query, and if keeps_key the key, are changed in place.
        """
        query, key, value = self._split(qkv)
        layer = self.weights.layers[index]
        rope = self._ropes[self.config.layer_ropes[index]]
        if layer.query_norm is not None:
            norms = {"query_norm": layer.query_norm, "key_norm": layer.key_norm}
            self.ops.qk_norm_rope(query, key, *rope, places.positions, **norms, **self._norm)
            rope = None
        self.attention.write(index, query, key, value, places, rope, keeps_key=keeps_key)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, [num_tokens, heads of it, head_dim] each."""
        heads = qkv.view(qkv.shape[0], -1, self.config.head_dim)
        query, key, value = heads.split(self._heads, dim=1)
        return query, key, value

    def logits(
        self, hidden: torch.Tensor, rows: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of hidden states, soft-capped where the model does: [num_rows, vocab] in the model's dtype.

        Args:
            hidden: [num_tokens, hidden], from `forward`.
            rows: int64 [num_rows], the rows that are wanted (`StepBatch.sampled_rows`), or None for all.
            out: [num_rows, vocab] in the model's dtype to put them in, or None.
        """
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        logits = self.ops.product(hidden, self.weights.lm_head, out)
        cap = self.config.logit_soft_cap
        return logits if cap is None else logits.copy_(self.ops.soft_cap(logits, cap))


class LaunchedPieces:
    """`Pieces` launched kernel by kernel."""

    written: Set[int] = frozenset()

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def start(self, token_ids: torch.Tensor) -> torch.Tensor:
        self._stream = self._decoder.embed(token_ids)
        return self._decoder.start(self._stream)

    def between(self, index: int, attended: torch.Tensor) -> torch.Tensor:
        return self._decoder.between(index, attended, self._stream)
