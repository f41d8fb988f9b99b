"""Profile files: what is in them, and one sentence for each way in which they can be wrong."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.commands.files import unpacked
from planner.catalog import list_gpus
from planner.errors import UserError
from planner.hf_config import model_from_config
from planner.kv_format import KVCacheDtype
from planner.model import ModelSpec
from planner.profile.clock import ClockModel, fit_clock, launched_ahead
from planner.profile.fit import FittedKV, fit_kv
from planner.profile.served import ServedFit, fit_served
from planner.profile.shape import ModelShape
from planner.profile.step_time import ProfileStepTime
from planner.profile.tables import KIND, VERSION, Point, ProfileTables
from planner.step_time import MAX_STEP_SECONDS, Uncertainty

_MAX_BYTES = 64 << 20
_CPU_FORMAT = "float32"  # of an engine on a CPU, which no deployment has
# The share of a smaller step's time that a larger one may take at the least, where their spreads do not meet: padding
# and other kernels can make a larger one faster (448 tokens on an H200 took 1.3 times as long as 512), but not by far.
_SLACK = 0.5
# The same of all-reduces, whose library has other ways for other sizes.
_ALLREDUCE_SLACK = 0.5
# What no all-reduce stays below or above: seconds, and bytes per second.
_LEAST_LINK_S, _MOST_LINK_S, _LEAST_LINK, _MOST_LINK = 1e-7, 1e-2, 1e7, 1e13
# Of the slowest step's time: what the CPU can take for one at the most, by far.
_MOST_HOST = 10.0
# A hot device is slower. Noise may say otherwise, and so may a CPU that could not launch a small step in time on the
# cool one: by so much at the most. No clock gives way by more than the other.
_LEAST_HEATED, _MOST_HEATED = 0.2, 3.0
# Of a series, of a service at one load, and of all of either: they are fitted whenever the profile is used.
_MOST_STEPS, _MOST_STEPS_IN_ALL = 10_000, 20_000

_Seconds = Annotated[float, Field(gt=0, le=MAX_STEP_SECONDS)]
_Count = Annotated[int, Field(ge=1, le=1 << 40)]
_Context = Annotated[int, Field(ge=0, le=1 << 40)]
_Sizes = tuple[_Count, ...]


class _Section(BaseModel):
    """Keys that are not known are left alone: a newer calibration may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class PointRecord(_Section):
    """One measured step, as `planner.profile.tables.Point` describes it."""

    prefills: tuple[tuple[_Count, _Context], ...]
    decodes: tuple[tuple[_Context, _Count], ...]
    step_s: _Seconds
    low_s: _Seconds
    high_s: _Seconds
    samples: _Count
    mean_s: _Seconds | None = None
    gpu_s: _Seconds | None = None
    ahead_s: _Seconds | None = None
    alone_s: _Seconds | None = None
    host_s: Annotated[float, Field(ge=0, le=MAX_STEP_SECONDS)] | None = None
    graph_size: _Count | None = None

    @model_validator(mode="after")
    def _in_order(self) -> PointRecord:
        if not (self.prefills or self.decodes):
            raise ValueError("it has neither prompt chunks nor decodes")
        if not self.low_s <= self.step_s <= self.high_s:
            raise ValueError(f"step_s {self.step_s:g} does not lie between low_s and high_s")
        # Steps come one behind the other on one CPU.
        if self.host_s is not None and self.host_s > _MOST_HOST * self.high_s:
            raise ValueError(f"host_s {self.host_s:g} is of steps of which the slowest came after {self.high_s:g} s")
        return self


class ServedRecord(_Section):
    """Steps of a short service in their order; of each column a value for every step.

    Those that start before lead_s tell of the heat alone; None where the service began from rest, and did not say.
    """

    concurrency: _Count
    lead_s: Annotated[float, Field(ge=0, le=MAX_STEP_SECONDS)] | None = None
    start_s: Annotated[tuple[Annotated[float, Field(ge=0, le=MAX_STEP_SECONDS)], ...], Field(max_length=_MOST_STEPS)]
    gpu_s: tuple[_Seconds, ...]
    host_s: tuple[Annotated[float, Field(ge=0, le=MAX_STEP_SECONDS)], ...] | None = None
    prefills: tuple[tuple[tuple[_Count, _Context], ...], ...]
    decodes: tuple[Annotated[int, Field(ge=0, le=1 << 14)], ...]
    keys: tuple[_Context, ...]
    excess: tuple[_Context, ...]

    @model_validator(mode="after")
    def _in_order(self) -> ServedRecord:
        columns = self.gpu_s, self.host_s or self.gpu_s, self.prefills, self.decodes, self.keys, self.excess
        if any(len(column) != len(self.start_s) for column in columns):
            raise ValueError("its columns are not of one length")
        if any(after < before for before, after in pairwise(self.start_s)):
            raise ValueError("a step starts before the one before it")
        if self.start_s and self.lead_s is not None and self.lead_s > self.start_s[-1]:
            raise ValueError(f"its lead of {self.lead_s:g} s is longer than all of it, {self.start_s[-1]:.3g} s")
        for n, (chunks, decodes) in enumerate(zip(self.prefills, self.decodes, strict=True), 1):
            if not (chunks or decodes):
                raise ValueError(f"step {n} has neither prompt chunks nor decodes")
        return self


class KVRecord(_Section):
    """The points of one KV format."""

    num_kv_blocks: _Count
    kv_cache_bytes: _Count
    decode: tuple[PointRecord, ...]
    prefill: tuple[PointRecord, ...]
    mixed: tuple[PointRecord, ...]
    served: Annotated[tuple[ServedRecord, ...], Field(max_length=64)] = ()
    fit: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _not_too_long(self) -> KVRecord:
        _check_length("the short service", [each.gpu_s for each in self.served])
        return self


class LimitsRecord(_Section):
    """Measured rates of the device."""

    copy_bytes_per_s: Annotated[float, Field(gt=0)]
    matmul_flops_per_s: Annotated[float, Field(gt=0)]
    matmul_fp8_flops_per_s: Annotated[float, Field(gt=0)] | None = None


class EngineRecord(_Section):
    """Settings of the engine that was measured."""

    max_num_batched_tokens: _Count
    max_num_seqs: _Count
    max_model_len: _Count
    block_size: _Count
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    enable_chunked_prefill: bool
    enforce_eager: bool
    async_scheduling: bool
    graph_sizes: _Sizes
    piece_sizes: _Sizes


class ModelSection(_Section):
    """The model that was measured."""

    name: str
    config: dict[str, Any]
    num_parameters: _Count
    dtype: str


class AllReduceRecord(_Section):
    """One all-reduce between the GPUs of a node."""

    world_size: Annotated[int, Field(ge=2)]
    bytes: _Count
    time_s: _Seconds


class ClockPointRecord(_Section):
    """One prompt chunk of so many tokens: in a stream of them, on a cool device, and on a hot one."""

    tokens: _Count
    steady_s: _Seconds
    cool_s: _Seconds
    hot_s: _Seconds
    samples: _Count = 1

    @model_validator(mode="after")
    def _plausible(self) -> ClockPointRecord:
        _check_heat(f"{self.tokens:,} tokens", self.cool_s, self.hot_s)
        for name in ("cool_s", "hot_s"):
            ratio = getattr(self, name) / self.steady_s
            if not 1 / _MOST_HEATED <= ratio <= _MOST_HEATED:
                raise ValueError(f"{name} of {self.tokens:,} tokens is {ratio:.3g} times steady_s")
        return self


class ClockDecodeRecord(_Section):
    """Steps of decodes alone: at rest, and right behind prompt steps."""

    batch: _Count
    context: _Context
    cool_s: _Seconds
    hot_s: _Seconds

    @model_validator(mode="after")
    def _plausible(self) -> ClockDecodeRecord:
        _check_heat(f"{self.batch} decodes", self.cool_s, self.hot_s)
        return self


class ClockSeriesRecord(_Section):
    """Prompt steps one behind the other on a device that was cool before."""

    tokens: _Count
    decode_batch: Annotated[int, Field(ge=0)] = 0
    gpu_s: Annotated[tuple[_Seconds, ...], Field(max_length=_MOST_STEPS)]
    begin_s: tuple[Annotated[float, Field(ge=0, le=MAX_STEP_SECONDS)], ...]

    @model_validator(mode="after")
    def _in_order(self) -> ClockSeriesRecord:
        if len(self.gpu_s) != len(self.begin_s):
            raise ValueError(f"{len(self.gpu_s)} steps begin {len(self.begin_s)} times")
        for n, (before, begin, after) in enumerate(zip(self.begin_s, self.gpu_s, self.begin_s[1:], strict=False), 2):
            if after < before - begin:  # small steps end a little before the CPU looks
                raise ValueError(f"step {n} begins long before the one before it")
        return self


class ClockRecord(_Section):
    """How the device slows down when it is hot. Of an unfinished calibration parts may be missing."""

    points: tuple[ClockPointRecord, ...] = ()
    decode_points: tuple[ClockDecodeRecord, ...] = ()
    series: Annotated[tuple[ClockSeriesRecord, ...], Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _not_too_long(self) -> ClockRecord:
        _check_length("the series", [each.gpu_s for each in self.series])
        return self


def _check_length(what: str, runs: Sequence[Sequence[float]]) -> None:
    if (steps := sum(map(len, runs))) > _MOST_STEPS_IN_ALL:
        raise ValueError(f"{what} has {steps:,} steps; {_MOST_STEPS_IN_ALL:,} are enough")


def _check_heat(what: str, cool_s: float, hot_s: float) -> None:
    if hot_s < _LEAST_HEATED * cool_s:
        raise ValueError(f"{what} take {hot_s * 1e3:.3g} ms on a hot device and {cool_s * 1e3:.3g} ms on a cool one")
    if hot_s > _MOST_HEATED * cool_s:
        raise ValueError(f"{what} take {hot_s / cool_s:.3g} times as long on a hot device as on a cool one")


class ProfileRecord(_Section):
    """A profile file."""

    version: int
    kind: str
    commit: str = ""
    date: str = ""
    environment: dict[str, Any] = Field(default_factory=dict)
    gpu: str | None
    gpu_name: str
    gpu_memory_bytes: Annotated[int, Field(ge=0)] | None = None
    limits: LimitsRecord
    model: ModelSection
    quantization: Literal["fp8"] | None
    engine: EngineRecord
    kv: dict[str, KVRecord]
    allreduce: tuple[AllReduceRecord, ...]
    clock: ClockRecord | None = None


@dataclass
class Profile:
    """A profile that was read and found in order.

    Attributes:
        name: the file's. record: its content. tables: the same for the fit. spec: the model it was measured with.
    """

    name: str
    record: ProfileRecord
    tables: ProfileTables
    spec: ModelSpec
    _fitted: dict[str, FittedKV] = field(default_factory=dict, repr=False)
    _served: dict[str, ServedFit | None] = field(default_factory=dict, repr=False)

    @cached_property
    def _clock(self) -> ClockModel | None:
        section = self.record.clock
        return fit_clock(section.model_dump()) if section else None

    @cached_property
    def launched_ahead(self) -> dict[int, float]:
        """Seconds of prompts for which the device did not wait, by tokens."""
        return launched_ahead(self.record.clock.model_dump()) if self.record.clock else {}

    def clock(self, kv_cache_dtype: str) -> ClockModel | None:
        """How the device slows down when it is hot; None where that was not measured.

        Raises:
            UserError: this format was not measured.
        """
        self.fitted(kv_cache_dtype)
        served = self._served[str(kv_cache_dtype)]
        return served.clock if served else self._clock

    @property
    def kv_cache_dtypes(self) -> tuple[KVCacheDtype, ...]:
        """The formats that were measured, of those that a deployment can have."""
        return tuple(KVCacheDtype(name) for name in self.tables.kv if name != _CPU_FORMAT)

    def fitted(self, kv_cache_dtype: str) -> FittedKV:
        """The fit of a format that was measured.

        Raises:
            UserError: it was not.
        """
        name = str(kv_cache_dtype)
        if name not in self.tables.kv:
            measured = ", ".join(self.tables.kv)
            raise UserError(f"profile {self.name} has no tables of {name} KV; it has those of {measured}")
        found = self._fitted.get(name)
        if found is None:
            tables = self.tables
            shape = ModelShape.from_config(tables.config, tables.quantization, name, tables.engine.block_size)
            found = fit_kv(tables.kv[name], shape, tables.limits, tables.engine, self.launched_ahead)
            runs = [run.model_dump() for run in self.record.kv[name].served]
            try:
                served = self._served[name] = fit_served(runs, found, self._clock) if runs else None
            except ValueError as error:
                raise UserError(f"profile {self.name} cannot be used: {name} KV: {error}") from None
            found = self._fitted[name] = served.applied(found) if served else found
        return found

    def step_time(
        self,
        kv_cache_dtype: str,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        device_id: str | None = None,
    ) -> ProfileStepTime:
        """Step times of what was measured, with nothing transferred.

        Args:
            max_num_seqs, max_num_batched_tokens: limits of the engine; None for those that were measured.
            device_id: of the device whose steps are foreseen, if it is known.

        Raises:
            UserError: this format was not measured.
        """
        fitted = self.fitted(kv_cache_dtype)
        uncertainty = self.uncertainty(kv_cache_dtype, device_id)
        limits = max_num_seqs, max_num_batched_tokens
        return ProfileStepTime(
            fitted, self.origin(kv_cache_dtype), uncertainty, *limits, clock=self.clock(kv_cache_dtype)
        )

    def origin(self, kv_cache_dtype: str) -> str:
        """What was measured, for people."""
        record = self.record
        weights = f", {record.quantization} weights" if record.quantization else ""
        return f"profile of {record.model.name} on {record.gpu_name}, {kv_cache_dtype} KV{weights}"

    def is_of(self, device_id: str | None) -> bool:
        """Whether it was measured on that very device."""
        return device_id is not None and device_id == self.record.environment.get("device_id")

    def uncertainty(self, kv_cache_dtype: str, device_id: str | None = None) -> Uncertainty:
        """Of that fit: from the errors that the profile tells of it, else from leaving out points now.

        Args:
            device_id: as of `step_time`.
        """
        same = self.is_of(device_id)
        fitted = self.fitted(kv_cache_dtype)
        stored = self.record.kv[str(kv_cache_dtype)].fit
        try:
            return fitted.uncertainty(stored or None, same_device=same)
        except (KeyError, TypeError, ValueError):
            return fitted.uncertainty(same_device=same)


def load_profile(path: Path | str) -> Profile:
    """Read a profile, gzipped or not.

    Raises:
        UserError: there is no such file, it is no profile of this version, or it holds nonsense.
    """
    path = Path(path)
    return parse_profile(read_profile(path), path.name)


def parse_profile(text: str, name: str) -> Profile:
    """A profile from the text of its file.

    Args:
        name: the file's, for messages.

    Raises:
        UserError: it is no profile of this version, or it holds nonsense.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"profile {name} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UserError(f"{name} is no profile of `memwall calibrate`: its kind is not {KIND!r}")
    if content.get("version") != VERSION:
        raise UserError(
            f"profile {name} has version {content.get('version')!r}, and this memwall reads version {VERSION}: "
            "calibrate again"
        )
    try:
        record = ProfileRecord.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its top level"
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"profile {name} cannot be used: {where}: {reason}") from None
    tables = ProfileTables.from_json(record.model_dump())
    try:
        spec = model_from_config(
            dict(record.model.config), record.model.name, record.quantization, source=f"profile {name}"
        )
        _check(record, tables)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"profile {name} cannot be used: {error}") from None
    return Profile(name, record, tables, spec)


def read_profile(path: Path) -> str:
    """The text of a profile's file, gzipped or not.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"profile {path}: the file is too large to be one")
        return unpacked(path.read_bytes()).decode("utf-8")
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"profile {path.name} is damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read profile {path}: {error.strerror or error}") from None


def _check(record: ProfileRecord, tables: ProfileTables) -> None:
    """What fields alone do not tell.

    Raises:
        ValueError: in one sentence.
    """
    if record.gpu is not None and record.gpu not in list_gpus():
        raise ValueError(f"it was measured on {record.gpu!r}, which the catalog does not know")
    if not record.kv:
        raise ValueError("it has no tables of any KV format")
    known = [*(dtype.value for dtype in KVCacheDtype if dtype is not KVCacheDtype.AUTO), _CPU_FORMAT]
    for name, kv in tables.kv.items():
        if name not in known:
            raise ValueError(f"it has tables of {name!r} KV; a KV format is one of {', '.join(known)}")
        for table in ("decode", "prefill"):
            if not getattr(kv, table):
                raise ValueError(f"the {table} table of {name} KV is missing")
        if any(point.prefills for point in kv.decode):
            raise ValueError(f"the decode table of {name} KV has a step with prompt chunks")
        if any(len(point.prefills) != 1 or point.decodes for point in kv.prefill):
            raise ValueError(f"the prefill table of {name} KV has a step that is not one prompt chunk alone")
        if any(not point.prefills for point in kv.mixed):
            raise ValueError(f"the mixed table of {name} KV has a step without prompt chunks")
        _check_growth(name, kv.decode, kv.prefill)
    _check_allreduce(tables.allreduce)


def _check_allreduce(rows: Iterable[tuple[int, int, float]]) -> None:
    """More bytes must not take much less time; the library changes its ways between some sizes."""
    slowest: dict[int, tuple[float, int]] = {}
    for ranks, size, seconds in sorted(rows):
        what = f"an all-reduce of {size:,} bytes between {ranks} GPUs"
        before_s, before = slowest.get(ranks, (0.0, 0))
        if before == size:
            raise ValueError(f"{what} is there twice")
        if not _LEAST_LINK_S + size / _MOST_LINK < seconds < _MOST_LINK_S + size / _LEAST_LINK:
            raise ValueError(f"{what} takes {seconds:.3g} s, which no link between GPUs does")
        if seconds < _ALLREDUCE_SLACK * before_s:
            raise ValueError(
                f"{what} takes {seconds * 1e6:.3g} us, and one of {before:,} bytes {before_s * 1e6:.3g} us"
            )
        slowest[ranks] = max((before_s, before), (seconds, size))


def _check_growth(name: str, decode: Iterable[Point], prefill: Iterable[Point]) -> None:
    """More work must not take much less time. Steps that had to wait for the CPU tell how busy that was."""
    uniform = [(point.batch, point.decodes[0][0], point) for point in decode if len(set(point.decodes)) == 1]
    chunks = [(*point.prefills[0], point) for point in prefill if not point.is_host_bound]
    for table, rows, more, longer in (
        ("decode", uniform, "requests", "tokens of context"),
        ("prefill", chunks, "new tokens", "tokens of context"),
    ):
        for axis, unit in ((0, more), (1, longer)):
            groups: dict[int, dict[int, Point]] = {}
            for row in rows:
                groups.setdefault(row[1 - axis], {})[row[axis]] = row[2]
            for group in groups.values():
                _check_line(f"the {table} table of {name} KV", group, unit)


def _check_line(table: str, line: Mapping[int, Point], unit: str) -> None:
    slowest_at = None
    for at in sorted(line):
        point = line[at]
        if slowest_at is not None:
            slowest = line[slowest_at]
            if point.step_s < _SLACK * slowest.step_s and point.high_s < slowest.low_s:
                raise ValueError(
                    f"in {table} a step of {at} {unit} takes {point.step_s * 1e3:.3g} ms and one of {slowest_at} "
                    f"{slowest.step_s * 1e3:.3g} ms"
                )
        if slowest_at is None or point.step_s > line[slowest_at].step_s:
            slowest_at = at
