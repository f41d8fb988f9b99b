"""Runs the suites on the GPU and collects their rows in a record."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
import triton

from kernels.bench import tables
from kernels.bench.cases import Case, cases, trends
from kernels.bench.results import OURS, Record, Row
from kernels.bench.timing import Stopwatch, reason
from kernels.bench.works import Bench, Work

ROUNDS, REPLAYS = 5, 3
QUICK_ROUNDS, QUICK_REPLAYS = 2, 2
# Relative difference (Frobenius) from a peer that does the same math in 16 bits, beyond which a result is wrong.
LARGEST_DIFFERENCE = 0.02


def run(
    suites: Sequence[str], *, quick: bool, command: str, commit: str | None, keep: Callable[[Record], None]
) -> Record:
    """Measure the suites; the limits always, since every share needs them. `keep` is called after each suite."""
    bench = Bench(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    stopwatch = Stopwatch(QUICK_ROUNDS, QUICK_REPLAYS) if quick else Stopwatch(ROUNDS, REPLAYS)
    record = Record(
        command=command,
        commit=commit or _commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        environment=environment(),
    )
    order = list(dict.fromkeys(("limits", *suites)))
    # Again when the GPU is warm: a share is of the best that was seen.
    for suite in order if quick or len(order) == 1 else [*order, "limits"]:
        print(suite, file=sys.stderr)
        stopwatch.clocks = {}
        for case in cases(suite, quick):
            row = measure(case, bench, stopwatch)
            record.rows.append(row)
            print(f"  {tables.progress(row, record.limits)}", file=sys.stderr, flush=True)
            if fault := _fault():
                record.stopped = f"{case.name} broke the CUDA context ({fault})"
                break
        record.rows += trends(suite, record.rows)
        if stopwatch.clocks:
            record.clocks[suite] = stopwatch.clocks
        keep(record)
        if record.stopped:
            break
    return record


def measure(case: Case, bench: Bench, stopwatch: Stopwatch) -> Row:
    """One row. Whatever fails in it is its `absent`."""
    row = Row(case.suite, case.name, case.shape, targets=case.targets, note=case.note)
    try:
        torch.manual_seed(0)
        work = case.build(bench)
        row.flops, row.bytes, row.values, row.floor = work.flops, work.bytes, work.values, work.floor
        if work.implementations:
            wrong = differences(work)
            able = {name: call for name, call in work.implementations.items() if name not in wrong}
            calls = {name: [partial(call, one) for one in work.sets] for name, call in able.items()}
            row.timings, row.absent = stopwatch.compare(calls)
            row.absent |= wrong
    except Exception as error:
        row.absent[OURS] = reason(error)
    return row


def _fault() -> str:
    """Why nothing more can be measured in this process; empty if all is well."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return reason(error)
    return ""


def differences(work: Work) -> dict[str, str]:
    """Why our kernel must not be timed: its result on the first set is not that of a peer with the same math."""
    if not work.same:
        return {}
    ours = work.compared(work.implementations[OURS](work.sets[0])).double().flatten()
    for name in work.same:
        try:
            peer = work.compared(work.implementations[name](work.sets[0])).double().flatten()
        except Exception:
            continue  # the stopwatch will find out why
        difference = float((ours - peer).norm() / peer.norm())
        if not difference <= LARGEST_DIFFERENCE:  # so that NaN is wrong
            return {OURS: f"wrong: its result differs from that of {name} by {difference:.3g}"}
    return {}


def environment() -> dict[str, Any]:
    """What the numbers depend on, besides the commit."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "gpu": properties.name,
        "device_id": device_id(properties),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }


def device_id(properties: Any) -> str | None:
    """What tells a GPU from others of its type, without saying which it is: 8 digits of a hash of its UUID.

    None where the driver gives none.
    """
    uuid = getattr(properties, "uuid", None)
    return None if uuid is None else hashlib.blake2b(str(uuid).encode(), digest_size=4).hexdigest()


def _commit() -> str:
    return _answer("git", "describe", "--always", "--dirty") or "unknown"


def _answer(*command: str) -> str:
    """What a command prints; nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
