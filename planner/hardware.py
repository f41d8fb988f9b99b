"""What a GPU is, as far as planning is concerned: memory, rates, links and price."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Price:
    """A rental price per GPU and hour, with where and when it was seen. Prices move: override them."""

    usd_per_gpu_hour: float
    source: str
    date: str


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One GPU from its data sheet, dense rates only (no structured-sparsity figures).

    Attributes:
        id: catalog id, e.g. "h200_sxm".
        memory_bytes: what the driver reports as total, which is less than the marketed size.
        memory_bandwidth_bytes_per_s: peak of the data sheet.
        bf16_flops: dense bf16 FLOP/s with fp32 accumulation.
        fp8_flops: dense fp8 FLOP/s, or None where the tensor cores have no fp8 (fp8 is then storage only).
        link_bandwidth_bytes_per_s: per GPU and direction, between GPUs of one node.
        fast_link: True for NVLink or Infinity Fabric, False where GPUs talk over PCIe.
        gpus_per_node: how many share that link; tensor parallelism stays within one node.
        price_low, price_typical, price_high: per GPU and hour, None where no price was found.
    """

    id: str
    name: str
    vendor: str
    architecture: str
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    link_bandwidth_bytes_per_s: float
    fast_link: bool
    gpus_per_node: int
    price_low: Price | None
    price_typical: Price | None
    price_high: Price | None
    spec_source: str
    spec_confidence: str
    notes: str = ""
