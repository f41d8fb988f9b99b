"""`memwall bench decode`: time per output token of a full batch, beside what reading weights and KV takes at least."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from engine.bench import tables
from engine.bench.options import MAX_COUNT, at_least, comma_separated
from engine.bench.record import rounded
from engine.bench.replay import make_sequence, quiet_collector
from engine.bench.workload import Prompts
from engine.errors import UserError
from engine.scheduling import KVCacheConfig

if TYPE_CHECKING:
    from engine.bench.session import Session
    from engine.config import EngineConfig
    from engine.core import EngineCore, StepRecord

HELP = "time per output token of a batch that only decodes, and its share of the floor"
# Steps after the last prompt that are not counted: the pipeline of two steps fills, clocks settle.
SETTLING_STEPS = 4


@dataclass(frozen=True)
class Shape:
    """`batch` requests of `context` prompt tokens."""

    batch: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "256x1024".

        Raises:
            ValueError: saying what would be right.
        """
        try:
            batch, context = map(int, text.lower().replace("×", "x").split("x"))
        except ValueError:
            raise ValueError(f"{text!r} is no batch × context such as 256x1024") from None
        if min(batch, context) < 1:
            raise ValueError(f"{text!r} must have at least 1 request of at least 1 token")
        if max(batch, context) > MAX_COUNT:
            raise ValueError(f"{text[:40]!r} must have at most {MAX_COUNT} requests of as many tokens")
        return cls(batch, context)


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The suite's own options."""
    parser.add_argument(
        "--batch", type=comma_separated(at_least(1)), metavar="N,...", help="requests at once, comma-separated [1]"
    )
    parser.add_argument(
        "--context", type=comma_separated(at_least(1)), metavar="N,...", help="prompt tokens, comma-separated [1024]"
    )
    parser.add_argument(
        "--shapes",
        type=comma_separated(Shape.parse),
        metavar="NxN,...",
        help="instead of all pairs of them: 256x1024,16x16384",
    )
    parser.add_argument("--output-tokens", type=at_least(2), default=64, metavar="N", help="steps to time [64]")
    # In place of the engine's option, which takes one.
    parser.add_argument(
        "--kv-cache-dtype",
        type=comma_separated(str),
        dest="kv_cache_dtypes",
        default=("auto",),
        metavar="NAME,...",
        help="formats, an engine for each [auto]",
    )


def configs(config: EngineConfig, options: argparse.Namespace) -> list[EngineConfig]:
    """An engine per KV format."""
    return [replace(config, kv_cache_dtype=name, enable_prefix_caching=False) for name in options.kv_cache_dtypes]


def shapes(options: argparse.Namespace) -> list[Shape]:
    """What is asked for, in order.

    Raises:
        UserError: it is asked for in both ways.
    """
    if options.shapes and (options.batch or options.context):
        raise UserError("--shapes and --batch or --context exclude each other: give pairs, or lists to be paired")
    lists = options.batch or (1,), options.context or (1024,)
    return list(options.shapes or (Shape(batch, context) for context in lists[1] for batch in lists[0]))


def run(session: Session, options: argparse.Namespace, config: EngineConfig) -> None:
    """Measure every shape with every KV format."""
    wanted, results = shapes(options), []
    engines = configs(config, options)
    session.limits(config)

    def measure_all(core: EngineCore) -> None:
        for shape in wanted:
            results.append(_measured(core, shape, options))
            session.say(f"  {_progress(results[-1])}")
            session.keep(results)

    for engine in engines:
        session.say(f"decode, KV cache {engine.kv_cache_dtype}")
        session.on_engine(engine, measure_all)
    limits = session.limits(config)
    for result in results:
        _compare(result, limits.copy)
    session.keep(results)


def _measured(core: EngineCore, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """A result, or why there is none."""
    name = {"kv_cache_dtype": core.config.kv_cache_dtype, "batch": shape.batch, "context": shape.context}
    try:
        steps = steady_steps(core, shape, options.output_tokens, options.temperature)
    except UserError as error:
        return name | {"absent": str(error)}
    return name | summary(core, steps)


def steady_steps(core: EngineCore, shape: Shape, output_tokens: int, temperature: float) -> list[StepRecord]:
    """The steps in which the whole batch decodes and nothing else happens: `output_tokens` and the one before.

    Raises:
        UserError: the batch does not fit the engine.
    """
    prompts, lead = Prompts(core.model_config.vocab_size, core.config.seed), _prefill_steps(core, shape)
    max_tokens = lead + SETTLING_STEPS + output_tokens + 1
    _check_fits(core, shape, max_tokens)
    least, most = _pages(core, shape, max_tokens)
    if least > core.memory.num_blocks:
        raise _pool_too_small(core, shape, most)
    sequences = [
        make_sequence(
            core, f"{shape.batch}x{shape.context}-{i}", prompts.own(i, shape.context).tolist(), max_tokens, temperature
        )
        for i in range(shape.batch)
    ]
    core.step_log = log = []
    with quiet_collector():
        for sequence in sequences:
            core.add(sequence)
        while core.has_work:
            core.step()
            if log and log[-1].num_preempted:
                for sequence in sequences:
                    core.abort(sequence)
    core.step_log = None
    steps = [step for step in log if len(step.shape.decode_contexts) == shape.batch and not step.shape.prefills]
    steps = steps[SETTLING_STEPS : SETTLING_STEPS + output_tokens + 1]
    if len(steps) < 2:
        raise _pool_too_small(core, shape, most)
    return steps


def _prefill_steps(core: EngineCore, shape: Shape) -> int:
    """At most so many steps pass between the first request's first token and the last one's."""
    if not core.config.enable_chunked_prefill:
        return shape.batch + 1
    # Those that decode already take a token each from the budget of every step.
    budget = max(core.config.max_num_batched_tokens - shape.batch, 1)
    return -(-shape.batch * shape.context // budget) + 2


def _check_fits(core: EngineCore, shape: Shape, max_tokens: int) -> None:
    if shape.batch > core.config.max_num_seqs:
        raise UserError(f"{shape.batch} requests are more than max_num_seqs {core.config.max_num_seqs}")
    needed = shape.context + max_tokens
    if needed > core.max_model_len:
        raise UserError(
            f"a context of {shape.context} tokens and {max_tokens} of output, prefill of the others included, are more "
            f"than max_model_len {core.max_model_len}"
        )
    budget, last = core.config.max_num_batched_tokens, shape.batch - 1 + shape.context
    if not core.config.enable_chunked_prefill and last > budget:
        raise UserError(
            f"without chunked prefill the last of {shape.batch} prompts of {shape.context} tokens finds room beside "
            f"the others' decodes only if max_num_batched_tokens is {last}; it is {budget}"
        )


def _pages(core: EngineCore, shape: Shape, max_tokens: int) -> tuple[int, int]:
    """KV blocks that a batch needs for certain to decode together, and those that it takes at most."""
    windows, size = core.scheduler.kv.windows, core.config.block_size
    least = sum(-(-(shape.context + 1) // size) for window in windows if window is None)
    config = KVCacheConfig(num_blocks=2, block_size=size, windows=windows)
    most = config.max_pages(shape.context + max_tokens, core.config.max_num_batched_tokens)
    return shape.batch * least, shape.batch * most


def _pool_too_small(core: EngineCore, shape: Shape, pages: int) -> UserError:
    return UserError(
        f"to decode together, {shape.batch} requests of {shape.context} tokens need up to {pages} KV blocks of "
        f"{core.config.block_size} tokens; there are {core.memory.num_blocks} KV blocks"
    )


def summary(core: EngineCore, steps: Many[StepRecord]) -> dict[str, Any]:
    """What consecutive decode steps of one batch came to."""
    intervals_s = [after.end_s - before.end_s for before, after in pairwise(steps)]
    tpot_s = statistics.median(intervals_s)
    total_bytes = statistics.median(core.step_bytes(step.shape) for step in steps[1:])
    weight_bytes = core.weights.num_bytes_per_step
    contexts = [context for step in steps[1:] for context in step.shape.decode_contexts]
    gpu_s = [step.gpu_s for step in steps[1:] if step.gpu_s is not None]
    exposed_s = [max(interval - gpu, 0.0) for interval, gpu in zip(intervals_s, gpu_s, strict=False)]
    batch = len(steps[0].shape.decode_contexts)
    return {
        "mean_context": round(statistics.fmean(contexts), 1),
        "num_steps": len(intervals_s),
        "graph_size": steps[-1].graph_size,
        "tpot_ms": rounded(tpot_s * 1e3),
        "tpot_mean_ms": rounded(statistics.fmean(intervals_s) * 1e3),
        "output_tokens_per_s": rounded(batch / tpot_s),
        "weight_bytes": weight_bytes,
        "kv_bytes": int(total_bytes) - weight_bytes,
        "bytes_per_s": rounded(total_bytes / tpot_s),
        "host_ms": rounded(statistics.median(step.host_s for step in steps[1:]) * 1e3),
        "gpu_ms": rounded(statistics.median(gpu_s) * 1e3) if gpu_s else None,
        "exposed_host_ms": rounded(statistics.median(exposed_s) * 1e3) if gpu_s else None,
        "intervals_us": [round(interval * 1e6) for interval in intervals_s],
    }


def _compare(result: dict[str, Any], copy_bytes_per_s: float) -> None:
    """Add the floor, which is what the bytes take at the copy rate; the share of it is the share of the bandwidth."""
    if "absent" not in result:
        floor_ms = (result["weight_bytes"] + result["kv_bytes"]) / copy_bytes_per_s * 1e3
        result["floor_ms"] = rounded(floor_ms)
        result["share_of_floor"] = rounded(floor_ms / result["tpot_ms"], 4)


def table(results: list[dict[str, Any]]) -> str:
    """A row per KV format and shape."""
    header = [
        "KV cache",
        "batch",
        "context",
        "TPOT ms",
        "mean ms",
        "tok/s",
        "GB/s",
        "floor ms",
        "floor/TPOT",
        "host ms",
        "exposed ms",
    ]
    rows = []
    for result in results:
        name = [result["kv_cache_dtype"], f"{result['batch']:,}", f"{result['context']:,}"]
        if "absent" in result:
            rows.append([*name, *[tables.MISSING] * (len(header) - len(name))])
            continue
        rows.append(
            [
                *name,
                tables.number(result["tpot_ms"]),
                tables.number(result["tpot_mean_ms"]),
                tables.number(result["output_tokens_per_s"], 0),
                tables.number(result["bytes_per_s"] / 1e9, 0),
                tables.number(result.get("floor_ms")),  # not known yet if Ctrl-C came first
                tables.percent(result.get("share_of_floor")),
                tables.number(result["host_ms"]),
                tables.number(result["exposed_host_ms"]),
            ]
        )
    absent = [f"{r['kv_cache_dtype']} {r['batch']} × {r['context']}: {r['absent']}" for r in results if "absent" in r]
    return "\n".join([tables.columns(header, rows), *absent])


def _progress(result: dict[str, Any]) -> str:
    found = result["absent"] if "absent" in result else f"{result['tpot_ms']:.2f} ms per token"
    return f"{result['batch']:,} × {result['context']:,}: {found}"
