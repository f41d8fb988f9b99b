"""What a GPU's clock does to steps: the same step takes longer among steps with prompts than among steps of decodes.

Long matrix products draw more power than a GPU may for long, which then lowers its clock; decodes wait for memory and
let it rise again. Both take about a tenth of a second. Three tables tell how much, and how fast:

    points          prompts of so many tokens, cool (few of them among many decodes) and hot (each behind two others)
    decode_points   decodes behind decodes, and each behind two prompts
    series          prompts that begin behind many decodes, step by step: one behind the other, or by turns with decodes

Times are those of the GPU, from a step's first operation to its last.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from calibration.measure.grid import BASE_CONTEXT, BESIDE_CONTEXT, DECODE, PREFILL, Point, Room
from engine.bench.record import rounded

if TYPE_CHECKING:
    from calibration.measure.steps import StepRunner
    from engine.core import StepRecord

SECTIONS = ("points", "decode_points", "series")

_MOST_DECODES = 16  # of the decodes between prompts
_HOT_TOKENS = 1024  # of the prompts that heat, where the engine runs as many


@dataclass(frozen=True)
class ClockPlan:
    """What is measured, and for how long. Times in seconds.

    Attributes:
        sizes: tokens of prompts; where the engine pads, the next size that it pads to.
        batches: of decode_points, and the most that the engine runs beside prompts.
        series: tokens of the prompts. shares: of the time, that prompts take among decodes.
        repetitions: of each step; of cool ones another goes first, which is not counted.
        quiet_s, most_quiet_s: of decodes before a cool prompt, between them three times what the prompt takes.
        hot_s: of prompts before the first hot step. cool_s: of decodes before cool ones.
        lead_s, series_s: of decodes before a series, of the prompts. mixed_lead_s, mixed_s: where decodes go between.
    """

    sizes: tuple[int, ...] = (16, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
    batches: tuple[int, ...] = (16, 128)
    series: tuple[int, ...] = (512, 1024)
    shares: tuple[float, ...] = (0.5, 0.7)
    repetitions: int = 6
    quiet_s: float = 0.06
    most_quiet_s: float = 0.3
    hot_s: float = 0.25
    cool_s: float = 0.15
    lead_s: float = 0.6
    series_s: float = 0.8
    mixed_lead_s: float = 0.4
    mixed_s: float = 0.5


QUICK = ClockPlan(
    sizes=(64, 512), batches=(), series=(512,), shares=(0.5,), repetitions=2, hot_s=0.1, cool_s=0.05, lead_s=0.1,
    series_s=0.2, mixed_lead_s=0.1, mixed_s=0.1,
)  # fmt: skip


class _Stream:
    """Steps to be run one behind the other, some of them by the name under which their records are wanted."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._names: list[Any] = []

    def add(self, point: Point, count: int = 1, name: Any = None) -> None:
        """That step so many times."""
        self.points += [point] * count
        self._names += [name] * count

    def run(self, runner: StepRunner) -> dict[Any, list[StepRecord]]:
        """The records by name."""
        found: dict[Any, list[StepRecord]] = {}
        for name, record in zip(self._names, runner.run(self.points), strict=True):
            if name is not None:
                found.setdefault(name, []).append(record)
        return found


class Clock:
    """Measures the tables of one engine.

    Args:
        known: what was measured of a step as a point of the profile, None if it was not: steps that follow their like.
    """

    def __init__(
        self,
        runner: StepRunner,
        room: Room,
        known: Callable[[Point], dict[str, Any] | None],
        plan: ClockPlan | None = None,
    ) -> None:
        self._runner, self._room, self._known, self._plan = runner, room, known, plan or ClockPlan()
        self._decodes = _decodes(room)
        self._prompts = _prompts(room, self._plan)
        self._heating = _heating(self._prompts) if self._prompts else None
        self._seconds_of: dict[tuple, float] = {}

    @staticmethod
    def has_room(room: Room, plan: ClockPlan | None = None) -> bool:
        """Whether an engine can run prompts among decodes at all."""
        return bool(_prompts(room, plan or ClockPlan()))

    def measure(self, section: str) -> list[dict[str, Any]]:
        """One of `SECTIONS`.

        Raises:
            RuntimeError: the engine ran other steps than the wished ones.
        """
        return {"points": self._points, "decode_points": self._decode_points, "series": self._series}[section]()

    def _points(self) -> list[dict[str, Any]]:
        cool, hot = self._cool(), self._hot()
        return [
            {
                "tokens": tokens,
                "steady_s": rounded(self._seconds(prompt)),
                "cool_s": rounded(_median(cool[tokens][1:])),
                "hot_s": rounded(_median(hot[tokens])),
                "samples": len(hot[tokens]),
            }
            for tokens, prompt in self._prompts.items()
        ]

    def _cool(self) -> dict[int, list[StepRecord]]:
        """Every prompt behind so many decodes that it takes a quarter of the time, or as many as the plan allows.

        The first of each size may follow larger ones.
        """
        plan, stream = self._plan, _Stream()
        for tokens, prompt in self._prompts.items():
            quiet_s = min(max(plan.quiet_s, 3 * self._seconds(prompt)), plan.most_quiet_s)
            for _ in range(1 + plan.repetitions):
                stream.add(self._decodes, self._count(self._decodes, quiet_s))
                stream.add(prompt, name=tokens)
        stream.add(self._decodes)
        return stream.run(self._runner)

    def _hot(self) -> dict[int, list[StepRecord]]:
        stream = _Stream()
        stream.add(self._heating, self._count(self._heating, self._plan.hot_s))
        for _ in range(self._plan.repetitions):
            for tokens, prompt in self._prompts.items():
                stream.add(self._heating, 2)
                stream.add(prompt, name=tokens)
        stream.add(self._heating)
        return stream.run(self._runner)

    def _decode_points(self) -> list[dict[str, Any]]:
        plan, room = self._plan, self._room
        most = room.max_num_seqs - 2
        context = room.within_page(BESIDE_CONTEXT)
        rows = []
        for batch in (*(batch for batch in plan.batches if batch < most), most):
            decodes = Point(DECODE, (), ((context, batch),))
            if not room.holds_stream([decodes, self._heating]):
                continue
            stream, count = _Stream(), max(self._count(decodes, plan.cool_s), 2 * plan.repetitions)
            stream.add(decodes, count - count // 2)
            stream.add(decodes, count // 2, name="cool")
            stream.add(self._heating, self._count(self._heating, plan.hot_s))
            for _ in range(plan.repetitions):
                stream.add(self._heating, 2)
                stream.add(decodes, name="hot")
            stream.add(self._heating)
            found = stream.run(self._runner)
            rows.append(
                {
                    "batch": batch,
                    "context": context,
                    "cool_s": rounded(_median(found["cool"])),
                    "hot_s": rounded(_median(found["hot"])),
                    "samples": len(found["hot"]),
                }
            )
        return rows

    def _series(self) -> list[dict[str, Any]]:
        plan = self._plan
        sizes = [tokens for tokens in map(self._room.padded, plan.series) if tokens in self._prompts]
        rows = []
        for tokens in sizes or [max(self._prompts)]:
            rows.append(self._one_series(tokens, None, plan.lead_s, plan.series_s))
            rows += [self._one_series(tokens, share, plan.mixed_lead_s, plan.mixed_s) for share in plan.shares]
        return rows

    def _one_series(self, tokens: int, share: float | None, lead_s: float, series_s: float) -> dict[str, Any]:
        """Behind decodes prompts for so long, and between them as many decodes as leave them that share of the time."""
        prompt, stream = self._prompts[tokens], _Stream()
        stream.add(self._decodes, self._count(self._decodes, lead_s))
        prompt_s, decode_s, between = self._seconds(prompt), self._seconds(self._decodes), 0
        if share is not None:
            between = max(round(prompt_s * (1 / share - 1) / decode_s), 1)
        for _ in range(max(math.ceil(series_s / (prompt_s + between * decode_s)), 2)):
            stream.add(prompt, name="prompt")
            stream.add(self._decodes, between, name="between")
        stream.add(self._decodes)
        found = stream.run(self._runner)
        records = found["prompt"]
        seconds = [taken_s(record) for record in records]
        # Tokens may be seen a little after their step has ended.
        ended = (record.end_s - taken for record, taken in zip(records, seconds, strict=True))
        begin_s = list(accumulate(ended, max))
        # The last prompt, and what is behind it, is no whole turn.
        whole_s = begin_s[-1] - begin_s[0]
        return {
            "tokens": tokens,
            "decode_batch": self._decodes.num_decodes,
            "decodes_between": between,
            "share": rounded(min(sum(seconds[:-1]) / whole_s, 1.0)) if whole_s > 0 else 1.0,
            "gpu_s": [rounded(taken) for taken in seconds],
            "begin_s": [rounded(begin - begin_s[0]) for begin in begin_s],
        }

    def _count(self, point: Point, seconds: float) -> int:
        """How many such steps take so long."""
        return max(math.ceil(seconds / self._seconds(point)), 1)

    def _seconds(self, point: Point) -> float:
        """Of a step that follows its like, as the profile has it."""
        if point.key not in self._seconds_of:
            measured = self._known(point) or self._runner.measure(point)
            self._seconds_of[point.key] = measured["gpu_s"] or measured["step_s"]
        return self._seconds_of[point.key]


def _decodes(room: Room) -> Point:
    """What goes between prompts."""
    batch = max(min(_MOST_DECODES, room.max_num_seqs - 2), 1)
    return Point(DECODE, (), ((room.within_page(BASE_CONTEXT), batch),), 0)


def _prompts(room: Room, plan: ClockPlan) -> dict[int, Point]:
    """By tokens, ascending; those that the engine has room for beside decodes and the prompts that heat."""
    decodes, found = _decodes(room), {}
    for size in plan.sizes:
        tokens = room.padded(size)
        prompt = Point(PREFILL, ((tokens, 0),), (), 0)
        if room.holds_stream([decodes, prompt]):
            found[tokens] = prompt
    return found


def _heating(prompts: dict[int, Point]) -> Point:
    """The largest prompt up to 1,024 tokens."""
    return prompts[max((tokens for tokens in prompts if tokens <= _HOT_TOKENS), default=min(prompts))]


def taken_s(record: StepRecord) -> float:
    """A step's time on the GPU; on a CPU, which has none, from its start to its tokens."""
    return record.end_s - record.start_s if record.gpu_s is None else record.gpu_s


def _median(records: list[StepRecord]) -> float:
    return statistics.median(map(taken_s, records))
