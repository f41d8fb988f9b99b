"""The fit of one KV format's tables: any step's time, what that rests on, and how well points predict each other.

Numpy, scipy and the standard library only: calibration fits on the GPU machine what it has just measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.scheduling import StepShape
from planner.profile.decode import DecodeFit, decode_errors, excess_of, fit_decode
from planner.profile.host import HostFit, fit_host
from planner.profile.prompt import PromptFit, fit_prompt, prompt_errors
from planner.profile.regression import table_errors
from planner.profile.shape import ModelShape
from planner.profile.tables import EngineSettings, KVTables, Limits
from planner.step_time import Evidence, Uncertainty

# A normal distribution's 10 % and 90 % quantiles are this many standard deviations apart.
_QUANTILE_SPAN = 2.563
# So many mixed points tell how far whole steps are off.
_ENOUGH_MIXED = 5
# What the steps of a kind are off by together: the relative standard deviation of their summed time in served loads
# (8B on two H200s, each with a profile of its own, two KV formats at six loads: 0.4 % and 0.5 to 0.6 %). It is how far
# the state of a device differs from one run to the next.
_COMMON_DECODE, _COMMON_PROMPT = 0.004, 0.005
# The same between devices of one type: the loads of five H200s, predicted with the profile of one of them. What one
# takes less or more than their mean has a standard deviation of 1.0 %, in steps with prompts, whose clock the power
# limit decides, as in decodes; this is of the difference of two.
_DEVICE_DECODE, _DEVICE_PROMPT = 0.013, 0.014
# What the CPU takes for steps with prompts in all of a run, against what a profile says: about the standard deviation
# of 65 runs on the machine that was profiled and on two others. They are virtual, and not at any time as fast.
_COMMON_HOST = 0.14
# A step between two points is about so far off, as a share of what a point that is left out is: it is half as far from
# them. (Noise would leave 1, a curve without noise a quarter.)
_BETWEEN_POINTS = 0.5
# Shapes whose errors are independent, as they are padded to other sizes: how many a run has at the least, counted as
# 1 / sum of squared shares of the time. Of those served loads 2.5 to 27 graph sizes, and 7.2 to 9.8 sizes of prompts.
_GRAPHS_IN_A_RUN, _SIZES_IN_A_RUN = 2.5, 7.0


@dataclass
class FittedKV:
    """Predicts step times for one model, KV format and GPU.

    Attributes:
        decode, prompt, host: the three fits.
        shape: the model's. engine: the settings it was measured with.
        tables: the points behind it, less those that tell of the host alone; None once it has been transferred to
            something else.
        plain: the same before a service was fitted to it, whose errors the points' are; None if none was.
    """

    shape: ModelShape
    engine: EngineSettings
    decode: DecodeFit
    prompt: PromptFit
    host: HostFit
    tables: KVTables | None = None
    plain: FittedKV | None = field(default=None, repr=False)
    _errors: dict[str, Any] | None = field(default=None, repr=False)
    _keys: frozenset | None = field(default=None, repr=False)

    def predict(self, step: StepShape) -> tuple[float, Evidence]:
        """Seconds that a step takes among equal ones, and what that rests on."""
        return self.seconds(step), self.evidence(step)

    def seconds(self, step: StepShape) -> float:
        """The period of such steps, one after another."""
        if step.verifies:
            return self._verification_s(step)
        if step.prefills:
            return self.prompt.seconds(step)
        contexts = step.decode_contexts
        return self.decode.seconds(len(contexts), self.shape.decode_keys(contexts), excess_of(contexts))

    def host_s(self, step: StepShape) -> float:
        """CPU time of schedule, launch and update."""
        return self.host.seconds(step)

    def alone_s(self, step: StepShape) -> float:
        """From schedule to tokens on the host when nothing is in flight."""
        if step.prefills:
            return self.seconds(step) + self.host.added_latency_s(step)
        return self.seconds(step) + self.host_s(step)

    def evidence(self, step: StepShape) -> Evidence:
        """MEASURED at a point, INTERPOLATED between points, EXTRAPOLATED outside and for verifications."""
        if self.tables is None or step.verifies:
            return Evidence.EXTRAPOLATED
        if _key(step) in self._measured():
            return Evidence.MEASURED
        return Evidence.INTERPOLATED if self.is_inside(step) else Evidence.EXTRAPOLATED

    def is_inside(self, step: StepShape) -> bool:
        """Whether a plain step lies between measured points."""
        if step.prefills:
            return self.prompt.is_inside(step)
        batch = len(step.decode_contexts)
        return self.shape.decode_keys(step.decode_contexts) <= self.decode.key_limit(batch)

    def errors(self) -> dict[str, Any]:
        """Of each table: number of points, relative errors in sample and leaving out one, coefficients dropped.

        {"decode": {"points": 60, "in_sample": {"median":, "p90":, "max":}, "leave_one_out": {...}, "dropped": [...]},
         "prefill": ..., "mixed": ..., "host decode": ..., "repeat": {"decode":, "prompt":}}

        "repeat" is the relative standard error of the points' medians.

        Raises:
            ValueError: the fit was transferred, so that no points stand behind it.
        """
        if self.plain is not None:
            return self.plain.errors()
        if self._errors is None:
            if self.tables is None:
                raise ValueError("a transferred fit has no points of its own")
            self._errors = self._compute_errors(self.tables)
        return self._errors

    def padded_by(self, engine: EngineSettings) -> FittedKV:
        """The same fit for an engine with other sizes of graphs and pieces."""
        return replace(
            self,
            engine=engine,
            decode=replace(self.decode, graph_sizes=engine.graph_sizes),
            prompt=replace(self.prompt, piece_sizes=engine.piece_sizes),
            host=replace(self.host, piece_sizes=engine.piece_sizes),
        )

    def uncertainty(self, errors: dict[str, Any] | None = None, *, same_device: bool = False) -> Uncertainty:
        """Of what the decode steps and the steps with prompts of a run take together, inside what was measured.

            deviation^2 = common^2 + device^2 + ((leave-one-out / 2)^2 + repeat^2) / shapes in a run

        Points are off by themselves: interpolation does not know which kernel the next size gets, and each point was
        measured once. A run has steps of many shapes, of which some are too long and some too short. What is common to
        all of them, as the state of the device is, or what another device of its type differs in, does not average out.

        Args:
            errors: what `errors` found, if it is at hand.
            same_device: the steps run on the very device that was measured.
        """
        errors = errors or self.errors()
        repeat = errors["repeat"]
        # Whole steps are what a simulation is made of; leaving a chunk out of its coarse grid says less of them.
        prompts = errors["mixed"] if errors["mixed"]["points"] >= _ENOUGH_MIXED else errors["prefill"]
        between = (_BETWEEN_POINTS * _deviation(table) for table in (errors["decode"], prompts))
        each = [np.hypot(own, repeat[name]) for own, name in zip(between, ("decode", "prompt"), strict=True)]
        decode, prompt = each[0] / _GRAPHS_IN_A_RUN**0.5, each[1] / _SIZES_IN_A_RUN**0.5
        common = [_COMMON_DECODE, _COMMON_PROMPT]
        if not same_device:
            common = [math.hypot(*each) for each in zip(common, (_DEVICE_DECODE, _DEVICE_PROMPT), strict=True)]
        told = (math.hypot(*each) for each in zip((decode, prompt), common, strict=True))
        return Uncertainty(*told, host=_COMMON_HOST if self.host.is_pipelined else 0.0)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _verification_s(self, step: StepShape) -> float:
        """A verification of q tokens costs the dense work of q rows; the context is read once for all of them."""
        rows = len(step.decode_contexts) + sum(query for query, _ in step.verifies)
        contexts = [*step.decode_contexts, *(context + query - 1 for query, context in step.verifies)]
        keys = self.shape.decode_keys(contexts)
        if step.prefills:
            plain = StepShape(step.prefills, [0] * rows)
            extra = keys - self.shape.decode_keys([0] * rows)
            return max(self.prompt.seconds(plain) + self.prompt.key_s * extra, self.prompt.seconds(plain))
        largest = self.engine.graph_sizes[-1] if self.engine.graph_sizes else self.decode.sizes[-1]
        attention = self.decode.key_s * keys
        if rows <= largest:
            return self.decode.seconds(rows, 0) + attention
        dense = self.prompt.dense(rows)
        return max(dense, self.decode.seconds(largest, 0)) + attention

    def _measured(self) -> frozenset:
        if self._keys is None:
            tables = self.tables
            points = (*tables.decode, *tables.prefill, *tables.mixed)
            self._keys = frozenset((tuple(sorted(p.prefills)), frozenset(_runs(p.decodes).items())) for p in points)
        return self._keys

    def _compute_errors(self, tables: KVTables) -> dict[str, Any]:
        inside, outside = decode_errors(tables.decode, self.decode, self.shape, self.engine)
        found = {"decode": table_errors(inside, outside, self.decode.dropped)}
        prompts = prompt_errors(tables.prefill, tables.mixed, self.decode, self.prompt, self.engine)
        found["prefill"] = table_errors(*prompts["prefill"])
        found["mixed"] = table_errors(*prompts["mixed"], self.prompt.dropped)
        repeat = {"decode": _repeat(tables.decode), "prompt": _repeat((*tables.prefill, *tables.mixed))}
        return found | self.host.errors | {"repeat": repeat}


def fit_kv(
    tables: KVTables,
    shape: ModelShape,
    limits: Limits,
    engine: EngineSettings,
    launched_ahead: Mapping[int, float] | None = None,
) -> FittedKV:
    """Fit one KV format.

    Args:
        launched_ahead: as `KVTables.on_device` has it.

    Raises:
        UserError: there is no decode point, or no prefill point.
    """
    for name in ("decode", "prefill"):
        if not getattr(tables, name):
            raise UserError(f"the profile has no {name} points, without which no step time can be told")
    told = tables.on_device(launched_ahead)
    decode = fit_decode(told.decode, shape, engine)
    prompt = fit_prompt(told.prefill, told.mixed, decode, shape, limits, engine)
    return FittedKV(shape, engine, decode, prompt, fit_host(tables, engine), told)


def _runs(decodes) -> Counter:
    """(context, count) by context, whatever the order."""
    total: Counter = Counter()
    for context, count in decodes:
        total[context] += count
    return total


def _key(step: StepShape) -> tuple:
    return tuple(sorted(step.prefills)), frozenset(Counter(step.decode_contexts).items())


def _deviation(table: dict[str, Any]) -> float:
    """A standard deviation from the median of absolute errors.

    Not from their tail: a point that was disturbed when it was measured is far from what the others say of it, and
    wrong itself. Where every point is exact, it is the others that are right.
    """
    found = table["leave_one_out"] or table["in_sample"]
    return found["median"] / 0.6745 if found else 0.0


def _repeat(points) -> float:
    errors = [(p.high_s - p.low_s) / _QUANTILE_SPAN / p.step_s / max(1, p.samples) ** 0.5 for p in points]
    return float(np.median(errors)) if errors else 0.0
