"""What served steps say of the clock and of mixed steps: requests that come and go, with steps of every size.

Steps that are measured one by one follow their like. Served ones do not, and a device's clock remembers: it is told
best by steps in the order in which serving makes them. From such a run are fitted, by what padded numbers of tokens,

    time = (steady + m · key_s · decode keys) · (cool + (hot - cool) · h)         as `planner.profile.clock` has it

cool and hot of every size that was seen, the constants of h, m, and the ratio of hot decodes to cool ones. Priors are
the clock's own tables, so that a run of a few seconds changes only what it knows.

Numpy and the standard library only: calibration fits on the GPU machine what it has just measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.profile.clock import MIN_GAP, USUAL_E0, USUAL_E1, USUAL_TAU_S, ClockModel, Heat
from planner.profile.fit import FittedKV
from planner.profile.regression import summary
from planner.profile.tables import padded

# How far a ratio of the clock's tables may be off, as each was measured a few times among others.
_PRIOR_COOL, _PRIOR_ADDED = 0.03, 0.05
# Likewise of the keys' rate beside prompts, and of log(tau), e0 and e1.
_PRIOR_KEY, _PRIOR_TAU, _PRIOR_E = 0.5, 0.5, 0.15
# A size that was seen less often has no ratio of its own.
_FEW = 6
# Relative errors: no step is known better than the least; beyond so many deviations one has a cause of its own. Those of
# a power limit that is held once per second, when steps take up to a tenth longer, belong to the mean.
_LEAST_NOISE, _FAR = 0.005, 6.0
_ROUNDS, _REWEIGHTED = 6, 4
_MOST_ADDED = 1.0  # a hot step takes at most twice as long as a cool one


@dataclass(frozen=True)
class ServedFit:
    """What was fitted.

    Attributes:
        clock: with every size that was seen. key_ratio: what the keys of decodes cost beside prompts, as a multiple of
            what points measured one by one say.
        errors: of steps with prompts and of decodes, in sample: {"prompt": {"points":, "median":, "p90":}, ...}.
    """

    clock: ClockModel
    key_ratio: float
    errors: dict[str, Any]

    def applied(self, fitted: FittedKV) -> FittedKV:
        """The fit with what mixed steps take."""
        return replace(fitted, prompt=replace(fitted.prompt, key_s=fitted.prompt.key_s * self.key_ratio))


def fit_served(runs: Sequence[Mapping[str, Any]], fitted: FittedKV, clock: ClockModel | None) -> ServedFit | None:
    """Fit runs of the "served" table of a profile.

    Args:
        runs: columns of equal length: start_s, gpu_s, prefills, decodes (how many), keys and excess, as
            `planner.profile.shape` and `planner.profile.decode` count them.
        clock: of the clock's own tables.

    Returns:
        None if there is no clock, or the runs have hardly any steps with prompts.
    """
    if clock is None:
        return None
    prompts = _Prompts.of(runs, fitted, clock)
    if prompts is None:
        return None
    found = prompts.fit()
    decode, decode_errors = _fit_decodes(runs, fitted, found.clock)
    clock = replace(found.clock, decode=decode)
    return ServedFit(clock, found.key_ratio, found.errors | decode_errors)


@dataclass(frozen=True, eq=False)
class _Solved:
    """For given constants: cool ratios, what hot ones have more, the keys' rate less 1, and relative errors."""

    cost: float
    cool: np.ndarray
    added: np.ndarray
    key: float
    errors: np.ndarray


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Steps with prompts of all runs.

    Attributes:
        base: the clock as its tables have it. tokens: the sizes that get a ratio.
        nodes: float64 [steps, sizes], how much of each size's ratio a step has.
        steady_s, key_s, measured_s: float64 [steps]; key_s: what the keys of decodes take of the steady time.
        begin_s: float64 [steps]; first: whether a step is the first of its run.
    """

    base: ClockModel
    tokens: tuple[int, ...]
    nodes: np.ndarray
    steady_s: np.ndarray
    key_s: np.ndarray
    measured_s: np.ndarray
    begin_s: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, runs: Sequence[Mapping[str, Any]], fitted: FittedKV, clock: ClockModel) -> _Prompts | None:
        """None if there are hardly any."""
        sizes, steady, keys, measured, begins, first = [], [], [], [], [], []
        for run in runs:
            is_first = True
            for begin, gpu, chunks, rows, of_decodes in zip(
                _begins(run), run["gpu_s"], run["prefills"], run["decodes"], run["keys"], strict=True
            ):
                if not chunks:
                    continue
                prompt = fitted.prompt
                tokens = rows + sum(query for query, _ in chunks)
                sizes.append(padded(tokens, fitted.engine.piece_sizes))
                steady.append(prompt.seconds_of(chunks, rows, of_decodes))
                keys.append(prompt.key_s * of_decodes)
                measured.append(gpu)
                begins.append(begin)
                first.append(is_first)
                is_first = False
        if len(sizes) < 5 * _FEW:
            return None
        largest = max(fitted.engine.piece_sizes, default=0)
        seen = {size for size, count in Counter(sizes).items() if count >= _FEW and size <= largest}
        tokens = tuple(sorted(seen.union(clock.tokens)))
        columns = (np.array(each, float) for each in (steady, keys, measured, begins))
        return cls(clock, tokens, _nodes(np.array(sizes, float), tokens), *columns, np.array(first, bool))

    def fit(self) -> ServedFit:
        """tau, e0 and e1 are looked for around what is usual, in ever smaller steps; all else follows from them."""
        heats: dict[float, np.ndarray] = {}

        def solved(at: tuple[float, float, float]) -> _Solved:
            if at[0] not in heats:
                heats[at[0]] = self._heat(math.exp(at[0]))
            return self._solve(at, heats[at[0]])

        best = (math.log(USUAL_TAU_S), USUAL_E0, USUAL_E1 - 0.1)
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
        clock = ClockModel(math.exp(best[0]), *best[1:], self.tokens, tuple(found.cool.tolist()), tuple(hot.tolist()))
        return ServedFit(clock, max(0.0, 1.0 + found.key), {"prompt": _told(found.errors)})

    def _solve(self, at: tuple[float, float, float], heat: np.ndarray) -> _Solved:
        """All that is linear, for these constants: least squares in which what is far off counts less."""
        log_tau, e0, e1 = at
        slowed = np.clip((heat - e0) / (e1 - e0), 0.0, 1.0)
        base = np.array([self.base.ratios(tokens) for tokens in self.tokens])
        count = len(self.tokens)
        prior = np.concatenate([base[:, 0], base[:, 1] - base[:, 0], [0.0]])
        width = np.concatenate([np.full(count, _PRIOR_COOL), np.full(count, _PRIOR_ADDED), [_PRIOR_KEY]])
        columns = np.empty((len(heat), 2 * count + 1))
        columns[:, :count] = (self.steady_s / self.measured_s)[:, None] * self.nodes
        columns[:, count:-1] = columns[:, :count] * slowed[:, None]
        keys, solved = self.key_s / self.measured_s, prior
        weight, noise = np.ones(len(heat)), _LEAST_NOISE
        for _ in range(_REWEIGHTED):
            columns[:, -1] = keys * (self.nodes @ solved[:count] + slowed * (self.nodes @ solved[count:-1]))
            weighted = columns * (weight / noise**2)[:, None]
            matrix = columns.T @ weighted + np.diag(width**-2.0)
            solved = np.linalg.solve(matrix, weighted.sum(axis=0) + prior / width**2)
            errors = columns @ solved - 1.0
            size = np.abs(errors)
            noise = max(_LEAST_NOISE, float(np.median(size)) / 0.6745)
            weight = 1 / np.maximum(size / (_FAR * noise), 1.0)
        far = size / _LEAST_NOISE
        cost = float(np.where(far < _FAR, far**2, _FAR * (2 * far - _FAR)).sum())
        cost += float((((solved - prior) / width) ** 2).sum())
        cost += ((log_tau - math.log(USUAL_TAU_S)) / _PRIOR_TAU) ** 2
        cost += ((e0 - USUAL_E0) ** 2 + (e1 - USUAL_E1) ** 2) / _PRIOR_E**2
        return _Solved(cost, solved[:count], solved[count:-1], float(solved[-1]), errors)

    def _heat(self, tau_s: float) -> np.ndarray:
        """In the middle of each step, by the times that were measured."""
        found = np.empty(len(self.begin_s))
        heat = Heat(tau_s)
        for i, (begin, gpu, first) in enumerate(
            zip(self.begin_s.tolist(), self.measured_s.tolist(), self.first.tolist(), strict=True)
        ):
            if first:
                heat = Heat(tau_s)
            found[i] = 1.0 - (1.0 - heat.at(begin)) * math.exp(-0.5 * gpu / tau_s)
            heat.ran(begin, begin + gpu, hot=True)
        return found


def _is_allowed(at: tuple[float, float, float]) -> bool:
    log_tau, e0, e1 = at
    return 0.005 <= math.exp(log_tau) <= 1.0 and e0 >= 0.0 and e1 <= 1.0 and e1 - e0 >= MIN_GAP - 1e-9


def _nodes(sizes: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """Linear between sizes, held outside, as `ClockModel.ratios`."""
    return np.column_stack([np.interp(sizes, tokens, row) for row in np.eye(len(tokens))])


def _begins(run: Mapping[str, Any]) -> list[float]:
    """When each step began on the device: when it was decided upon, or the one before had ended."""
    begins, end = [], -math.inf
    for start, gpu in zip(run["start_s"], run["gpu_s"], strict=True):
        begins.append(max(start, end))
        end = begins[-1] + gpu
    return begins


def _fit_decodes(
    runs: Sequence[Mapping[str, Any]], fitted: FittedKV, clock: ClockModel
) -> tuple[float, dict[str, Any]]:
    """The ratio of a hot step of decodes to a cool one, and the errors with it."""
    slowed, ratio = [], []
    for run in runs:
        heat = Heat(clock.tau_s)
        for begin, gpu, chunks, rows, keys, excess in zip(
            _begins(run), run["gpu_s"], run["prefills"], run["decodes"], run["keys"], run["excess"], strict=True
        ):
            if chunks:
                heat.ran(begin, begin + gpu, hot=True)
                continue
            slowed.append(clock.slowed(heat.at(begin) * math.exp(-0.5 * gpu / clock.tau_s)))
            ratio.append(gpu / fitted.decode.seconds(rows, keys, excess))
    if not ratio:
        return clock.decode, {}
    x, y = np.array(slowed), np.array(ratio) - 1.0
    if not x.any():
        return clock.decode, {"decode": _told(-y)}
    added, weight = 0.0, np.ones(len(y))
    for _ in range(_REWEIGHTED):
        added = max(0.0, float((weight * x * y).sum() / (weight * x * x).sum()))
        error = np.abs(y - added * x)
        weight = 1 / np.maximum(error / (_FAR * max(_LEAST_NOISE, float(np.median(error)) / 0.6745)), 1.0)
    return 1.0 + added, {"decode": _told((1.0 + added * x) / (1.0 + y) - 1.0)}


def _told(errors: np.ndarray) -> dict[str, Any]:
    return {"points": len(errors), "in_sample": summary(errors)}
