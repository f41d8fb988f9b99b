"""`memwall memory`: what each GPU of a replica holds, and how much context fits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands.files import ensure_distinct
from planner.commands import tables
from planner.commands.options import (
    DEFAULT_MODEL,
    DEFAULT_SYSTEM,
    GROUP,
    EngineOptions,
    Model,
    OutputOptions,
    Quantization,
    SpeculationOptions,
    System,
    TensorParallelSize,
    gpu_from_option,
    model_files,
    speculation_from_options,
    takes_groups,
)
from planner.errors import UserError

if TYPE_CHECKING:
    from planner.memory import MemoryReport

_MEASURED = "Measured values per GPU, instead of modelled ones"


def _measured(flag: str, help: str) -> typer.models.OptionInfo:
    return typer.Option(flag, help=help, rich_help_panel=_MEASURED, metavar="GIB")


@takes_groups
def memory(
    model: Model = DEFAULT_MODEL,
    system: System = DEFAULT_SYSTEM,
    tensor_parallel_size: TensorParallelSize = 1,
    quantization: Quantization = None,
    concurrency: Annotated[
        int,
        typer.Option(
            "--concurrency",
            help="Sequences of max-model-len that must fit at once.",
            rich_help_panel="Question",
            metavar="N",
        ),
    ] = 1,
    engine: EngineOptions = GROUP,
    speculation: SpeculationOptions = GROUP,
    total_memory_gib: Annotated[float | None, _measured("--total-memory-gib", "Total memory.")] = None,
    activation_gib: Annotated[float | None, _measured("--activation-gib", "Peak of a step beyond the weights.")] = None,
    non_torch_gib: Annotated[float | None, _measured("--non-torch-gib", "CUDA context and NCCL.")] = None,
    cuda_graph_gib: Annotated[float | None, _measured("--cuda-graph-gib", "Captured CUDA graphs.")] = None,
    output: OutputOptions = GROUP,
) -> int:
    """Show what fits: weights, activations, KV cache per GPU, concurrency, and the longest context."""
    from planner.catalog import load_model
    from planner.deployment import Deployment
    from planner.memory import plan_memory
    from planner.simulation import AcceptanceProcess
    from planner.speculation import MAX_SPECULATIVE_TOKENS

    ensure_distinct([*model_files(model), *speculation.files()], output.files())
    gpu = gpu_from_option(system)
    # Memory does not depend on how many drafts are accepted.
    any_acceptance = AcceptanceProcess((1.0,) * MAX_SPECULATIVE_TOKENS)
    deployment = Deployment(
        model=load_model(model, quantization),
        gpu=gpu,
        tensor_parallel_size=tensor_parallel_size,
        speculation=speculation_from_options(speculation, any_acceptance),
        profiles=("none",),  # where the memory goes is what is asked, not how many blocks some engine had
        **engine.settings(),
    )
    settings = replace(
        deployment.memory_settings(),
        total_memory_bytes=_bytes("--total-memory-gib", total_memory_gib),
        activation_bytes=_bytes("--activation-gib", activation_gib),
        non_torch_bytes=_bytes("--non-torch-gib", non_torch_gib),
        cuda_graph_bytes=_bytes("--cuda-graph-gib", cuda_graph_gib),
    )
    report = plan_memory(deployment.model, gpu, settings, concurrency)
    tables.deliver(report, memory_table(report), output)
    if not report.fits:
        typer.echo(f"does not fit: {report.reason}", err=True)
    return 0 if report.fits else 1


def _bytes(flag: str, gib: float | None) -> int | None:
    if gib is None:
        return None
    if not (math.isfinite(gib) and gib >= 0):
        raise UserError(f"{flag} is {gib}; it must be a number of GiB from 0 on")
    return round(gib * (1 << 30))


def memory_table(report: MemoryReport) -> str:
    """The report for people."""
    return tables.page(
        _headline(report),
        _rank_table(report),
        tables.paragraph(
            "KV is reserved up front by design: the engine takes the whole KV cache when it starts, so the GPU looks "
            "full even when idle."
        ),
        _facts(report),
        _remedies(report),
        tables.warnings(report.warnings),
    )


def _headline(report: MemoryReport) -> str:
    asked = tables.count(report.concurrency, "sequence")
    title = (
        f"{report.model} on {report.tensor_parallel_size} × {report.system}, {report.kv_cache_dtype} KV cache: "
        f"{asked} of {report.max_model_len:,} tokens"
    )
    answer = tables.verdict(report.fits, "fits" if report.fits else "DOES NOT FIT")
    reason = f"\n{tables.paragraph(report.reason)}" if report.reason else ""
    return f"{title} {answer}{reason}"


def _rank_table(report: MemoryReport) -> str:
    residual = any(rank.kv_residual_bytes for rank in report.ranks)
    header = ["GPU", "weights", "activations", "CUDA graphs", "non-torch"]
    header += ["KV residual"] * residual + ["KV cache", "total", "of", "share", "KV heads"]
    rows = []
    for rank in report.ranks:
        parts = [rank.weights_bytes, rank.activation_bytes, rank.cuda_graph_bytes, rank.non_torch_bytes]
        parts += [rank.kv_residual_bytes] * residual + [rank.kv_cache_bytes]
        total = sum(parts)
        cells = [tables.gib(part) for part in (*parts, total, report.gpu_memory_bytes)]
        rows.append([rank.rank, *cells, tables.percent(total / report.gpu_memory_bytes), rank.num_kv_heads])
    return f"GiB per GPU, at gpu_memory_utilization {report.gpu_memory_utilization:g}\n{tables.columns(header, rows)}"


def _facts(report: MemoryReport) -> str:
    per_token = f"{tables.kib(report.kv_bytes_per_token)} KiB in all layers"
    if report.tensor_parallel_size > 1:
        per_token += f"; {tables.kib(report.kv_bytes_per_token_per_rank)} KiB on each GPU"
    concurrency = f"{report.max_concurrency:.2f} sequences of {report.max_model_len:,} tokens"
    if report.max_concurrency_decoding > 1.01 * report.max_concurrency:
        concurrency += f"; {report.max_concurrency_decoding:.2f} once they only decode"
    held = f"{tables.count(report.num_kv_blocks, 'block')} of {report.block_size} tokens"
    return tables.pairs(
        [
            ("KV pool", f"{held}, room for {report.kv_cache_tokens:,} tokens"),
            ("KV per token", per_token),
            ("KV per sequence", f"{tables.gib(report.kv_bytes_per_sequence)} GiB for {report.max_model_len:,} tokens"),
            ("max concurrency", concurrency),
            ("longest that fits", f"{report.max_model_len_that_fits:,} tokens × {report.concurrency}"),
        ]
    )


def _remedies(report: MemoryReport) -> str:
    if report.fits:
        return ""
    if not report.remedies:
        return "No single change of utilisation, KV precision or GPUs within a node would help."
    rows = [
        [
            remedy.change,
            "yes" if remedy.fits else "no",
            f"{remedy.max_model_len_that_fits:,}",
            f"{remedy.max_concurrency:.2f}",
        ]
        for remedy in report.remedies
    ]
    return f"What would help\n{tables.columns(['change', 'fits', 'longest, tokens', 'max concurrency'], rows)}"
