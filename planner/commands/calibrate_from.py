"""`memwall calibrate-from`: calibrate from somebody else's benchmark and log, without touching the engine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands.files import ensure_distinct
from planner.commands import tables
from planner.commands.options import (
    GROUP,
    OutputOptions,
    Quantization,
    checks_file_of,
    flag,
    gpu_from_option,
    model_files,
    profile_files,
    profiles_from_option,
    takes_groups,
)
from planner.errors import UserError

if TYPE_CHECKING:
    from planner.external.calibration import ExternalCalibration, FactorRecord
    from planner.external.errors import RunErrors
    from planner.external.memwall_record import MemwallRecord
    from planner.external.served_run import ServedRun
    from planner.external.server_facts import ServerFacts
    from planner.hardware import GpuSpec

_SEEN = "What was seen"
_SERVER = "The server's settings; default: what its log says, else vLLM's defaults"
# Facts that a reader wants to see again, with the unit that is printed after them.
_SHOWN = {
    "engine": "",
    "version": "",
    "model": "",
    "dtype": "",
    "quantization": "",
    "kv_cache_dtype": "",
    "num_gpu_blocks": " blocks",
    "block_size": " tokens",
    "kv_cache_tokens": " tokens",
    "kv_cache_gib": " GiB",
    "weights_gib": " GiB",
    "graph_gib": " GiB",
    "max_model_len": " tokens",
    "max_concurrency": " sequences",
    "max_num_seqs": "",
    "max_num_batched_tokens": " tokens",
    "tensor_parallel_size": "",
    "pipeline_parallel_size": "",
    "data_parallel_size": "",
    "gpu_memory_utilization": "",
    "enable_prefix_caching": "",
    "enforce_eager": "",
    "async_scheduling": "",
    "num_speculative_tokens": "",
    "num_preemptions": "",
    "prefix_cache_queries": " tokens",
    "prefix_cache_hits": " tokens",
}
_MEANING = {
    "prefill": "× what prompt chunks add to a step",
    "weights": "× a decode step without its cached tokens",
    "kv": "× what each cached token adds",
    "request_s": "more per request of a step",
    "arrival_s": "more before a first token, outside of steps",
}


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of the server that answered; each goes before what its log says."""

    tensor_parallel_size: Annotated[
        int | None, flag("--tensor-parallel-size", "-tp", help="GPUs it ran on.", panel=_SERVER, min=1, metavar="N")
    ] = None
    kv_cache_dtype: Annotated[
        str | None, flag("--kv-cache-dtype", help="Format of its KV cache.", panel=_SERVER, metavar="DTYPE")
    ] = None
    max_model_len: Annotated[
        int | None, flag("--max-model-len", help="Longest sequence.", panel=_SERVER, min=1, metavar="TOKENS")
    ] = None
    max_num_seqs: Annotated[
        int | None, flag("--max-num-seqs", help="Most sequences in one step.", panel=_SERVER, min=1, metavar="N")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        flag("--max-num-batched-tokens", help="Token budget of one step.", panel=_SERVER, min=1, metavar="TOKENS"),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        flag("--gpu-memory-utilization", help="Share of GPU memory it took.", panel=_SERVER, metavar="SHARE"),
    ] = None
    block_size: Annotated[
        int | None, flag("--block-size", help="Tokens per KV block.", panel=_SERVER, min=1, metavar="TOKENS")
    ] = None
    num_gpu_blocks_override: Annotated[
        int | None, flag("--num-gpu-blocks-override", help="KV blocks it had.", panel=_SERVER, min=2, metavar="N")
    ] = None
    async_scheduling: Annotated[
        bool | None,
        flag(
            "--async-scheduling/--no-async-scheduling",
            help="Whether it schedules a step while the one before runs.",
            panel=_SERVER,
            show_default=False,
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """What was set, by the names of ServerFacts."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["num_gpu_blocks"] = values.pop("num_gpu_blocks_override")
        return {name: value for name, value in values.items() if value is not None}


@takes_groups
def calibrate_from(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT…",
            help="What `vllm bench serve --save-detailed` or SGLang's bench_serving wrote (the latter has no start "
            "times: --request-rate inf without --max-concurrency), or a table of requests, with columns in seconds "
            "unless their names end in _ms, _us or _ns; or records of `memwall bench serve`.",
        ),
    ],
    model: Annotated[
        str | None,
        flag("--model", help="Model it served; default: what log or result says.", panel=_SEEN, metavar="NAME|PATH"),
    ] = None,
    system: Annotated[
        str | None,
        flag(
            "--system",
            help="GPU it ran on; needed, unless a record says. `memwall catalog gpus` lists them.",
            panel=_SEEN,
            metavar="GPU",
        ),
    ] = None,
    quantization: Quantization = None,
    server_log: Annotated[
        Path | None,
        flag("--server-log", help="Its output: start-up and statistics lines.", panel=_SEEN, metavar="LOG"),
    ] = None,
    metrics: Annotated[
        Path | None, flag("--metrics", help="The text of its /metrics.", panel=_SEEN, metavar="FILE")
    ] = None,
    profile: Annotated[
        list[str] | None,
        flag(
            "--profile",
            help="Profiles of `memwall calibrate`, whose step times are scaled; repeatable. Default: shipped; none: "
            "data sheets.",
            panel=_SEEN,
            metavar="PATH|none",
        ),
    ] = None,
    server: ServerOptions = GROUP,
    held_out: Annotated[
        float,
        flag("--held-out", help="Share of requests, the last ones, to test on.", panel=_SEEN, metavar="SHARE"),
    ] = 0.5,
    save: Annotated[
        Path | None,
        flag(
            "--save",
            help="Write the calibration, for `--profile`.",
            panel=_SEEN,
            metavar="FILE",
            callback=checks_file_of("--save"),
        ),
    ] = None,
    output: OutputOptions = GROUP,
) -> None:
    """Fit a step-time model to an engine seen from outside: its benchmark's timestamps, and its log.

    The factors are fitted on the first half of the requests and tested on the rest.
    """
    from planner.catalog import load_model
    from planner.external.calibration import calibrate_external
    from planner.external.contradictions import served_quantization
    from planner.external.readers import read_own_records, read_served_runs, read_server_facts, refuse_twice
    from planner.external.settings import external_system

    inputs = [*(("the benchmark", path) for path in results), ("--server-log", server_log), ("--metrics", metrics)]
    ensure_distinct([*inputs, *model_files(model), *profile_files(profile)], [("--save", save), *output.files()])
    refuse_twice(results)
    facts, flags, said_by = read_server_facts(server_log, metrics), server.given(), "flag"
    own = read_own_records(results)
    if own is None:
        runs = [run for path in results for run in read_served_runs(path)]
        name, gpu = _named(runs, model, facts), _gpu(results[0].name, system)
        flags |= {} if quantization is None else {"quantization": quantization}
        quantization = served_quantization(quantization, facts)
    else:
        _refuse_about_own(results[0].name, own, flags, model, system, quantization, server_log or metrics)
        runs, name, gpu, quantization = list(own.runs), model or own.model, own.gpu(), own.quantization
        flags, said_by = dict(own.flags), "record"
    spec = load_model(name, quantization)
    external = external_system(spec, gpu, facts, runs, flags, said_by=said_by, profiles=_profiles(profile))
    with _Progress() as progress:
        calibration = calibrate_external(
            runs,
            external,
            facts,
            held_out=held_out,
            quantization=quantization,
            command=shlex.join(["memwall", *(Path(part).name if "/" in part else part for part in sys.argv[1:])]),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            progress=progress,
        )
    document = calibration.model_dump_json(indent=1) + "\n"
    if save is not None:
        tables.write_whole(save, document)
    tables.deliver(calibration, calibration_table(calibration, facts), output)


def _profiles(paths: list[str] | None) -> tuple[str, ...] | None:
    """
    Raises:
        UserError: one of them cannot be used, or is what such a command has saved.
    """
    from planner.profile.library import load_calibrations

    if calibrations := load_calibrations(paths):
        raise UserError(
            f"{calibrations[0][0]} is a calibration of `memwall calibrate-from`; factors are fitted on profiles of "
            "`memwall calibrate`, anew each time"
        )
    return profiles_from_option(paths, None)


def _named(runs: Sequence[ServedRun], model: str | None, facts: ServerFacts) -> str:
    """
    Raises:
        UserError: nothing says which model was served.
    """
    from planner.external.contradictions import served_model

    name = served_model(model, facts, runs)
    if name is None:
        unknown = next((f"; {run.name} calls it {run.model!r}" for run in runs if run.model is not None), "")
        unknown = unknown and f"{unknown}, which the catalog does not know"
        raise UserError(f"neither --model nor a server log says which model was served{unknown}")
    return name


def _gpu(file: str, system: str | None) -> GpuSpec:
    """
    Raises:
        UserError: nobody says which it was, or the catalog does not know it.
    """
    if system is None:
        raise UserError(f"{file} does not say which GPU served it; pass --system, e.g. h200_sxm")
    return gpu_from_option(system)


def _refuse_about_own(
    file: str,
    own: MemwallRecord,
    flags: dict[str, Any],
    model: str | None,
    system: str | None,
    quantization: str | None,
    log: Path | None,
) -> None:
    """
    Raises:
        UserError: something is said of our own engine that its record says itself.
    """
    said = [f"--{name.replace('_', '-')}" for name in flags]
    said += ["--model"] * _is_another_model(model, own)
    said += ["--quantization"] * (quantization not in (None, own.quantization))
    said += ["--system"] * (system is not None and gpu_from_option(system) != own.gpu())
    said += ["--server-log or --metrics"] * (log is not None)
    if said:
        raise UserError(f"{said[0]} is of servers that are not ours; {file} says itself what served it")


def _is_another_model(model: str | None, own: MemwallRecord) -> bool:
    """Whether this is another model than a record's; where that one's name is a path elsewhere, nobody can tell."""
    from planner.catalog import catalog_id, load_model

    known = catalog_id(own.model)
    if model is None or known is None:
        return False
    if catalog_id(model) is not None:
        return catalog_id(model) != known
    return load_model(model).num_parameters != load_model(known).num_parameters


class _Progress:
    """Counts simulations on stderr where that is a terminal."""

    def __enter__(self) -> Callable[[int], None] | None:
        self._shown = sys.stderr.isatty()
        return self._show if self._shown else None

    def _show(self, simulations: int) -> None:
        print(f"\rfitting: {simulations} simulations", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ---- what is printed -----------------------------------------------------------------------------------------------


def calibration_table(calibration: ExternalCalibration, facts: ServerFacts) -> str:
    """The calibration for people."""
    served = f"{calibration.model} on {calibration.tensor_parallel_size} × {calibration.gpu}"
    return tables.page(
        f"{served}, {calibration.kv_cache_dtype} KV cache, seen from outside",
        _runs(calibration),
        _found(facts),
        _settings(calibration),
        _factors(calibration),
        _errors(calibration),
        tables.warnings(calibration.warnings),
    )


def _runs(calibration: ExternalCalibration) -> str:
    rows = []
    for run in calibration.runs:
        failed = f", {run.num_failed:,} failed ones left out" if run.num_failed else ""
        held_out = f"{run.num_fitted:,} fitted, {run.num_held_out:,} held out"
        rows.append((run.name, f"{run.num_requests:,} requests ({held_out}){failed}"))
        rows += [("", note) for note in run.notes]
    return "\n".join(["runs", tables.pairs(rows)])


def _found(facts: ServerFacts) -> str:
    rows = []
    for name, unit in _SHOWN.items():
        found = getattr(facts, name)
        if found is not None:
            value = f"{found.value:,}" if type(found.value) is int else str(found.value)
            rows.append([name, f"{value}{unit}", f"line {found.line}"])
    if facts.acceptance is not None:
        acceptance = facts.acceptance
        rates = ", ".join(f"{rate:.3f}" for rate in acceptance.conditional_rates)
        length = acceptance.mean_acceptance_length
        text = f"{length:.2f} tokens per round" if length else ""
        rows.append(["acceptance", f"{text}; conditional {rates}" if rates else text, f"line {acceptance.line}"])
    if facts.stats:
        busiest = max(facts.stats, key=lambda line: line.running)
        usage = f", KV {busiest.kv_usage:.0%} full" if busiest.kv_usage is not None else ""
        waiting = f", {busiest.waiting} waiting" if busiest.waiting is not None else ""
        rows.append(["busiest", f"{busiest.running} running{waiting}{usage}", f"line {busiest.line}"])
    if not rows:
        return ""
    return "\n".join(["found in the log", tables.columns(["", "", ""], rows, left=3)])


def _settings(calibration: ExternalCalibration) -> str:
    rows = [
        [name, f"{value:,}" if type(value) is int else str(value), calibration.origin.get(name, "")]
        for name, value in calibration.settings.items()
        if value is not None
    ]
    return "\n".join(["simulated with", tables.columns(["", "", ""], rows, left=3)])


def _factors(calibration: ExternalCalibration) -> str:
    rows = []
    for name, record in calibration.factors.items():
        value, interval = _shown(name, record)
        state = "" if record.identified else "not shown by the runs"
        if record.alike:
            state += f", looks like {record.alike}"
        rows.append([name, value, interval, _MEANING[name], state])
    title = f"factors on the {calibration.base.removeprefix('from the ')}"  # of a transfer it begins so
    return f"{title}\n{tables.columns(['', 'value', '90 % interval', 'meaning', ''], rows, left=5)}"


def _shown(name: str, record: FactorRecord) -> tuple[str, str]:
    scale, digits = {"request_s": (1e6, 2), "arrival_s": (1e3, 2)}.get(name, (1.0, 3))
    unit = {"request_s": " us", "arrival_s": " ms"}.get(name, "")
    value, low, high = (f"{number * scale:.{digits}f}" for number in (record.value, record.low, record.high))
    return f"{value}{unit}", f"{low} to {high}"


def _errors(calibration: ExternalCalibration) -> str:
    rows = []
    tested = calibration.after is not None
    parts: list[tuple[str, RunErrors | None]] = [("fitted requests", calibration.fitted)]
    if tested:
        parts = [("held out, base", calibration.before), ("held out, scaled", calibration.after), *parts]
    for label, errors in parts:
        for name in ("ttft", "tpot", "e2el"):
            error = getattr(errors, name)
            if error is not None:
                signed = [f"{100 * getattr(error, key):+.1f} %" for key in ("mean", "p50", "p90", "p99")]
                served = tables.milliseconds(error.served_mean_ms)
                rows.append([label, name.upper(), served, *signed, tables.percent(error.median_request)])
                label = ""
    header = ["simulated against served", "", "served mean ms", "mean", "p50", "p90", "p99", "|request| p50"]
    return tables.columns(header, rows, left=2)
