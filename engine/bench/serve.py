"""`memwall bench serve`: a workload replayed on the engine by the clock, with forced output lengths (open loop).

With --base-url it is a server that it is replayed on: `engine.bench.http_serve`.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench import tables
from engine.bench.metrics import latencies
from engine.bench.options import at_least, base_url, factor
from engine.bench.record import MAX_BYTES, ensure_writable, rounded, write_text
from engine.bench.replay import Interrupted, Replay, replay, sequences_of, why_not
from engine.bench.step_log import encode
from engine.bench.workload import Entry, Prompts, Workload, ensure_replayable, read_workload, split
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.bench.session import Session
    from engine.config import EngineConfig
    from engine.core import EngineCore

HELP = "replay a workload in real time: requests arrive whatever the engine does"
MAX_REPEAT = 1000
# Of a server that does not tell. All but the smallest models have as many tokens.
DEFAULT_VOCAB_SIZE = 32_000
# The warm-up's requests end early: it is there to compile kernels, not to be measured.
_WARMUP_OUTPUT_TOKENS = 16
_LATENCIES = (("TTFT", "ttft_ms"), ("  queue", "queue_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2EL", "e2el_ms"))
_MEDIANS = (
    "duration_s",
    "request_throughput_per_s",
    "output_throughput_tokens_per_s",
    "total_throughput_tokens_per_s",
    "peak_running",
    "num_preemptions",
)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The suite's own options."""
    parser.add_argument("--workload", type=Path, required=True, metavar="PATH", help="JSONL; see `make-workload`")
    parser.add_argument(
        "--request-rate-scale", type=factor, default=1.0, metavar="X", help="requests arrive X times as fast [1]"
    )
    parser.add_argument("--num-prompts", type=at_least(1), metavar="N", help="only the first N requests")
    parser.add_argument(
        "--repeat", type=at_least(1, MAX_REPEAT), default=1, metavar="N", help="runs on the same engine [1]"
    )
    parser.add_argument("--strict", action="store_true", help="refuse a workload with requests that are too long")
    parser.add_argument("--num-warmups", type=at_least(0), default=16, metavar="N", help="requests before it [16]")
    parser.add_argument(
        "--step-log",
        type=Path,
        metavar="PATH",
        help="shape and times of every step, JSON lines (.gz: compressed); with --repeat NAME.1.…, NAME.2.… and so on",
    )
    parser.add_argument(
        "--base-url",
        type=base_url,
        metavar="URL",
        help="measure the OpenAI-compatible server at http://HOST:PORT/v1 instead of an engine in this process; then "
        "there is no MODEL, of the engine's options there is only --seed, and the exit code is 1 if requests failed",
    )
    parser.add_argument("--model", dest="served_model", metavar="NAME", help="the server's model, if it has several")
    parser.add_argument("--api-key", metavar="KEY", help="for that server [the environment's OPENAI_API_KEY, if any]")
    parser.add_argument(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help=f"prompts for that server have token ids below N [what GET /v1/models says, or {DEFAULT_VOCAB_SIZE}]",
    )


def run(session: Session, options: argparse.Namespace, config: EngineConfig) -> None:
    """Replay the workload `--repeat` times. After Ctrl-C what the finished runs gave is kept.

    Raises:
        UserError: the workload cannot be read or replayed, or a file cannot be written.
    """
    workload = workload_of(options)
    logs = step_log_paths(options.step_log, options.repeat)
    for path in logs:
        ensure_writable(path)
    runs: list[dict[str, Any]] = []

    def measure_all(core: EngineCore) -> None:
        fitting, reasons = fit(core, workload, options.strict)
        for line in reasons[:1]:
            session.say(f"  {len(reasons)} of {len(workload)} requests are left out: {line}")
        about = describe(fitting, len(reasons), options.request_rate_scale)

        def keep(run: dict[str, Any] | None, found: Replay) -> None:
            if logs and len(found.log):
                _write_step_log(session, logs[len(runs)], found)
            if run is not None:
                runs.append(run)
                session.keep([about | {"median": medians(runs), "runs": runs}])

        replay_runs(session, core, fitting, options, keep)

    session.say(f"serve, {len(workload)} requests over {workload.entries[-1].arrival_s:,.1f} s")
    session.limits(config)
    session.on_engine(config, measure_all)


def workload_of(options: argparse.Namespace) -> Workload:
    """The requests of the options, as they arrive.

    Raises:
        UserError: the file cannot be read, or nobody would wait for its end.
    """
    workload = read_workload(options.workload)
    if options.num_prompts:
        workload = workload.head(options.num_prompts)
    workload = workload.scaled(options.request_rate_scale)
    ensure_replayable(workload, "take fewer with --num-prompts, or have them arrive faster with --request-rate-scale")
    return workload


def warm_up_of(workload: Workload, options: argparse.Namespace) -> Workload:
    """The requests that are sent twice before anything is measured; perhaps none."""
    return workload.head(options.num_warmups).at_once().capped(_WARMUP_OUTPUT_TOKENS)


def fit(core: EngineCore, workload: Workload, strict: bool) -> tuple[Workload, list[str]]:
    """The requests that this engine can run, and why it cannot run the others; raises as `fit_by`."""
    return fit_by(lambda entry: why_not(core, entry), workload, strict)


def fit_by(why_not: Callable[[Entry], str], workload: Workload, strict: bool) -> tuple[Workload, list[str]]:
    """The requests that can run, and for each of the others the reason that `why_not` gives.

    Raises:
        UserError: there are such, and strict is set; or there are no others.
    """
    fitting, reasons = split(workload, why_not)
    if reasons and (strict or not len(fitting)):
        raise UserError(
            f"{workload.name} has {len(reasons)} requests of {len(workload)} that cannot run: {reasons[0]}"
            f"{'; without --strict they are left out' if strict and len(fitting) else ''}"
        )
    return fitting, reasons


def describe(workload: Workload, num_skipped: int, rate_scale: float) -> dict[str, Any]:
    """What was replayed."""
    entries = workload.entries
    return {
        "workload": workload.name,
        "request_rate_scale": rate_scale,
        "request_rate_per_s": workload.request_rate and rounded(workload.request_rate),
        "num_requests": len(workload),
        "num_skipped": num_skipped,
        "mean_input_tokens": rounded(statistics.fmean(entry.input_tokens for entry in entries)),
        "mean_output_tokens": rounded(statistics.fmean(entry.output_tokens for entry in entries)),
        "prefix_block_tokens": workload.prefix_block_tokens,
    }


def replay_runs(
    session: Session,
    core: EngineCore,
    workload: Workload,
    options: argparse.Namespace,
    keep: Callable[[dict[str, Any] | None, Replay], None],
) -> None:
    """Warm up, then replay `options.repeat` times, with new prompts each time, so that the cache has none of them.

    Args:
        keep: takes the figures of each run, None for one that Ctrl-C ended, and what it left behind.
    """
    warmup = warm_up_of(workload, options)
    for _ in range(2 if len(warmup) else 0):  # the second finds the first's prompts in the cache, if there is one
        _replayed(session, core, warmup, options, run=0)
    for run in range(1, options.repeat + 1):
        try:
            found = _replayed(session, core, workload, options, run)
        except Interrupted as stopped:
            keep(None, stopped.found)
            raise
        columns = found.columns()
        result = latencies(columns, found.gaps_s) | {
            "peak_running": found.log.peak_running,
            "num_preemptions": sum(columns["preemptions"]),
            "cached_tokens": sum(columns["cached_tokens"]),
            "num_steps": len(found.log),
            "mean_step_tokens": rounded(found.log.num_tokens / len(found.log)),
            "requests": columns,
        }
        session.say(f"  run {run}: {tables.number(result['output_throughput_tokens_per_s'], 0)} output tokens/s")
        keep(result, found)


def _replayed(session: Session, core: EngineCore, workload: Workload, options: argparse.Namespace, run: int) -> Replay:
    prompts = Prompts(core.model_config.vocab_size, core.config.seed, run)
    sequences = sequences_of(core, workload, prompts, options.temperature, run)
    return replay(core, sequences, [entry.arrival_s for entry in workload.entries], session.clock)


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over runs of every figure; None of one that is unknown."""
    found: dict[str, Any] = {
        name: None if runs[0][name] is None else statistics.median(run[name] for run in runs) for name in _MEDIANS
    }
    for _, name in _LATENCIES:
        of_runs = [run[name] for run in runs if run[name] is not None]
        found[name] = {key: statistics.median(one[key] for one in of_runs) for key in of_runs[0]} if of_runs else None
    return found


# ---- the step log ----------------------------------------------------------------------------------------------------


def step_log_paths(path: Path | None, repeat: int) -> list[Path]:
    """log.jsonl.gz for one run; log.1.jsonl.gz, log.2.jsonl.gz for several; none if none is asked for."""
    if path is None or repeat == 1:
        return [] if path is None else [path]
    name, endings = re.fullmatch(r"(.+?)((?:\.[A-Za-z]+)?(?:\.gz)?)", path.name).groups()  # w8.5.gz is w8.5 and .gz
    return [path.with_name(f"{name}.{run}{endings}") for run in range(1, repeat + 1)]


def _write_step_log(session: Session, path: Path, found: Replay) -> None:
    size = write_text(path, encode(found.log.steps(found.start_s)))
    session.say(f"  {len(found.log)} steps written to {path}")
    if size > MAX_BYTES:
        session.say(f"  {path.name} has {size:,} bytes, more than the {MAX_BYTES:,} that are committed as one file")


# ---- the table -------------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    """Latencies and throughput, the median over the runs and each of them."""
    result = results[0]
    runs, median = result["runs"], result["median"]
    rows = [
        [label, *(tables.number(median[name][key], 1) for key in ("mean", "p50", "p90", "p99"))]
        for label, name in _LATENCIES
        if median[name] is not None
    ]
    rate = result["request_rate_per_s"]
    arriving = f"{rate:g} requests/s realised" if rate else "all at once"
    lines = [
        f"{result['workload']}: {result['num_requests']} requests, {arriving}, {result['num_skipped']} left out",
        tables.columns(["ms, median of runs" if len(runs) > 1 else "ms", "mean", "p50", "p90", "p99"], rows),
        f"{tables.number(median['output_throughput_tokens_per_s'], 0)} output tokens/s, "
        f"{tables.number(median['request_throughput_per_s'])} requests/s, "
        f"at most {_count(median['peak_running'])} running, {_count(median['num_preemptions'])} preemptions",
    ]
    if len(runs) > 1:
        each = ", ".join(tables.number(run["output_throughput_tokens_per_s"], 0) for run in runs)
        lines.append(f"output tokens/s of each run: {each}")
    return "\n".join(lines)


def _count(value: float | None) -> str:
    return tables.MISSING if value is None else f"{value:,.0f}"
