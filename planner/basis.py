"""What a result's step times rest on, in one word, and how far they may be off."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from planner.schema import Record
from planner.simulation import SimulationResult
from planner.step_time import WEAKEST_FIRST, Evidence, StepTime

# From this share of the steps' time on a weaker evidence is what the whole is named after.
_WEIGHTY_SHARE = 0.01


class Basis(StrEnum):
    """What the step times of a deployment rest on."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    TRANSFERRED = "transferred"
    SCALED = "scaled"
    UNCALIBRATED = "uncalibrated"


#: In the order from the best to the worst.
MEANING = {
    Basis.MEASURED: "steps that were measured",
    Basis.INTERPOLATED: "interpolated between measured steps",
    Basis.EXTRAPOLATED: "1 % or more of the steps' time lies outside of what was measured",
    Basis.SCALED: "scaled to an engine that was seen from outside",
    Basis.TRANSFERRED: "measured on something else, and transferred",
    Basis.UNCALIBRATED: "data sheet × stated efficiencies, nothing measured",
}
MARKS = {basis: basis.value[0].upper() for basis in Basis}


class StepTimes(Record):
    """Where the step times of a result come from."""

    basis: Basis
    """In one word: the weakest evidence that 1 % or more of the steps' time rests on."""
    shares: dict[Evidence, float]
    """Share of the steps' time by what it rests on."""
    description: str
    """The profile, calibration or data sheet."""
    decode_uncertainty: float | None
    """Relative standard deviation of the times of decode steps, as one unknown factor; None if nothing tells."""
    prefill_uncertainty: float | None
    """The same of steps with prompt chunks."""
    host_uncertainty: float | None = None
    """The same of what the host takes to launch a step; None as well where a plan was made before that was told."""

    @classmethod
    def of(cls, result: SimulationResult, step_time: StepTime) -> StepTimes:
        """Of a simulation with this model."""
        uncertainty = step_time.uncertainty
        return cls(
            basis=basis_of(result.evidence_shares, step_time),
            shares=result.evidence_shares,
            description=step_time.description,
            decode_uncertainty=uncertainty.decode if uncertainty else None,
            prefill_uncertainty=uncertainty.prefill if uncertainty else None,
            host_uncertainty=uncertainty.host if uncertainty else None,
        )


def basis_of(shares: Mapping[Evidence, float], step_time: StepTime) -> Basis:
    """The one word for these shares of evidence."""
    if step_time.evidence is Evidence.EXTRAPOLATED:  # a model of nothing but extrapolations is one of something else
        return Basis.TRANSFERRED
    weighty = [evidence for evidence in WEAKEST_FIRST if shares.get(evidence, 0.0) >= _WEIGHTY_SHARE]
    return Basis((weighty[0] if weighty else step_time.evidence).value)
