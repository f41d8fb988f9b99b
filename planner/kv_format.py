"""Storage formats of cached keys and values, and the bytes they take. Free of everything but the model's shapes."""

from __future__ import annotations

from enum import StrEnum

from planner.errors import UserError
from planner.model import ModelSpec


class KVCacheDtype(StrEnum):
    """Storage format of cached keys and values. AUTO is the model's own dtype, 16 bits."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"

    @classmethod
    def parse(cls, name: str) -> KVCacheDtype:
        """The dtype of a name or one of its aliases, with AUTO resolved to BFLOAT16.

        Raises:
            UserError: no such format.
        """
        aliases = {"auto": "bfloat16", "bf16": "bfloat16", "float16": "bfloat16", "fp16": "bfloat16"}
        aliases |= {"fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "int8_per_token_head": "int8", "int4_per_token_head": "int4"}
        wanted = str(name).strip().lower()
        try:
            return cls(aliases.get(wanted, wanted))
        except ValueError:
            raise UserError(f"kv_cache_dtype is {name!r}; it must be one of {', '.join(cls)}") from None

    @property
    def bits(self) -> int:
        """Bits per element, without scales."""
        return {"fp8": 8, "int8": 8, "int4": 4, "int2": 2}.get(self.value, 16)

    @property
    def is_low_bit(self) -> bool:
        """True for formats that quantise a page at a time and so keep the newest page in bf16."""
        return self in (KVCacheDtype.INT4, KVCacheDtype.INT2)


def kv_bytes_per_token_layer(
    model: ModelSpec, dtype: KVCacheDtype | str, tensor_parallel_size: int, block_size: int
) -> float:
    """Bytes that one rank caches per token in one layer, scales included.

    Per KV head of size D, keys and values together:
        bf16        2·D·2
        fp8         2·D                     one scale per tensor
        int8        2·(D + 4)               a fp32 scale per token, for K and for V
        int4, int2  2·D·bits/8 + 4·D/block_size + 4
                                            K: fp16 scale and zero per channel and block; V: the same per token
    Latent attention caches one vector of kv_lora_rank + rope per token, on every rank, with scales per token.
    """
    dtype = KVCacheDtype.parse(dtype)
    if model.mla is not None:
        scales = 0 if dtype in (KVCacheDtype.BFLOAT16, KVCacheDtype.FP8) else 4
        return model.mla.latent_dim * dtype.bits / 8 + scales
    elements = 2 * model.head_dim * dtype.bits / 8
    scales = 0.0
    if dtype is KVCacheDtype.INT8:
        scales = 2 * 4
    elif dtype.is_low_bit:
        scales = 4 * model.head_dim / block_size + 4
    return model.kv_heads_per_rank(tensor_parallel_size) * (elements + scales)
