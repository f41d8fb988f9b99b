"""`memwall simulate`: one deployment under one workload."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands.files import ensure_distinct
from planner.commands import tables
from planner.commands.options import (
    DEFAULT_MODEL,
    DEFAULT_SYSTEM,
    GROUP,
    EnableChunkedPrefill,
    EnablePrefixCaching,
    EngineOptions,
    Model,
    OutputOptions,
    Profiles,
    Quantization,
    Replicas,
    Router,
    RunOptions,
    SLOOptions,
    SpeculationOptions,
    System,
    TensorParallelSize,
    WorkloadOptions,
    flag,
    gpu_from_option,
    model_files,
    profile_files,
    profiles_from_option,
    simulation_from_options,
    speculation_from_options,
    takes_groups,
    workload_from_options,
)
from planner.errors import UserError

if TYPE_CHECKING:
    from planner.records import DeploymentRecord, SLORecord
    from planner.simulate_report import SimulateReport
    from planner.simulation import Distribution, SimulationResult
    from planner.workload import Workload, WorkloadSummary

_METRICS = (
    ("TTFT", "ttft_ms"),
    ("  queue", "queue_ms"),
    ("  prefill", "prefill_ms"),
    ("TPOT", "tpot_ms"),
    ("ITL", "itl_ms"),
    ("E2EL", "e2el_ms"),
)


def _check_workload_file(path: Path | None) -> Path | None:
    if path is not None and path.suffix != ".jsonl":
        raise UserError(
            f"--save-workload {path}: the name must end in .jsonl, the format that memwall bench serve reads"
        )
    return path


SaveWorkload = Annotated[
    Path | None,
    flag(
        "--save-workload",
        help="Also write the requests here, as JSONL that `memwall bench serve --workload` replays on the engine.",
        panel="Any workload",
        metavar="PATH",
        callback=_check_workload_file,
    ),
]


@takes_groups
def simulate(
    model: Model = DEFAULT_MODEL,
    system: System = DEFAULT_SYSTEM,
    tensor_parallel_size: TensorParallelSize = 1,
    replicas: Replicas = 1,
    quantization: Quantization = None,
    profile: Profiles = None,
    slo: SLOOptions = GROUP,
    workload: WorkloadOptions = GROUP,
    save_workload: SaveWorkload = None,
    engine: EngineOptions = GROUP,
    enable_prefix_caching: EnablePrefixCaching = None,
    enable_chunked_prefill: EnableChunkedPrefill = True,
    router: Router = "auto",
    speculation: SpeculationOptions = GROUP,
    run: RunOptions = GROUP,
    output: OutputOptions = GROUP,
) -> int:
    """Simulate one deployment under a trace or a synthetic load: latencies, throughput, KV cache, saturation."""
    from planner.catalog import load_model
    from planner.deployment import Deployment, length_for
    from planner.simulate_report import simulate_report

    inputs = [*model_files(model), *profile_files(profile), *workload.files(), *speculation.files()]
    ensure_distinct(inputs, [("--save-workload", save_workload), *output.files()])
    gpu, spec = gpu_from_option(system), load_model(model, quantization)
    options = simulation_from_options(run, slo, workload.seed)
    load = workload_from_options(workload)
    if save_workload is not None:
        _save(load, save_workload)
    settings = engine.settings()
    if settings["max_model_len"] is None:
        settings["max_model_len"] = length_for(load, spec)
    if enable_prefix_caching is None:
        enable_prefix_caching = load.prefix_block_hashes is not None
    deployment = Deployment(
        model=spec,
        gpu=gpu,
        tensor_parallel_size=tensor_parallel_size,
        replicas=replicas,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        router=router,
        speculation=speculation_from_options(speculation),
        profiles=profiles_from_option(profile, quantization),
        **settings,
    )
    report = simulate_report(load, deployment, options, quantization, run.intervals, run.jobs)
    tables.deliver(report, simulate_table(report), output)
    if report.result is None:
        typer.echo(f"does not fit: {report.memory.reason}", err=True)
    return 0 if report.is_yes else 1


def _save(load: Workload, path: Path) -> None:
    from planner.workload import save_workload

    save_workload(load, path)


def simulate_table(report: SimulateReport) -> str:
    """The report for people."""
    result = report.result
    if result is None:
        from planner.commands.memory import memory_table

        return memory_table(report.memory)
    return tables.page(
        _step_times(report),
        _question(report.deployment, report.workload),
        _latencies(result),
        _intervals(report),
        _slo(report.slo, result),
        _facts(report, result),
        _timeline(result),
        tables.warnings(result.warnings),
    )


def _step_times(report: SimulateReport) -> str:
    found = report.step_times
    assert found is not None, "a report with a result has them"
    text = tables.paragraph(tables.step_times(found), "step times: ")
    return text.replace(found.basis, tables.verdict(found.basis in ("measured", "interpolated"), found.basis), 1)


def _question(deployment: DeploymentRecord, workload: WorkloadSummary) -> str:
    gpus = f"{tables.count(deployment.replicas, 'replica')} × {deployment.tensor_parallel_size} × {deployment.system}"
    rate = f" at {workload.request_rate_per_s:.3g}/s" if workload.request_rate_per_s else " all at once"
    lengths = f"{workload.input_tokens.mean:,.0f} tokens in, {workload.output_tokens.mean:,.0f} out on average"
    rows = [
        ("deployment", f"{deployment.model} on {gpus}, {deployment.kv_cache_dtype} KV, {_limits(deployment)}"),
        ("workload", f"{workload.name}: {workload.num_requests:,} requests{rate}, {lengths}"),
    ]
    return tables.pairs(rows, indent=0)


def _limits(deployment: DeploymentRecord) -> str:
    parts = [
        f"max_model_len {deployment.max_model_len:,}",
        f"prefix caching {'on' if deployment.enable_prefix_caching else 'off'}",
    ]
    if deployment.num_speculative_tokens:
        parts.append(f"{deployment.speculative_method} speculation with k = {deployment.num_speculative_tokens}")
    return ", ".join(parts)


def _latencies(result: SimulationResult) -> str:
    def cells(distribution: Distribution | None) -> list[str]:
        if distribution is None:
            return ["-"] * 6
        d = distribution
        return [tables.milliseconds(value) for value in (d.mean, d.p50, d.p90, d.p95, d.p99, d.max)]

    rows = [[name, *cells(getattr(result, field))] for name, field in _METRICS]
    warmup = f" after {result.warmup_s:.3g} s of warm-up" if result.warmup_s else ""
    title = f"milliseconds, {result.num_measured:,} requests{warmup}"
    return f"{title}\n{tables.columns(['', 'mean', 'p50', 'p90', 'p95', 'p99', 'max'], rows)}"


def _intervals(report: SimulateReport) -> str:
    sure = report.confidence
    if sure is None:
        return tables.paragraph(f"no interval: {report.no_interval}")
    rows = []
    for name in ("ttft", "tpot", "e2el"):
        found = sure.metric_ms(name)
        if found is not None:
            cells = [getattr(found, statistic) for statistic in ("mean", "p50", "p90", "p95", "p99")]
            rows.append([name.upper(), *(tables.between(cell, tables.milliseconds) for cell in cells)])
    title = tables.paragraph(
        f"90 % intervals, milliseconds, of {sure.num_draws} draws of the load and of the step times"
    )
    rates = [("tokens", f"{tables.between(sure.output_throughput_tokens_per_s, _whole)} output tokens/s")]
    if sure.slo_probability is not None:
        rates.append(("meets the SLO", f"with probability {tables.chance(sure.slo_probability)}"))
    table = tables.columns(["", "mean", "p50", "p90", "p95", "p99"], rows)
    return "\n".join([title, table, tables.pairs(rates), *tables.unknown(sure)])


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _slo(slo: SLORecord, result: SimulationResult) -> str:
    rows = []
    for name, limit in (("ttft", slo.ttft_ms), ("tpot", slo.tpot_ms), ("e2el", slo.e2el_ms)):
        found = result.metric_ms(name)
        if limit is None:
            continue
        if found is None:
            rows.append([name.upper(), f"{limit:,g}", "-", "not measured"])
            continue
        good = found.at_slo_percentile <= limit
        at = tables.milliseconds(found.at_slo_percentile)
        rows.append([name.upper(), f"{limit:,g}", at, tables.verdict(good, "met" if good else "MISSED")])
    if not rows:
        return ""
    kept_up = "" if result.verdict == "stable" or result.slo_met else ", as the system is saturated"
    answer = tables.verdict(bool(result.slo_met), "met" if result.slo_met else f"MISSED{kept_up}")
    header = ["", "limit ms", f"p{slo.percentile:g} ms", ""]
    return f"SLO {answer}\n{tables.columns(header, rows)}"


def _facts(report: SimulateReport, result: SimulationResult) -> str:
    gpus = report.deployment.num_gpus
    stable = result.verdict == "stable"
    rows = [
        ("verdict", tables.verdict(stable, str(result.verdict)) + ("" if stable else ": it does not keep up")),
        ("requests", _requests(result)),
        (
            "tokens",
            f"{result.output_throughput_tokens_per_s:,.0f} output tokens/s "
            f"({result.output_throughput_tokens_per_s / gpus:,.0f} per GPU), "
            f"{result.total_throughput_tokens_per_s:,.0f} with input",
        ),
        (
            "KV cache",
            f"{tables.percent(result.kv_usage_peak)} full at the peak, {tables.percent(result.kv_usage_mean)} "
            f"on average, of {result.num_kv_blocks:,} blocks per replica",
        ),
        (
            "batch",
            f"{result.mean_running:.1f} running and {result.mean_waiting:.1f} waiting on average over all replicas; "
            f"at most {result.max_running:,} running on one",
        ),
        ("preemptions", f"{result.num_preemptions:,}, of {tables.percent(result.preempted_share)} of requests"),
        ("prefix cache", _prefix_cache(report, result)),
    ]
    if result.mean_acceptance_length is not None:
        accepted = tables.percent(result.draft_acceptance_rate or 0.0)
        rows.append(
            ("speculation", f"{result.mean_acceptance_length:.2f} tokens per round, {accepted} of drafts accepted")
        )
    return tables.pairs(rows)


def _requests(result: SimulationResult) -> str:
    text = f"{result.request_throughput_per_s:.3g}/s finished"
    if result.goodput_per_s is not None:
        text += f"; goodput {result.goodput_per_s:.3g}/s"
    if result.slo_attainment is not None:
        text += f", {tables.percent(result.slo_attainment)} of requests within every limit"
    lost = [(result.num_rejected, "rejected"), (result.num_aborted, "aborted")]
    return text + "".join(f"; {number:,} {what}" for number, what in lost if number)


def _prefix_cache(report: SimulateReport, result: SimulationResult) -> str:
    infinite = report.workload.infinite_cache_hit_rate
    if infinite is None:
        return "the workload tells of no shared prompts"
    own = f"an infinite cache would find {tables.percent(infinite)}"
    if not report.deployment.enable_prefix_caching:
        return f"off; {own}"
    return f"{tables.percent(result.prefix_cache_hit_rate)} of prompt tokens found; {own}"


def _timeline(result: SimulationResult) -> str:
    points = result.timeline
    running, waiting = [p.running for p in points], [p.waiting for p in points]
    usage = [p.kv_usage for p in points]
    rows = [
        ("running", f"{tables.sparkline(running, max(running))}  up to {max(running):,}"),
        ("waiting", f"{tables.sparkline(waiting, max(waiting))}  up to {max(waiting):,}"),
        ("KV usage", f"{tables.sparkline(usage, 1.0)}  up to {tables.percent(max(usage))}"),
    ]
    return f"all replicas over {result.duration_s:,.0f} s\n{tables.pairs(rows)}"
