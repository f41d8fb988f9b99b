"""`memwall bench kv-cache`: what the KV cache is for. Tokens per second with it, and with the whole prefix recomputed.

with the cache      prefix once, then | token | token | token        a step reads weights and KV
without             | prefix, token | prefix + 1, token | …          a step computes the whole prefix again
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.bench import tables
from engine.bench.decode import Shape, steady_steps, summary
from engine.bench.options import at_least, comma_separated
from engine.bench.prefill import first_token_s
from engine.bench.record import rounded
from engine.bench.replay import Clock, why_not
from engine.bench.workload import Entry, Prompts
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.bench.session import Session
    from engine.config import EngineConfig
    from engine.core import EngineCore

HELP = "tokens per second with the KV cache and with recomputation of the prefix"


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The suite's own options."""
    parser.add_argument(
        "--context",
        type=comma_separated(at_least(1)),
        metavar="N,...",
        default=(256, 512, 1024, 2048, 4096, 8192),
        help="tokens in the prefix, comma-separated [256,512,1024,2048,4096,8192]",
    )
    parser.add_argument(
        "--output-tokens", type=at_least(2), default=64, metavar="N", help="steps to time with the cache [64]"
    )
    parser.add_argument("--recomputed-tokens", type=at_least(1), default=5, metavar="N", help="… and without it [5]")


def run(session: Session, options: argparse.Namespace, config: EngineConfig) -> None:
    """Measure every length both ways, batch 1."""
    results: list[dict[str, Any]] = []

    def measure_all(core: EngineCore) -> None:
        for context in options.context:
            results.append(_measured(core, context, options, session.clock))
            session.keep(results)

    session.say("kv-cache")
    session.limits(config)
    session.on_engine(replace(config, enable_prefix_caching=False), measure_all)


def _measured(core: EngineCore, context: int, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    # The last prompt that is recomputed, and its token.
    if reason := why_not(core, Entry(0.0, context + options.recomputed_tokens - 1, 1)):
        return {"context": context, "absent": f"a prefix that grows by {options.recomputed_tokens} tokens: {reason}"}
    try:
        steps = steady_steps(core, Shape(1, context), options.output_tokens, options.temperature)
        recomputed_s = _recomputed_s(core, context, options, clock)
    except UserError as error:
        return {"context": context, "absent": str(error)}
    cached = summary(core, steps)
    median_s = statistics.median(recomputed_s)
    return {
        "context": context,
        "cached_tokens_per_s": cached["output_tokens_per_s"],
        "recomputed_tokens_per_s": rounded(1 / median_s),
        "speedup": rounded(median_s * 1e3 / cached["tpot_ms"]),
        "cached_us": cached["intervals_us"],
        "recomputed_us": [round(seconds * 1e6) for seconds in recomputed_s],
    }


def _recomputed_s(core: EngineCore, context: int, options: argparse.Namespace, clock: Clock) -> list[float]:
    """Time of each token when every one takes the prefill of a prefix that is one token longer."""
    tokens = (
        Prompts(core.model_config.vocab_size, core.config.seed).own(0, context + options.recomputed_tokens).tolist()
    )
    first_token_s(core, tokens[:context], options.temperature, clock)  # compiles kernels
    return [
        first_token_s(core, tokens[: context + count], options.temperature, clock)
        for count in range(options.recomputed_tokens)
    ]


def table(results: list[dict[str, Any]]) -> str:
    """A row per length."""
    rows = [
        [f"{result['context']:,}"]
        + (
            [tables.MISSING] * 3
            if "absent" in result
            else [
                tables.number(result["cached_tokens_per_s"], 1),
                tables.number(result["recomputed_tokens_per_s"], 1),
                f"{result['speedup']:,.1f} ×",
            ]
        )
        for result in results
    ]
    absent = [f"{result['context']:,}: {result['absent']}" for result in results if "absent" in result]
    return "\n".join([tables.columns(["context", "tok/s with cache", "without", "ratio"], rows, left=0), *absent])
