"""`memwall bench`: what the engine does on this device."""

from __future__ import annotations


def bench(arguments: list[str]) -> int:
    """Measure the engine: decode, prefill, offline, serve and kv-cache.

    Every suite runs in this process, prints a table and writes a record with the command, the commit, the environment
    and all repetitions. `make-workload` writes a workload for `serve`.
    """
    from engine.bench.cli import run

    return run(arguments)


bench.takes_arguments = True
