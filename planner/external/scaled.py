"""A base step time scaled by the few factors that an engine seen from outside reveals.

    step = weights × (the base's time of the decodes, had they no context)
         + kv      × (what their cached tokens add to that)
         + prefill × (what the prompt chunks add to the decodes)
         + request_s × requests

The parts are differences of the base's own predictions, so that any `StepTime` is a base: the roofline, or a profile
that was measured on another machine or for another model. A step without decodes counts one decode without context as
its floor, the weights that every step reads.

`arrival_s` is not part of any step: it is what a request takes on its way in and its first token on the way out, and
adds to every TTFT alike.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from engine.scheduling import StepShape
from planner.errors import UserError
from planner.step_time import TICKS_PER_SECOND, DecodeRun, DerivedStepTime, Evidence, StepTime, TableRun, Uncertainty

# Scale factors as fractions of 2**20, so that a step's ticks are integers whichever way they are reached.
_ONE = 1 << 20
_LISTED_STEPS = 256
# No engine is a hundred times faster or slower than the base; none takes a second for each request of a step, or gives
# much of the base's time back; and no request waits a minute on its way in.
_POSSIBLE_SCALE = (0.009, 110.0)
_POSSIBLE = {"request_s": (-1e-3, 1.0), "arrival_s": (0.0, 60.0)}


@dataclass(frozen=True, slots=True)
class Factors:
    """What scales a base step time; the defaults leave it as it is.

    Attributes:
        prefill: on the time that prompt chunks add to a step. Above 1 is slower than the base.
        weights: on a decode step without its cached tokens: reading weights, but also launches and the host's time
            for a step, as both come with every step and a black box shows their sum.
        kv: on the time that each cached token adds.
        request_s: added for each request of a step.
        arrival_s: added to every request's TTFT, outside of all steps.
    """

    prefill: float = 1.0
    weights: float = 1.0
    kv: float = 1.0
    request_s: float = 0.0
    arrival_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value):
                raise UserError(f"the factor {name} is {value}, which is not a number")
            if value <= 0 and name in SCALES:
                raise UserError(f"the factor {name} is {value:g}; it scales a time and must be positive")
            low, high = _POSSIBLE.get(name, _POSSIBLE_SCALE)
            if not low <= value <= high:
                raise UserError(
                    f"the factor {name} is {value:g}, which no engine comes near; it lies between {low:g} and {high:g}"
                )


NAMES = tuple(field.name for field in fields(Factors))
SCALES = ("prefill", "weights", "kv")


class ScaledStepTime(DerivedStepTime):
    """A `StepTime` that scales another one.

    Attributes:
        inner: the base, which is scaled.
        factors: by how much. `factors.arrival_s` is in no step; `planner.serving` adds it to what clients see.
    """

    evidence = Evidence.SCALED

    def __init__(
        self,
        base: StepTime,
        factors: Factors,
        source: str = "",
        uncertainty: Uncertainty | None = None,
        pipeline_depth: int = 1,
        decode: float = 1.0,
        prefill: float = 1.0,
    ) -> None:
        """
        Args:
            source: whose runs the factors were fitted to, for people.
            uncertainty: of the scaled times.
            pipeline_depth: steps that the engine seen from outside has in flight.
            decode, prefill: what whole steps without and with prompt chunks are multiplied by on top of the factors.
        """
        super().__init__(base)
        self.factors = factors
        self.source = source
        self.uncertainty = uncertainty
        self.pipeline_depth = pipeline_depth
        self.clock = base.clock
        self._steps = decode, prefill
        origin = f" to {source}" if source else ""
        self.description = f"{base.description}, scaled{origin}"
        self._prefill = round(factors.prefill * _ONE)
        self._weights = round(factors.weights * _ONE)
        self._kv = round(factors.kv * _ONE)
        self._request = round(factors.request_s * TICKS_PER_SECOND)
        self._floors: dict[tuple, int] = {}

    def predict(self, step: StepShape) -> float:
        return self.ticks(step) / TICKS_PER_SECOND

    def ticks(self, step: StepShape) -> int:
        contexts, verifies = step.decode_contexts, step.verifies
        floor = self._floor(len(contexts), tuple(query for query, _ in verifies))
        if contexts or verifies:
            sampled = len(contexts) + sum(query for query, _ in verifies)
            decodes = (
                self.inner.ticks(StepShape(decode_contexts=contexts, verifies=verifies, num_sampled=sampled))
                if step.prefills
                else self.inner.ticks(step)
            )
        else:
            decodes = floor
        prefill = max(0, self.inner.ticks(step) - decodes) if step.prefills else 0
        ticks = self._ticks(floor, decodes - floor, prefill, step.num_requests)
        return self._stretched(ticks, self._steps[bool(step.prefills)])

    def decode_run(self, contexts: list[int], steps: int) -> DecodeRun:
        batch = len(contexts)
        floor = self._floor(batch, ())
        run = self.inner.decode_run(contexts, min(steps, _LISTED_STEPS))
        durations = []
        for first, increment, count in run.segments(run.steps):
            ticks = (self._ticks(floor, first + increment * j - floor, 0, batch) for j in range(count))
            durations += [self._stretched(each, self._steps[0]) for each in ticks]
        return TableRun(durations)

    @property
    def arrival_s(self) -> float:
        """What every TTFT and E2EL takes beyond the engine's steps, as `planner.serving` adds it."""
        return self.factors.arrival_s

    def scaled(self, decode: float = 1.0, prefill: float = 1.0, host: float = 1.0) -> ScaledStepTime:
        steps = self._steps[0] * decode, self._steps[1] * prefill
        base = self.inner.scaled(host=host) if host != 1.0 else self.inner
        return ScaledStepTime(base, self.factors, self.source, self.uncertainty, self.pipeline_depth, *steps)

    @staticmethod
    def _stretched(ticks: int, by: float) -> int:
        return ticks if by == 1.0 else max(1, round(ticks * by))

    def _ticks(self, floor: int, cached: int, prefill: int, requests: int) -> int:
        scaled = (self._weights * floor + self._kv * max(0, cached) + self._prefill * prefill) >> 20
        return max(1, scaled + self._request * requests)

    def _floor(self, decodes: int, verifies: tuple[int, ...]) -> int:
        """Ticks of the base for these decodes and verifications if none had any context; of one decode for none."""
        key = (decodes, verifies)
        ticks = self._floors.get(key)
        if ticks is None:
            shape = StepShape(decode_contexts=[0] * decodes, verifies=[(query, 0) for query in verifies])
            if not (decodes or verifies):
                shape = StepShape(decode_contexts=[0])
            self._floors[key] = ticks = self.inner.ticks(shape)
        return ticks
