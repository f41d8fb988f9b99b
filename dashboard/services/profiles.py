"""What a profile holds, as pages show it: measured points, the fit through them, and how far it is off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

from engine.scheduling import StepShape
from planner.hardware import GpuSpec
from planner.kv_format import KVCacheDtype
from planner.model import ModelSpec
from planner.profile.decode import decode_errors
from planner.profile.library import Match, find_profile, load_profiles, why_unusable
from planner.profile.prompt import prompt_errors
from planner.profile.schema import Profile
from planner.profile.tables import Point

_MOST_CURVES = 6
_STEPS_PER_CURVE = 24


def available(paths: tuple[str, ...] | None) -> dict[str, Profile]:
    """The user's profiles and then the shipped ones, by their files' names; of several of one name the later numbered.

    Raises:
        UserError: one cannot be read.
    """
    found: dict[str, Profile] = {}
    for profile in load_profiles(paths):
        others = sum(each.name == profile.name for each in found.values())
        found[f"{profile.name} ({others + 1})" if others else profile.name] = profile
    return found


def nearest(
    paths: tuple[str, ...] | None, model: ModelSpec, gpu: GpuSpec, dtype: KVCacheDtype = KVCacheDtype.BFLOAT16
) -> Match | None:
    """The profile from which the step times of such a deployment on one GPU come; None where data sheets serve.

    Raises:
        UserError: one cannot be read.
    """
    usable = [each for each in load_profiles(paths) if why_unusable(each, model, gpu, enforce_eager=False) is None]
    return find_profile(model, gpu, dtype, 1, usable)


@dataclass(frozen=True)
class MeasuredStep:
    """One point: where it is on the axis, its time, its spread."""

    at: int
    seconds: float
    low_s: float
    high_s: float
    samples: int


@dataclass(frozen=True)
class Curve:
    """Measured points of one kind of step, and the fit through them as (at, seconds)."""

    name: str
    measured: tuple[MeasuredStep, ...]
    fitted: tuple[tuple[int, float], ...]


def decode_curves(profile: Profile, dtype: str) -> tuple[Curve, ...]:
    """Decode steps of equal contexts, one curve per batch."""
    fitted = profile.fitted(dtype)
    groups: dict[int, list[Point]] = {}
    for point in profile.tables.kv[dtype].decode:
        if len(set(point.decodes)) == 1:
            groups.setdefault(point.batch, []).append(point)
    curves = []
    for batch in _spread(sorted(groups)):
        points = sorted(groups[batch], key=lambda point: point.decodes[0][0])
        contexts = _between(points[0].decodes[0][0], points[-1].decodes[0][0])
        line = [(at, fitted.seconds(StepShape(decode_contexts=[at] * batch))) for at in contexts]
        name = f"{batch} decode{'s' * (batch > 1)}"
        curves.append(Curve(name, tuple(_step(point, point.decodes[0][0]) for point in points), tuple(line)))
    return tuple(curves)


def prefill_curves(profile: Profile, dtype: str) -> tuple[Curve, ...]:
    """Prompt chunks, one curve per context that stands before them."""
    fitted = profile.fitted(dtype)
    groups: dict[int, list[Point]] = {}
    for point in profile.tables.kv[dtype].prefill:
        groups.setdefault(point.prefills[0][1], []).append(point)
    curves = []
    for context in _spread(sorted(groups)):
        points = sorted(groups[context], key=lambda point: point.prefills[0][0])
        queries = _between(points[0].prefills[0][0], points[-1].prefills[0][0])
        line = [(at, fitted.seconds(StepShape(prefills=[(at, context)], num_sampled=1))) for at in queries]
        name = f"after {context:,} tokens"
        curves.append(Curve(name, tuple(_step(point, point.prefills[0][0]) for point in points), tuple(line)))
    return tuple(curves)


def _step(point: Point, at: int) -> MeasuredStep:
    return MeasuredStep(at, point.step_s, point.low_s, point.high_s, point.samples)


def _spread(values: list[int]) -> list[int]:
    """A few of them, the first and the last included."""
    if len(values) <= _MOST_CURVES:
        return values
    return sorted({values[round(i * (len(values) - 1) / (_MOST_CURVES - 1))] for i in range(_MOST_CURVES)})


def _between(low: int, high: int) -> list[int]:
    """Whole numbers from low to high, evenly by ratio."""
    low = max(1, low)
    if high <= low:
        return [low]
    return sorted({round(low * (high / low) ** (i / _STEPS_PER_CURVE)) for i in range(_STEPS_PER_CURVE + 1)})


@dataclass(frozen=True)
class ParityPoint:
    """One prediction beside its measurement, in the same unit."""

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Parity:
    """Predictions of one kind."""

    name: str
    points: tuple[ParityPoint, ...]

    @property
    def median_error(self) -> float:
        return median(abs(point.error) for point in self.points) if self.points else 0.0


@lru_cache(64)
def left_out_parity(name: str, paths: tuple[str, ...] | None, dtype: str) -> tuple[Parity, ...]:
    """Every measured step beside what a fit to all the others predicts for it."""
    profile = available(paths)[name]
    fitted, tables = profile.fitted(dtype), profile.tables.kv[dtype].on_device(profile.launched_ahead)
    fitted = fitted.plain or fitted  # points tell of the fit to points, not of what a service added
    prompts = prompt_errors(tables.prefill, tables.mixed, fitted.decode, fitted.prompt, fitted.engine)
    found = (
        ("decode steps", tables.decode, decode_errors(tables.decode, fitted.decode, fitted.shape, fitted.engine)),
        ("prompt chunks", tables.prefill, prompts["prefill"]),
        ("mixed steps", tables.mixed, prompts["mixed"]),
    )
    groups = []
    for kind, points, (_, left_out) in found:
        pairs = tuple(
            ParityPoint(_name(point), 1e3 * point.step_s, 1e3 * point.step_s * (1 + error))
            for point, error in zip(points, left_out, strict=False)
        )
        if pairs:
            groups.append(Parity(kind, pairs))
    return tuple(groups)


def _name(point: Point) -> str:
    parts = [f"chunk of {query:,} after {context:,}" for query, context in point.prefills[:2]]
    if len(point.prefills) > 2:
        parts.append(f"{len(point.prefills) - 2} more chunks")
    if point.decodes:
        parts.append(f"{point.batch} decodes" if not point.prefills else f"{sum(c for _, c in point.decodes)} decodes")
    return ", ".join(parts)


@dataclass(frozen=True)
class ErrorRow:
    """How far the fit of one table is off; relative errors."""

    table: str
    points: int
    in_sample: dict[str, float] | None
    left_out: dict[str, float] | None


@lru_cache(64)
def errors(name: str, paths: tuple[str, ...] | None, dtype: str) -> tuple[ErrorRow, ...]:
    """The leave-one-out errors of a profile's fit, table by table."""
    profile = available(paths)[name]
    stored: dict[str, Any] = profile.record.kv[dtype].fit or {}
    found = stored or profile.fitted(dtype).errors()
    return tuple(_rows(found))


def _rows(found: dict[str, Any]) -> Iterable[ErrorRow]:
    for table, content in found.items():
        if isinstance(content, dict) and content.get("points"):
            yield ErrorRow(table, content["points"], content.get("in_sample"), content.get("leave_one_out"))
