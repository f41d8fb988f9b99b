"""The models and GPUs that have a name, as rows; and GPUs that people add."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pandas as pd

from planner.catalog import list_gpus, list_models, load_gpu
from planner.commands.catalog import model_record
from planner.errors import UserError
from planner.hardware import GpuSpec, Price
from planner.kv_format import KVCacheDtype, kv_bytes_per_token_layer
from planner.memory import GIB, weights_bytes_per_rank
from planner.model import ModelSpec

#: Arguments of `own_gpu` after the name.
GPU_NUMBERS = 8
_HIGHEST = 1e6
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}")


@cache
def model_rows() -> tuple[Mapping[str, Any], ...]:
    """The catalog's models."""
    rows = []
    for name in list_models():
        record = model_record(name)
        rows.append(_row(name, record.num_parameters, record.num_active_parameters, record.weights_bytes,
                         record.num_layers, record.num_attention_heads, record.num_key_value_heads,
                         record.kv_bytes_per_token_bf16, record.max_position_embeddings, record.source))  # fmt: skip
    return tuple(rows)


def own_model_row(model: ModelSpec) -> Mapping[str, Any]:
    """A model that was added."""
    per_token = model.num_layers * kv_bytes_per_token_layer(model, KVCacheDtype.BFLOAT16, 1, 16)
    return _row(model.name, model.num_parameters, model.num_active_parameters, weights_bytes_per_rank(model, 1),
                model.num_layers, model.num_attention_heads, model.num_key_value_heads, per_token,
                model.max_position_embeddings, "your config.json")  # fmt: skip


def _row(
    name: str,
    parameters: int,
    active: int,
    weights: int,
    layers: int,
    heads: int,
    kv_heads: int,
    kv_bytes: float,
    longest: int,
    source: str,
) -> Mapping[str, Any]:
    return {
        "model": name,
        "parameters, 10⁹": round(parameters / 1e9, 2),
        "active, 10⁹": round(active / 1e9, 2),
        "weights, GiB": round(weights / GIB, 2),
        "layers": layers,
        "heads": heads,
        "KV heads": kv_heads,
        "KV per token (bf16), KiB": round(kv_bytes / 1024, 2),
        "context, tokens": longest,
        "source": source,
    }


def gpu_rows(own: Mapping[str, GpuSpec], prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """All GPUs, with the catalog's price and the user's."""
    rows = []
    for gpu in [*(load_gpu(name) for name in list_gpus()), *own.values()]:
        price = gpu.price_typical or gpu.price_low or gpu.price_high
        rows.append(
            {
                "id": gpu.id,
                "GPU": gpu.name,
                "your US$/h": prices.get(gpu.id),
                "US$/h": price.usd_per_gpu_hour if price else None,
                "memory, GiB": round(gpu.memory_bytes / GIB, 1),
                "bandwidth, TB/s": gpu.memory_bandwidth_bytes_per_s / 1e12,
                "bf16, TFLOP/s": gpu.bf16_flops / 1e12,
                "fp8, TFLOP/s": gpu.fp8_flops / 1e12 if gpu.fp8_flops else None,
                "link, GB/s": gpu.link_bandwidth_bytes_per_s / 1e9,
                "GPUs per node": gpu.gpus_per_node,
                "price seen": f"{price.source} {price.date}".strip() if price else "no price known",
                "source": gpu.spec_source,
            }
        )
    return rows


def prices_of(edited: pd.DataFrame) -> dict[str, float]:
    """The prices that somebody wrote into the table of GPUs, by id."""
    pairs = zip(edited["id"], edited["your US$/h"], strict=True)
    return {name: float(usd) for name, usd in pairs if usd is not None and math.isfinite(usd) and usd > 0}


def own_gpu(
    name: str,
    memory_gib: float,
    bandwidth_tb_per_s: float,
    bf16_tflops: float,
    fp8_tflops: float,
    link_gb_per_s: float,
    has_fast_link: bool,
    gpus_per_node: int,
    usd_per_hour: float,
) -> GpuSpec:
    """A GPU from what a data sheet says.

    Raises:
        UserError: a name that is taken or no id, or a number that no GPU has.
    """
    identity = re.sub(r"[\s-]+", "_", name.strip().lower())
    if not _NAME.fullmatch(identity):
        raise UserError(f"{name!r} is no id for a GPU: use letters, digits and _, e.g. my_gpu")
    if identity in list_gpus():
        raise UserError(f"{identity} is in the catalog already; change its price in the table, or choose another id")
    positive = (memory_gib, bandwidth_tb_per_s, bf16_tflops, link_gb_per_s, gpus_per_node)
    if not all(math.isfinite(value) and 0 < value < _HIGHEST for value in positive) or not all(
        math.isfinite(value) and 0 <= value < _HIGHEST for value in (fp8_tflops, usd_per_hour)
    ):
        raise UserError(f"{identity} has a memory, a rate, a number of GPUs or a price that no GPU has")
    return GpuSpec(
        id=identity,
        name=name.strip(),
        vendor="",
        architecture="",
        memory_bytes=round(memory_gib * GIB),
        memory_bandwidth_bytes_per_s=bandwidth_tb_per_s * 1e12,
        bf16_flops=bf16_tflops * 1e12,
        fp8_flops=fp8_tflops * 1e12 or None,
        link_bandwidth_bytes_per_s=link_gb_per_s * 1e9,
        fast_link=bool(has_fast_link),
        gpus_per_node=int(gpus_per_node),
        price_low=None,
        price_typical=Price(usd_per_hour, "given by the user", "") if usd_per_hour else None,
        price_high=None,
        spec_source="given by the user",
        spec_confidence="given by the user",
    )
