"""`memwall catalog`: the models and GPUs that have a name."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands.files import ensure_distinct
from planner.commands import tables
from planner.commands.options import GROUP, OutputOptions, takes_groups

if TYPE_CHECKING:
    from planner.records import GpuRecord, ModelRecord, PriceRecord


class Kind(StrEnum):
    """What to list."""

    MODELS = "models"
    GPUS = "gpus"


@takes_groups
def catalog(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; both by default.")] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One entry in full, with its sources.", show_default=False)
    ] = None,
    output: OutputOptions = GROUP,
) -> None:
    """List the models and GPUs that have a name, or show one in full."""
    from pydantic import RootModel

    from planner.catalog import config_file, list_gpus, list_models
    from planner.records import CatalogRecord, GpuRecord, ModelRecord

    if name is not None:
        ensure_distinct([("the model's", config_file(name) if kind is Kind.MODELS else None)], output.files())
        record = model_record(name) if kind is Kind.MODELS else gpu_record(name)
        tables.deliver(record, _model_page(record) if kind is Kind.MODELS else _gpu_page(record), output)
        return
    models = tuple(map(model_record, list_models())) if kind is not Kind.GPUS else ()
    gpus = tuple(map(gpu_record, list_gpus())) if kind is not Kind.MODELS else ()
    if kind is None:
        record = CatalogRecord(models=models, gpus=gpus)
        tables.deliver(record, tables.page(_model_table(models), _gpu_table(gpus)), output)
    elif kind is Kind.MODELS:
        tables.deliver(RootModel[tuple[ModelRecord, ...]](models), _model_table(models), output)
    else:
        tables.deliver(RootModel[tuple[GpuRecord, ...]](gpus), _gpu_table(gpus), output)


def model_record(name: str) -> ModelRecord:
    """A model of the catalog, or of a config.json, with what Memwall derives from its shapes.

    Raises:
        UserError: an unknown name, or a bad config.
    """
    from planner.catalog import load_model, model_entry
    from planner.memory import KVCacheDtype, kv_bytes_per_token_layer, weights_bytes_per_rank
    from planner.records import ModelRecord

    model = load_model(name)
    entry = model_entry(model.name) if model.hf_repo else {}  # a user's own config names no repository
    windows = [window for window in model.layer_windows if window is not None]
    return ModelRecord(
        id=model.name,
        hf_repo=model.hf_repo,
        family=model.family,
        num_parameters=model.num_parameters,
        num_active_parameters=model.num_active_parameters,
        published_num_parameters=entry.get("published_num_parameters"),
        weights_bytes=weights_bytes_per_rank(model, 1),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        mla_latent_dim=model.mla.latent_dim if model.mla else None,
        sliding_window_tokens=max(windows, default=None),
        num_sliding_window_layers=len(windows),
        num_experts=model.moe.num_experts if model.moe else None,
        experts_per_token=model.moe.experts_per_token if model.moe else None,
        kv_bytes_per_token_bf16=round(
            model.num_layers * kv_bytes_per_token_layer(model, KVCacheDtype.BFLOAT16, 1, block_size=16)
        ),
        max_position_embeddings=model.max_position_embeddings,
        source=entry.get("source", name),
        note=entry.get("note") or "",
    )


def gpu_record(name: str) -> GpuRecord:
    """A GPU of the catalog.

    Raises:
        UserError: an unknown id.
    """
    from planner.catalog import gpu_entry, load_gpu
    from planner.records import GpuRecord

    entry, gpu = gpu_entry(name), load_gpu(name)
    return GpuRecord(
        id=gpu.id,
        name=gpu.name,
        vendor=gpu.vendor,
        architecture=gpu.architecture,
        memory_bytes=gpu.memory_bytes,
        memory_bandwidth_bytes_per_s=gpu.memory_bandwidth_bytes_per_s,
        bf16_flops_per_s=gpu.bf16_flops,
        fp8_flops_per_s=gpu.fp8_flops,
        link=entry["link"],
        link_bandwidth_bytes_per_s=gpu.link_bandwidth_bytes_per_s,
        fast_link=gpu.fast_link,
        gpus_per_node=gpu.gpus_per_node,
        price_low=entry["price_low"],
        price_typical=entry["price_typical"],
        price_high=entry["price_high"],
        memory_source=entry["memory_source"],
        spec_source=gpu.spec_source,
        spec_confidence=gpu.spec_confidence,
        notes=entry["notes"],
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def _model_table(models: tuple[ModelRecord, ...]) -> str:
    header = ["model", "parameters", "layers", "heads/KV", "attention", "experts", "KV KiB/token", "context"]
    rows = [
        [
            model.id,
            _parameters(model),
            model.num_layers,
            f"{model.num_attention_heads}/{model.num_key_value_heads}",
            _attention(model),
            f"{model.experts_per_token} of {model.num_experts}" if model.num_experts else "",
            tables.kib(model.kv_bytes_per_token_bf16),
            f"{model.max_position_embeddings:,}",
        ]
        for model in models
    ]
    legend = (
        "KV is bf16, all layers, full context. `memwall catalog models NAME` shows one with its source; --model also "
        "takes a path to any config.json of these families."
    )
    return f"{tables.columns(header, rows, indent=0)}\n\n{tables.paragraph(legend)}"


def _gpu_table(gpus: tuple[GpuRecord, ...]) -> str:
    header = [
        "GPU",
        "GiB",
        "TB/s",
        "bf16 TFLOP/s",
        "fp8",
        "link GB/s",
        "per node",
        "$/h low",
        "typical",
        "high",
        "seen",
    ]
    rows = [
        [
            gpu.id,
            f"{gpu.memory_bytes / (1 << 30):.1f}",
            f"{gpu.memory_bandwidth_bytes_per_s / 1e12:.2f}",
            f"{gpu.bf16_flops_per_s / 1e12:.0f}",
            f"{gpu.fp8_flops_per_s / 1e12:.0f}" if gpu.fp8_flops_per_s else "-",
            f"{gpu.link.partition(' (')[0]} {gpu.link_bandwidth_bytes_per_s / 1e9:g}",
            gpu.gpus_per_node,
            _dollars(gpu.price_low),
            _dollars(gpu.price_typical),
            _dollars(gpu.price_high),
            max((price.date for price in _prices(gpu)), default="-"),
        ]
        for gpu in gpus
    ]
    legend = (
        "Dense rates of the data sheet; links per GPU and direction; prices per GPU and hour, which move. "
        "`memwall catalog gpus NAME` shows one with its sources."
    )
    return f"{tables.columns(header, rows, indent=0)}\n\n{tables.paragraph(legend)}"


def _model_page(model: ModelRecord) -> str:
    published = model.published_num_parameters
    heads = f"{model.num_attention_heads} query, {model.num_key_value_heads} KV, of {model.head_dim} elements"
    experts = f"{model.experts_per_token} of {model.num_experts} per token" if model.num_experts else "none"
    return tables.page(
        typer.style(model.id, bold=True),
        tables.pairs(
            [
                ("repository", model.hf_repo or ""),
                ("family", model.family),
                ("parameters", f"{model.num_parameters:,}, of which a token touches {model.num_active_parameters:,}"),
                ("published count", f"{published:,}" if published else ""),
                ("weights", f"{tables.gib(model.weights_bytes)} GiB in the released precision"),
                ("layers", f"{model.num_layers}, hidden size {model.hidden_size:,}"),
                ("heads", heads),
                ("attention", _attention(model)),
                ("experts", experts),
                ("KV cache", f"{tables.kib(model.kv_bytes_per_token_bf16)} KiB per token in bf16, all layers"),
                ("context", f"{model.max_position_embeddings:,} tokens"),
                ("vocabulary", f"{model.vocab_size:,} tokens"),
                ("source", model.source),
                ("note", model.note),
            ]
        ),
    )


def _gpu_page(gpu: GpuRecord) -> str:
    fp8 = f"{gpu.fp8_flops_per_s / 1e12:g}" if gpu.fp8_flops_per_s else "no"
    link = f"{gpu.link}, {gpu.link_bandwidth_bytes_per_s / 1e9:g} GB/s per GPU and direction"
    rows = [
        ("name", gpu.name),
        ("architecture", f"{gpu.vendor} {gpu.architecture}"),
        ("memory", f"{tables.gib(gpu.memory_bytes)} GiB ({gpu.memory_source})"),
        ("bandwidth", f"{gpu.memory_bandwidth_bytes_per_s / 1e12:g} TB/s"),
        ("matrix rate", f"{gpu.bf16_flops_per_s / 1e12:g} TFLOP/s in bf16, {fp8} in fp8, dense"),
        ("link", f"{link}, {gpu.gpus_per_node} GPUs in a node"),
    ]
    tiers = (("low", gpu.price_low), ("typical", gpu.price_typical), ("high", gpu.price_high))
    rows += [(f"price, {tier}", _price(price)) for tier, price in tiers]
    rows += [("source", f"{gpu.spec_source} (confidence: {gpu.spec_confidence})"), ("notes", gpu.notes)]
    return tables.page(typer.style(gpu.id, bold=True), tables.pairs(rows))


def _parameters(model: ModelRecord) -> str:
    total = _billions(model.num_parameters)
    return f"{total}, {_billions(model.num_active_parameters)} active" if model.num_experts else total


def _billions(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 10e9 else f"{number / 1e9:.2f} B"


def _attention(model: ModelRecord) -> str:
    if model.mla_latent_dim:
        return f"latent {model.mla_latent_dim}"
    if model.sliding_window_tokens:
        return f"{model.num_sliding_window_layers} layers slide {model.sliding_window_tokens}"
    return "full"


def _prices(gpu: GpuRecord) -> list[PriceRecord]:
    return [price for price in (gpu.price_low, gpu.price_typical, gpu.price_high) if price is not None]


def _dollars(price: PriceRecord | None) -> str:
    return f"{price.usd_per_gpu_hour:.2f}" if price else "-"


def _price(price: PriceRecord | None) -> str:
    return f"{price.usd_per_gpu_hour:.2f} USD per GPU and hour, {price.date} ({price.source})" if price else "not found"
