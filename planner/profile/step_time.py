"""The simulator's step times from a fitted profile."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from engine.padding import graph_sizes
from engine.scheduling import StepShape
from planner.profile.clock import ClockModel
from planner.profile.decode import excess_of
from planner.profile.fit import FittedKV
from planner.profile.host import LAUNCHED
from planner.profile.tables import padded
from planner.step_time import (
    TICKS_PER_SECOND,
    AffineRun,
    DecodeRun,
    Evidence,
    PiecewiseRun,
    StepTime,
    Uncertainty,
    to_ticks,
)


class ProfileStepTime(StepTime):
    """Step times of one fitted profile, for a deployment with the engine's limits.

    The time of a decode step of one batch is piecewise linear in the keys it attends to. Its pieces are kept as whole
    ticks, so that a run of steps is a few arithmetic progressions and equals its single steps to the tick.
    """

    evidence_varies = True

    def __init__(
        self,
        fitted: FittedKV,
        description: str = "",
        uncertainty: Uncertainty | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        decode_scale: float = 1.0,
        prefill_scale: float = 1.0,
        clock: ClockModel | None = None,
        host_scale: float = 1.0,
    ) -> None:
        """
        Args:
            fitted: the fit, measured or transferred.
            description: where it comes from, for people.
            uncertainty: the fit's own if None, where it has points.
            max_num_seqs, max_num_batched_tokens: of the deployment, which decide how steps are padded; None for those
                of the profile.
            decode_scale, prefill_scale: what times of steps without and with prompt chunks are multiplied by.
            clock: how the device slows down when it is hot.
            host_scale: what the host's times are multiplied by.
        """
        self.fitted = with_limits(fitted, max_num_seqs, max_num_batched_tokens)
        self.description = description
        is_measured = fitted.tables is not None
        self.evidence = Evidence.INTERPOLATED if is_measured else Evidence.EXTRAPOLATED
        self.evidence_varies = is_measured
        if uncertainty is None and is_measured:
            uncertainty = fitted.uncertainty()
        self.uncertainty = uncertainty
        self.pipeline_depth = 2 if fitted.host.is_pipelined else 1
        self.clock = clock
        self._decode_scale, self._prefill_scale, self._host_scale = decode_scale, prefill_scale, host_scale
        self._layers = fitted.shape.layers
        self._curves: dict[int, _Curve] = {}
        self._host_ticks: dict[int, int] = {}

    def scaled(self, decode: float = 1.0, prefill: float = 1.0, host: float = 1.0) -> ProfileStepTime:
        return ProfileStepTime(
            self.fitted,
            self.description,
            self.uncertainty,
            decode_scale=self._decode_scale * decode,
            prefill_scale=self._prefill_scale * prefill,
            clock=self.clock,
            host_scale=self._host_scale * host,
        )

    # ---- the contract ----------------------------------------------------------------------------------------------

    def predict(self, step: StepShape) -> float:
        return self.ticks(step) / TICKS_PER_SECOND

    def ticks(self, step: StepShape) -> int:
        if step.prefills:
            return to_ticks(self.fitted.seconds(step) * self._prefill_scale, step)
        if step.verifies:
            return to_ticks(self.fitted.seconds(step) * self._decode_scale, step)
        contexts = step.decode_contexts
        curve = self._curve(len(contexts))
        return curve.ticks_at(self.fitted.shape.decode_keys(contexts)) + curve.ragged_ticks(contexts)

    def heated_ticks(self, step: StepShape, ticks: int, heat: float) -> int:
        clock = self.clock
        if clock is None:
            return ticks
        seconds = ticks / TICKS_PER_SECOND
        if step.prefills:
            factor = clock.prompt_factor(self._padded(step), heat, seconds)
            beside = min(ticks, self._beside_ticks(step))
            return max(1, round((ticks - beside) * factor) + beside)
        if clock.is_felt_by_decodes(heat):
            return max(1, round(ticks * clock.decode_factor(heat, seconds)))
        return ticks

    def heating(self, step: StepShape) -> float:
        if self.clock is None or not step.prefills:
            return super().heating(step)
        return self.clock.heating(self._padded(step))

    def _of_host(self, seconds: float) -> int:
        return round(seconds * self._host_scale * TICKS_PER_SECOND)

    def _padded(self, step: StepShape) -> int:
        return padded(step.num_tokens, self.fitted.engine.piece_sizes)

    def _beside_ticks(self, step: StepShape) -> int:
        """What the decodes of a step with prompts take of it."""
        contexts = step.decode_contexts
        if not contexts:
            return 0
        seconds = self.fitted.prompt.beside_s(len(contexts), self.fitted.shape.decode_keys(contexts))
        return round(seconds * self._prefill_scale * TICKS_PER_SECOND)

    def host_ticks(self, step: StepShape) -> int:
        if step.prefills or step.verifies:
            return self._of_host(self.fitted.host_s(step))
        batch = len(step.decode_contexts)
        ticks = self._host_ticks.get(batch)
        if ticks is None:
            self._host_ticks[batch] = ticks = self._of_host(self.fitted.host_s(step))
        return ticks

    def wait_ticks(self, step: StepShape) -> int:
        if not step.prefills:
            return self.host_ticks(step)
        return self._of_host(self.fitted.host.added_latency_s(step))

    def launched_ticks(self, step: StepShape) -> int:
        return round(LAUNCHED * self.host_ticks(step)) if step.prefills else 0

    def evidence_of(self, step: StepShape) -> Evidence:
        """As `FittedKV.evidence`, but no decode step counts as MEASURED: that one of many hits a point is chance."""
        if not self.evidence_varies or step.prefills or step.verifies:
            return self.fitted.evidence(step)
        return Evidence.INTERPOLATED if self.fitted.is_inside(step) else Evidence.EXTRAPOLATED

    def steps_inside(self, contexts: list[int], steps: int) -> int:
        if not self.evidence_varies:
            return 0
        limit = self.fitted.decode.key_limit(len(contexts))
        keys, growth, regular = self._growth(contexts)
        inside = 0
        while inside < steps and keys <= limit:
            count = min(steps - inside, regular)
            if growth:
                count = min(count, (limit - keys) // growth + 1)
            inside += count
            if count < regular or inside == steps:
                break
            keys, growth, regular = self._growth([context + inside for context in contexts])
        return inside

    def decode_run(self, contexts: list[int], steps: int) -> DecodeRun:
        keys, growth, regular = self._growth(contexts)
        curve = self._curve(len(contexts))
        return curve.run(keys, growth, min(steps, regular), curve.ragged_ticks(contexts))

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _growth(self, contexts: list[int]) -> tuple[int, int, int]:
        """Keys of the next step, by how many they grow with each step, and for how many steps they grow like that."""
        growth, regular = 0, 1 << 62
        for window, count in self._layers:
            if window is None:
                growth += count * len(contexts)
                continue
            growing = [context for context in contexts if context + 1 < window]
            if growing:
                # Until the next request fills its window.
                regular = min(regular, window - 1 - max(growing))
                growth += count * len(growing)
        return self.fitted.shape.decode_keys(contexts), growth, regular

    def _curve(self, batch: int) -> _Curve:
        curve = self._curves.get(batch)
        if curve is None:
            self._curves[batch] = curve = _Curve(self.fitted, batch, self._decode_scale)
        return curve


class _Curve:
    """Ticks of a decode step of one batch by the keys it attends to: whole numbers at nodes, whole slopes between."""

    __slots__ = ("nodes", "ragged", "slopes", "ticks")

    def __init__(self, fitted: FittedKV, batch: int, scale: float) -> None:
        decode = fitted.decode
        # Every decode attends to itself in every layer.
        least = batch * decode.num_layers
        nodes = [least, *(node for node in decode.nodes(batch) if node > least)]
        what = f"{batch} decodes"
        self.nodes = nodes
        # A table of nonsense might have steps of no time at all; the clock must go on.
        self.ticks = [max(1, to_ticks(max(0.0, decode.seconds(batch, node)) * scale, what)) for node in nodes]
        self.slopes = [
            (after - before) // (to - start)
            for start, to, before, after in zip(nodes, nodes[1:], self.ticks, self.ticks[1:], strict=False)
        ]
        self.slopes.append(max(0, int(decode.slope(batch) * scale * TICKS_PER_SECOND)))
        self.ragged = round(decode.ragged(batch) * scale * TICKS_PER_SECOND)

    def ticks_at(self, keys: int) -> int:
        i = bisect_right(self.nodes, keys) - 1
        return self.ticks[i] + self.slopes[i] * (keys - self.nodes[i])

    def ragged_ticks(self, contexts: list[int]) -> int:
        """What unequal contexts add; the same while all of them grow."""
        return self.ragged * excess_of(contexts) if self.ragged else 0

    def run(self, keys: int, growth: int, steps: int, added: int) -> DecodeRun:
        """The next steps, the keys of which grow by `growth` from step to step, each with `added` ticks more."""
        nodes = self.nodes
        i = bisect_right(nodes, keys) - 1
        segments: list[tuple[int, int, int]] = []
        while True:
            first = self.ticks[i] + self.slopes[i] * (keys - nodes[i]) + added
            count = steps
            if growth and i + 1 < len(nodes):
                count = min(steps, -(-(nodes[i + 1] - keys) // growth))
            segments.append((first, self.slopes[i] * growth, count))
            steps -= count
            if not steps:
                break
            keys += growth * count
            i = bisect_right(nodes, keys, lo=i) - 1
        if len(segments) == 1 and segments[0][1] >= 0:
            return AffineRun(*segments[0])
        return PiecewiseRun(segments)


def with_limits(fitted: FittedKV, max_num_seqs: int | None, max_num_batched_tokens: int | None) -> FittedKV:
    """The fit with the padding of an engine that has these limits."""
    engine = fitted.engine
    graphs, pieces = engine.graph_sizes, engine.piece_sizes
    if graphs and max_num_seqs is not None and max_num_seqs != graphs[-1]:
        graphs = tuple(graph_sizes(max_num_seqs))
    if max_num_batched_tokens is not None:
        pieces = tuple(size for size in pieces if size <= max_num_batched_tokens)
    if (graphs, pieces) == (engine.graph_sizes, engine.piece_sizes):
        return fitted
    return fitted.padded_by(replace(engine, graph_sizes=graphs, piece_sizes=pieces))
