"""What a server said about itself, each fact with the line it came from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

from planner.errors import UserError

_Value = TypeVar("_Value")

# vLLM's page where nothing else is said (before 2026 its only default on NVIDIA GPUs).
DEFAULT_BLOCK_SIZE = 16
# Lines print rates with three digits: a rate may seem to rise by this much.
_ROUNDING = 5e-3


@dataclass(frozen=True, slots=True)
class Found(Generic[_Value]):
    """A value, and the line (from 1) of the text that it was read from."""

    value: _Value
    line: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One line of the engine's periodic statistics; None where the line does not say.

    Attributes:
        line: where it stood.
        running, waiting: requests.
        kv_usage: share of KV blocks in use, 0 to 1.
        prefix_hit_rate: share of prompt tokens found in the cache since the start, 0 to 1.
        generation_tokens_per_s: of the last interval.
    """

    line: int
    running: int
    waiting: int | None = None
    kv_usage: float | None = None
    prefix_hit_rate: float | None = None
    generation_tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How many drafts were accepted, over everything the text covers.

    Attributes:
        accepted, drafted: tokens; None where only rates were printed.
        mean_acceptance_length: tokens per round, the bonus token included.
        unconditional_rates: share of rounds that accepted position i at all, as vLLM reports it.
        line: of the last line that was counted.
    """

    accepted: int | None
    drafted: int | None
    mean_acceptance_length: float | None
    unconditional_rates: tuple[float, ...]
    line: int

    @property
    def conditional_rates(self) -> tuple[float, ...]:
        """Acceptance of each position given that all before it were accepted, as this project counts."""
        return conditional_rates(self.unconditional_rates)


def conditional_rates(unconditional: tuple[float, ...]) -> tuple[float, ...]:
    """Each rate over the one before it; 0 after a position that is never accepted.

    Raises:
        UserError: a rate is not between 0 and 1, or rises with the position, which unconditional rates cannot.
    """
    rates, before = [], 1.0
    for position, rate in enumerate(unconditional):
        if not 0 <= rate <= min(1.0, before + _ROUNDING):
            raise UserError(
                f"per-position acceptance {rate:g} at position {position} is not between 0 and the rate before it, "
                f"{before:g}"
            )
        rates.append(min(1.0, rate / before) if before else 0.0)
        before = rate
    return tuple(rates)


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Everything optional: a log is as long as somebody pasted. Names and values as `vllm serve` spells them.

    Attributes:
        engine: "vllm" or "sglang".
        num_gpu_blocks: blocks of the KV pool, the null block among them.
        kv_cache_tokens: what the pool holds, as printed; of a hybrid model vLLM prints a derived figure.
        kv_cache_gib: memory of the pool per GPU.
        max_concurrency: sequences of `max_model_len` that fit, as printed.
        max_running_requests: SGLang's limit on the batch.
        cudagraph_sizes: batch sizes with a captured graph.
        stats: the periodic lines, in order.
        num_preemptions: counted from warnings, or the server's own counter.
        prefix_cache_queries, prefix_cache_hits: prompt tokens since the start, by the counters of /metrics.
    """

    engine: Found[str] | None = None
    version: Found[str] | None = None
    model: Found[str] | None = None
    dtype: Found[str] | None = None
    quantization: Found[str] | None = None
    num_gpu_blocks: Found[int] | None = None
    block_size: Found[int] | None = None
    kv_cache_tokens: Found[int] | None = None
    kv_cache_gib: Found[float] | None = None
    kv_cache_dtype: Found[str] | None = None
    weights_gib: Found[float] | None = None
    graph_gib: Found[float] | None = None
    max_model_len: Found[int] | None = None
    max_concurrency: Found[float] | None = None
    max_num_seqs: Found[int] | None = None
    max_num_batched_tokens: Found[int] | None = None
    tensor_parallel_size: Found[int] | None = None
    gpu_memory_utilization: Found[float] | None = None
    enable_prefix_caching: Found[bool] | None = None
    enable_chunked_prefill: Found[bool] | None = None
    enforce_eager: Found[bool] | None = None
    async_scheduling: Found[bool] | None = None
    cudagraph_sizes: Found[tuple[int, ...]] | None = None
    num_speculative_tokens: Found[int] | None = None
    acceptance: Acceptance | None = None
    stats: tuple[EngineStats, ...] = ()
    num_preemptions: Found[int] | None = None
    pipeline_parallel_size: Found[int] | None = None
    data_parallel_size: Found[int] | None = None
    prefix_cache_queries: Found[int] | None = None
    prefix_cache_hits: Found[int] | None = None

    def value(self, name: str) -> Any:
        """The value of a fact, None where it was not found."""
        found = getattr(self, name)
        return None if found is None else found.value

    @property
    def blocks(self) -> int | None:
        """Blocks of the KV pool: as printed, or the tokens it holds over the block size."""
        if self.num_gpu_blocks is not None:
            return self.num_gpu_blocks.value
        if self.kv_cache_tokens is None:
            return None
        return self.kv_cache_tokens.value // self.tokens_per_block

    @property
    def tokens_per_block(self) -> int:
        """The block size: as printed, or the engine's default."""
        if self.block_size is not None:
            return self.block_size.value
        return 1 if self.value("engine") == "sglang" else DEFAULT_BLOCK_SIZE

    @property
    def prefix_hit_rates(self) -> tuple[float, ...]:
        """Shares of prompt tokens found in the prefix cache, 0 to 1: by the last line that says, then by counters."""
        rates = [line.prefix_hit_rate for line in self.stats if line.prefix_hit_rate is not None][-1:]
        if queries := self.value("prefix_cache_queries"):
            rates.append((self.value("prefix_cache_hits") or 0) / queries)
        return tuple(rates)

    def merged(self, other: ServerFacts) -> ServerFacts:
        """These facts, with what only the other has; its statistics lines follow these."""
        missing = {
            field.name: getattr(other, field.name)
            for field in fields(self)
            if field.name != "stats" and getattr(self, field.name) is None
        }
        return replace(self, **missing, stats=self.stats + other.stats)
