"""What an engine is told: fields are the flags of `vllm serve`, with underscores."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import UserError

KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8", "int8", "int4", "int2")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
QUANTIZATIONS = (None, "fp8")
BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class EngineConfig:
    """One engine on one device.

    Attributes:
        model: folder with config.json and safetensors.
        load_format: "auto" or "safetensors", or "dummy" for random weights from the config alone.
        dtype: of weights and activations; "auto" is the checkpoint's on a GPU (bfloat16 for a float32 one), float32 on
            a CPU.
        quantization: "fp8" for W8A8: weights with a scale per output channel, activations with one per token.
        kv_cache_dtype: format of the KV cache; "auto" is dtype.
        kv_cache_dtype_skip_layers: layers whose KV stays in dtype.
        max_model_len: tokens of prompt and output; None for the model's limit.
        max_num_seqs: running requests. max_num_batched_tokens: tokens of one step.
        gpu_memory_utilization: share of the GPU's memory for weights, activations and KV cache together.
        block_size: tokens per KV page.
        num_gpu_blocks_override: pages in the pool instead of what memory allows.
        enforce_eager: no CUDA graphs.
        async_scheduling: schedule step n + 1 while step n runs.
        seed: of dummy weights, and of requests that bring none.
        device: "auto", "cuda" or "cpu".

    Raises:
        UserError: a value out of its range.
    """

    model: str
    load_format: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    kv_cache_dtype_skip_layers: tuple[int, ...] = ()
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.92
    block_size: int = 64
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    async_scheduling: bool = True
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("load_format", LOAD_FORMATS),
            ("dtype", DTYPES),
            ("quantization", QUANTIZATIONS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("block_size", BLOCK_SIZES),
            ("device", ("auto", "cuda", "cpu")),
        ):
            value = getattr(self, name)
            if value not in choices:
                wanted = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UserError(f"{name} is {value!r}; it must be one of {wanted}")
        for name, least in (("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("seed", 0)):
            self._check_integer(name, least)
        for name, least in (("max_model_len", 2), ("num_gpu_blocks_override", 2)):
            if getattr(self, name) is not None:
                self._check_integer(name, least)
        for layer in self.kv_cache_dtype_skip_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise UserError(f"kv_cache_dtype_skip_layers has {layer!r}; layers are whole numbers from 0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0 and at most 1"
            )
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise UserError(
                f"max_num_seqs ({self.max_num_seqs}) must not exceed max_num_batched_tokens "
                f"({self.max_num_batched_tokens}): every running request needs a token of each step's budget"
            )

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}")
