"""What timing needs to know of a model, and how much a step attends to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.hf_config import model_from_config
from planner.kv_format import KVCacheDtype, kv_bytes_per_token_layer
from planner.model import ModelSpec, ParameterRole

_LAYER_ROLES = (ParameterRole.ATTENTION, ParameterRole.MLP, ParameterRole.SHARED_EXPERT, ParameterRole.ROUTER)


@dataclass(frozen=True)
class Products:
    """Matrix products with weights, of one rank.

    Attributes:
        layer_bytes, layer_flops: of all layers without routed experts: weights read by a step, FLOPs of a token.
        expert_bytes, expert_flops: the same of all routed experts together; expert_share: of them that a token uses.
        head_bytes, head_flops: of the output matrix; FLOPs of a sampled row.
    """

    layer_bytes: float
    layer_flops: float
    head_bytes: float
    head_flops: float
    expert_bytes: float = 0.0
    expert_flops: float = 0.0
    expert_share: float = 0.0

    def seconds(self, tokens: float, sampled: float, bytes_per_s: float, flops_per_s: float) -> float:
        """Time of `tokens` rows, `sampled` of which reach the output matrix, at these rates; as `planner.roofline`."""
        read = self.layer_bytes + self.head_bytes
        flops = self.layer_flops * tokens + self.head_flops * sampled
        if self.expert_bytes:
            read += self.expert_bytes * (1.0 - (1.0 - self.expert_share) ** tokens)
            flops += self.expert_flops * self.expert_share * tokens
        return ((read / bytes_per_s) ** 2 + (flops / flops_per_s) ** 2) ** 0.5


@dataclass(frozen=True)
class ModelShape:
    """One model in one KV format on one rank.

    Attributes:
        layers: (window in tokens or None, number of such layers), full attention first.
        products: the dense work.
        pair_flops: FLOPs per (query, key) pair and layer.
        kv_bytes: bytes cached per token and layer.
        hidden_size: width of what an all-reduce sums.
        fp8: matrix products run at the fp8 rate.
    """

    layers: tuple[tuple[int | None, int], ...]
    products: Products
    pair_flops: float
    kv_bytes: float
    hidden_size: int
    fp8: bool = False

    @classmethod
    def of(
        cls, model: ModelSpec, kv_cache_dtype: KVCacheDtype | str, block_size: int, tensor_parallel_size: int = 1
    ) -> ModelShape:
        """The shape of a catalog model, or of one read from a config.json."""
        ranks = tensor_parallel_size
        experts = model.parameters_of(ParameterRole.EXPERT)
        head = ParameterRole.EMBEDDING if model.tie_word_embeddings else ParameterRole.LM_HEAD

        def totals(groups) -> tuple[float, float]:
            stored = sum(group.bytes_per_rank(ranks) for group in groups)
            return float(stored), sum(2.0 * g.num_parameters / (ranks if g.sharded else 1) for g in groups)

        products = Products(
            *totals(model.parameters_of(*_LAYER_ROLES)),
            *totals(model.parameters_of(head)),
            *totals(experts),
            model.moe.experts_per_token / model.moe.num_experts if model.moe else 0.0,
        )
        if model.mla is None:
            per_head = 4.0 * model.head_dim
        else:
            mla = model.mla
            per_head = 2.0 * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
        counts = Counter(model.layer_windows)
        layers = sorted(counts.items(), key=lambda item: (item[0] is not None, item[0] or 0))
        return cls(
            layers=tuple(layers),
            products=products,
            pair_flops=per_head * model.num_attention_heads / ranks,
            kv_bytes=kv_bytes_per_token_layer(model, kv_cache_dtype, ranks, block_size),
            hidden_size=model.hidden_size,
            fp8=model.fp8_compute,
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], quantization: str | None, kv_cache_dtype: str, block_size: int
    ) -> ModelShape:
        """The shape of a Hugging Face `config.json`, on one GPU.

        Args:
            kv_cache_dtype: a `KVCacheDtype`, or "float32", which is what a CPU has.

        Raises:
            UserError: the config is wrong.
        """
        is_float32 = kv_cache_dtype == "float32"
        dtype = KVCacheDtype.BFLOAT16 if is_float32 else kv_cache_dtype
        shape = cls.of(model_from_config(dict(config), "model", quantization), dtype, block_size)
        return replace(shape, kv_bytes=2 * shape.kv_bytes) if is_float32 else shape

    @property
    def num_layers(self) -> int:
        return sum(count for _, count in self.layers)

    def decode_keys(self, contexts: Sequence[int]) -> int:
        """As the function of this name, of the model's layers."""
        return decode_keys(self.layers, contexts)

    def prompt_pairs(self, query: int, context: int) -> int:
        """(query, key) pairs of a prompt chunk, over all layers."""
        return sum(count * attended_pairs(query, context, window) for window, count in self.layers)


def decode_keys(layers: Sequence[tuple[int | None, int]], contexts: Sequence[int]) -> int:
    """Keys that decodes with these cached contexts attend to, over all layers: each its context and itself.

    Args:
        layers: (window in tokens or None, number of such layers).
    """
    keys = 0
    for window, count in layers:
        if window is None:
            keys += count * (sum(contexts) + len(contexts))
        else:
            keys += count * sum([context + 1 if context + 1 < window else window for context in contexts])
    return keys


def attended_pairs(query: int, context: int, window: int | None) -> int:
    """(query, key) pairs that causal attention scores for `query` new tokens after `context` cached ones.

    Query i (from 0) sees min(context + i + 1, window) keys.
    """
    if window is None or context + query <= window:
        return query * context + query * (query + 1) // 2
    growing = max(0, window - context)  # queries that still see everything before them
    return growing * context + growing * (growing + 1) // 2 + (query - growing) * window
