"""`python -m planner.bench`: how fast the simulator and the search are, as a committed record.

Every benchmark runs in a process of its own, so that peak memory is its own too; simulations are pinned to one core and
repeated after one run that is not counted. The record holds the command, the commit, the environment, every repetition
and the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.commands.files import ensure_distinct
from planner.errors import UserError

PACKAGES = ("numpy", "scipy", "simpy", "pandas", "pydantic", "joblib")
SYNTHETIC_RATE_PER_S = 10.0


def main() -> None:
    """Run the benchmarks, print a table, write the record."""
    parser = argparse.ArgumentParser(prog="python -m planner.bench", description=__doc__)
    parser.add_argument("--trace", help="Azure conversation trace (CSV); without it only synthetic loads are run")
    parser.add_argument("--prefix-trace", help="Mooncake conversation trace (JSONL), simulated with prefix caching")
    parser.add_argument("--output-file", default="records/planner_speed.json", help="where the record goes")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2, help="cores that the search may use")
    parser.add_argument("--requests", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.repetitions < 1:
            raise UserError(f"--repetitions must be at least 1, not {arguments.repetitions}")
        if arguments.one:
            print(json.dumps(_measure(json.loads(arguments.one))))
            return
        traces = (("--trace", arguments.trace), ("--prefix-trace", arguments.prefix_trace))
        inputs = [(flag, Path(path) if path else None) for flag, path in traces]
        ensure_distinct(inputs, [("--output-file", Path(arguments.output_file))])
        record = _run_all(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    path = Path(arguments.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    _print_table(record)
    print(f"record written to {path}")


def _run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = []
    if arguments.trace:
        trace = arguments.trace
        jobs += [{"kind": "simulate", "trace": trace, "replicas": n} for n in (2, 8)]
        jobs += [{"kind": "plan", "trace": trace, "cores": arguments.cores}]
    if arguments.prefix_trace:
        jobs += [{"kind": "simulate", "trace": arguments.prefix_trace, "replicas": 2, "enable_prefix_caching": True}]
    jobs += [{"kind": "simulate", "requests": n, "replicas": 2} for n in arguments.requests]
    results = []
    for job in jobs:
        runs = _in_own_process({**job, "repetitions": arguments.repetitions})
        wall = statistics.median(run["wall_s"] for run in runs)
        results.append({**_anonymous(job), "median_wall_s": wall, **_derived(runs, wall), "repetitions": runs})
        print(f"  {_name(job)}: {wall:.2f} s", file=sys.stderr)
    shown = ["--trace", Path(arguments.trace).name] if arguments.trace else []
    if arguments.prefix_trace:
        shown += ["--prefix-trace", Path(arguments.prefix_trace).name]
    shown += ["--repetitions", str(arguments.repetitions), "--cores", str(arguments.cores)]
    shown += ["--requests", *map(str, arguments.requests)]
    return {
        "command": " ".join(["python -m planner.bench", *shown]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            **{package: version(package) for package in PACKAGES},
        },
        "system": "llama-3.1-8b on h200_sxm, TP 1 (simulations); llama-3.1-70b on h200_sxm and h100_sxm (plan)",
        "results": results,
    }


def _in_own_process(job: dict[str, Any]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "planner.bench", "--one", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: ") or f"{_name(job)} failed")
    return json.loads(done.stdout)


def _measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    if job["kind"] == "plan":
        return [_measure_plan(job) for _ in range(job["repetitions"])]
    return _measure_simulation(job)


def _measure_simulation(job: dict[str, Any]) -> list[dict[str, Any]]:
    from planner.catalog import load_gpu, load_model
    from planner.deployment import Deployment, length_for
    from planner.simulation import SLO, SimulationOptions, simulate
    from planner.workload import SyntheticSpec, load_workload, parse_length, synthesize

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if "trace" in job:
        workload = load_workload(job["trace"])
    else:
        spec = SyntheticSpec(
            request_rate=SYNTHETIC_RATE_PER_S,
            num_requests=job["requests"],
            input_tokens=parse_length("lognormal:mean=1024,cv=1.0", which="input"),
            output_tokens=parse_length("lognormal:mean=256,cv=0.8", which="output"),
        )
        workload = synthesize(spec, seed=0)
    model = load_model("llama-3.1-8b")
    length = length_for(workload, model)
    deployment = Deployment(
        model,
        load_gpu("h200_sxm"),
        replicas=job["replicas"],
        max_model_len=length,
        enable_prefix_caching=job.get("enable_prefix_caching", False),
    )
    options = SimulationOptions(slo=SLO(ttft_ms=1000, tpot_ms=50))
    system = deployment.system(workload)
    simulate(workload.head(20_000), system, options)  # not counted: imports, caches and the heap's first growth
    # A million requests take a minute; their linearity does not need five of them.
    repetitions = job["repetitions"] if len(workload) < 500_000 else 1
    runs = []
    for _ in range(repetitions):
        started = time.perf_counter()
        result = simulate(workload, system, options)
        wall_s = time.perf_counter() - started
        runs.append(
            {
                "wall_s": wall_s,
                "simulated_s": workload.duration_s,
                "num_requests": len(workload),
                "num_steps": result.num_steps,
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    return runs


def _measure_plan(job: dict[str, Any]) -> dict[str, Any]:
    from planner.catalog import load_gpu, load_model
    from planner.deployment import Deployment, length_for
    from planner.search import Question, plan
    from planner.simulation import SLO
    from planner.workload import load_workload

    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: job["cores"]]))
    started = time.perf_counter()
    workload = load_workload(job["trace"])
    model = load_model("llama-3.1-70b")
    gpus = (load_gpu("h200_sxm"), load_gpu("h100_sxm"))
    engine = Deployment(model, gpus[0], max_model_len=length_for(workload, model))
    slo = SLO(ttft_ms=1000, tpot_ms=50, percentile=99)
    report = plan(Question(engine, workload, slo, gpus, total_gpus=64), n_jobs=job["cores"])
    wall_s = time.perf_counter() - started
    effort = report.effort.model_dump()
    return {"wall_s": wall_s, "simulated_s": workload.duration_s, "num_requests": len(workload), **effort}


def _derived(runs: list[dict[str, Any]], wall_s: float) -> dict[str, Any]:
    first = runs[0]
    derived = {name: value for name, value in first.items() if name.startswith("num_")}
    if "num_simulations" not in first:
        derived["times_real_time"] = first["simulated_s"] / wall_s
        derived["requests_per_s"] = first["num_requests"] / wall_s
        derived["median_peak_memory_mib"] = statistics.median(run["peak_memory_mib"] for run in runs)
    return derived


def _anonymous(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "trace": Path(job["trace"]).name} if "trace" in job else job


def _name(job: dict[str, Any]) -> str:
    load = Path(job["trace"]).name if "trace" in job else f"{job['requests']:,} synthetic requests"
    return f"plan, {load}" if job["kind"] == "plan" else f"simulate, {load}, {job['replicas']} replicas"


def _commit() -> str:
    """The commit that was measured, marked if the tree had changes."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _print_table(record: dict[str, Any]) -> None:
    from planner.commands.tables import columns

    def figure(result: dict[str, Any], name: str) -> str:
        return f"{result[name]:,.0f}" if name in result else "-"

    rows = [
        [
            _name(result),
            f"{result['median_wall_s']:.2f}",
            figure(result, "times_real_time"),
            figure(result, "requests_per_s"),
            figure(result, "median_peak_memory_mib"),
        ]
        for result in record["results"]
    ]
    print(columns(["median of the repetitions", "wall s", "× real time", "requests/s", "peak MiB"], rows))


if __name__ == "__main__":
    main()
