"""Requests that arrive by the clock, whatever the engine does: an open loop.

    clock     0.0     0.1     0.2     0.3     0.4
    arrivals   a       b c             d            added before the first step after their time
    engine    | step  | step  | step  | step |      never waited for, never waiting unless it has nothing to do

Times of a request count from its arrival in the workload, not from the moment at which the engine took it in, so a
request that had to wait for a step to end is charged for it. The load is the same however slow the engine is; closed
loops, which send the next request when one ends, hide that.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from engine.bench.step_log import StepLog
from engine.bench.workload import Entry, Prompts, Workload
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.sequence import Sequence


class Clock(Protocol):
    """Time in seconds, and waiting for it. The engine stamps requests on the same clock."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class WallClock:
    """The clock of time.perf_counter."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)


@dataclass(frozen=True)
class Replay:
    """What a run of a workload left behind.

    Attributes:
        start_s: the clock when the workload began.
        gaps_s: between output events of the same request, over all requests.
    """

    start_s: float
    sequences: list[Sequence]
    gaps_s: list[float]
    log: StepLog

    def columns(self) -> dict[str, list[Any]]:
        """Per request: times in seconds since the start, in whole microseconds, tokens and preemptions."""

        def times(name: str) -> list[float]:
            return [round(getattr(sequence, name) - self.start_s, 6) for sequence in self.sequences]

        def counts(name: str) -> list[int]:
            return [getattr(sequence, name) for sequence in self.sequences]

        return {
            "arrival_s": times("arrival_s"),
            "scheduled_s": times("first_scheduled_s"),
            "first_token_s": times("first_token_s"),
            "last_token_s": times("last_token_s"),
            "input_tokens": counts("num_prompt_tokens"),
            "output_tokens": counts("num_output_tokens"),
            "cached_tokens": counts("num_cached_tokens"),
            "preemptions": counts("num_preemptions"),
        }


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a replay.

    Attributes:
        found: what there was until then; not all of its requests have run.
    """

    def __init__(self, found: Replay) -> None:
        super().__init__()
        self.found = found


def why_not(core: EngineCore, entry: Entry) -> str:
    """Why this engine cannot run a request to its end, and what would let it; empty if it can."""
    needed, limit = entry.input_tokens + entry.output_tokens, core.model_config.max_position_embeddings
    if needed > core.max_model_len:
        more = "raise --max-model-len" if needed <= limit else f"the model takes {limit} at most"
        return f"{needed} tokens of input and output are more than max_model_len {core.max_model_len}; {more}"
    budget = core.config.max_num_batched_tokens
    if not core.config.enable_chunked_prefill and entry.input_tokens > budget:
        return (
            f"{entry.input_tokens} input tokens are more than max_num_batched_tokens {budget}, without chunked "
            "prefill; raise --max-num-batched-tokens, or enable chunked prefill"
        )
    return ""


def sequences_of(
    core: EngineCore, workload: Workload, prompts: Prompts, temperature: float, run: int
) -> list[Sequence]:
    """The workload's requests with forced lengths, ready to be added."""
    pairs = zip(workload.entries, prompts.of(workload), strict=True)
    return [
        make_sequence(core, f"{run}-{index}", prompt, entry.output_tokens, temperature)
        for index, (entry, prompt) in enumerate(pairs)
    ]


def make_sequence(core: EngineCore, name: str, prompt: Many[int], output_tokens: int, temperature: float) -> Sequence:
    """A request that goes on for exactly `output_tokens`."""
    from engine.sampling_params import SamplingParams
    from engine.sequence import Sequence

    return Sequence(
        name,
        prompt,
        SamplingParams(temperature=temperature, max_tokens=output_tokens, ignore_eos=True, detokenize=False),
        max_model_len=core.max_model_len,
        block_size=core.config.block_size,
        hash_blocks=core.config.enable_prefix_caching,
        default_seed=core.config.seed,
    )


def replay(core: EngineCore, sequences: list[Sequence], arrivals_s: Many[float], clock: Clock) -> Replay:
    """Run requests to their end, each arriving at its time.

    Args:
        arrivals_s: seconds from now, ascending.

    Raises:
        Interrupted: Ctrl-C.
        UserError: a request ended before its forced length.
    """
    with quiet_collector():
        found = Replay(clock.now(), sequences, [], StepLog())
        core.step_log = []
        try:
            _run(core, found, arrivals_s, clock)
        except KeyboardInterrupt:
            raise Interrupted(found) from None
        finally:
            core.step_log = None
    _check_lengths(sequences)
    return found


def _run(core: EngineCore, found: Replay, arrivals_s: Many[float], clock: Clock) -> None:
    sequences = found.sequences
    for sequence, arrival_s in zip(sequences, arrivals_s, strict=True):
        sequence.arrival_s = found.start_s + arrival_s
    last_event_s: dict[Hashable, float] = {}
    num_added, total = 0, len(sequences)
    while num_added < total or core.has_work:
        now = clock.now()
        while num_added < total and sequences[num_added].arrival_s <= now:
            core.add(sequences[num_added])
            num_added += 1
        if not core.has_work:
            clock.sleep(sequences[num_added].arrival_s - now)
            continue
        for update in core.step():
            name, event_s = update.sequence.request_id, update.sequence.last_token_s
            before_s = last_event_s.get(name)
            if before_s is not None:
                found.gaps_s.append(event_s - before_s)
            last_event_s[name] = event_s
        found.log.take(core.step_log)


def finish(core: EngineCore) -> None:
    """Run steps until nothing is left to do."""
    while core.has_work:
        core.step()


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep Python's garbage collector away from what exists already, as a serving process does after its start.

    A full collection walks every object that torch and transformers made, which takes longer than a step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_lengths(sequences: list[Sequence]) -> None:
    short = next((s for s in sequences if s.num_output_tokens != s.params.max_tokens), None)
    if short is not None:
        raise UserError(
            f"request {short.request_id} ended after {short.num_output_tokens} output tokens instead of "
            f"{short.params.max_tokens} ({short.finish_reason}): its forced length does not fit max_model_len"
        )
