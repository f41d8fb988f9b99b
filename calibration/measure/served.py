"""A short service: requests that come and go, and every step of it in the order in which it ran.

Steps measured one by one follow their like, in a stream that is as hot as they make it. In a service a step of many
tokens follows decodes or other prompts, and the clock of the device remembers what was before. As many requests as a
plan says run all the time: where one ends, the next one comes. The first ones are there from the start, with contexts
as if they had been running for long.

A device that comes from rest is fast at first, for as long as its power limit is an average over a second. So loads
follow each other without a pause, and each is served for a while before its steps tell anything; what is written down
has those, too, as they say how hot the others began.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.measure.clock import taken_s
from calibration.measure.grid import Room
from engine.bench.record import rounded
from engine.bench.replay import make_sequence
from planner.profile.decode import excess_of
from planner.profile.shape import decode_keys

if TYPE_CHECKING:
    from engine.core import EngineCore, StepRecord
    from engine.sequence import Sequence

_TEMPERATURE = 1.0


@dataclass(frozen=True)
class ServedPlan:
    """What is served.

    Attributes:
        loads: (requests that run at once, most output tokens of one, seconds that tell): how many and how long they are
            says how often prompts come, and how many keys are read beside them. Both are varied by themselves, or a fit
            could not tell the heat of prompts from the keys of decodes.
        input_tokens: least and most of a prompt. least_output: tokens. Lengths are drawn log-uniformly.
        lead_s: of the first load and of each other one, before its steps tell.
    """

    loads: tuple[tuple[int, int, float], ...] = (
        (250, 1024, 3.0),
        (200, 192, 3.0),
        (120, 512, 2.0),
        (90, 128, 3.0),
        (40, 256, 2.0),
        (40, 96, 2.0),
        (16, 128, 2.0),
        (6, 128, 2.0),
    )
    input_tokens: tuple[int, int] = (24, 1024)
    least_output: int = 8
    lead_s: tuple[float, float] = (2.0, 1.0)


QUICK = ServedPlan(loads=((4, 32, 0.3),), input_tokens=(8, 128), least_output=4, lead_s=(0.0, 0.0))


class Service:
    """Serves on an engine that has nothing else to do, and no prefix cache.

    Args:
        room: what the engine has room for.
    """

    def __init__(self, core: EngineCore, room: Room, plan: ServedPlan | None = None, *, seed: int = 0) -> None:
        self._core, self._room, self._plan = core, room, plan or ServedPlan()
        self._draw = random.Random(f"{seed} served")
        generator = np.random.default_rng(seed)
        self._tokens = generator.integers(0, core.model_config.vocab_size, 1 << 16).tolist()
        self._layers = tuple(Counter(core.model_config.layer_windows).items())
        self._num_requests = 0

    def measure(self) -> list[dict[str, Any]]:
        """The "served" table: a row for every load that the engine has room for.

        lead_s: steps that start before it tell of the heat alone. In columns, a value for each step: start_s, when the
        host decided upon it, since the first one; gpu_s, its time on the GPU; host_s, the CPU's to schedule, launch and
        update it; prefills, (new tokens, tokens in the cache) of each prompt chunk; decodes, how many; keys, which
        these attend to over all layers; and excess, as many keys as the longest of them has more than the others.
        """
        rows, (first_s, lead_s) = [], self._plan.lead_s
        for concurrency, most_output, seconds in self._loads():
            lead = lead_s if rows else first_s
            records = self._serve(concurrency, most_output, lead + seconds)
            rows.append({"concurrency": concurrency, "lead_s": lead} | self._columns(records))
        return rows

    def _loads(self) -> list[tuple[int, int, float]]:
        """Those of the plan, with no more requests than the engine has slots and pages for."""
        longest_input, longest = self._longest_input(), self._room.max_model_len
        if longest < 4 * self._plan.least_output:
            return []  # for nothing that comes and goes
        found = {}
        for concurrency, most_output, seconds in self._plan.loads:
            output = max(min(most_output, longest - 1 - longest_input), self._plan.least_output)
            fitting = min(concurrency, self._room.most_requests(longest_input + output + 1))
            if fitting:
                found.setdefault((fitting, output), seconds)
        return [(*load, seconds) for load, seconds in found.items()]

    def _longest_input(self) -> int:
        return min(self._plan.input_tokens[1], self._room.max_model_len // 2)

    def _serve(self, concurrency: int, most_output: int, seconds: float) -> list[StepRecord]:
        core = self._core
        running = dict.fromkeys(self._running(most_output) for _ in range(concurrency))
        core.adopt(list(running))
        core.step_log = log = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for update in core.step():
                if update.finish_reason is not None:
                    del running[update.sequence]
                    arriving = self._arriving(most_output)
                    running[arriving] = None
                    core.add(arriving)
        core.settle()
        core.step_log = None
        for each in running:
            core.abort(each)
        return log

    def _arriving(self, most_output: int) -> Sequence:
        least, _ = self._plan.input_tokens
        return self._sequence(self._between(least, self._longest_input()), self._output(most_output))

    def _running(self, most_output: int) -> Sequence:
        """A request that has been running for a while: nearer to its end the longer ago it came."""
        least, _ = self._plan.input_tokens
        # Of all that run at some instant, long ones are more; a share of the longest is near enough.
        output = max(round(most_output * self._draw.random() ** 2), self._plan.least_output)
        done = max(round(output * self._draw.random()), 1)
        context = self._between(least, self._longest_input()) + done - 1
        sequence = self._sequence(context, output - done + 2)
        sequence.append(self._some(1))  # sampled, and not yet computed
        sequence.num_computed_tokens, sequence.num_tokens, sequence.num_output_tokens = context, context + 1, 1
        return sequence

    def _output(self, most: int) -> int:
        return self._between(min(self._plan.least_output, most), most)

    def _between(self, least: int, most: int) -> int:
        least = min(least, most)
        return round(math.exp(self._draw.uniform(math.log(least), math.log(most))))

    def _sequence(self, num_tokens: int, output_tokens: int) -> Sequence:
        self._num_requests += 1
        return make_sequence(
            self._core, f"served-{self._num_requests}", self._some(num_tokens), output_tokens, _TEMPERATURE
        )

    def _some(self, count: int) -> list[int]:
        """Tokens, made before so that the engine need not wait for them."""
        start = self._draw.randrange(len(self._tokens) - count)
        return self._tokens[start : start + count]

    def _columns(self, records: list[StepRecord]) -> dict[str, list[Any]]:
        first_s = records[0].start_s if records else 0.0
        decodes = [record.shape.decode_contexts for record in records]
        return {
            "start_s": [round(record.start_s - first_s, 6) for record in records],
            "gpu_s": [rounded(taken_s(record)) for record in records],
            "host_s": [rounded(record.host_s, 3) for record in records],
            "prefills": [[list(chunk) for chunk in record.shape.prefills] for record in records],
            "decodes": [len(contexts) for contexts in decodes],
            "keys": [decode_keys(self._layers, contexts) for contexts in decodes],
            "excess": [excess_of(contexts) if contexts else 0 for contexts in decodes],
        }
