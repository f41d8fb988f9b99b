"""Fit the factors of `ScaledStepTime` to served runs, with the simulator in the loop.

The simulator replays each run's own arrivals and lengths; the residuals are log(simulated / served) of every fitted
request's TTFT and TPOT. Gauss-Newton with central differences minimises them under a robust loss, in units of a broad
prior around the base's values. The prior does two things: it keeps what the data do not show at the base, and it is
the yardstick of whether they do. A factor that the data narrow to less than half of its prior counts as identified;
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
from planner.external.replay import Replayed, replay
from planner.external.scaled import NAMES, SCALES, Factors
from planner.external.served_run import ServedRun
from planner.simulation import System
from planner.step_time import TICKS_PER_SECOND

MIN_REQUESTS = 20
# Standard deviations of the prior: scales within a factor of two, mostly; host constants of what engines show.
_SCALE_SD = 0.7
_STEP_SHARE = 0.1  # of a decode step without context
_REQUEST_SHARE = 0.002
_ARRIVAL_SD_S = 0.05
_IDENTIFIED = 0.5
_NORMAL_90 = 1.645

# Steps of the central differences, in the prior's standard deviations: wide enough that batches do not just jump.
_DIFFERENCES = (0.05, 0.05, 0.05, 0.2, 0.2, 0.1)
# A constant must lower the loss (half a chi-squared) by this much to be in the model.
_WORTH = 4.0
_MAX_ITERATIONS = 12
_GOOD_ENOUGH = 1e-3
_HUBER = 1.345
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
    """

    factors: Factors
    estimates: dict[str, Estimate]
    median_error: float
    num_fitted: int
    num_simulations: int
    quiet: int


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
        raise UserError(f"only {count} answered requests to fit to; it takes {MIN_REQUESTS}")
    problem = _Problem([_needed(run, mask) for run, mask in zip(runs, masks, strict=True)], system, progress)
    solver = _Solver(problem)
    solver.start(problem.first_guess())
    active = _scales(solver)
    for i in range(len(SCALES), len(NAMES)):
        active = _with_constant(solver, active, i)
    spread = dict(zip(active, solver.spread(active).tolist(), strict=True))
    estimates = {}
    for i, name in enumerate(NAMES):
        identified = spread.get(i, 1.0) <= _IDENTIFIED
        sd = spread[i] if identified else 1.0
        estimates[name] = problem.estimate(i, float(solver.x[i]), sd, identified, solver.alike.get(i))
    error = float(np.median(np.abs(solver.residuals)))
    return Fit(problem.factors(solver.x), estimates, error, count, problem.num_simulations, problem.num_quiet)


def _scales(solver: _Solver) -> list[int]:
    """Fit the three scales, and hold those at the base's value that the runs do not show."""
    active = list(range(len(SCALES)))
    while True:
        solver.minimise(active)
        spread = solver.spread(active)
        weakest = int(spread.argmax())
        if spread[weakest] <= _IDENTIFIED or len(active) == 1:
            return active
        solver.note_alike(active[weakest], active)
        dropped = active.pop(weakest)
        solver.hold(dropped)


def _with_constant(solver: _Solver, active: list[int], i: int) -> list[int]:
    """Add a host constant if the runs show it, it takes none of the others away, and it lowers the loss by enough."""
    before = solver.state()
    wider = [*active, i]
    solver.minimise(wider)
    spread = solver.spread(wider)
    gain = (before.loss - solver.loss_in(before)) * before.residuals.size
    if spread.max() <= _IDENTIFIED and gain > _WORTH:
        return wider
    if spread[-1] > _IDENTIFIED or spread[:-1].max() > _IDENTIFIED:
        solver.note_alike(i, wider)
    solver.restore(before)
    return active


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
        self._units = np.array(
            [_SCALE_SD, _SCALE_SD, _SCALE_SD, _STEP_SHARE * floor_s, _REQUEST_SHARE * floor_s, _ARRIVAL_SD_S]
        )
        self._floor_s = floor_s
        self.blocks = self._block_numbers()

    def _block_numbers(self) -> np.ndarray:
        """int64 [residuals]: the block of each residual; a block is a run of consecutive requests."""
        numbers, first = [], 0
        for run, mask in self.runs:
            places = np.flatnonzero(mask)
            size = max(1, -(-places.size // max(2, _BLOCKS // len(self.runs))))
            block = first + np.arange(places.size) // size
            several = run.output_tokens[places] > 1
            numbers += [block, block[several]]
            first = int(block[-1]) + 1
        return np.concatenate(numbers)

    @property
    def kinds(self) -> np.ndarray:
        """int64 [residuals]: run and metric of each, as each has its own noise."""
        kinds = []
        for number, (run, mask) in enumerate(self.runs):
            several = int((run.output_tokens[mask] > 1).sum())
            kinds += [np.full(int(mask.sum()), 2 * number), np.full(several, 2 * number + 1)]
        return np.concatenate(kinds)

    def factors(self, x: np.ndarray) -> Factors:
        values = x * self._units
        named = dict(zip(NAMES, values.tolist(), strict=True))
        named |= {name: float(np.exp(np.clip(named[name], -4.6, 4.6))) for name in SCALES}
        # Steps cannot take less than nothing, and a request is not answered before it is sent.
        named["step_s"] = max(named["step_s"], -0.5 * self._floor_s * named["weights"])
        named["request_s"] = max(named["request_s"], -0.005 * self._floor_s)
        named["arrival_s"] = max(named["arrival_s"], 0.0)
        return Factors(**named)

    def estimate(self, i: int, x: float, sd: float, identified: bool, alike: str | None) -> Estimate:
        low, middle, high = (x + z * sd for z in (-_NORMAL_90, 0.0, _NORMAL_90))
        values = [value * float(self._units[i]) for value in (middle, low, high)]
        if NAMES[i] in SCALES:
            values = [float(np.exp(value)) for value in values]
        elif NAMES[i] == "arrival_s":
            values = [max(value, 0.0) for value in values]
        if not identified:
            values[0] = 1.0 if NAMES[i] in SCALES else 0.0
        return Estimate(*values, identified, None if identified else alike)

    def residuals(self, x: np.ndarray) -> np.ndarray:
        factors = self.factors(x)
        parts = []
        for run, mask in self.runs:
            replayed = replay(run, self.system, factors)
            self.num_simulations += 1
            parts += _residuals(run, replayed, mask)
        if self._progress is not None:
            self._progress(self.num_simulations)
        return np.concatenate(parts)

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
        parts.append(np.nan_to_num(ratio, nan=_LOST))
    return parts


class _Solver:
    """Gauss-Newton under a Huber loss and a standard normal prior on x."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.x = np.zeros(len(NAMES))
        self.loss = np.inf
        self.alike: dict[int, str] = {}
        self._jacobian: np.ndarray | None = None

    def start(self, x: np.ndarray) -> None:
        self.x = x
        self.residuals = self.problem.residuals(x)
        self._kinds = self.problem.kinds
        self._rescale()

    def _rescale(self) -> None:
        """The noise of each kind of residual, from its median distance from the median."""
        self._noise = np.ones_like(self.residuals)
        for kind in np.unique(self._kinds):
            chosen = self._kinds == kind
            values = self.residuals[chosen]
            spread = 1.4826 * float(np.median(np.abs(values - np.median(values))))
            self._noise[chosen] = max(spread, _MIN_NOISE)
        self.loss = self._loss(self.residuals, self.x)

    def _loss(self, residuals: np.ndarray, x: np.ndarray) -> float:
        size = np.abs(residuals / self._noise)
        robust = np.where(size <= _HUBER, 0.5 * size**2, _HUBER * (size - 0.5 * _HUBER))
        return float((robust.sum() + 0.5 * (x**2).sum()) / residuals.size)

    def _weights(self) -> np.ndarray:
        size = np.maximum(np.abs(self.residuals / self._noise), _HUBER)
        return _HUBER / size / self._noise**2

    def minimise(self, active: list[int]) -> None:
        """Iterate over the active parameters until nothing improves."""
        for _ in range(_MAX_ITERATIONS):
            before = self.loss
            self._jacobian = self._differences(active)
            if not self._step(active):
                break
            improved = before - self.loss
            self._rescale()
            if improved < _GOOD_ENOUGH * before:
                break

    def _differences(self, active: list[int]) -> np.ndarray:
        columns = []
        for i in active:
            ahead, behind = self.x.copy(), self.x.copy()
            difference = _DIFFERENCES[i]
            ahead[i] += difference
            behind[i] -= difference
            moved = self.problem.residuals(ahead) - self.problem.residuals(behind)
            # A request that changes its batch jumps; one jump must not pass for a slope.
            columns.append(np.clip(moved / (2 * difference), -50.0, 50.0))
        return np.stack(columns, axis=1)

    def _normal(self) -> np.ndarray:
        weighted = self._jacobian * self._weights()[:, None]
        return self._jacobian.T @ weighted + np.eye(self._jacobian.shape[1])

    def _step(self, active: list[int]) -> bool:
        """Move to a lower loss along the Gauss-Newton direction; False if there is none."""
        gradient = self._jacobian.T @ (self._weights() * self.residuals) + self.x[active]
        direction = -np.linalg.solve(self._normal(), gradient)
        direction *= min(1.0, 1.5 / max(np.abs(direction).max(), 1e-12))
        for shorter in (1.0, 0.5, 0.25, 0.125):
            x = self.x.copy()
            x[active] += shorter * direction
            residuals = self.problem.residuals(x)
            loss = self._loss(residuals, x)
            if loss < self.loss:
                self.x, self.residuals, self.loss = x, residuals, loss
                return True
        return False

    def _covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the parameters in the last Jacobian: variances over blocks, and the inverse of the normal matrix."""
        inverse = np.linalg.inv(self._normal())
        score = self._jacobian * (self._weights() * self.residuals)[:, None]
        blocks = np.unique(self.problem.blocks)
        sums = np.stack([score[self.problem.blocks == block].sum(axis=0) for block in blocks])
        sums -= sums.mean(axis=0)
        scale = blocks.size / max(1, blocks.size - 1)
        sandwich = inverse @ (scale * sums.T @ sums + np.eye(len(inverse))) @ inverse
        return np.maximum(np.diag(sandwich), np.diag(inverse)), inverse

    def spread(self, active: list[int]) -> np.ndarray:
        """Standard errors of the active parameters in units of the prior's, at most 1."""
        variances, _ = self._covariance()
        return np.minimum(np.sqrt(variances), 1.0)

    def note_alike(self, i: int, active: list[int]) -> None:
        """Note the parameter that this one is hardest to tell from, of those in the last Jacobian."""
        _, inverse = self._covariance()
        place = active.index(i)
        correlation = inverse[place] / np.sqrt(np.diag(inverse) * inverse[place, place])
        correlation[place] = 0.0
        nearest = int(np.abs(correlation).argmax())
        if abs(correlation[nearest]) > 0.3:
            self.alike[i] = NAMES[active[nearest]]

    def hold(self, i: int) -> None:
        """Put a parameter back to the base's value."""
        x = self.x.copy()
        x[i] = 0.0
        self.start(x)

    def state(self) -> _State:
        """What `restore` goes back to."""
        return _State(self.x, self.residuals, self._noise, self.loss, self._jacobian)

    def restore(self, state: _State) -> None:
        self.x, self.residuals, self._noise = state.x, state.residuals, state.noise
        self.loss, self._jacobian = state.loss, state.jacobian

    def loss_in(self, state: _State) -> float:
        """The present loss in the noise of an earlier state, to compare the two."""
        noise, self._noise = self._noise, state.noise
        loss = self._loss(self.residuals, self.x)
        self._noise = noise
        return loss


@dataclass(frozen=True, slots=True)
class _State:
    x: np.ndarray
    residuals: np.ndarray
    noise: np.ndarray
    loss: float
    jacobian: np.ndarray | None
