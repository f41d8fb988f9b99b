"""A calibration from outside: the record that is saved, how it is made, and the step time it gives back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError

from engine.scheduling import StepShape
from planner.errors import UserError
from planner.external.errors import RunErrors, run_errors
from planner.external.fit import NORMAL_90, Fit, fit_factors
from planner.external.replay import Replayed, replay
from planner.external.scaled import NAMES, SCALES, Factors, ScaledStepTime
from planner.external.served_run import ServedRun
from planner.external.server_facts import ServerFacts
from planner.external.settings import ASSUMED, MEMORY_MODEL, ExternalSystem
from planner.schema import Record
from planner.step_time import StepTime, Uncertainty

VERSION = 1
KIND = "memwall-external-calibration"
# Of one run: more requests take longer to replay a hundred times and hardly narrow the factors.
MAX_FITTED = 2000
# A step that stands for many, where a factor's share of a step is asked for.
_TYPICAL_BATCH, _TYPICAL_CONTEXT = 32, 1024
# By how much a number of steps in flight must fit worse than another to be given up, where the base speaks for it.
_MUCH_WORSE = 2.0
# A factor beyond that, or below its inverse, is no longer what it is called.
_FAR_OFF = 3.0
# Errors on requests that were not fitted, as shares, from which on a calibration foretells nothing: TPOT, TTFT. Engines
# that were calibrated from outside are a few per cent off, and TTFT near saturation some tens.
_USELESS_TPOT, _USELESS_TTFT = 0.25, 1.0
# A standard deviation beyond which nothing is known: times of a third to three times as long.
_MOST_UNCERTAIN = 1.0
# How far typical steps of a base may lie from those of the one that was fitted on: one that was fitted anew from the
# same measurements moves by some per cent.
_SAME_BASE = 0.05


class FactorRecord(Record):
    """One factor with its 90 % interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    identified: bool = Field(description="whether the runs show it; if not, the base's value is kept")
    alike: str | None = Field(default=None, description="the factor it cannot be told from")


class RunRecord(Record):
    """One served run."""

    name: str
    num_requests: int
    num_failed: int
    num_fitted: int
    num_held_out: int
    notes: tuple[str, ...]


class ExternalCalibration(Record):
    """Factors on a base step time, fitted to what somebody else's engine did."""

    version: Literal[1] = VERSION
    kind: Literal["memwall-external-calibration"] = KIND
    command: str
    date: str
    model: str
    gpu: str = Field(description="catalog id")
    tensor_parallel_size: int
    kv_cache_dtype: str
    quantization: str | None
    base: str = Field(description="description of the step time that is scaled")
    base_steps_s: tuple[FiniteFloat, ...] | None = Field(
        default=None, description="what typical steps take it: decodes without and with context, and with a prompt"
    )
    factors: dict[str, FactorRecord]
    correlation: tuple[tuple[float, ...], ...] | None = Field(
        default=None, description="of what the factors are off by, in their order; none where it was not kept"
    )
    settings: dict[str, Any] = Field(description="of the simulated server, by vLLM's names")
    origin: dict[str, str] = Field(description="where each setting came from")
    runs: tuple[RunRecord, ...]
    held_out_share: float
    before: RunErrors | None = Field(description="of the base, on the requests that were not fitted")
    after: RunErrors | None = Field(description="of the scaled base, on the same requests")
    fitted: RunErrors = Field(description="of the scaled base, on the requests that were fitted")
    warnings: tuple[str, ...]

    def as_factors(self) -> Factors:
        """The point values."""
        return Factors(**{name: record.value for name, record in self.factors.items()})

    def step_time(self, base: StepTime) -> ScaledStepTime:
        """The base step time, scaled; `planner.serving` adds `factors.arrival_s` to what clients see.

        Raises:
            UserError: the factors were fitted on another base.
        """
        if base.description != self.base:
            raise UserError(
                f"the calibration scales the {_times(self.base)}, but here they are the {_times(base.description)}; "
                "calibrate from the runs again"
            )
        self._check_base(base)
        names = ", ".join(dict.fromkeys(run.name for run in self.runs))
        depth = self.settings.get("pipeline_depth", 1)
        return ScaledStepTime(base, self.as_factors(), names, self.uncertainty(base), depth)

    def _check_base(self, base: StepTime) -> None:
        """
        Raises:
            UserError: the base goes by the same name, but takes other times.
        """
        for then_s, now_s in zip(self.base_steps_s or (), _typical_steps(base), strict=False):
            if abs(now_s - then_s) > _SAME_BASE * then_s:
                raise UserError(
                    f"the calibration scales the {_times(self.base)}, where a typical step took {then_s * 1e3:.3g} ms, "
                    f"and here it takes {now_s * 1e3:.3g} ms; calibrate from the runs again, or leave out the profile "
                    "that was given beside it"
                )

    def uncertainty(self, base: StepTime) -> Uncertainty:
        """Relative standard deviations of a typical decode step and of a typical step with a prompt chunk.

        Each factor's interval counts by the share of the step that it scales, and factors that can make up for each
        other by what both together are off by; what requests that were not fitted are off by on average comes on top.
        """
        floor, step, mixed = _typical_steps(base)
        parts = {"weights": floor, "kv": max(0.0, step - floor), "request_s": float(_TYPICAL_BATCH)}
        tested = self.after or self.fitted
        tpot = tested.tpot.mean if tested.tpot else 0.0
        decode = math.hypot(self._deviation(parts), tpot)
        prefill = math.hypot(self._deviation(parts | {"prefill": max(0.0, mixed - step)}), tested.ttft.p50)
        return Uncertainty(
            decode=min(decode, _MOST_UNCERTAIN),
            prefill=min(prefill, _MOST_UNCERTAIN),
            host=base.uncertainty.host if base.uncertainty else 0.0,
        )

    def _deviation(self, parts: Mapping[str, float]) -> float:
        """Of the sum of parts times their factors, relative to it."""
        seconds = np.array([parts.get(name, 0.0) for name in NAMES])
        factors = [self.factors[name] for name in NAMES]
        total = float(seconds @ [factor.value for factor in factors])
        each = seconds * [(factor.high - factor.low) / (2 * NORMAL_90) for factor in factors]
        correlation = np.eye(len(NAMES)) if self.correlation is None else np.array(self.correlation)
        return math.sqrt(max(0.0, float(each @ correlation @ each))) / total

    def differs(self, model: str, gpu: str, tensor_parallel_size: int, kv_cache_dtype: str) -> str | None:
        """How a deployment differs from the one that was seen, in one sentence; None if it does not."""
        asked = {
            "model": model,
            "gpu": gpu,
            "tensor_parallel_size": tensor_parallel_size,
            "kv_cache_dtype": kv_cache_dtype,
        }
        for name, value in asked.items():
            if getattr(self, name) != value:
                return f"the calibration is of {name} {getattr(self, name)}, not {value}"
        return None

    def check(self, model: str, gpu: str, tensor_parallel_size: int, kv_cache_dtype: str) -> None:
        """Refuse another deployment than the one that was seen.

        Raises:
            UserError: naming what differs.
        """
        fault = self.differs(model, gpu, tensor_parallel_size, kv_cache_dtype)
        if fault is not None:
            raise UserError(fault)

    def failure(self) -> str | None:
        """Why nothing should be planned with it, in one sentence; None if it foretells the runs that it is from."""
        return _failure(self.after, self.fitted)

    def pool(
        self, max_num_seqs: int, max_num_batched_tokens: int, gpu_memory_utilization: float, is_usual: bool = False
    ) -> int | None:
        """KV blocks that requests could hold, where the server said so and its memory was shared out like this.

        Args:
            is_usual: that this is the usual share, and goes with a server of which nothing says the share that it had.
        """
        asked = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        if not (is_usual and self.origin.get("gpu_memory_utilization") == ASSUMED):
            asked["gpu_memory_utilization"] = gpu_memory_utilization
        blocks = self.settings.get("num_gpu_blocks")
        if type(blocks) is not int or self.origin.get("num_gpu_blocks") == MEMORY_MODEL:
            return None
        if any(self.settings.get(name) != value for name, value in asked.items()):
            return None
        return blocks - 1  # vLLM counts the null block


def _times(base: str) -> str:
    """What a base's description means, after an article: that of a transfer begins with its source."""
    return f"step times {'' if base.startswith('from the ') else 'of the '}{base}"


def _typical_steps(base: StepTime) -> tuple[float, float, float]:
    """Seconds of decodes without and with context, and of the latter beside a prompt."""
    decodes = [_TYPICAL_CONTEXT] * _TYPICAL_BATCH
    return (
        base.predict(StepShape(decode_contexts=[0] * _TYPICAL_BATCH)),
        base.predict(StepShape(decode_contexts=decodes)),
        base.predict(StepShape(prefills=[(_TYPICAL_CONTEXT, 0)], decode_contexts=decodes)),
    )


def calibrate_external(
    runs: Sequence[ServedRun],
    external: ExternalSystem,
    facts: ServerFacts,
    *,
    held_out: float = 0.5,
    quantization: str | None = None,
    command: str = "",
    date: str = "",
    progress: Callable[[int], None] | None = None,
) -> ExternalCalibration:
    """Fit on the first part of each run, MAX_FITTED requests at most, and test on the rest.

    Args:
        held_out: share of each run's requests, the last to arrive, that are tested on; 0 to fit to all.
        command, date: provenance.

    Raises:
        UserError: too few requests, or settings that the runs contradict.
    """
    if not 0 <= held_out <= 0.9:
        raise UserError(f"the held-out share is {held_out}; it must be from 0 to 0.9")
    for run in runs:
        if float(np.median(run.ttft_s)) <= 0:
            raise UserError(f"{run.name} has first tokens at the very arrival of requests; was the answer streamed?")
    masks = [np.arange(len(run)) < min(round(len(run) * (1 - held_out)), MAX_FITTED) for run in runs]
    external, fit = _fitted(runs, external, masks, progress)
    system = external.system
    before = [replay(run, system) for run in runs]
    after = [replay(run, system, fit.factors) for run in runs]
    rest = [~mask for mask in masks]
    deployment = external.deployment
    fitted, tested = run_errors(runs, after, masks), run_errors(runs, after, rest)
    assert fitted is not None, "fit_factors refuses runs without fitted requests"
    failure = _failure(tested, fitted)
    return ExternalCalibration(
        command=command,
        date=date,
        model=deployment.model.name,
        gpu=deployment.gpu.id,
        tensor_parallel_size=deployment.tensor_parallel_size,
        kv_cache_dtype=str(deployment.kv_cache_dtype),
        quantization=quantization,
        base=system.step_time.description,
        base_steps_s=_typical_steps(system.step_time),
        factors={name: _factor(fit, name) for name in NAMES},
        correlation=tuple(tuple(round(float(each), 4) for each in row) for row in fit.correlation),
        settings={name: value for name, (value, _) in external.origin.items()}
        | {"pipeline_depth": system.pipeline_depth},
        origin={name: origin for name, (_, origin) in external.origin.items()},
        runs=tuple(_run_record(run, mask) for run, mask in zip(runs, masks, strict=True)),
        held_out_share=held_out,
        before=run_errors(runs, before, rest),
        after=tested,
        fitted=fitted,
        warnings=(*([failure] if failure else []), *_warnings(runs, external, facts, fit, after)),
    )


def _fitted(
    runs: Sequence[ServedRun],
    external: ExternalSystem,
    masks: Sequence[np.ndarray],
    progress: Callable[[int], None] | None,
) -> tuple[ExternalSystem, Fit]:
    """The fit; where nothing says how many steps were in flight, of the number that fits better.

    A profile's times are those of an engine with its own number of steps in flight. That is then the likelier one, as
    what the other hides of the host's time the factors can make up for: it must fit twice as badly to be given up.
    """
    fit = fit_factors(runs, external.system, masks, progress)
    if external.depth_known:
        return external, fit
    other = external.with_depth(2)
    deeper = fit_factors(runs, other.system, masks, progress)
    worse = _MUCH_WORSE if external.system.step_time.pipeline_depth == 2 else 1.0
    return (other, deeper) if deeper.median_error < worse * fit.median_error else (external, fit)


def _factor(fit: Fit, name: str) -> FactorRecord:
    estimate, value = fit.estimates[name], getattr(fit.factors, name)
    return FactorRecord(
        value=value,
        # To the last bit: the two are computed in different orders.
        low=min(estimate.low, value),
        high=max(estimate.high, value),
        identified=estimate.identified,
        alike=estimate.alike,
    )


def _run_record(run: ServedRun, mask: np.ndarray) -> RunRecord:
    num_fitted = int(mask.sum())
    return RunRecord(
        name=run.name,
        num_requests=len(run),
        num_failed=run.num_failed,
        num_fitted=num_fitted,
        num_held_out=len(run) - num_fitted,
        notes=run.notes,
    )


def _failure(tested: RunErrors | None, fitted: RunErrors) -> str | None:
    """How factors fail to foretell the runs that they are from; None if they do not."""
    errors = tested or fitted
    tpot, ttft = errors.tpot.mean if errors.tpot else 0.0, errors.ttft.p50
    if abs(tpot) <= _USELESS_TPOT and abs(ttft) <= _USELESS_TTFT:
        return None
    which = "the requests that it was fitted to" if tested is None else "requests of its runs that it has not seen"
    return (
        f"do not plan with this calibration: on {which} the mean TPOT is off by {tpot:+.0%} and the median TTFT by "
        f"{ttft:+.0%}; units, arrivals or settings are probably not those of the server"
    )


def _warnings(
    runs: Sequence[ServedRun], external: ExternalSystem, facts: ServerFacts, fit: Fit, after: Sequence[Replayed]
) -> list[str]:
    """What a reader should know before trusting the factors."""
    warnings = []
    if not external.depth_known:
        depth, base = external.system.pipeline_depth, external.system.step_time.pipeline_depth
        why = "as the profile's engine has them" if depth == base == 2 else "which fits better"
        warnings.append(f"nothing says how many steps the server has in flight; {depth} are assumed, {why}")
    if external.guessed:
        warnings.append(
            f"{', '.join(external.guessed)}: neither flag nor log says, so a default stands in; the factors absorb it"
        )
    simulated = sum(result.num_preemptions for result in after)
    told = facts.value("num_preemptions")
    if told is not None and abs(told - simulated) > max(5, 0.25 * max(told, simulated)):
        warnings.append(f"the server preempted {told} times, the simulator {simulated} times: check the KV blocks")
    for name in NAMES:
        estimate = fit.estimates[name]
        if not estimate.identified and name in SCALES:
            alike = f": here it looks like {estimate.alike}" if estimate.alike else ""
            warnings.append(f"the runs do not show the factor {name}{alike}; the base's value is kept")
        value = getattr(fit.factors, name)
        if name in SCALES and not 1 / _FAR_OFF <= value <= _FAR_OFF:
            warnings.append(
                f"the factor {name} is {value:.3g}: no engine is so far from the base in this alone, so it stands for "
                "something else, such as a CPU that is the bottleneck; other loads cannot be told with it"
            )
    if not any((run.tpot_s > 0).any() for run in runs):
        warnings.append("no answer has more than one token at a measurable pace, so nothing shows decoding")
    return [*warnings, *external.warnings]


def _is_correlation(rows: Sequence[Sequence[float]], size: int) -> bool:
    """Whether this is a matrix that random numbers can have; rounded ones count."""
    if len(rows) != size or any(len(row) != size for row in rows):
        return False
    matrix = np.array(rows)
    if not np.isfinite(matrix).all() or not np.allclose(matrix, matrix.T) or not np.allclose(np.diag(matrix), 1.0):
        return False
    return bool(np.linalg.eigvalsh(matrix).min() > -1e-3)


def load_external(path: str | Path) -> ExternalCalibration:
    """Read a saved calibration.

    Raises:
        UserError: no such file, no JSON, of another kind or version, or edited to nonsense.
    """
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read as JSON: {getattr(error, 'msg', error)}") from None
    return parse_external(document, path.name)


def parse_external(document: Any, file: str) -> ExternalCalibration:
    """A calibration from parsed JSON, checked.

    Raises:
        UserError: one sentence naming the field.
    """
    if type(document) is not dict or document.get("kind") != KIND:
        raise UserError(f'{file} is no calibration from outside: its kind is not "{KIND}"')
    if document.get("version") != VERSION:
        raise UserError(f"{file} is of version {document.get('version')!r}; this memwall reads version {VERSION}")
    try:
        calibration = ExternalCalibration.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        said = first["msg"].partition(" or instance of ")[0].lower()
        raise UserError(f"{file}: {place}: {said}") from None
    expected = {field.name for field in fields(Factors)}
    if set(calibration.factors) != expected:
        raise UserError(
            f"{file}: factors are {', '.join(sorted(calibration.factors))}, not {', '.join(sorted(expected))}"
        )
    if calibration.correlation is not None and not _is_correlation(calibration.correlation, len(expected)):
        raise UserError(
            f"{file}: correlation must be a symmetric matrix of {len(expected)} × {len(expected)} numbers from -1 to "
            "1, with ones on its diagonal"
        )
    try:
        calibration.as_factors()
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    for name, record in calibration.factors.items():
        if not record.low <= record.value <= record.high:
            raise UserError(f"{file}: factors.{name} is {record.value:g}, outside its interval")
    return calibration
