"""`memwall bench offline`: all requests at once, as fast as they go."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench import serve
from engine.bench.options import at_least
from engine.bench.options import lengths as lengths_option
from engine.bench.workload import Lengths, Workload, read_workload, synthesise
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.bench.replay import Replay
    from engine.bench.session import Session
    from engine.config import EngineConfig
    from engine.core import EngineCore

HELP = "throughput with all requests present from the start"
table = serve.table


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The suite's own options."""
    parser.add_argument("--num-prompts", type=at_least(1), metavar="N", help="requests [256, or those of --dataset]")
    for name in ("--input-len", "--output-len"):
        parser.add_argument(name, type=lengths_option, metavar="LOW:HIGH", help="uniform [100:1024]")
    parser.add_argument("--dataset", type=Path, metavar="PATH", help="a JSONL workload whose lengths to take instead")
    parser.add_argument(
        "--repeat", type=at_least(1, serve.MAX_REPEAT), default=3, metavar="N", help="runs on the same engine [3]"
    )
    parser.add_argument("--strict", action="store_true", help="refuse a dataset with requests that are too long")
    parser.add_argument(
        "--num-warmups", type=at_least(0), metavar="N", help="requests of a run before, of 16 tokens [all]"
    )


def workload_of(options: argparse.Namespace, seed: int) -> Workload:
    """The requests of the options, all at 0 s.

    Raises:
        UserError: the dataset cannot be read, or lengths are given beside it.
    """
    lengths = {"--input-len": options.input_len, "--output-len": options.output_len}
    if options.dataset is None:
        return synthesise(
            options.num_prompts or 256, math.inf, *(given or Lengths(100, 1024) for given in lengths.values()), seed
        )
    for flag, given in lengths.items():
        if given is not None:
            raise UserError(f"{flag} and --dataset exclude each other: the lengths are the dataset's")
    workload = read_workload(options.dataset).at_once()
    return workload.head(options.num_prompts) if options.num_prompts else workload


def run(session: Session, options: argparse.Namespace, config: EngineConfig) -> None:
    """Run everything `--repeat` times. Prompts are random and share nothing unless the dataset says so."""
    workload = workload_of(options, config.seed)
    if options.num_warmups is None:
        options.num_warmups = len(workload)
    runs: list[dict[str, Any]] = []

    def measure_all(core: EngineCore) -> None:
        fitting, reasons = serve.fit(core, workload, options.strict)
        about = serve.describe(fitting, len(reasons), 1.0)

        def keep(run: dict[str, Any] | None, _: Replay) -> None:
            if run is not None:
                runs.append(run)
                session.keep([about | {"median": serve.medians(runs), "runs": runs}])

        serve.replay_runs(session, core, fitting, options, keep)

    session.say(f"offline, {len(workload)} requests")
    session.limits(config)
    session.on_engine(replace(config, enable_prefix_caching=workload.has_prefixes), measure_all)
