"""The clock of a device that runs into its power limit: prompt steps take longer the more of them there were.

A step of matrix products draws more power than the device may take for long, so that the device lowers its clock; in
between, while it decodes, it recovers. How far it has got is told by its heat E, between 0 and 1: the share of time
spent in prompt steps, of which the past counts ever less, and small steps less than large ones.

    E(t + d) = u - (u - E(t)) · exp(-d / tau)         u = n / (n + 170) in a step with prompt chunks of n tokens with
                                                      its decodes and padding, 0 otherwise
    time     = steady · (cool + (hot - cool) · h)     h = clip((E - e0) / (e1 - e0), 0, 1), E in the middle of the step

`steady` is what a profile says of the step: measured among equal ones, in a stream of which the first are cool and the
last hot. `cool` and `hot` are ratios to it by number of tokens: 512 tokens on an H200 take 0.83 of their steady time
between decodes, and 1.18 times as long as that behind others. Small steps draw less power: their matrix units wait for
weights. What a step needs to read the keys of requests that decode beside its prompts is no matter of this clock, and
left out of `steady` here. Steps of decodes alone slow down a little, too, by one ratio that is told by what they take
right behind prompt steps; at rest their steady time is right.

Numpy and the standard library only: calibration fits on the GPU machine what it has just measured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What served loads on three H200s showed, of two KV formats on two of them: taken where no series tells, and what a
# series that tells little leaves alone. tau was between 0.04 and 0.08 s there, e0 between 0.24 and 0.32, e1 between
# 0.52 and 0.77; and a step of so many tokens heats half as much as one of very many: between 110 and 210, so that it is
# not fitted again.
USUAL_TAU_S, USUAL_E0, USUAL_E1, HALF_TOKENS = 0.055, 0.27, 0.68, 170.0
# How far the truth may be from that before a series has to say so: log(tau), e0, e1.
_PRIOR = (0.5, 0.15, 0.15)
MIN_GAP = 0.1  # between e0 and e1
_TAUS = tuple(float(tau) for tau in 0.02 * 1.25 ** np.arange(15))  # to 0.45 s
_E0S = tuple(float(each) for each in np.arange(0.0, 0.81, 0.1))
_E1S = tuple(float(each) for each in np.arange(0.4, 1.01, 0.1))
# Rounds of looking closer around the best, each in half the steps.
_ROUNDS = 4
# Relative errors of single steps: none is known better than the least, and beyond so many deviations one has a cause
# of its own.
_LEAST_NOISE, _FAR = 0.003, 3.0
# A long step heats itself; where it is slowed down by more than this in its middle, it tells nothing of its cool time.
_MOST_SLOWED = 0.5
_LEAST_COOL = 0.3  # of a hot step's time: no clock falls by more
_LEAST_HOT = 0.9  # of a cool step's time: less is not noise


@dataclass(frozen=True)
class ClockModel:
    """What was fitted.

    Attributes:
        tau_s: time constant. e0, e1: heat below which steps take their cool time, and from which on their hot one.
        tokens: numbers of tokens, ascending. cool, hot: ratios to the steady time there; hot is not less than cool.
        decode: ratio of a step of decodes alone that is hot to one that is cool, at least 1.
        half_tokens: a step with prompts of so many heats half as much as one of very many; 0 where all heat alike.
    """

    tau_s: float
    e0: float
    e1: float
    tokens: tuple[int, ...]
    cool: tuple[float, ...]
    hot: tuple[float, ...]
    decode: float = 1.0
    half_tokens: float = HALF_TOKENS

    def heating(self, tokens: int) -> float:
        """The heat that a device comes to which does nothing but steps with prompts of so many tokens, padded."""
        return _heating(tokens, self.half_tokens)

    def slowed(self, heat: float) -> float:
        """From 0, the cool time, to 1, the hot one."""
        return min(max((heat - self.e0) / (self.e1 - self.e0), 0.0), 1.0)

    def ratios(self, tokens: int) -> tuple[float, float]:
        """Cool and hot ratio: linear between measured numbers of tokens, held outside of them."""
        at, cool, hot = self.tokens, self.cool, self.hot
        high = bisect_right(at, tokens)
        if high == 0:
            return cool[0], hot[0]
        if high == len(at):
            return cool[-1], hot[-1]
        low = high - 1
        share = (tokens - at[low]) / (at[high] - at[low])
        return cool[low] + share * (cool[high] - cool[low]), hot[low] + share * (hot[high] - hot[low])

    def prompt_factor(self, tokens: int, heat: float, steady_s: float) -> float:
        """What the steady time of a step with prompt chunks is multiplied by.

        Args:
            tokens: of the step, padded.
            heat: when it begins on the device.
            steady_s: its steady time: the longer it takes, the nearer it comes to its own heat.
        """
        cool, hot = self.ratios(tokens)
        at_start = cool + (hot - cool) * self.slowed(heat)
        own = self.heating(tokens)
        middle = own - (own - heat) * math.exp(-0.5 * steady_s * at_start / self.tau_s)
        return cool + (hot - cool) * self.slowed(middle)

    def decode_factor(self, heat: float, steady_s: float) -> float:
        """The same of a step of decodes alone; exactly 1 up to a heat of e0, as it only cools the device."""
        if heat <= self.e0:
            return 1.0
        return 1.0 + (self.decode - 1.0) * self.slowed(heat * math.exp(-0.5 * steady_s / self.tau_s))

    def is_felt_by_decodes(self, heat: float) -> bool:
        """Whether a step of decodes that begins at this heat takes longer than its steady time."""
        return self.decode > 1.0 and heat > self.e0


def _heating(tokens: int, half_tokens: float = HALF_TOKENS) -> float:
    return tokens / (tokens + half_tokens)


class Heat:
    """How hot a device is. Steps of decodes alone need not be told of: they are time that goes by.

    Args:
        tau: time constant, in the unit of all times here.
    """

    __slots__ = ("_at", "_level", "_tau")

    def __init__(self, tau: float) -> None:
        self._tau = tau
        self._level = 0.0
        self._at = 0

    def at(self, time: float) -> float:
        """The heat at a time not before the end of the last prompt step."""
        if not self._level:
            return 0.0
        return self._level * math.exp(-max(0, time - self._at) / self._tau)

    def ran(self, begin: float, end: float, heating: float) -> None:
        """The device ran a step; heating: `ClockModel.heating` of one with prompt chunks, 0 of others."""
        if heating:
            self._level = heating - (heating - self.at(begin)) * math.exp((begin - end) / self._tau)
            self._at = end


def heat_within(
    begin_s: np.ndarray, seconds: np.ndarray, tau_s: float, heating: np.ndarray, steady_s: np.ndarray
) -> np.ndarray:
    """The heat in the middle of prompt steps on a device that was cool before the first, float64 [n].

    Args:
        begin_s, seconds: float64 [n], when each begins and how long it takes, ascending.
        heating: float64 [n], as `ClockModel.heating` has it.
        steady_s: float64 [n], what tells where their middles are: what a step took by chance must not foretell itself.
    """
    heat, found = Heat(tau_s), np.empty(len(seconds))
    columns = (each.tolist() for each in (begin_s, seconds, heating, steady_s))
    for i, (begin, taken, own, steady) in enumerate(zip(*columns, strict=True)):
        found[i] = own - (own - heat.at(begin)) * math.exp(-0.5 * steady / tau_s)
        heat.ran(begin, begin + taken, own)
    return found


def begins_on_device(earliest: Iterable[float], seconds: Iterable[float]) -> list[float]:
    """When steps begin that run one behind the other: when the one before has ended, or as soon as they can."""
    begins, end = [], -math.inf
    for first, taken in zip(earliest, seconds, strict=True):
        begins.append(max(first, end))
        end = begins[-1] + taken
    return begins


# ---- fit -------------------------------------------------------------------------------------------------------------


def fit_clock(section: Mapping[str, Any] | None) -> ClockModel | None:
    """Fit the "clock" section of a profile; it must be valid. None without one, or if it has no points.

    cool_s is the time of a step that begins on a cool device: what it heats itself until its middle is taken out again.
    hot_s is its time behind many of its like, which small ones do not heat all the way.
    """
    if not section or not section.get("points"):
        return None
    tau_s, e0, e1 = _fit_series(section.get("series") or ())
    rows: dict[int, list[Mapping[str, Any]]] = {}
    for row in section["points"]:
        rows.setdefault(row["tokens"], []).append(row)
    # Where a step takes much longer on a cool device the CPU was late with its launches: that is not the clock.
    means = {each: _means(rows[each]) for each in sorted(rows)}
    tokens = [each for each, (cool, hot, _) in means.items() if hot >= _LEAST_HOT * cool]
    if not tokens:
        return None
    unknown = ClockModel(tau_s, e0, e1, (), (), ())
    cool, hot, share = [], [], 1.0
    for each in tokens:
        measured_cool, measured_hot, cool_s = means[each]
        heating = unknown.heating(each)
        own = unknown.slowed(heating * (1.0 - math.exp(-0.5 * cool_s / tau_s)))
        settled = unknown.slowed(heating)
        if own <= _MOST_SLOWED:
            # A small step is hardly heated by its like. What it does tell must not be blown up.
            added = (measured_hot - measured_cool) / max(settled - own, 1.0 - _MOST_SLOWED)
            alone = max(measured_cool - own * added, _LEAST_COOL * measured_hot)
            share = alone / (alone + added)
        if share > 1.0:
            # What feels nothing of the clock may by noise be faster when hot.
            measured_hot, share = (measured_cool + measured_hot) / 2, 1.0
        hot.append(measured_hot / (share + (1.0 - share) * settled))
        cool.append(share * hot[-1])
    decodes = [row["hot_s"] / row["cool_s"] for row in section.get("decode_points") or ()]
    decode = max(1.0, float(np.median(decodes))) if decodes else 1.0
    return ClockModel(tau_s, e0, e1, tuple(tokens), tuple(cool), tuple(hot), decode)


def launched_ahead(section: Mapping[str, Any] | None) -> dict[int, float]:
    """Seconds that prompts took behind others, by tokens: the CPU had launched them in time."""
    found: dict[int, list[float]] = {}
    for row in (section or {}).get("points") or ():
        found.setdefault(row["tokens"], []).append(row["hot_s"])
    return {tokens: sum(each) / len(each) for tokens, each in found.items()}


def _means(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Cool and hot ratio of one number of tokens, which may have been measured several times; and the cool time."""
    weights = [row.get("samples") or 1 for row in rows]

    def mean(values: list[float]) -> float:
        return float(np.average(values, weights=weights))

    cool, hot = (mean([row[name] / row["steady_s"] for row in rows]) for name in ("cool_s", "hot_s"))
    return cool, hot, mean([row["cool_s"] for row in rows])


def _fit_series(series: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """tau, e0 and e1 that explain how steps get slower one behind the other.

    Each series has a cool and a hot time of its own, by least squares for given tau, e0 and e1; those are looked for
    on a grid, then closer around its best point. Single steps that were disturbed count no more than a few deviations.
    A series that never comes to its hot time, or has it from the start, tells little: what is usual then decides.
    """
    usual = (USUAL_TAU_S, USUAL_E0, USUAL_E1)
    measured = [_Series.of(each) for each in series if len(each["gpu_s"]) > 3]
    if not measured:
        return usual
    grid = [(tau, e0, e1) for tau in _TAUS for e0 in _E0S for e1 in _E1S if e1 - e0 >= MIN_GAP - 1e-9]
    grid.insert(0, usual)
    heats: dict[float, list[np.ndarray]] = {}

    def errors_at(at: tuple[float, float, float]) -> np.ndarray:
        tau, e0, e1 = at
        if tau not in heats:
            heats[tau] = [each.heat(tau) for each in measured]
        return _errors(measured, heats[tau], e0, e1)

    errors = {at: errors_at(at) for at in grid}
    noise = max(_LEAST_NOISE, min(map(_deviation, errors.values())))

    def cost(at: tuple[float, float, float], errors: np.ndarray) -> float:
        from_usual = (math.log(at[0] / USUAL_TAU_S), at[1] - USUAL_E0, at[2] - USUAL_E1)
        prior = sum((each / width) ** 2 for each, width in zip(from_usual, _PRIOR, strict=True))
        return float((np.minimum(np.abs(errors / noise), _FAR) ** 2).sum()) + prior

    costs = {at: cost(at, errors[at]) for at in grid}
    best = min(costs, key=costs.get)
    widths = (math.log(1.25), 0.1, 0.1)
    for _ in range(_ROUNDS):
        widths = tuple(width / 2 for width in widths)
        start = None
        while start != best:
            start = best
            around = [
                (start[0] * math.exp(i * widths[0]), start[1] + j * widths[1], start[2] + k * widths[2])
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
                for k in (-1, 0, 1)
            ]
            for at in around:
                if at not in costs and at[1] >= 0.0 and at[2] <= 1.0 and at[2] - at[1] >= MIN_GAP - 1e-9:
                    costs[at] = cost(at, errors_at(at))
            best = min(costs, key=costs.get)
    return best


@dataclass(frozen=True)
class _Series:
    """Prompt steps one behind the other on a cool device, float64 [n] in seconds, and how they heat it."""

    begin_s: np.ndarray
    gpu_s: np.ndarray
    heating: np.ndarray

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Series:
        heating = np.full(len(row["gpu_s"]), _heating(row["tokens"]))
        return cls(np.array(row["begin_s"], float), np.array(row["gpu_s"], float), heating)

    def heat(self, tau_s: float) -> np.ndarray:
        """In the middle of each step, by the times that were measured."""
        return heat_within(self.begin_s, self.gpu_s, tau_s, self.heating, self.gpu_s)


def _errors(series: Sequence[_Series], heats: Sequence[np.ndarray], e0: float, e1: float) -> np.ndarray:
    """Relative errors of all steps, with the best cool and hot time of each series."""
    found = []
    for each, heat in zip(series, heats, strict=True):
        slowed = np.clip((heat - e0) / (e1 - e0), 0.0, 1.0)
        weight = 1 / each.gpu_s
        for _ in range(3):
            cool, added = _line(slowed, each.gpu_s, weight)
            errors = (cool + added * slowed) / each.gpu_s - 1
            far = np.abs(errors) / max(_LEAST_NOISE, _deviation(errors))
            weight = 1 / each.gpu_s / np.sqrt(np.maximum(far / _FAR, 1.0))
        found.append(errors)
    return np.concatenate(found)


def _line(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Constant and slope, not below 0, of a weighted line."""
    w = weight**2 / (weight**2).sum()
    mean_x, mean_y = float(w @ x), float(w @ y)
    spread = float(w @ (x - mean_x) ** 2)
    slope = max(0.0, float(w @ ((x - mean_x) * (y - mean_y))) / spread) if spread > 1e-12 else 0.0
    return mean_y - slope * mean_x, slope


def _deviation(errors: np.ndarray) -> float:
    return float(np.median(np.abs(errors))) / 0.6745
