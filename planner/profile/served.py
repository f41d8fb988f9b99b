"""What served steps say of the clock and of mixed steps: requests that come and go, with steps of every size.

Steps that are measured one by one follow their like. Served ones do not, and a device's clock remembers: it is told
best by steps in the order in which serving makes them. From such a run are fitted, by what padded numbers of tokens,

    time = steady · (cool + (hot - cool) · h) + m · key_s · decode keys + row_s · decodes

cool and hot of every size that was seen, the constants of h (`planner.profile.clock`), m and row_s, and the ratio of
hot decodes to cool ones. The keys of decodes are read at the rate of the memory, whatever the clock. Priors are the
clock's own tables, so that a run of a few seconds changes only what it knows.

Numpy and the standard library only: calibration fits on the GPU machine what it has just measured.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from engine.scheduling import StepShape
from planner.profile.clock import (
    MIN_GAP,
    USUAL_E0,
    USUAL_E1,
    USUAL_TAU_S,
    ClockModel,
    Heat,
    begins_on_device,
    heat_within,
)
from planner.profile.fit import FittedKV
from planner.profile.host import LAUNCHED, HostCost, HostFit
from planner.profile.regression import summary
from planner.profile.tables import padded

# A power limit that is an average over a second lets a device that comes from rest be faster for so long: in the loads
# of three H200s steps with prompts are 2 % faster until then, and 3 to 8 % slower for the rest of that second.
_FROM_REST_S = 0.75
# How far a ratio of the clock's tables may be off, as each was measured a few times among others; and how far all of
# them together. Chosen on loads of two H200s, each foreseen from seconds of others: at 80 % load and more steps with
# prompts then are 0.3 % off in all.
_PRIOR_COOL, _PRIOR_ADDED = 0.015, 0.015
_PRIOR_ALL_COOL, _PRIOR_ALL_ADDED = 0.03, 0.05
# Likewise of the keys' rate beside prompts, of what a decode adds there per layer in microseconds, and of log(tau), e0
# and e1. Keys are read at the memory's rate there, too: each of the eight loads of a service is foreseen from the
# others to 0.8 % in all with this, and to 1.0 % where the rate may be ten times as far off.
_PRIOR_KEY, _PRIOR_ROW_US, _PRIOR_TAU, _PRIOR_E = 0.05, 0.125, 0.5, 0.15
_HELD = 1e12  # the precision of what must be as it is
# A size that was seen less often has no ratio of its own.
_FEW = 6
# Relative errors: no step is known better than the least; beyond so many deviations one has a cause of its own. What a
# power limit adds that is held once per second, when steps take up to a tenth longer, belongs to the mean.
_LEAST_NOISE, _FAR = 0.005, 6.0
# Steps in a row are off together. In the loads of three H200s a step with prompts is 1.5 to 4 % off by itself, and it
# takes 2 to 5 of them to tell as much as one that is off independently (integrated autocorrelation): each weighs
# against the priors of tau, e0 and e1 as one with this standard deviation would alone.
_TOGETHER = 0.04
_ROUNDS, _REWEIGHTED = 6, 4
# Before so much of a step's time has passed, as a share of it, the CPU has launched all of it.
_IN_TIME = 0.85
# As a share of the time between two decisions; with how many requests at once that is seldom mistaken; and how much
# longer the CPU may take in a service.
_WELL_BEFORE, _MOST_TELLING, _MOST_HOST = 0.7, 32, 2.5
# Of what the CPU took for steps of a kind so many take less: what others had it do beside is not a step's.
_UNDISTURBED = 0.25
# What a hot step takes more than a cool one at the most, with prompts and without.
_MOST_ADDED, _MOST_ADDED_DECODE = 1.0, 0.25
# A run of fewer steps was disturbed, as by a kernel that had to be compiled; so is a step that takes so many times as
# long as it should. Where half of them do, or take as much less, the table is nonsense.
_LEAST_STEPS, _DISTURBED, _NONSENSE = 20, 5.0, 3.0


@dataclass(frozen=True)
class ServedFit:
    """What was fitted.

    Attributes:
        clock: with every size that was seen; None without one.
        key_ratio: what the keys of decodes cost beside prompts, as a multiple of what points measured one by one say.
        row_s: what each decode beside prompts costs more than they say.
        errors: of steps with prompts and of decodes, in sample: {"prompt": {"points":, "in_sample": {...}}, ...}.
        host_costs: what the CPU takes for a step with prompts in a service, by kind.
    """

    clock: ClockModel | None
    key_ratio: float
    row_s: float
    errors: dict[str, Any]
    host_costs: Mapping[str, HostCost]

    def applied(self, fitted: FittedKV) -> FittedKV:
        """The fit with what mixed steps take."""
        alone = fitted.prompt
        prompt = replace(alone, key_s=alone.key_s * self.key_ratio, row_s=alone.row_s + self.row_s)
        return replace(fitted, prompt=prompt, host=_with_costs(fitted.host, self.host_costs), plain=fitted)


def fit_served(runs: Sequence[Mapping[str, Any]], fitted: FittedKV, clock: ClockModel | None) -> ServedFit | None:
    """Fit runs of the "served" table of a profile.

    Args:
        runs: columns of equal length: start_s, gpu_s, prefills, decodes (how many), keys and excess, as
            `planner.profile.shape` and `planner.profile.decode` count them; and lead_s, before which steps tell of the
            heat alone, for as long as a device is faster that comes from rest if there is none.
        clock: of the clock's own tables.

    Returns:
        None if the runs have hardly any steps with prompts.

    Raises:
        ValueError: the runs have nothing to do with the points.
    """
    runs = [run for run in runs if len(run["start_s"]) >= _LEAST_STEPS]
    _check(runs, fitted)
    host_costs = _host_costs(runs, fitted)
    prompts = None if clock is None else _Prompts.of(runs, fitted, clock, _with_costs(fitted.host, host_costs))
    if prompts is None:
        return ServedFit(clock, 1.0, 0.0, {}, host_costs) if host_costs else None
    clock, key_ratio, row_s, errors = prompts.fit()
    decode, decode_errors = _fit_decodes(runs, fitted, clock)
    clock = replace(clock, decode=decode)
    return ServedFit(clock, key_ratio, row_s, {"prompt": errors} | decode_errors, host_costs)


def _check(runs: Sequence[Mapping[str, Any]], fitted: FittedKV) -> None:
    """
    Raises:
        ValueError: half of the steps take far more or less than steps that were measured one by one.
    """
    ratios: dict[str, list[float]] = {"with prompts": [], "of decodes": []}
    for run in runs:
        columns = (run[name] for name in ("gpu_s", "prefills", "decodes", "keys", "excess"))
        for gpu, chunks, rows, keys, excess in zip(*columns, strict=True):
            if chunks:
                seconds = fitted.prompt.seconds_of(chunks, rows, keys)
                # Of a small step the device waits for the CPU, and that may be long.
                host_s = _MOST_HOST * fitted.host.seconds(StepShape(chunks, [0] * rows))
                ratios["with prompts"].append(gpu / (max(seconds, gpu) if gpu <= host_s else seconds))
            else:
                ratios["of decodes"].append(gpu / fitted.decode.seconds(rows, keys, excess))
    for kind, each in ratios.items():
        off = [ratio for ratio in each if not 1 / _NONSENSE <= ratio <= _NONSENSE]
        if 2 * len(off) > len(each):
            raise ValueError(
                f"in its short service steps {kind} take {np.median(each):.3g} times what its points say in the median"
            )


def _with_costs(host: HostFit, costs: Mapping[str, HostCost]) -> HostFit:
    return replace(host, costs={**host.costs, **costs})


@dataclass(frozen=True, eq=False)
class _Solved:
    """For given constants: cool ratios, what hot ones have more, the keys' rate less 1, what a decode adds in
    microseconds, and relative errors."""

    cost: float
    cool: np.ndarray
    added: np.ndarray
    key: float
    row_us: float
    errors: np.ndarray


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Steps with prompts of all runs.

    Attributes:
        base: the clock as its tables have it. tokens: the sizes that get a ratio.
        nodes: float64 [steps, sizes], how much of each size's ratio a step has. heating: float64 [steps].
        steady_s, key_s, beside_s, measured_s: float64 [steps]; key_s and beside_s: of the steady time, what the keys of
            decodes take and all that decodes add. rows: float64 [steps], how many decode.
        begin_s: float64 [steps]; first: whether a step is the first of its run; tells: whether its time is the device's
            own, and not of the lead.
        least_key: of the keys' rate less 1: they are not read faster than in steps of decodes alone, which are bound by
            the memory. least_row_us, prior_row_us: of what each decode adds, which is not negative in all.
    """

    base: ClockModel
    tokens: tuple[int, ...]
    nodes: np.ndarray
    heating: np.ndarray
    steady_s: np.ndarray
    key_s: np.ndarray
    beside_s: np.ndarray
    rows: np.ndarray
    measured_s: np.ndarray
    begin_s: np.ndarray
    first: np.ndarray
    tells: np.ndarray
    least_key: float
    least_row_us: float
    prior_row_us: float

    @classmethod
    def of(
        cls,
        runs: Sequence[Mapping[str, Any]],
        fitted: FittedKV,
        clock: ClockModel,
        host: HostFit,
    ) -> _Prompts | None:
        """Without those during which the device waited for the CPU; None if there are hardly any."""
        sizes, steady, keys, beside, decodes, measured, begins, first, tells = [], [], [], [], [], [], [], [], []
        prompt = fitted.prompt
        for run in runs:
            is_first, began, taken = True, _begins(run), _host_s(run)
            from_step = _first_telling(run)
            for n, (chunks, rows, gpu) in enumerate(zip(run["prefills"], run["decodes"], run["gpu_s"], strict=True)):
                if not chunks:
                    continue
                if (host_s := taken[n]) is None:
                    host_s = host.seconds(StepShape(chunks, [0] * rows))
                seconds = prompt.seconds_of(chunks, rows, run["keys"][n])
                in_time = run["start_s"][n] + LAUNCHED * host_s < began[n] + _IN_TIME * gpu
                tells.append(n >= from_step and in_time and gpu < _DISTURBED * seconds)
                sizes.append(padded(rows + sum(query for query, _ in chunks), fitted.engine.piece_sizes))
                steady.append(seconds)
                keys.append(prompt.key_s * run["keys"][n])
                beside.append(prompt.beside_s(rows, run["keys"][n]))
                decodes.append(rows)
                measured.append(gpu)
                begins.append(began[n])
                first.append(is_first)
                is_first = False
        if sum(tells) < 5 * _FEW:
            return None
        largest = max(fitted.engine.piece_sizes, default=0)
        counts = Counter(size for size, tell in zip(sizes, tells, strict=True) if tell)
        seen = {size for size, count in counts.items() if count >= _FEW and size <= largest}
        # Steps that are not padded run other kernels: the largest size of pieces says nothing of them.
        beyond = {largest + 1} if largest and max(sizes) > largest else set()
        tokens = tuple(sorted(seen.union(clock.tokens, beyond)))
        heating = [clock.heating(size) for size in sizes]
        columns = (np.array(each, float) for each in (heating, steady, keys, beside, decodes, measured, begins))
        flags = (np.array(each, bool) for each in (first, tells))
        nodes = _nodes(np.array(sizes, float), tokens)
        least_key = min(fitted.decode.key_s / prompt.key_s, 1.0) - 1.0 if prompt.key_s else 0.0
        rows_us = -1e6 * prompt.row_s, _PRIOR_ROW_US * fitted.shape.num_layers
        return cls(clock, tokens, nodes, *columns, *flags, least_key, *rows_us)

    def fit(self) -> tuple[ClockModel, float, float, dict[str, Any]]:
        """The clock, the ratio of the keys' rate, what each decode adds in seconds, and the errors.

        tau, e0 and e1 are looked for around what is usual, in ever smaller steps; all else follows from them.
        """
        heats: dict[float, np.ndarray] = {}

        def solved(at: tuple[float, float, float]) -> _Solved:
            if at[0] not in heats:
                heats[at[0]] = self._heat(math.exp(at[0]))
            return self._solve(at, heats[at[0]])

        best = (math.log(USUAL_TAU_S), USUAL_E0, USUAL_E1)
        widths = (0.5, 0.1, 0.1)
        cost = {best: solved(best).cost}
        for _ in range(_ROUNDS):
            improved = True
            while improved:
                improved = False
                for axis in range(3):
                    for sign in (-1, 1):
                        at = tuple(each + sign * widths[axis] * (i == axis) for i, each in enumerate(best))
                        if at not in cost:
                            cost[at] = solved(at).cost if _is_allowed(at) else math.inf
                        if cost[at] < cost[best]:
                            best, improved = at, True
            widths = tuple(width / 2 for width in widths)
        found = solved(best)
        hot = found.cool + np.clip(found.added, 0.0, _MOST_ADDED)
        clock = replace(
            self.base,
            tau_s=math.exp(best[0]),
            e0=best[1],
            e1=best[2],
            tokens=self.tokens,
            cool=tuple(found.cool.tolist()),
            hot=tuple(hot.tolist()),
        )
        key, row_us = max(found.key, self.least_key), max(found.row_us, self.least_row_us)
        return clock, 1.0 + key, 1e-6 * row_us, _told(found.errors)

    def _solve(self, at: tuple[float, float, float], heat: np.ndarray) -> _Solved:
        """All that is linear, for these constants: least squares in which what is far off counts less."""
        log_tau, e0, e1 = at
        tells, nodes, measured_s = self.tells, self.nodes[self.tells], self.measured_s[self.tells]
        slowed = np.clip((heat[tells] - e0) / (e1 - e0), 0.0, 1.0)
        base = np.array([self.base.ratios(tokens) for tokens in self.tokens])
        count = len(self.tokens)
        prior = np.concatenate([base[:, 0], base[:, 1] - base[:, 0], [0.0, 0.0]])
        precision = _precision(count, self.prior_row_us)
        columns = np.empty((len(slowed), 2 * count + 2))
        columns[:, :count] = ((self.steady_s - self.beside_s)[tells] / measured_s)[:, None] * nodes
        columns[:, count:-2] = columns[:, :count] * slowed[:, None]
        columns[:, -2] = self.key_s[tells] / measured_s
        columns[:, -1] = 1e-6 * self.rows[tells] / measured_s
        target = 1.0 - self.beside_s[tells] / measured_s
        solved, size, errors = self._robust(columns, target, precision, prior)
        held, stiff = prior.copy(), precision.copy()
        for index, least in ((-2, self.least_key), (-1, self.least_row_us)):
            if solved[index] < least:
                held[index], stiff[index, index] = least, _HELD
                solved, size, errors = self._robust(columns, target, stiff, held)
        far = size / _LEAST_NOISE
        cost = float(np.where(far < _FAR, far**2, _FAR * (2 * far - _FAR)).sum()) * (_LEAST_NOISE / _TOGETHER) ** 2
        cost += float((solved - prior) @ precision @ (solved - prior))
        cost += ((log_tau - math.log(USUAL_TAU_S)) / _PRIOR_TAU) ** 2
        cost += ((e0 - USUAL_E0) ** 2 + (e1 - USUAL_E1) ** 2) / _PRIOR_E**2
        return _Solved(cost, solved[:count], solved[count:-2], float(solved[-2]), float(solved[-1]), errors)

    def _robust(
        self, columns: np.ndarray, target: np.ndarray, precision: np.ndarray, prior: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The solution, and the size and sign of the relative errors."""
        weight, noise = np.ones(len(target)), _LEAST_NOISE
        for _ in range(_REWEIGHTED):
            weighted = columns * (weight / noise**2)[:, None]
            solved = np.linalg.solve(columns.T @ weighted + precision, weighted.T @ target + precision @ prior)
            errors = columns @ solved - target
            size = np.abs(errors)
            noise = max(_LEAST_NOISE, float(np.median(size)) / 0.6745)
            weight = 1 / np.maximum(size / (_FAR * noise), 1.0)
        return solved, size, errors

    def _heat(self, tau_s: float) -> np.ndarray:
        """In the middle of each step, by the times that were measured."""
        starts = np.flatnonzero(self.first)[1:]
        columns = (self.begin_s, self.measured_s, self.heating, self.steady_s)
        runs = zip(*(np.split(column, starts) for column in columns), strict=True)
        return np.concatenate([heat_within(begin_s, measured_s, tau_s, *of) for begin_s, measured_s, *of in runs])


def _precision(count: int, prior_row_us: float) -> np.ndarray:
    """The inverse of the prior's covariance: cool ratios of `count` sizes, what hot ones have more, the keys' rate, and
    what a decode adds.

    What makes one device slower than another makes it so for all sizes; each by itself is less off.
    """
    covariance = np.zeros((2 * count + 2, 2 * count + 2))
    for block, own, all_of_them in (
        (slice(0, count), _PRIOR_COOL, _PRIOR_ALL_COOL),
        (slice(count, 2 * count), _PRIOR_ADDED, _PRIOR_ALL_ADDED),
    ):
        covariance[block, block] = own**2 * np.eye(count) + all_of_them**2
    covariance[-2, -2] = _PRIOR_KEY**2
    covariance[-1, -1] = prior_row_us**2
    return np.linalg.inv(covariance)


def _is_allowed(at: tuple[float, float, float]) -> bool:
    log_tau, e0, e1 = at
    return 0.01 <= math.exp(log_tau) <= 0.5 and e0 >= 0.0 and e1 <= 1.0 and e1 - e0 >= MIN_GAP - 1e-9


def _nodes(sizes: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """Linear between sizes, held outside, as `ClockModel.ratios`."""
    return np.column_stack([np.interp(sizes, tokens, row) for row in np.eye(len(tokens))])


def _first_telling(run: Mapping[str, Any]) -> int:
    """The first step behind the lead of a run, which says no more than how hot the device was then."""
    lead_s, starts = run.get("lead_s"), run["start_s"]
    if lead_s is None:
        lead_s = min(_FROM_REST_S, starts[-1] / 2)
    return bisect_left(starts, lead_s)


def _begins(run: Mapping[str, Any]) -> list[float]:
    """When each step began on the device: when it was decided upon, or the one before had ended."""
    return begins_on_device(run["start_s"], run["gpu_s"])


def _fit_decodes(
    runs: Sequence[Mapping[str, Any]], fitted: FittedKV, clock: ClockModel
) -> tuple[float, dict[str, Any]]:
    """The ratio of a hot step of decodes to a cool one, and the errors with it."""
    slowed, ratio = [], []
    for run in runs:
        heat, from_step = Heat(clock.tau_s), _first_telling(run)
        columns = (run[name] for name in ("gpu_s", "prefills", "decodes", "keys", "excess"))
        for n, (begin, gpu, chunks, rows, keys, excess) in enumerate(zip(_begins(run), *columns, strict=True)):
            if chunks:
                size = padded(rows + sum(query for query, _ in chunks), fitted.engine.piece_sizes)
                heat.ran(begin, begin + gpu, clock.heating(size))
                continue
            seconds = fitted.decode.seconds(rows, keys, excess)
            if n >= from_step and gpu < _DISTURBED * seconds:
                slowed.append(clock.slowed(heat.at(begin) * math.exp(-0.5 * gpu / clock.tau_s)))
                ratio.append(gpu / seconds)
    if not ratio:
        return clock.decode, {}
    x, y = np.array(slowed), np.array(ratio) - 1.0
    if not x.any():
        return clock.decode, {"decode": _told(-y)}
    added, weight = 0.0, np.ones(len(y))
    for _ in range(_REWEIGHTED):
        added = min(max(0.0, float((weight * x * y).sum() / (weight * x * x).sum())), _MOST_ADDED_DECODE)
        error = np.abs(y - added * x)
        weight = 1 / np.maximum(error / (_FAR * max(_LEAST_NOISE, float(np.median(error)) / 0.6745)), 1.0)
    return 1.0 + added, {"decode": _told((1.0 + added * x) / (1.0 + y) - 1.0)}


def _host_s(run: Mapping[str, Any]) -> list[float | None]:
    """What the CPU took for each step, as far as a run tells."""
    return list(run["host_s"]) if run.get("host_s") else _turns_s(run)


def _turns_s(run: Mapping[str, Any]) -> list[float | None]:
    """What the CPU took from one decision to the next, where it did not wait for the device in between.

    It decides upon a step when it has launched the one before and seen the tokens of the one before that. Where the
    device was done with that one well before, all of the time is the CPU's.
    """
    starts, begins = run["start_s"], _begins(run)
    found: list[float | None] = [None] * len(starts)
    for n in range(2, len(starts) - 1):
        taken = starts[n + 1] - starts[n]
        if begins[n - 1] + run["gpu_s"][n - 1] <= starts[n] + _WELL_BEFORE * taken:
            found[n] = taken
    return found


def _host_costs(runs: Sequence[Mapping[str, Any]], fitted: FittedKV) -> dict[str, HostCost]:
    """What the CPU takes for steps with prompts, by kind.

    The time of whole turns tells, as it has all in it that is done beside. Where the device is always behind, there is
    what was written down of each step: then launches wait for room in the driver's queue, and such steps take longer
    than they need. So it is the lesser ones that are told, not their middle.
    """
    turns: dict[str, list[tuple[StepShape, float]]] = {}
    written: dict[str, list[tuple[StepShape, float]]] = {}
    for run in runs:
        kept = run.get("host_s") or [None] * len(run["start_s"])
        few = run["concurrency"] <= _MOST_TELLING
        columns = (run["prefills"], run["decodes"], _turns_s(run), kept)
        for chunks, rows, turn, own in islice(zip(*columns, strict=True), _first_telling(run), None):
            if not chunks:
                continue
            step = StepShape(chunks, [0] * rows)
            kind = fitted.host.kind(step)
            if turn is not None and (few or own is not None):
                turns.setdefault(kind, []).append((step, turn))
            if own is not None:
                written.setdefault(kind, []).append((step, own))
    costs = {}
    for kind in {*turns, *written}:
        steps, share = turns.get(kind, []), 0.5
        if len(steps) < _FEW:
            steps, share = written.get(kind, []), _UNDISTURBED
        usual = fitted.host.costs.get(kind)
        if usual is None or len(steps) < _FEW:
            continue
        # What it takes per request and chunk is better told by steps that were measured one by one.
        known = [(taken, seconds) for step, taken in steps if (seconds := usual.seconds(step)) > 0.0]
        if len(known) < _FEW:  # points that say it takes nothing
            continue
        factor = float(np.quantile([taken / seconds for taken, seconds in known], share))
        costs[kind] = usual.scaled(min(max(factor, 1 / _MOST_HOST), _MOST_HOST))
    return costs


def _told(errors: np.ndarray) -> dict[str, Any]:
    return {"points": len(errors), "in_sample": summary(errors)}
