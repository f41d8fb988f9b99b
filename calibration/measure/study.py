"""A calibration: limits of the device, an engine for each KV format, the points of its grid, and the profile of it all.

The weights are loaded once. Each KV format has its share of the time: what it does not use the next ones have, and when
it is used up, points that a profile can do without are left for the end, if there is time then.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calibration.measure import clock, facts, served
from calibration.measure.ahead import Ahead
from calibration.measure.clock import SECTIONS, Clock, ClockPlan
from calibration.measure.fit import fit_errors
from calibration.measure.grid import TABLES, Point, Room, points
from calibration.measure.part import PartFile
from calibration.measure.served import ServedPlan, Service
from calibration.measure.steps import Effort, StepRunner
from calibration.measure.table import describe
from engine.bench.limits import Limits, measure_limits, release_memory
from engine.bench.record import environment, rounded
from engine.bench.replay import quiet_collector
from engine.core import EngineCore
from engine.errors import UserError
from engine.kv.cache import FLOAT_NAMES, layer_layouts
from engine.setup import choose_device, choose_dtype, describe_model

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.models.modules import DecoderWeights

VERSION = 1
KIND = "memwall-profile"
_LINE_EVERY_S = 5.0
_MOST_FAILURES = 3
# Times as long as the fastest engine took to build, most likely without compiling, must be left to build one once more.
_WORTH_BUILDING = 2.0


@dataclass(frozen=True)
class Job:
    """One run of the command.

    Attributes:
        config: of the engines, whatever its kv_cache_dtype. kv_cache_dtypes: one engine each.
        save: where the profile will be written; what is measured is kept beside it.
        minutes: for all of it.
        record: what the profile begins with: command, commit.
        clock: what is measured of the GPU's clock, if not what there is. served: likewise of a short service.
    """

    config: EngineConfig
    kv_cache_dtypes: tuple[str, ...]
    save: Path
    minutes: float = 10.0
    quick: bool = False
    overwrite: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    effort: Effort = field(default_factory=Effort)
    clock: ClockPlan | None = None
    served: ServedPlan | None = None

    @property
    def clock_plan(self) -> ClockPlan:
        """What is measured of the clock."""
        return self.clock or (clock.QUICK if self.quick else ClockPlan())

    @property
    def served_plan(self) -> ServedPlan:
        """What is served."""
        return self.served or (served.QUICK if self.quick else ServedPlan())


def calibrate(job: Job) -> tuple[dict[str, Any], PartFile]:
    """Measure all that is not measured yet.

    Returns:
        The profile, and the file of its parts, to be removed once the profile is written.

    Raises:
        UserError: a model or format that cannot be run here, parts of another calibration, or too little time.
        KeyboardInterrupt: after saying how to go on.
    """
    study = _Study(job)
    part = study.part
    part.open(study.settings(), overwrite=job.overwrite)
    try:
        if len(part):
            study.say(f"going on with {part.path.name}: {len(part)} points are measured")
        study.measure()
        profile = study.profile()
    except UserError:
        if not len(part):
            part.remove()
        raise
    except KeyboardInterrupt:
        study.say(f"interrupted: {len(part)} points are in {part.path}; the same command again goes on from there")
        raise
    finally:
        part.close()
    return profile, part


class _Study:
    """
    Attributes:
        part: what has been measured.
    """

    def __init__(self, job: Job) -> None:
        config = replace(job.config, enable_prefix_caching=False)
        self._job, self._config = job, config
        self._device = choose_device(config.device)
        self._described = describe_model(config)
        self._dtype = choose_dtype(config.dtype, self._described, self._device)
        own = FLOAT_NAMES[self._dtype]
        self._formats = list(dict.fromkeys(own if name == "auto" else name for name in job.kv_cache_dtypes))
        for name in self._formats:  # raises before anything is loaded
            layer_layouts(self._described, name, (), config.block_size, self._dtype)
        self._weights: DecoderWeights | None = None
        self._limits = Limits()
        self._left_out: dict[str, int] = {}
        self._failed: dict[tuple, str] = {}
        self._started = time.perf_counter()
        self._end = self._started + 60 * job.minutes
        self._fastest_build_s = math.inf
        self._said = 0.0
        self.part = PartFile.at(job.save)

    # ---- what is asked for -------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What must be the same for a calibration to be continued. KV formats may come and go."""
        job = self._job
        engine = {
            name: value for name, value in asdict(self._config).items() if name not in ("model", "kv_cache_dtype")
        }
        return {
            "commit": job.record.get("commit"),
            "model": facts.model(self._config, self._described, self._device),
            "gpu": facts.gpu(self._device)["gpu_name"],
            "quick": job.quick,
            "effort": asdict(job.effort),
            "clock": asdict(job.clock_plan),
            "served": asdict(job.served_plan),
            **engine,
        }

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """All that is missing."""
        self._measure_limits()
        self._measure_allreduce()
        self._measure_formats(self._formats)
        # The first format's kernels are compiled in its share of the time. What it left out the others left time for.
        self._measure_formats([name for name in self._formats if not self._is_done(name)], again=True)
        self._weights = None
        self._measure_limits()

    def _measure_formats(self, names: Sequence[str], *, again: bool = False) -> None:
        """What is missing of formats, each in its share of the time that is left.

        Args:
            again: only where building the engine once more leaves most of the share.
        """
        for index, name in enumerate(names):
            now = time.perf_counter()
            share = (self._end - now) / (len(names) - index)
            if again and share < _WORTH_BUILDING * self._fastest_build_s:
                continue
            failed = -1
            while not self._is_done(name) and failed < len(self._failed):  # again, behind a step that failed
                failed = len(self._failed)
                measure = partial(self._measure_points, name=name, deadline=now + share)
                self._on_engine(name, measure)

    def _measure_limits(self) -> None:
        if self.part.limits is not None:
            known = self.part.limits
            self._limits.copy = max(self._limits.copy, known["copy_bytes_per_s"])
            self._limits.matmul = max(self._limits.matmul, known["matmul_flops_per_s"])
            if known["matmul_fp8_flops_per_s"]:
                self._limits.matmul_fp8 = max(self._limits.matmul_fp8 or 0.0, known["matmul_fp8_flops_per_s"])
        measure_limits(self._device, self._limits, matmul=True, fp8=self._device.type == "cuda")
        found = self._limits
        rates = {
            "copy_bytes_per_s": rounded(found.copy),
            "matmul_flops_per_s": rounded(found.matmul),
            "matmul_fp8_flops_per_s": rounded(found.matmul_fp8) if found.matmul_fp8 else None,
        }
        self._note({"limits": rates})

    def _measure_allreduce(self) -> None:
        if self.part.allreduce is not None:
            return
        rows: list[dict[str, Any]] = []
        if self._device.type == "cuda" and torch.cuda.device_count() > 1:
            from calibration.measure.allreduce import measure_allreduce, world_sizes

            for size in world_sizes(torch.cuda.device_count()):
                try:
                    rows += measure_allreduce(size)
                except Exception as error:  # of another process, and no reason to lose the rest
                    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                    self.say(f"all-reduce of {size} GPUs could not be measured: {reason}")
        self._note({"allreduce": rows})

    def _on_engine(self, name: str, measure: Callable[[EngineCore], None]) -> None:
        """Build an engine, measure on it, and give its memory back."""
        started = time.perf_counter()
        core = EngineCore(replace(self._config, kv_cache_dtype=name), weights=self._weights)
        try:
            self._weights = core.weights
            taken = time.perf_counter() - started
            self._fastest_build_s = min(self._fastest_build_s, taken)
            self.say(f"{name}: {core.memory.num_blocks:,} KV blocks, built in {taken:.0f} s")
            with quiet_collector():
                measure(core)
        finally:
            del core
            release_memory(self._device)

    def _measure_points(self, core: EngineCore, name: str, deadline: float) -> None:
        room = Room(
            self._config.max_num_seqs,
            self._config.max_num_batched_tokens,
            core.max_model_len,
            core.memory.num_blocks,
            self._config.block_size,
            tuple(core.scheduler.kv.windows),
            tuple(core.piece_sizes),
        )
        noted = {
            "room": asdict(room),
            "num_kv_blocks": core.memory.num_blocks,
            "kv_cache_bytes": core.memory.kv_bytes,
            "weight_bytes": core.weights.num_bytes_per_step,
            "settings": facts.engine_settings(self._config, core),
        }
        self._note({"kv": name, "engine": noted})
        missing = self._missing(name)
        total = len(self._wanted(room))
        runner = StepRunner(core, seed=self._config.seed, effort=self._job.effort)
        ahead = Ahead(runner, room, lambda point: self.part.point(name, point))
        count = sum(not point.priority for point in missing)
        for index, point in enumerate(missing):
            if index == count and not self._measure_streams(runner, core, name, room, deadline):
                return
            now = time.perf_counter()
            if point.priority and now > deadline:
                break
            if now > self._end:
                self._refuse(name, missing[index:])
            try:
                measured = runner.measure(point)
                measured["ahead_s"] = ahead.seconds(point, measured)
            except UserError:
                raise
            except Exception as error:  # of a kernel, most likely; the engine cannot go on
                self._fail((name, point.key), f"{name}: {describe(point)}", error)
                return
            self._note({"kv": name, "table": point.table, "point": measured})
            self._progress(name, total - len(missing) + index + 1, total)
        if count == len(missing):
            self._measure_streams(runner, core, name, room, deadline)

    def _measure_streams(self, runner: StepRunner, core: EngineCore, name: str, room: Room, deadline: float) -> bool:
        """What steps of several shapes one behind the other tell, which a profile can do without.

        Returns:
            Whether the engine can go on.
        """
        return self._measure_clock(runner, name, room, deadline) and self._measure_served(core, name, room, deadline)

    def _measure_served(self, core: EngineCore, name: str, room: Room, deadline: float) -> bool:
        if not self._is_served_missing(name) or time.perf_counter() > deadline:
            return True
        started = time.perf_counter()
        try:
            rows = Service(core, room, self._job.served_plan, seed=self._config.seed).measure()
        except Exception as error:
            self._fail(("served", name), f"{name}: a short service", error)
            return False
        self._note({"kv": name, "served": rows})
        self.say(f"{name}: a short service measured in {time.perf_counter() - started:.0f} s")
        return True

    def _is_served_missing(self, name: str) -> bool:
        """Of an engine that has been built, on a GPU."""
        room = self._room(name)
        if room is None or not self._has_clock(room):
            return False
        return name not in self.part.served and ("served", name) not in self._failed

    def _measure_clock(self, runner: StepRunner, name: str, room: Room, deadline: float) -> bool:
        """Its tables, which a profile can do without, with the points that steps of their like have been measured as.

        Returns:
            Whether the engine can go on.
        """
        tables = Clock(runner, room, lambda point: self.part.point(name, point), self._job.clock_plan)
        for section in self._missing_of_clock(name):
            if time.perf_counter() > deadline:
                break
            started = time.perf_counter()
            try:
                measured = tables.measure(section)
            except Exception as error:
                self._fail(("clock", section), f"clock: {section}", error)
                return False
            self._note({"clock": {section: measured}})
            self.say(f"clock: {section} measured in {time.perf_counter() - started:.0f} s")
        return True

    def _missing_of_clock(self, name: str) -> list[str]:
        """Tables of the clock that this format's engine is to measure: the first one's, on a GPU."""
        room = self._room(name)
        if name != self._formats[0] or room is None or not self._has_clock(room):
            return []
        return [each for each in SECTIONS if each not in self.part.clock and ("clock", each) not in self._failed]

    def _has_clock(self, room: Room) -> bool:
        return self._device.type == "cuda" and Clock.has_room(room, self._job.clock_plan)

    def _fail(self, key: tuple, text: str, error: Exception) -> None:
        """Go on without a point, loudly: what else there is to measure is not lost, and the profile will say so.

        Args:
            key: what tells it from others. text: what it is.

        Raises:
            Exception: the error, if there were too many.
        """
        self._failed[key] = f"{text} failed with {type(error).__name__}: {error}"
        if len(self._failed) > _MOST_FAILURES:
            raise error
        self.say("".join(traceback.format_exception(error)))
        self.say(self._failed[key])

    def _refuse(self, name: str, missing: list[Point]) -> None:
        """
        Raises:
            UserError: saying what to do.
        """
        count = sum(not point.priority for point in missing)
        raise UserError(
            f"{self._job.minutes:g} minutes are over, and of {name} {count} points are missing that a profile needs; "
            f"what was measured is in {self.part.path}, and the same command again, with more --minutes or not, goes on"
        )

    def _wanted(self, room: Room) -> list[Point]:
        return points(room, quick=self._job.quick, seed=self._config.seed)

    def _room(self, name: str) -> Room | None:
        """Of an engine that has been built."""
        if name not in self.part.engines:
            return None
        room = self.part.engines[name]["room"]
        return Room(**room | {each: tuple(room[each]) for each in ("windows", "piece_sizes")})

    def _is_done(self, name: str) -> bool:
        """Whether nothing is left to measure on the engine of a format."""
        return self._missing(name) == [] and not self._missing_of_clock(name) and not self._is_served_missing(name)

    def _missing(self, name: str) -> list[Point] | None:
        """Points that are not measured yet; None where no engine has said what it has room for."""
        room = self._room(name)
        if room is None:
            return None
        wanted = (point for point in self._wanted(room) if (name, point.key) not in self._failed)
        return [point for point in wanted if self.part.point(name, point) is None]

    # ---- the profile -------------------------------------------------------------------------------------------------

    def profile(self) -> dict[str, Any]:
        """All of it.

        Raises:
            UserError: points are missing that it needs.
        """
        part = self.part
        kv = {name: self._tables(name) for name in self._formats}
        first = part.engines[self._formats[0]]
        found = {
            "version": VERSION,
            "kind": KIND,
            **self._job.record,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(self._device),
            "duration_s": round(part.elapsed_s + self._elapsed(), 1),
            **facts.gpu(self._device),
            "limits": part.limits,
            "model": facts.model(self._config, self._described, self._device),
            "quantization": self._config.quantization,
            "engine": first["settings"],
            **({"clock": {each: part.clock[each] for each in SECTIONS if each in part.clock}} if part.clock else {}),
            "kv": kv,
            "allreduce": part.allreduce,
        }
        notes = list(self._failed.values())
        if self._left_out:
            counts = ", ".join(f"{count} of {name}" for name, count in self._left_out.items())
            notes.append(f"time ran out: points were left out that a profile can do without ({counts})")
        if left := self._missing_of_clock(self._formats[0]):
            notes.append(f"time ran out: of the clock's tables were left out: {', '.join(left)}")
        if left := [name for name in self._formats if self._is_served_missing(name)]:
            notes.append(f"time ran out: a short service was left out of {', '.join(left)}")
        if notes:
            found["notes"] = notes
        errors = self._fit_errors(found)
        for name, tables in kv.items():
            tables["fit"] = errors.get(name)
        return found

    def _fit_errors(self, profile: dict[str, Any]) -> dict[str, Any]:
        """By KV format; what was measured is not lost for the sake of a fit."""
        try:
            return fit_errors(profile) or {}
        except Exception as error:
            self.say(f"the points could not be fitted: {type(error).__name__}: {error}")
            return {}

    def _tables(self, name: str) -> dict[str, Any]:
        engine = self.part.engines[name]
        missing = self._missing(name)
        if any(not point.priority for point in missing):
            self._refuse(name, missing)
        if missing:
            self._left_out[name] = len(missing)
        tables: dict[str, Any] = {key: engine[key] for key in ("num_kv_blocks", "kv_cache_bytes")}
        tables |= {table: self.part.table(name, table) for table in TABLES}
        return tables | ({"served": self.part.served[name]} if name in self.part.served else {})

    # ---- what is said ------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line for someone who waits."""
        if self._said and sys.stderr.isatty():
            print(file=sys.stderr)
        self._said = 0.0
        print(text, file=sys.stderr, flush=True)

    def _progress(self, name: str, done: int, total: int) -> None:
        now = time.perf_counter()
        text = f"{name}: {done}/{total} points, {self._elapsed():.0f} s"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
            self._said = 0.0 if done == total else now
        elif done == total or now - self._said >= _LINE_EVERY_S:
            print(text, file=sys.stderr, flush=True)
            self._said = now

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _note(self, line: dict[str, Any]) -> None:
        self.part.add(line, self._elapsed())
