"""What each KV format was measured to cost in quality: the record of `python -m calibration.kv_quality`.

A format's cost depends on the model. The record is of one small model, so that what is said of another one from it is
an indication, and says so.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from planner.errors import UserError
from planner.memory import KVCacheDtype
from planner.schema import Record

RECORD = "kv_quality.json"
REFERENCE = KVCacheDtype.BFLOAT16


class KVQuality(Record):
    """The quality term of a KV format, against bfloat16 on the same text; shares are of 1."""

    kv_cache_dtype: str
    perplexity_increase_percent: float
    perplexity_increase_interval_percent: tuple[float, float] = Field(description="95 %, documents resampled")
    kl_nats_per_token: float = Field(description="KL(bfloat16 || this), mean")
    kl_p99_nats: float = Field(description="99th percentile over tokens")
    top1_agreement: float = Field(description="tokens at which both have the same most probable next token")
    retrieval: float | None = Field(description="planted values found again, all distances; None if not measured")
    retrieval_reference: float | None = Field(description="the same with bfloat16")
    tokens: int = Field(description="decoded tokens that were compared")
    model_parameters: int = Field(description="of the model that it was measured on, not of the planned one")
    date: str = Field(description="of the measurement")


class _Read(BaseModel):
    """The part of a record that is read; the rest of it is for people and for `calibration`."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _Estimate(_Read):
    value: float = Field(ge=0)
    interval: tuple[float, float]

    @field_validator("interval")
    @classmethod
    def _in_order(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] <= interval[1]:
            raise ValueError("an interval has a lower and an upper end, neither of them negative")
        return interval


class _Divergence(_Read):
    mean: float = Field(ge=-1e-6)
    p99: float


class _Retrieval(_Read):
    trials: int = Field(ge=1)
    exact: int = Field(ge=0)


class _Variant(_Read):
    name: str
    tokens: int = Field(ge=1)
    kl: _Divergence
    perplexity_ratio: _Estimate
    top1_agreement: _Estimate
    retrieval: tuple[_Retrieval, ...]

    @property
    def found_again(self) -> float | None:
        trials = sum(each.trials for each in self.retrieval)
        return sum(each.exact for each in self.retrieval) / trials if trials else None


class _Model(_Read):
    parameters: int = Field(ge=1)


class KVQualityStudy(_Read):
    """A record, as far as planning needs it."""

    version: Literal[1]
    suite: Literal["kv_quality"]
    date: str
    model: _Model
    variants: tuple[_Variant, ...]

    def of(self, dtype: KVCacheDtype) -> KVQuality | None:
        """What a format costs as the engine runs it, with its residual window and in all layers; None if unmeasured."""
        found = {variant.name: variant for variant in self.variants}
        measured, reference = found.get(dtype.value), found.get(REFERENCE.value)
        if measured is None:
            return None
        low, high = (_percent(ratio) for ratio in measured.perplexity_ratio.interval)
        return KVQuality(
            kv_cache_dtype=dtype.value,
            perplexity_increase_percent=_percent(measured.perplexity_ratio.value),
            perplexity_increase_interval_percent=(low, high),
            kl_nats_per_token=measured.kl.mean,
            kl_p99_nats=measured.kl.p99,
            top1_agreement=measured.top1_agreement.value,
            retrieval=measured.found_again,
            retrieval_reference=reference.found_again if reference else None,
            tokens=measured.tokens,
            model_parameters=self.model.parameters,
            date=self.date,
        )


def read_kv_quality(file: Path) -> KVQualityStudy:
    """A record of `python -m calibration.kv_quality`.

    Raises:
        UserError: the file cannot be read, or holds something else or another version.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return _parse(text, str(file))


@cache
def load_kv_quality() -> KVQualityStudy | None:
    """The record that comes with the planner; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    file = resources.files("planner") / "data" / RECORD
    return _parse(file.read_text(encoding="utf-8"), RECORD) if file.is_file() else None


def quality_fault(dtype: KVCacheDtype, study: KVQualityStudy | None, most_percent: float | None) -> str | None:
    """Why a format is not good enough, or None. bfloat16 always is: the others are compared with it.

    Args:
        most_percent: most that the perplexity may increase, by the upper end of its interval; None for any.
    """
    if most_percent is None or dtype is REFERENCE:
        return None
    found = study.of(dtype) if study else None
    if found is None:
        return f"what {dtype} KV costs in quality was never measured, so that it may be more than {most_percent:g} %"
    high = found.perplexity_increase_interval_percent[1]
    if high <= most_percent:
        return None
    return (
        f"{dtype} KV may increase perplexity by {high:.2g} % (upper end of 95 %, on {parameters(found)}), more than "
        f"the {most_percent:g} % that are allowed"
    )


def parameters(quality: KVQuality) -> str:
    """The model that it was measured on."""
    return f"a model of {quality.model_parameters / 1e6:.3g} M parameters"


def described(quality: KVQuality | None) -> str:
    """A quality term in one line."""
    if quality is None:
        return "not measured"
    low, high = quality.perplexity_increase_interval_percent
    parts = [
        f"perplexity {quality.perplexity_increase_percent:+.2g} % (95 %: {low:+.2g} to {high:+.2g} %)",
        f"KL {quality.kl_nats_per_token:.2g} nats per token",
        f"top-1 agreement {quality.top1_agreement:.1%}",
    ]
    if quality.retrieval is not None and quality.retrieval_reference is not None:
        parts.append(f"planted lines found {quality.retrieval:.0%} (bf16 {quality.retrieval_reference:.0%})")
    return ", ".join(parts)


def check_limit(most_percent: float | None) -> None:
    """
    Raises:
        UserError: no finite number, or a negative one.
    """
    if most_percent is not None and not (math.isfinite(most_percent) and most_percent >= 0):
        raise UserError(f"--max-kv-perplexity-increase is {most_percent:g}; it must be a percentage of at least 0")


def _parse(text: str, source: str) -> KVQualityStudy:
    try:
        return KVQualityStudy.model_validate_json(text)
    except ValidationError as error:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        raise UserError(
            f"{source} is not a record of `python -m calibration.kv_quality` that can be read ({where}: {first['msg']})"
        ) from None


def _percent(ratio: float) -> float:
    return round((ratio - 1) * 100, 6)
