"""The planner's results as pages show them. The one place that knows which field says what: where the planner tells
more (intervals, probabilities), only this module has to learn it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dashboard.services.work import TrialAnswer
from planner.basis import Basis
from planner.cost import Cost, cost_of
from planner.deployment import Deployment, PriceList
from planner.intervals import interval
from planner.plan_report import Plan, PlanReport, SloTerm
from planner.simulation import SimulationResult
from planner.step_time import Evidence

Interval = tuple[float, float]

TERMS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2EL"}
_WORDS = {
    Evidence.UNCALIBRATED: "uncalibrated: from data sheets, not from a measured GPU",
    Evidence.EXTRAPOLATED: "extrapolated from what was measured",
    Evidence.INTERPOLATED: "interpolated between measured steps",
    Evidence.MEASURED: "measured",
    Evidence.SCALED: "scaled to what the engine was seen to do from outside",
}
# A share of the steps' time below which it is not worth a word.
_NEGLIGIBLE = 0.01


# ---- numbers -------------------------------------------------------------------------------------------------------


def shown(value: float | None, interval: Interval | None = None, digits: int = 3) -> str:
    """A number with no more digits than its interval allows: the last one is where the interval is wide. Two at least
    unless it is wider than the number, as one alone may be off by more than the interval says.

    Args:
        digits: significant ones, where there is no interval.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    place = magnitude - digits + 1
    if interval is not None:
        half = (interval[1] - interval[0]) / 2
        if half > 0:
            coarsest = magnitude - (half < abs(value))
            place = max(place, min(coarsest, math.floor(math.log10(half))))
    return f"{round(value, -place):,.{max(0, -place)}f}"


def shown_capacity(value: float | None) -> str:
    """How many fit, rounded down: 27.96 sequences are not 28."""
    if value is None or not math.isfinite(value) or value <= 0:
        return shown(value)
    place = math.floor(math.log10(value)) - 2
    return shown(math.floor(value / 10.0**place + 1e-9) * 10.0**place)


def shown_range(interval: Interval | None) -> str:
    """Both ends, to the digits that tell them apart."""
    if interval is None:
        return ""
    return f"{shown(interval[0], interval)} to {shown(interval[1], interval)}"


def change(before: float, after: float) -> str:
    """A relative difference in whole per cent; "the same" where it would be none."""
    text = f"{after / before - 1:+.0%}"
    return "the same" if text in ("+0%", "-0%") else text.replace("-", "−")


def from_to(before: tuple[float, Interval | None], after: tuple[float, Interval | None]) -> str:
    """Two numbers with their intervals, and the relative difference; none where both are shown alike."""
    told = [shown(value, span) for value, span in (before, after)]
    return f"{told[0]} → {told[1]} ms ({'the same' if told[0] == told[1] else change(before[0], after[0])})"


def signed(error: float | None) -> str:
    """A relative error with its sign, in per cent to one decimal."""
    return "–" if error is None else f"{error:+.1%}".replace("-", "−")


def times(factor: float) -> str:
    """A factor for people: 3 times, 0.5 times."""
    return f"{shown(factor, digits=2).removesuffix('.0')} times"


def usd(value: float | None, digits: int = 3) -> str:
    """Dollars and cents; so many digits, which may be fractions of a cent, where it is less than a dollar."""
    if value is None:
        return "no price"
    return f"${value:,.2f}" if value >= 1 else f"${value:.{digits}g}"


# ---- intervals and confidence --------------------------------------------------------------------------------------


def _pair(value: Any) -> Interval | None:
    """An interval in whatever form: low and high of a record, or two numbers."""
    low, high = getattr(value, "low", None), getattr(value, "high", None)
    if low is None and isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        low, high = value
    if low is None or high is None:
        return None
    return float(low), float(high)


def term_interval(term: SloTerm) -> Interval | None:
    """The interval of what a plan achieves in one term of the SLO."""
    return _pair(term.range_ms)


def probability(plan: Plan) -> Interval | None:
    """How likely the plan meets its SLO, 0 to 1: a 90 % interval, where the step times have a known error."""
    found = plan.confidence.slo_probability if plan.confidence else None
    return None if found is None else (found.low, found.high)


def likely(plan: Plan) -> str:
    """How likely a plan meets its SLO, in a table's cell; empty where nothing tells."""
    share = probability(plan)
    if share is None:
        return ""
    low, high = (shown(100 * each, digits=2) for each in share)
    if share[1] >= 1.0:
        return f"≥ {low} %"
    return f"≤ {high} %" if share[0] <= 0.0 else f"{low} to {high} %"


def confidence(plan: Plan) -> str:
    """How sure a plan is, in words."""
    share = probability(plan)
    if share is None:
        if plan.loads is None:
            return "the SLO holds on this load; it was not tried on others"
        return f"the SLO held on {plan.loads.met} of {plan.loads.of} loads, this one and resamples of it"
    met, of = plan.loads.met, plan.loads.of
    low, high = (shown(100 * each, digits=2) for each in share)
    drawn = "draws of load and step times"
    if share[1] >= 1.0:
        return f"it meets the SLO in all {of} {drawn}; so many draws show that it is at least {low} % likely"
    if share[0] <= 0.0:
        return f"it meets the SLO in none of {of} {drawn}; so many draws show that it is at most {high} % likely"
    queue = ""
    if plan.loads.saturated:
        queue = f" (in {plan.loads.saturated} of the others requests arrive faster than they are served)"
    known = f"so few draws show no more than that it is {low} to {high} % likely"
    return f"it meets the SLO in {met} of {of} {drawn}{queue}; {known}"


def is_sure(plan: Plan) -> bool:
    """Whether nothing speaks against it."""
    likely = probability(plan)
    held = plan.loads is None or plan.loads.met == plan.loads.of
    return held and (likely is None or likely[1] >= 0.9)


def measured_instead(report: PlanReport) -> Plan | None:
    """The cheapest plan whose step times were measured, where those of the first were not."""
    if report.plans[0].step_times.basis not in (Basis.TRANSFERRED, Basis.UNCALIBRATED):
        return None
    measured = (Basis.MEASURED, Basis.INTERPOLATED)
    return next((plan for plan in report.plans if plan.step_times.basis in measured), None)


def metric_interval(answer: TrialAnswer, metric: str, at: str) -> Interval | None:
    """The 90 % interval of one number of a trial, from the loads and step times that were drawn.

    Args:
        metric: a distribution of `SimulationResult`, e.g. "ttft_ms". at: one of its fields, e.g. "p99".
    """

    def value(result: SimulationResult | None) -> float | None:
        found = getattr(result, metric, None)
        return None if found is None else getattr(found, at)

    return _interval(value(answer.report.result), [value(each) for each in answer.others])


def number_interval(answer: TrialAnswer, field: str) -> Interval | None:
    """The same of a plain number of `SimulationResult`."""
    return _interval(getattr(answer.report.result, field, None), [getattr(each, field) for each in answer.others])


def _interval(point: float | None, drawn: Sequence[float | None]) -> Interval | None:
    values = [float(each) for each in drawn if each is not None]
    if point is None or not values:
        return None
    found = interval(float(point), values)
    return found.low, found.high


# ---- money ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What one configuration costs under its loads.

    Attributes:
        each: on the given load, then in each draw.
    """

    each: tuple[Cost, ...]

    def told(self, field: str) -> str:
        """One field of `Cost`, to the digits that the draws allow."""
        values = [getattr(cost, field) for cost in self.each]
        if not values:
            return "–"
        if values[0] is None:
            return "no price"
        span = _interval(values[0], values[1:]) if field != "usd_per_hour" else None
        return usd(values[0]) if span is None else f"${shown(values[0], span)}"


def costs(deployment: Deployment, answer: TrialAnswer, prices: PriceList) -> Costs:
    """The cost of a trial; nothing where it does not fit."""
    if answer.report.result is None:
        return Costs(())
    return Costs(tuple(cost_of(deployment, each, prices) for each in (answer.report.result, *answer.others)))


# ---- evidence ------------------------------------------------------------------------------------------------------


def evidence_words(result: SimulationResult) -> str:
    """What the step times of a result rest on, largest share first."""
    shares = result.evidence_shares or {result.evidence: 1.0}
    told = sorted(((share, kind) for kind, share in shares.items() if share >= _NEGLIGIBLE), reverse=True)
    if len(told) == 1:
        return _WORDS[Evidence(told[0][1])]
    return ", ".join(f"{share:.0%} {_WORDS[Evidence(kind)]}" for share, kind in told)


def evidence_word(evidence: Evidence) -> str:
    """What step times rest on."""
    return _WORDS[Evidence(evidence)]


def evidence_tag(result: SimulationResult) -> str:
    """One word beside a number that rests on too little; empty where it rests on measurements."""
    shares = result.evidence_shares or {result.evidence: 1.0}
    for kind in (Evidence.UNCALIBRATED, Evidence.SCALED, Evidence.EXTRAPOLATED):
        if shares.get(kind, 0.0) >= _NEGLIGIBLE:
            return str(kind)
    return ""


def warnings_of_others(report: PlanReport, said: Sequence[str]) -> list[str]:
    """What to know of the plans after the first, each sentence once, with the plans that it is about.

    Args:
        said: sentences that stand elsewhere.
    """
    told: dict[str, list[int]] = {}
    for plan in report.plans[1:]:
        for warning in dict.fromkeys(plan.warnings):
            told.setdefault(warning, []).append(plan.rank)
    return [f"{_plans(ranks)}: {warning}" for warning, ranks in told.items() if warning not in said]


def _plans(ranks: Sequence[int]) -> str:
    """Plan 2; plans 2, 4 and 7 to 9."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [text for run in runs for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    *head, last = texts
    return f"plan{'s' * (len(ranks) > 1)} {', '.join(head)}{' and ' * bool(head)}{last}"


# ---- verdicts ------------------------------------------------------------------------------------------------------


def verdict(is_good: bool) -> str:
    """Pass or fail, as a sign and a word; colour is left to those who see it."""
    return "✓ meets" if is_good else "✗ misses"


def definition(metric: str) -> str:
    """What a metric is, in the planner's own words.

    Args:
        metric: a field of `SimulationResult` or `Plan`.
    """
    for model in (SimulationResult, Plan):
        field = model.model_fields.get(metric)
        if field is not None and field.description:
            return field.description
    return ""


def best(plans: Iterable[Plan]) -> Plan | None:
    """The first."""
    return next(iter(plans), None)
