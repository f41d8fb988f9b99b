"""Fit the factors of `ScaledStepTime` to served runs, with the simulator in the loop.

The simulator replays each run's own arrivals and lengths; the residuals are log(simulated / served) of every fitted
request's TTFT and TPOT. Clipped at what their spread makes likely, they are projected on features of the requests
(`planner.external.moments`), and Gauss-Newton with central differences brings these moments to nothing, in units of a
broad prior around the base's values. The prior does two things: it keeps what the data do not show at the base, and it
is the yardstick of whether they do. A factor that the data narrow to less than half of its prior counts as identified;
any other is held at the base's value and reported with the prior's interval.

Requests of one busy spell err together, so standard errors come from blocks of consecutive requests (the sandwich
estimator), and are never below those of independent errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.scheduling import StepShape
from planner.errors import UserError
from planner.external.moments import orthonormal, tpot_features, ttft_features
from planner.external.replay import Replayed, replay
from planner.external.scaled import NAMES, SCALES, Factors
from planner.external.served_run import ServedRun
from planner.simulation import System
from planner.step_time import TICKS_PER_SECOND

MIN_REQUESTS = 20
# Standard deviations of the prior: scales within a factor of two, mostly; host constants of what engines show.
_SCALE_SD = 0.7
_REQUEST_SHARE = 0.002  # of a decode step without context
_ARRIVAL_SD_S = 0.05
_IDENTIFIED = 0.5
NORMAL_90 = 1.645

# Central differences start from this step (in the prior's standard deviations) and double it until the moments move by
# more than requests jumping from one step to the next can make them.
_FIRST_DIFFERENCE = 0.05
_LAST_DIFFERENCE = 1.0
_CLEAR_MOVE = 10.0
_MAX_ITERATIONS = 12
_GOOD_ENOUGH = 0.02
# What is next to a point, for all factors and for some.
_AROUND = 0.003 * np.array([[1, 1, 1, 1, 0], [-1, -1, -1, -1, 0], [1, -1, 1, -1, 0], [-1, 1, -1, 1, 0]])
_CLIP = 2.5
_MISFIT_CAP = 4.0
_MIN_NOISE = 0.005
_BLOCKS = 20
_LOST = 20.0  # the log ratio of a request that never ended


@dataclass(frozen=True, slots=True)
class Estimate:
    """One factor: its value, a 90 % interval, and whether the runs show it at all.

    Attributes:
        alike: the identified factor that it is hardest to tell from, where it is not identified.
    """

    value: float
    low: float
    high: float
    identified: bool
    alike: str | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """What fitting found.

    Attributes:
        factors: the values, those not identified at the base's.
        estimates: by factor name.
        median_error: of |log(simulated / served)|, over the fitted requests' TTFT and TPOT.
        num_fitted: requests whose latencies were fitted.
        num_simulations: replays that it took.
        quiet: requests that were alone in the system.
        correlation: float64 [factors, factors] of what the factors are off by, in the order of NAMES: what one has too
            much of the runs lets another make up for.
    """

    factors: Factors
    estimates: dict[str, Estimate]
    median_error: float
    num_fitted: int
    num_simulations: int
    quiet: int
    correlation: np.ndarray


def fit_factors(
    runs: Sequence[ServedRun],
    system: System,
    fitted: Sequence[np.ndarray] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Fit:
    """Fit the factors to the runs of one server.

    Args:
        system: what is simulated; its step time is the base.
        fitted: bool [n] per run, whose latencies count; all if None. The others' arrivals and lengths are used.
        progress: called with the number of replays so far.

    Raises:
        UserError: too few requests.
    """
    masks = [np.ones(len(run), bool) for run in runs] if fitted is None else list(fitted)
    count = sum(int(mask.sum()) for mask in masks)
    if count < MIN_REQUESTS:
        total = sum(map(len, runs))
        rest = f" of {total}, the others being held out," if total > count else ""
        raise UserError(f"only {count} answered requests{rest} to fit to; it takes {MIN_REQUESTS}")
    problem = _Problem([_needed(run, mask) for run, mask in zip(runs, masks, strict=True)], system, progress)
    solver = _Solver(problem)
    solver.start(problem.first_guess())
    active = list(range(len(NAMES)))
    while True:
        solver.minimise(active)
        spread = solver.spread(active)
        weakest = int(spread.argmax())
        if spread[weakest] <= _IDENTIFIED or len(active) == 1:
            break
        solver.hold(active.pop(weakest), active)
    # Whatever is held may be off by as much as the prior allows, and the others make up for it: so all of them count.
    spread = solver.full_spread()
    estimates = {}
    for i, name in enumerate(NAMES):
        identified = i in active
        sd = float(spread[i]) if identified else 1.0
        estimates[name] = problem.estimate(i, float(solver.x[i]), sd, identified, solver.alike.get(i))
    error = float(np.median(np.abs(np.concatenate(solver.residuals))))
    found = problem.factors(solver.x)
    return Fit(found, estimates, error, count, problem.num_simulations, problem.num_quiet, solver.correlation())


def _needed(run: ServedRun, mask: np.ndarray) -> tuple[ServedRun, np.ndarray]:
    """The run without what arrives after the last fitted request has ended."""
    if not mask.any():
        raise UserError(f"{run.name} has no request to fit to")
    kept = run.arrival_s <= run.last_token_s[mask].max()
    shortened = replace(
        run,
        **{
            name: getattr(run, name)[kept]
            for name in ("arrival_s", "input_tokens", "output_tokens", "first_token_s", "last_token_s")
        },
        scheduled_s=None,
        itls=None,
    )
    return shortened, mask[kept]


def quiet_requests(run: ServedRun) -> np.ndarray:
    """bool [n]: requests that no other overlapped, from their arrival to their last token."""
    latest_before = np.concatenate([[-np.inf], np.maximum.accumulate(run.last_token_s)[:-1]])
    next_arrival = np.append(run.arrival_s[1:], np.inf)
    return (latest_before <= run.arrival_s) & (next_arrival >= run.last_token_s)


@dataclass(frozen=True, slots=True)
class _Part:
    """One metric of one run.

    Attributes:
        basis: float64 [n, features], orthonormal.
        blocks: int64 [n]: requests of one busy spell.
    """

    basis: np.ndarray
    blocks: np.ndarray


class _Problem:
    """Parameters in units of the prior's standard deviation, and the residuals that they leave."""

    def __init__(
        self,
        runs: Sequence[tuple[ServedRun, np.ndarray]],
        system: System,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.runs = runs
        self.system = system
        self.num_simulations = 0
        self.num_quiet = sum(int((quiet_requests(run) & mask).sum()) for run, mask in runs)
        self._progress = progress
        floor_s = system.step_time.ticks(StepShape(decode_contexts=[0])) / TICKS_PER_SECOND
        self._units = np.array([*[_SCALE_SD] * len(SCALES), _REQUEST_SHARE * floor_s, _ARRIVAL_SD_S])
        # The base may have too much time per request, but not much more than it has in all.
        self._lowest = np.array([*[-np.log(100) / _SCALE_SD] * len(SCALES), -2.5, 0.0])
        self.parts = self._parts()

    def _parts(self) -> list[_Part]:
        """What the residuals fall into: TTFT and TPOT of each run, in the order of `residuals`."""
        parts, first = [], 0
        blocks_each = max(4, _BLOCKS // len(self.runs))
        for run, mask in self.runs:
            places = np.flatnonzero(mask)
            size = max(1, -(-places.size // blocks_each))
            blocks = first + np.arange(places.size) // size
            several = run.output_tokens[places] > 1
            parts.append(_Part(orthonormal(ttft_features(run)[places]), blocks))
            if several.any():
                parts.append(_Part(orthonormal(tpot_features(run)[places[several]]), blocks[several]))
            first = int(blocks[-1]) + 1
        return parts

    def factors(self, x: np.ndarray) -> Factors:
        values = self.bounded(x) * self._units
        named = dict(zip(NAMES, values.tolist(), strict=True))
        return Factors(**named | {name: float(np.exp(named[name])) for name in SCALES})

    def bounded(self, x: np.ndarray) -> np.ndarray:
        """x within what makes sense: scales within a factor of 100, no request answered before it is sent."""
        return np.clip(x, self._lowest, -np.array([*self._lowest[: len(SCALES)], -np.inf, -np.inf]))

    def estimate(self, i: int, x: float, sd: float, identified: bool, alike: str | None) -> Estimate:
        low, middle, high = (x + z * sd for z in (-NORMAL_90, 0.0, NORMAL_90))
        values = [value * float(self._units[i]) for value in (middle, low, high)]
        if NAMES[i] in SCALES:
            values = [float(np.exp(value)) for value in values]
        elif NAMES[i] == "arrival_s":
            values = [max(value, 0.0) for value in values]
        if not identified:
            values[0] = 1.0 if NAMES[i] in SCALES else 0.0
        return Estimate(*values, identified, None if identified else alike)

    def residuals(self, x: np.ndarray) -> list[np.ndarray]:
        """log(simulated / served) of each part."""
        factors = self.factors(x)
        parts = []
        for run, mask in self.runs:
            replayed = replay(run, self.system, factors)
            self.num_simulations += 1
            parts += _residuals(run, replayed, mask)
        if self._progress is not None:
            self._progress(self.num_simulations)
        return parts

    def first_guess(self) -> np.ndarray:
        """From requests that were alone, where there are some; else the base, all of it slower or faster."""
        x = np.zeros(len(NAMES))
        ratios, prefill = [], []
        for run, mask in self.runs:
            base = replay(run, self.system)
            self.num_simulations += 1
            quiet = quiet_requests(run) & mask
            chosen = quiet if quiet.sum() >= 5 else mask
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = run.tpot_s[chosen] / base.tpot_s[chosen]
            ratios += [value for value in ratio.tolist() if np.isfinite(value) and value > 0]
            if quiet.sum() >= 5:
                prefill += (run.ttft_s[quiet] / base.ttft_s[quiet]).tolist()
        scale = float(np.log(np.clip(np.median(ratios), 0.1, 10))) if ratios else 0.0
        x[: len(SCALES)] = scale / _SCALE_SD
        prefill = [value for value in prefill if value > 0]
        if prefill:
            x[0] = float(np.log(np.clip(np.median(prefill), 0.1, 10))) / _SCALE_SD
        return x


def _residuals(run: ServedRun, replayed: Replayed, mask: np.ndarray) -> list[np.ndarray]:
    several = mask & (run.output_tokens > 1)
    tiny = 1e-6
    parts = []
    for served, simulated, chosen in (
        (run.ttft_s, replayed.ttft_s, mask),
        (run.tpot_s, replayed.tpot_s, several),
    ):
        ratio = np.log(np.maximum(simulated[chosen], tiny) / np.maximum(served[chosen], tiny))
        if ratio.size:
            parts.append(np.nan_to_num(ratio, nan=_LOST))
    return parts


class _Solver:
    """Gauss-Newton on the moments, with a standard normal prior on x."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.x = np.zeros(len(NAMES))
        self.loss = np.inf
        self.alike: dict[int, str] = {}
        self._jacobian: np.ndarray | None = None
        self._tried: list[tuple[np.ndarray, list[np.ndarray]]] = []
        self._steps = np.full(len(NAMES), _FIRST_DIFFERENCE)

    def start(self, x: np.ndarray) -> None:
        self.x = x
        self.residuals = self.problem.residuals(x)
        self._rescale()

    def _rescale(self) -> None:
        """The noise of each part: its median distance from nothing, so that far off a clip does not hide the slope."""
        self._noise = [max(1.4826 * float(np.median(np.abs(part))), _MIN_NOISE) for part in self.residuals]
        self.loss = self._loss(self.residuals, self.x)

    def _clipped(self, residuals: list[np.ndarray]) -> list[np.ndarray]:
        return [np.clip(part / noise, -_CLIP, _CLIP) for part, noise in zip(residuals, self._noise, strict=True)]

    def _moments(self, residuals: list[np.ndarray]) -> np.ndarray:
        """float64 [moments], each of unit variance if residuals were independent."""
        clipped = self._clipped(residuals)
        return np.concatenate([part.basis.T @ r for part, r in zip(self.problem.parts, clipped, strict=True)])

    def _loss(self, residuals: list[np.ndarray], x: np.ndarray) -> float:
        return 0.5 * float((self._moments(residuals) ** 2).sum() + (x**2).sum())

    def minimise(self, active: list[int]) -> None:
        """Iterate over the active parameters until nothing improves.

        A request that jumps from one step to the next makes the loss jump, too: it differs by half between factors that
        are 0.2 % apart. So the direction of descent may lead to a higher one; then the best of the points that told the
        direction is the next. And a point may be low by chance; then it counts as what lies around it, once.
        """
        is_reassessed = False
        for _ in range(_MAX_ITERATIONS):
            before = self.loss
            self._jacobian = self._differences(active)
            if not self._move(active):
                if is_reassessed:
                    break
                is_reassessed = True
                self._reassess()
                before = self.loss
                if not self._move(active):
                    break
            improved = before - self.loss
            self._rescale()
            if improved < _GOOD_ENOUGH * before:
                break

    def _differences(self, active: list[int]) -> np.ndarray:
        """float64 [moments, active]: how the moments move with the parameters."""
        self._tried = []
        return np.stack([self._difference(i) for i in active], axis=1)

    def _move(self, active: list[int]) -> bool:
        return self._step(active) or self._step_aside()

    def _reassess(self) -> None:
        """Take the median of the loss here and around here for the loss."""
        around = [self.problem.bounded(self.x + shift) for shift in _AROUND]
        self.loss = float(np.median([self.loss, *(self._loss(self.problem.residuals(x), x) for x in around)]))

    def _step_aside(self) -> bool:
        """Move to the best of the points of the last differences; False if none of them is better."""
        losses = [self._loss(residuals, x) for x, residuals in self._tried]
        best = int(np.argmin(losses))
        if losses[best] >= self.loss:
            return False
        self.loss, (self.x, self.residuals) = losses[best], self._tried[best]
        return True

    def _difference(self, i: int) -> np.ndarray:
        while True:
            step = self._steps[i]
            ahead, behind = self.x.copy(), self.x.copy()
            ahead[i] += step
            behind[i] -= step
            ahead, behind = self.problem.bounded(ahead), self.problem.bounded(behind)
            tried = [(x, self.problem.residuals(x)) for x in (ahead, behind)]
            self._tried += tried
            moved = self._moments(tried[0][1]) - self._moments(tried[1][1])
            if step >= _LAST_DIFFERENCE or np.linalg.norm(moved) > _CLEAR_MOVE:
                return moved / (ahead[i] - behind[i])
            self._steps[i] = min(2 * step, _LAST_DIFFERENCE)

    def _normal(self) -> np.ndarray:
        return self._jacobian.T @ self._jacobian + np.eye(self._jacobian.shape[1])

    def _step(self, active: list[int]) -> bool:
        """Move to a lower loss along the Gauss-Newton direction; False if there is none."""
        gradient = self._jacobian.T @ self._moments(self.residuals) + self.x[active]
        direction = -np.linalg.solve(self._normal(), gradient)
        direction *= min(1.0, 1.0 / max(np.abs(direction).max(), 1e-12))
        for shorter in (1.0, 0.5, 0.25, 0.125):
            x = self.x.copy()
            x[active] += shorter * direction
            x = self.problem.bounded(x)
            residuals = self.problem.residuals(x)
            loss = self._loss(residuals, x)
            if loss < self.loss:
                self.x, self.residuals, self.loss = x, residuals, loss
                return True
        return False

    def _covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the parameters in the last Jacobian: variances over blocks, and the inverse of the normal matrix."""
        inverse = np.linalg.inv(self._normal())
        num_blocks = 1 + max(int(part.blocks.max()) for part in self.problem.parts)
        columns = []
        for part, clipped in zip(self.problem.parts, self._clipped(self.residuals), strict=True):
            sums = np.zeros((num_blocks, part.basis.shape[1]))
            np.add.at(sums, part.blocks, part.basis * clipped[:, None])
            columns.append(sums)
        scores = np.concatenate(columns, axis=1) @ self._jacobian
        scores -= scores.mean(axis=0)
        middle = scores.T @ scores * (num_blocks / max(1, num_blocks - 1))
        sandwich = inverse @ (middle + np.eye(len(inverse))) @ inverse
        return np.maximum(np.diag(sandwich), np.diag(inverse)), inverse

    def spread(self, active: list[int]) -> np.ndarray:
        """Standard errors of the active parameters in units of the prior's, at most 1."""
        variances, _ = self._covariance()
        return np.minimum(np.sqrt(variances), 1.0)

    def full_spread(self) -> np.ndarray:
        """Standard errors of all parameters, none of them taken as known.

        Moments that stay away from nothing say that the model is not quite the engine: they widen all of them, by two
        at most, as the blocks show part of it already.
        """
        everything = list(range(len(NAMES)))
        self._jacobian = self._differences(everything)
        moments = self._moments(self.residuals)
        misfit = float((moments**2).sum()) / max(1, moments.size - len(everything))
        return np.minimum(self.spread(everything) * np.clip(misfit, 1.0, _MISFIT_CAP) ** 0.5, 1.0)

    def correlation(self) -> np.ndarray:
        """Of the parameters in the last Jacobian, which `full_spread` leaves for all of them."""
        inverse = self._covariance()[1]
        deviations = np.sqrt(np.diag(inverse))
        return inverse / np.outer(deviations, deviations)

    def hold(self, i: int, rest: list[int]) -> None:
        """Put a parameter back to the base's value, and note which of the rest it is hardest to tell from."""
        inverse = self._covariance()[1]
        both = sorted([*rest, i])
        place = both.index(i)
        correlation = inverse[place] / np.sqrt(np.diag(inverse) * inverse[place, place])
        correlation[place] = 0.0
        nearest = int(np.abs(correlation).argmax())
        if abs(correlation[nearest]) > 0.3:
            self.alike[i] = NAMES[both[nearest]]
        x = self.x.copy()
        x[i] = 0.0
        self.start(x)
