"""From what was measured to what was not: another model, KV format, number of ranks or GPU. Utilisation stays.

A time is taken apart into what a roofline at the measured limits says, and how far it was from that. The roofline is
worked out again for the new shapes and limits; the distance is taken apart and kept:

    once a step     sampling, to begin and to end
    per layer       kernels that begin, end and wait for each other: what steps take that wait for weights
    per weight      as products of few rows read weights more slowly than a copy does
    per activation  norms, rotary embedding and the like: bytes moved for each token, layer and unit of the hidden size
    the rest        as far as a step is bound by its FLOPs as a factor on them, as a clock that gives way is; of a cool
                    device like activations, as tiles of products begin and end, however long their sums are; per layer
                    as far as it waits for weights

None of this is measured: all of it is EXTRAPOLATED.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from engine.padding import padded_sizes
from planner.hardware import GpuSpec
from planner.profile.clock import USUAL_E0, USUAL_E1, USUAL_TAU_S, ClockModel
from planner.profile.decode import DecodeFit
from planner.profile.fit import FittedKV
from planner.profile.host import HostFit
from planner.profile.prompt import AttentionRow, PromptFit
from planner.profile.shape import ModelShape
from planner.profile.tables import Limits
from planner.step_time import Uncertainty

# Of the fp8 rate's ratio to the bf16 rate on the data sheet, what scaled products reach (H200: 1,210 of 1,979 TFLOP/s
# against 700 of 989).
_FP8_REACHED = 0.86
# What a step takes once, whatever its layers: sampling among 128,256 tokens, and to begin and end. With it the decodes
# of Llama-3.1-8B and Llama-3.2-1B on one H200 tell each other within some per cent.
_ONCE_S = 0.2e-3
# Bytes that all but the matrix products and attention move, per token, layer and unit of the hidden size: of
# Llama-3.1-8B two norms with the residual stream 16, rotary embedding and cache 6, the activation 21; of 3.2-1B 46.
_ACTIVATION_BYTES = 45.0
# What products of few rows take longer than a copy of their weights. With it what a layer takes besides is the same,
# some 25 us, of Llama-3.1-8B and Llama-3.2-1B in steps of 16 to 64 decodes.
_READ_SLOWER = 0.09
# Steps whose dense work is bound by its FLOPs by no more than this tell what a layer takes whatever its tokens.
_WAITS_FOR_WEIGHTS = 0.5
# By how much more of its cool time a hot step takes longer, for each unit that its FLOPs per second come nearer to the
# limit, as the power that it draws does: from 64 to 2,048 tokens Llama-3.1-8B goes from 0.74 to 1.0 of the limit, and
# from 7 to 23 % longer (0.43 to 0.70 in six fits, of four KV formats on two H200s).
_SLOWED_BY_POWER = 0.58
# The rate of matrix products is measured one behind the other, which lowers the clock. Products of zeros, which draw
# little power, ran 13 % faster on an H200 (894 TFLOP/s against 788).
_COOL_RATE = 1.13
# What each change adds. The first is of a model of half or twice the size, and grows as further factors of two do that
# are independent of each other: Llama-3.2-1B and Llama-3.1-8B on an H200, three of them apart, tell each other's steps
# of decodes to 5 % and prompts to 10 % (root mean square over sizes). The others, and all of the host's, are stated,
# not measured: what launches take is worked out by layers, weights in fp8 and ranks have launches of their own, and
# another GPU stands in a machine with another CPU.
ADDED_UNCERTAINTY = {
    "model": Uncertainty(0.03, 0.06, host=0.10),
    "kv_cache_dtype": Uncertainty(0.04, 0.03),
    "quantization": Uncertainty(0.08, 0.10, host=0.05),
    "tensor_parallel_size": Uncertainty(0.08, 0.10, host=0.10),
    "gpu": Uncertainty(0.12, 0.15, host=0.15),
}


@dataclass(frozen=True)
class Scaling:
    """What a transfer multiplies.

    Attributes:
        source, target: shapes; source_limits, target_limits: rates.
        link_s: seconds that the ranks of a step of so many tokens need to exchange their sums.
    """

    source: ModelShape
    target: ModelShape
    source_limits: Limits
    target_limits: Limits
    link_s: Callable[[int], float]

    @property
    def layers(self) -> float:
        return self.target.num_layers / self.source.num_layers

    @property
    def key(self) -> float:
        """Time to read one key of one layer, relative to the source."""
        bandwidth = self.source_limits.copy_bytes_per_s / self.target_limits.copy_bytes_per_s
        return self.target.kv_bytes / self.source.kv_bytes * bandwidth

    def compute_share(self, tokens: int, sampled: int) -> float:
        """How far the source's dense work is bound by its FLOPs: 0 not at all, 1 by nothing else."""
        return 1.0 - (self.reads(tokens, sampled)[0] / self.roofs(tokens, sampled)[0]) ** 2

    def when_cool(self) -> Scaling:
        """The same at the limits of cool devices."""
        return replace(self, source_limits=_cool(self.source_limits), target_limits=_cool(self.target_limits))

    def reads(self, tokens: int, sampled: int) -> tuple[float, float]:
        """Reading the weights of the source and of the target."""
        return self._both(
            lambda shape, limits: shape.products.seconds(tokens, sampled, limits.copy_bytes_per_s, math.inf)
        )

    def roofs(self, tokens: int, sampled: int) -> tuple[float, float]:
        """Dense work of the source and of the target at their limits."""
        return self._both(
            lambda shape, limits: shape.products.seconds(
                tokens, sampled, limits.copy_bytes_per_s, limits.flops_per_s(shape.fp8)
            )
        )

    def activations(self, tokens: int) -> tuple[float, float]:
        """What all layers of the source and of the target move between their products, and not for attention."""
        per_unit = _ACTIVATION_BYTES * tokens
        return self._both(
            lambda shape, limits: per_unit * shape.hidden_size * shape.num_layers / limits.copy_bytes_per_s
        )

    def chunk_roofs(self, query: int, context: int) -> tuple[float, float]:
        """Attention of a chunk likewise: the longer of scoring its pairs and reading its keys."""

        def seconds(shape: ModelShape, limits: Limits) -> float:
            keys = shape.decode_keys([context + query - 1])
            compute_s = shape.prompt_pairs(query, context) * shape.pair_flops / limits.matmul_flops_per_s
            return max(compute_s, keys * shape.kv_bytes / limits.copy_bytes_per_s)

        return self._both(seconds)

    def _both(self, seconds: Callable[[ModelShape, Limits], float]) -> tuple[float, float]:
        """Of the source and of the target."""
        return seconds(self.source, self.source_limits), seconds(self.target, self.target_limits)


def _cool(limits: Limits) -> Limits:
    fp8 = limits.matmul_fp8_flops_per_s
    return replace(
        limits,
        matmul_flops_per_s=_COOL_RATE * limits.matmul_flops_per_s,
        matmul_fp8_flops_per_s=None if fp8 is None else _COOL_RATE * fp8,
    )


def transferred(source: FittedKV, scaling: Scaling) -> FittedKV:
    """The fit of something else, without points of its own."""
    found = FittedKV(
        scaling.target,
        source.engine,
        _decode(source.decode, scaling),
        _prompt(source.prompt, scaling),
        _host(source.host, scaling),
    )
    return found.padded_by(replace(source.engine, piece_sizes=_piece_sizes(source, scaling)))


def _piece_sizes(source: FittedKV, scaling: Scaling) -> tuple[int, ...]:
    """What the engine pads the target's steps to: of a small model larger ones, as the GPU is done with them sooner."""
    sizes, target, measured = source.engine.piece_sizes, scaling.target, scaling.source
    is_alike = target.products.layer_flops == measured.products.layer_flops and target.fp8 == measured.fp8
    if not sizes or is_alike:
        return sizes
    elements = target.products.layer_flops / 2 / target.num_layers
    # The engine left out those of its rule that a larger one beats. Which these are is not known for the target.
    return tuple(padded_sizes(elements, target.fp8, source.engine.max_num_batched_tokens))


@dataclass(frozen=True)
class _Dense:
    """Dense work, taken apart.

    Attributes:
        all_sampled: whether every token of a step is sampled, as in decodes; else one is.
        gap_s: what a layer takes beyond its roofline, whatever its tokens.
        is_cool: whether it is of a cool device.
    """

    scaling: Scaling
    all_sampled: bool
    gap_s: float
    is_cool: bool = False

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        seconds: Sequence[float],
        scaling: Scaling,
        *,
        all_sampled: bool,
        is_cool: bool = False,
    ) -> _Dense:
        """Of what steps of these numbers of tokens took."""
        scaling = scaling.when_cool() if is_cool else scaling
        found = []
        for size, measured in zip(sizes, seconds, strict=True):
            sampled = size if all_sampled else 1
            if scaling.compute_share(size, sampled) <= _WAITS_FOR_WEIGHTS:
                known_s = _ONCE_S + scaling.activations(size)[0] + _READ_SLOWER * scaling.reads(size, sampled)[0]
                beyond = measured - scaling.roofs(size, sampled)[0] - known_s
                found.append(max(beyond, 0.0) / scaling.source.num_layers)
        return cls(scaling, all_sampled, statistics.median(found) if found else 0.0, is_cool)

    def seconds(self, size: int, measured: float) -> float:
        """What a step takes on the target that took `measured` seconds on the source."""
        scaling, sampled = self.scaling, size if self.all_sampled else 1
        before, after = scaling.roofs(size, sampled)
        beyond = measured - before
        if beyond <= 0.0:  # faster than the limits that were measured
            return after * measured / before
        once = min(_ONCE_S, beyond)
        share = scaling.compute_share(size, sampled)
        # Not more than there is, of each in the same proportion.
        told, told_after = self._told(size, sampled, share)
        fixed = min(1.0, (beyond - once) / told)
        rest = beyond - once - fixed * told
        source, target = scaling.activations(size) if self.is_cool else (before, after)
        factor = share * target / source + (1.0 - share) * scaling.layers
        return after + once + fixed * told_after + rest * factor

    def _told(self, size: int, sampled: int, share: float) -> tuple[float, float]:
        """What a step takes for its layers, weights and activations, on the source and on the target."""
        scaling = self.scaling
        return tuple(
            shape.num_layers * self.gap_s + moved + _READ_SLOWER * (1.0 - share) * read
            for shape, moved, read in zip(
                (scaling.source, scaling.target), scaling.activations(size), scaling.reads(size, sampled), strict=True
            )
        )


def _dense(sizes: Sequence[int], seconds: Sequence[float], scaling: Scaling, all_sampled: bool) -> tuple[float, ...]:
    dense = _Dense.of(sizes, seconds, scaling, all_sampled=all_sampled)
    return tuple(dense.seconds(*each) + scaling.link_s(each[0]) for each in zip(sizes, seconds, strict=True))


def transferred_clock(clock: ClockModel, source: FittedKV, scaling: Scaling) -> ClockModel:
    """How the device slows down with another model on it.

    Cool steps are transferred at the limits of a cool device. How much longer a hot one takes follows from the power
    that it draws: it is as much as on the source, and more or less by how much nearer its FLOPs per second come to the
    limit. How fast the device heats and cools is taken for what is usual, as a model that draws little power tells
    little of it.
    """
    prompt = source.prompt
    dense = _Dense.of(prompt.sizes, prompt.dense_s, scaling, all_sampled=False)
    cool_s = [seconds * clock.ratios(size)[0] for size, seconds in zip(prompt.sizes, prompt.dense_s, strict=True)]
    cool_dense = _Dense.of(prompt.sizes, cool_s, scaling, all_sampled=False, is_cool=True)
    cool, hot = [], []
    for tokens, of_cool, of_hot in zip(clock.tokens, clock.cool, clock.hot, strict=True):
        steady = prompt.dense(tokens)
        measured = steady * of_cool
        before, after = scaling.roofs(tokens, 1)
        found = cool_dense.seconds(tokens, measured)
        slowed = of_hot / of_cool - 1.0 + _SLOWED_BY_POWER * (after / found - before / measured)
        cool.append(found / dense.seconds(tokens, steady))
        hot.append(cool[-1] * (1.0 + max(slowed, 0.0)))
    usual = {"tau_s": USUAL_TAU_S, "e0": USUAL_E0, "e1": USUAL_E1}
    return replace(clock, cool=tuple(cool), hot=tuple(hot), **usual)


def _decode(fit: DecodeFit, scaling: Scaling) -> DecodeFit:
    attention = scaling.key * scaling.layers
    return replace(
        fit,
        base_s=_dense(fit.sizes, fit.base_s, scaling, all_sampled=True),
        key_s=fit.key_s * scaling.key,
        ragged_s=fit.ragged_s * scaling.key,
        residuals=tuple(
            replace(row, seconds=tuple(s * attention for s in row.seconds), slope_s=row.slope_s * attention)
            for row in fit.residuals
        ),
        num_layers=scaling.target.num_layers,
        full_layers=sum(count for window, count in scaling.target.layers if window is None),
        max_keys=round(fit.max_keys * scaling.layers),
    )


def _prompt(fit: PromptFit, scaling: Scaling) -> PromptFit:
    return replace(
        fit,
        dense_s=_dense(fit.sizes, fit.dense_s, scaling, all_sampled=False),
        attention=tuple(_attention(row, scaling) for row in fit.attention),
        key_s=fit.key_s * scaling.key,
        chunk_s=fit.chunk_s * scaling.layers,
        row_s=fit.row_s * scaling.layers,
        decodes_s=fit.decodes_s * scaling.layers,
        exact={},
        shape=scaling.target,
        limits=scaling.target_limits,
    )


def _attention(row: AttentionRow, scaling: Scaling) -> AttentionRow:
    by_pairs: dict[int, tuple[int, float]] = {}
    for context, seconds in zip(row.contexts, row.seconds, strict=True):
        before, after = scaling.chunk_roofs(row.query, context)
        by_pairs[scaling.target.prompt_pairs(row.query, context)] = (context, seconds * after / before)
    pairs = sorted(by_pairs)
    contexts, seconds = zip(*(by_pairs[each] for each in pairs), strict=True)
    # Further pairs: as long as before, relative to the rooflines at the last context.
    per_pair = scaling.source.prompt_pairs(row.query, row.contexts[-1]) / pairs[-1]
    before, after = scaling.chunk_roofs(row.query, row.contexts[-1])
    return AttentionRow(row.query, contexts, tuple(pairs), seconds, row.rate_s * after / before * per_pair)


def _host(fit: HostFit, scaling: Scaling) -> HostFit:
    costs = dict(fit.costs)
    # A decode step replays one graph; the others launch something for every layer.
    for kind in ("pieces", "eager"):
        if kind in costs:
            cost = costs[kind]
            of_layers = {name: getattr(cost, name) * scaling.layers for name in ("step_s", "mixed_s", "context_s")}
            costs[kind] = replace(cost, **of_layers)
    return replace(fit, costs=costs, latency_s=tuple(s * scaling.layers for s in fit.latency_s), errors={})


def limits_on(limits: Limits, measured_on: GpuSpec, gpu: GpuSpec) -> Limits:
    """What another GPU is expected to do: its data sheet, at the share that the measured one reached."""
    matmul = limits.matmul_flops_per_s * gpu.bf16_flops / measured_on.bf16_flops
    fp8 = None
    if gpu.fp8_flops is not None:
        fp8 = matmul * gpu.fp8_flops / gpu.bf16_flops * _FP8_REACHED
        if limits.matmul_fp8_flops_per_s is not None and measured_on.fp8_flops is not None:
            fp8 = limits.matmul_fp8_flops_per_s * gpu.fp8_flops / measured_on.fp8_flops
    copy = limits.copy_bytes_per_s * gpu.memory_bandwidth_bytes_per_s / measured_on.memory_bandwidth_bytes_per_s
    return Limits(copy, matmul, fp8)


def measured_link_s(
    allreduce: Sequence[tuple[int, int, float]],
    ranks: int,
    num_layers: int,
    hidden_size: int,
    sheet_s: Callable[[float], float],
) -> Callable[[float], float]:
    """Two all-reduces a layer of bf16 hidden states, from a table that has some of so many ranks.

    Between measured sizes a power law; outside of them as the data sheet has it, at the distance of the nearest size.

    Args:
        sheet_s: by the data sheet, of a step of so many tokens.
    """
    table = sorted((size, seconds) for world, size, seconds in allreduce if world == ranks)

    def one(size: float) -> float:
        for (low, low_s), (high, high_s) in pairwise(table):
            if size <= high:
                share = math.log(size / low) / math.log(high / low)
                return low_s ** (1 - share) * high_s**share
        return table[-1][1]

    def link_s(tokens: float) -> float:
        measured = min(max(tokens, table[0][0] / (2 * hidden_size)), table[-1][0] / (2 * hidden_size))
        seconds = 2 * num_layers * one(measured * hidden_size * 2)
        return seconds if measured == tokens else seconds * sheet_s(tokens) / sheet_s(measured)

    return link_s


def widened(uncertainty: Uncertainty, changes: Sequence[str], size_ratio: float = 1.0) -> Uncertainty:
    """The uncertainty with that of these changes added; they count as independent.

    Args:
        size_ratio: parameters of the model over those of the one that was measured.
    """
    doublings = max(1.0, abs(math.log2(size_ratio)))
    found = uncertainty
    for change in changes:
        times = doublings**0.5 if change == "model" else 1.0
        added = ADDED_UNCERTAINTY[change]
        found = Uncertainty(
            math.hypot(found.decode, times * added.decode),
            math.hypot(found.prefill, times * added.prefill),
            math.hypot(found.host, times * added.host),
        )
    return found
