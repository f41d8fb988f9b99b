"""`memwall bench prefill`: time to the first token of a prompt that has the engine to itself."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.bench import tables
from engine.bench.options import at_least, comma_separated
from engine.bench.record import rounded
from engine.bench.replay import Clock, finish, make_sequence, quiet_collector, why_not
from engine.bench.work import prompt_flops
from engine.bench.workload import Entry, Prompts
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.bench.session import Session
    from engine.config import EngineConfig
    from engine.core import EngineCore

HELP = "time to first token of one prompt alone, and its share of the matmul rate"


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The suite's own options."""
    parser.add_argument(
        "--prompt-tokens",
        type=comma_separated(at_least(1)),
        metavar="N,...",
        default=(128, 1024, 4096, 16_384),
        help="lengths, comma-separated [128,1024,4096,16384]",
    )
    parser.add_argument("--repetitions", type=at_least(1), default=5, metavar="N", help="prompts of each length [5]")


def run(session: Session, options: argparse.Namespace, config: EngineConfig) -> None:
    """Measure every length."""
    config, results = replace(config, enable_prefix_caching=False), []
    session.limits(config, matmul=True)

    def measure_all(core: EngineCore) -> None:
        prompts = Prompts(core.model_config.vocab_size, core.config.seed)
        for num_tokens in options.prompt_tokens:
            results.append(_measured(core, num_tokens, options, prompts, session.clock))
            session.say(f"  {num_tokens:,} tokens: {_ttft(results[-1])}")
            session.keep(results)

    session.say("prefill")
    session.on_engine(config, measure_all)
    limits = session.limits(config, matmul=True)
    for result in results:
        if "absent" not in result:
            result["share_of_matmul"] = rounded(result["flops_per_s"] / limits.matmul, 4)
            if limits.matmul_fp8:
                result["share_of_matmul_fp8"] = rounded(result["flops_per_s"] / limits.matmul_fp8, 4)
    session.keep(results)


def _measured(
    core: EngineCore, num_tokens: int, options: argparse.Namespace, prompts: Prompts, clock: Clock
) -> dict[str, Any]:
    """A result, or why there is none."""
    if reason := why_not(core, Entry(0.0, num_tokens, 1)):
        return {"prompt_tokens": num_tokens, "absent": reason}
    try:
        # One more, whose time is not counted: kernels are compiled in it.
        ttft_s = [
            first_token_s(core, prompts.own(index, num_tokens).tolist(), options.temperature, clock)
            for index in range(options.repetitions + 1)
        ][1:]
    except UserError as error:
        return {"prompt_tokens": num_tokens, "absent": str(error)}
    median_s = statistics.median(ttft_s)
    flops = prompt_flops(core.model_config, core.weights, num_tokens)
    return {
        "prompt_tokens": num_tokens,
        "ttft_ms": rounded(median_s * 1e3),
        "input_tokens_per_s": rounded(num_tokens / median_s),
        "flops": flops,
        "flops_per_s": rounded(flops / median_s),
        "repetitions_us": [round(seconds * 1e6) for seconds in ttft_s],
    }


def first_token_s(core: EngineCore, prompt: list[int], temperature: float, clock: Clock) -> float:
    """Seconds until the first token of a prompt is on the host; nothing else is running.

    Raises:
        UserError: the prompt does not fit.
    """
    sequence = make_sequence(core, "alone", prompt, 1, temperature)
    with quiet_collector():
        sequence.arrival_s = clock.now()
        core.add(sequence)
        finish(core)
    return sequence.first_token_s - sequence.arrival_s


def table(results: list[dict[str, Any]]) -> str:
    """A row per length."""
    rows = [
        [
            f"{result['prompt_tokens']:,}",
            *(
                [tables.MISSING] * 4
                if "absent" in result
                else [
                    tables.number(result["ttft_ms"]),
                    tables.number(result["input_tokens_per_s"], 0),
                    tables.number(result["flops_per_s"] / 1e12, 1),
                    tables.percent(result.get("share_of_matmul_fp8", result.get("share_of_matmul"))),
                ]
            ),
        ]
        for result in results
    ]
    absent = [f"{result['prompt_tokens']:,}: {result['absent']}" for result in results if "absent" in result]
    header = ["prompt tokens", "TTFT ms", "tok/s", "TFLOP/s", "of matmul"]
    return "\n".join([tables.columns(header, rows, left=0), *absent])


def _ttft(result: dict[str, Any]) -> str:
    return result.get("absent") or f"{result['ttft_ms']:.2f} ms"
