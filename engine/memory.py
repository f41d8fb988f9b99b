"""How the device's memory is divided, in the words that vLLM prints."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryReport:
    """What an engine found and took. Sizes in bytes; None where the device does not tell (a CPU).

    Attributes:
        total_bytes: of the device. utilization: share of it that may be used.
        weights_bytes: model weights. activation_bytes: peak of the largest step beyond them, measured.
        other_bytes: what the process holds outside of PyTorch's allocator (CUDA context, libraries).
        residual_bytes: residual windows and scratch pages of quantised KV formats.
        block_bytes: one block of the KV pool. num_blocks: of the pool, the null block not counted.
        blocks_per_sequence: blocks that one sequence of max_model_len tokens takes at most.
        graph_bytes: taken by CUDA graphs.
        load_s: time to load the weights. graph_s: to capture the graphs.
    """

    total_bytes: int | None
    utilization: float
    weights_bytes: int
    activation_bytes: int | None
    other_bytes: int | None
    residual_bytes: int
    block_bytes: int
    num_blocks: int
    block_size: int
    num_groups: int
    max_model_len: int
    blocks_per_sequence: int
    graph_bytes: int = 0
    load_s: float = 0.0
    graph_s: float = 0.0

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens of sequences of max_model_len that the cache holds, as vLLM counts them."""
        return int(self.max_concurrency * self.max_model_len)

    @property
    def max_concurrency(self) -> float:
        """Sequences of max_model_len that fit at once."""
        return self.num_blocks / self.blocks_per_sequence

    def lines(self) -> list[str]:
        """The report as vLLM words it."""
        said = [f"Model loading took {self.weights_bytes / GIB:.2f} GiB and {self.load_s:.1f} seconds"]
        if self.activation_bytes is not None:
            said.append(f"Peak activation memory: {self.activation_bytes / GIB:.2f} GiB")
        said += [
            f"Available KV cache memory: {self.kv_bytes / GIB:.2f} GiB",
            f"GPU KV cache size: {self.num_tokens:,} tokens",
            f"Maximum concurrency for {self.max_model_len:,} tokens per request: {self.max_concurrency:.2f}x",
        ]
        if self.graph_s:
            said.append(f"Graph capturing finished in {self.graph_s:.1f} secs, took {self.graph_bytes / GIB:.2f} GiB")
        return said
