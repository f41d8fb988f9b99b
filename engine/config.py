"""What an engine is told: fields are the flags of `vllm serve`, with underscores."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from engine.errors import UserError
from engine.values import MAX_INT32, MAX_SEED, flag, integer, real_number, shown, whole_number, whole_numbers

KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8", "int8", "int4", "int2")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
QUANTIZATIONS = (None, "fp8")
BLOCK_SIZES = (32, 64, 128)

# Least and most of each. The scheduler counts running requests in 20 bits, and pages and positions are int32.
_BOUNDS = {
    "max_model_len": (2, MAX_INT32),
    "max_num_seqs": (1, 2**20 - 2),
    "max_num_batched_tokens": (1, 2**24),
    "num_gpu_blocks_override": (2, MAX_INT32),
    "seed": (0, MAX_SEED),
}
_MAY_BE_NONE = ("max_model_len", "num_gpu_blocks_override")


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
        self._set("model", _model(self.model))
        for name, choices in (
            ("load_format", LOAD_FORMATS),
            ("dtype", DTYPES),
            ("quantization", QUANTIZATIONS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("device", ("auto", "cuda", "cpu")),
        ):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)) or value not in choices:
                raise UserError(f"{name} is {shown(value)}; it must be one of {_listed(choices)}")
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                self._set(name, whole_number(name, value, least, most))
        size = integer(self.block_size)
        if size not in BLOCK_SIZES:
            kind = " as a whole number" if size is None else ""
            raise UserError(f"block_size is {shown(self.block_size)}; it must be one of {_listed(BLOCK_SIZES)}{kind}")
        self._set("block_size", size)
        for field in fields(self):
            if isinstance(field.default, bool):
                flag(field.name, getattr(self, field.name))
        layers = whole_numbers("kv_cache_dtype_skip_layers", self.kv_cache_dtype_skip_layers, "layers")
        self._set("kv_cache_dtype_skip_layers", layers)
        share = real_number(
            "gpu_memory_utilization", self.gpu_memory_utilization, lambda x: 0 < x <= 1, "above 0 and at most 1"
        )
        self._set("gpu_memory_utilization", share)
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise UserError(
                f"max_num_seqs ({self.max_num_seqs}) must not exceed max_num_batched_tokens "
                f"({self.max_num_batched_tokens}): every running request needs a token of each step's budget"
            )

    @classmethod
    def from_options(cls, model: str, options: Mapping[str, object]) -> EngineConfig:
        """The configuration with these fields.

        Raises:
            UserError: there is no such field, or a value is out of its range.
        """
        names = [field.name for field in fields(cls) if field.name != "model"]
        for name in options:
            if name not in names:
                nearest = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
                raise UserError(f"the engine has no option {name}; {hint}")
        return cls(model=model, **options)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _model(given: object) -> str:
    """Its folder or name; a path object is as good."""
    model = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(model, str) or not model.strip() or "\0" in model:
        raise UserError(f"model is {shown(given)}; it must be a folder or the name of a built-in model")
    return model


def _listed(choices: tuple[object, ...]) -> str:
    return ", ".join(str(choice) for choice in choices if choice is not None)
