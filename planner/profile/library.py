"""Which profile serves a deployment: the shipped ones, the user's, and what each would have to be transferred for.

Beside profiles of `memwall calibrate` the user may give calibrations of `memwall calibrate-from`, which hold for one
deployment only and scale the step times that profiles or data sheets give it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from planner.catalog import load_gpu
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.kv_format import KVCacheDtype
from planner.model import ModelSpec
from planner.profile.schema import Profile, load_profile, read_profile
from planner.profile.shape import ModelShape
from planner.profile.step_time import ProfileStepTime
from planner.profile.transfer import (
    ADDED_UNCERTAINTY,
    Scaling,
    limits_on,
    measured_link_s,
    transferred,
    transferred_clock,
    widened,
)
from planner.roofline import RooflineStepTime

if TYPE_CHECKING:
    from planner.external.calibration import ExternalCalibration

#: In place of a profile's path: no profile at all, not even a shipped one.
NO_PROFILE = "none"
_SUFFIXES = (".json", ".json.gz")
# A GPU that no catalog entry could be told of has to have at least the memory of the one that is asked for.
_MEMORY_SLACK = 0.02

_CHANGE_WORDS = {
    "model": "another model to {model}",
    "kv_cache_dtype": "another KV format",
    "quantization": "other weight bits",
    "tensor_parallel_size": "one GPU",
    "gpu": "another GPU to {gpu}",
}


@dataclass(frozen=True)
class Match:
    """A profile that can serve.

    Attributes:
        kv_cache_dtype: whose tables are used.
        changes: what differs from what was measured, words of `ADDED_UNCERTAINTY`; empty for an exact match.
    """

    profile: Profile
    kv_cache_dtype: KVCacheDtype
    changes: tuple[str, ...]

    def transfers(self, model: ModelSpec, gpu: GpuSpec) -> str:
        """What it has to be transferred from and to, in words; empty for an exact match."""
        return ", ".join(_CHANGE_WORDS[change].format(model=model.name, gpu=gpu.name) for change in self.changes)


def load_profiles(paths: Sequence[str | Path] | None) -> tuple[Profile, ...]:
    """The user's profiles, and behind them the shipped ones; only the latter for None, nothing for "none".

    Calibrations from outside are left out.

    Raises:
        UserError: a profile that cannot be used, or "none" beside others.
    """
    if paths is None:
        return shipped_profiles()
    names = [str(path) for path in paths]
    if NO_PROFILE in names:
        if len(names) > 1:
            raise UserError("--profile none means no profile at all; leave it out to use those that are given")
        return ()
    given = [_load(name) for name in names]
    return (*(each for each in given if isinstance(each, Profile)), *shipped_profiles())


def load_calibrations(paths: Sequence[str | Path] | None) -> tuple[tuple[str, ExternalCalibration], ...]:
    """The calibrations from outside among the user's profiles, each with the name of its file.

    Raises:
        UserError: one that cannot be used.
    """
    given = [(Path(path).name, _load(str(path))) for path in paths or () if str(path) != NO_PROFILE]
    return tuple((name, each) for name, each in given if not isinstance(each, Profile))


def _load(name: str) -> Profile | ExternalCalibration:
    try:
        stat = Path(name).stat()
    except OSError as error:
        raise UserError(f"cannot read profile {name}: {error.strerror or error}") from None
    return _load_once(name, stat.st_mtime_ns, stat.st_size)


@cache
def _load_once(name: str, mtime_ns: int, size: int) -> Profile | ExternalCalibration:
    from planner.external.calibration import KIND, parse_external  # which itself plans with profiles

    document = _content(name)
    if isinstance(document, dict) and document.get("kind") == KIND:
        return parse_external(document, Path(name).name)
    return load_profile(name)


def _content(name: str) -> object:
    """The JSON of a file, to tell its kind; None if it is none, which reading it as a profile will complain about."""
    try:
        return json.loads(read_profile(Path(name)))
    except (ValueError, RecursionError):  # which an error of the user's is, too
        return None


@cache
def shipped_profiles() -> tuple[Profile, ...]:
    """Those in planner/data/profiles."""
    folder = resources.files("planner") / "data" / "profiles"
    if not folder.is_dir():
        return ()
    files = sorted((each for each in folder.iterdir() if each.name.endswith(_SUFFIXES)), key=lambda each: each.name)
    found = []
    for file in files:
        with resources.as_file(file) as path:
            found.append(load_profile(path))
    return tuple(found)


def find_profile(
    model: ModelSpec,
    gpu: GpuSpec,
    kv_cache_dtype: KVCacheDtype,
    tensor_parallel_size: int,
    profiles: Sequence[Profile],
) -> Match | None:
    """The profile that needs the least transfer; None if none can serve.

    Of equally near ones the model next in size, and then the first.
    """
    found: list[tuple[float, float, int, Match]] = []
    for place, profile in enumerate(profiles):
        for measured in profile.kv_cache_dtypes:
            changes = _changes(profile, measured, model, gpu, kv_cache_dtype, tensor_parallel_size)
            if changes and _is_special(profile.spec, model):
                continue
            added = sum(ADDED_UNCERTAINTY[change].decode ** 2 for change in changes)
            distance = abs(math.log(model.num_parameters / profile.spec.num_parameters))
            distance += abs(math.log(measured.bits / kv_cache_dtype.bits))
            found.append((added, distance, place, Match(profile, measured, changes)))
    return min(found, key=lambda each: each[:3])[3] if found else None


def _changes(
    profile: Profile,
    measured: KVCacheDtype,
    model: ModelSpec,
    gpu: GpuSpec,
    kv_cache_dtype: KVCacheDtype,
    tensor_parallel_size: int,
) -> tuple[str, ...]:
    changes = []
    if not same_shapes(profile.spec, model):
        changes.append("model")
    if _weight_bits(profile.spec) != _weight_bits(model):
        changes.append("quantization")
    if measured is not kv_cache_dtype:
        changes.append("kv_cache_dtype")
    if tensor_parallel_size != 1:
        changes.append("tensor_parallel_size")
    if not is_same_gpu(profile, gpu):
        changes.append("gpu")
    return tuple(changes)


def _is_special(*specs: ModelSpec) -> bool:
    """Latent attention and experts do too much differently for a transfer to or from them."""
    return any(spec.mla or spec.moe for spec in specs)


def why_unusable(profile: Profile, model: ModelSpec, gpu: GpuSpec, enforce_eager: bool) -> str | None:
    """What keeps a profile from telling anything of such a deployment; None if nothing does."""
    if profile.record.gpu is None and not is_same_gpu(profile, gpu):
        return f"it was measured on {profile.record.gpu_name!r}, whose data sheet is not known"
    if profile.tables.engine.enforce_eager != enforce_eager:
        return f"it was measured {'with' if enforce_eager else 'without'} CUDA graphs"
    if not same_shapes(profile.spec, model) and _is_special(profile.spec, model):
        return f"it was measured with {profile.spec.name}, and experts or latent attention cannot be transferred"
    if not profile.kv_cache_dtypes:
        return "it has no tables of a KV format that a GPU would use"
    return None


def is_same_gpu(profile: Profile, gpu: GpuSpec) -> bool:
    """Whether a profile was measured on such a GPU; of one that is in no catalog its memory has to tell."""
    record = profile.record
    if record.gpu is not None:
        return record.gpu == gpu.id
    memory = record.gpu_memory_bytes or 0
    return abs(memory / gpu.memory_bytes - 1) < _MEMORY_SLACK


def same_shapes(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two models do the same work, whatever they are called and how their weights are stored."""

    def shapes(spec: ModelSpec) -> tuple:
        counts = tuple((group.role, group.num_parameters) for group in spec.parameters)
        heads = (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim)
        return (spec.hidden_size, *heads, spec.layer_windows, counts, spec.mla, spec.moe)

    return shapes(one) == shapes(other)


def _weight_bits(spec: ModelSpec) -> tuple:
    bits = {(group.role, group.bits_per_parameter) for group in spec.parameters}
    return (spec.fp8_compute, *sorted({each for role, each in bits if role not in ("norm",)}))


def step_time_of(
    match: Match,
    model: ModelSpec,
    gpu: GpuSpec,
    kv_cache_dtype: KVCacheDtype,
    tensor_parallel_size: int,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> ProfileStepTime:
    """The step times of a deployment from the profile that was found for it."""
    profile, changes = match.profile, match.changes
    fitted = profile.fitted(match.kv_cache_dtype)
    size_ratio = model.num_parameters / profile.spec.num_parameters
    uncertainty = widened(profile.uncertainty(match.kv_cache_dtype), changes, size_ratio)
    record = profile.record
    origin = profile.origin(match.kv_cache_dtype)
    if changes:
        origin = f"from the {origin}: transferred from {match.transfers(model, gpu)}"
        target = ModelShape.of(model, kv_cache_dtype, block_size, tensor_parallel_size)
        source_limits = _complete(profile.tables.limits, profile, gpu)
        limits = source_limits
        if "gpu" in changes:
            limits = limits_on(source_limits, load_gpu(record.gpu), gpu)
        link_s = _link(profile, model, gpu, tensor_parallel_size, "gpu" in changes)
        scaling = Scaling(fitted.shape, target, source_limits, limits, link_s)
        fitted, measured = transferred(fitted, scaling), fitted
    # Another GPU is taken to give way to its power limit as the measured one does, and so are other weight bits and
    # numbers of ranks; what another model draws follows from its shape.
    clock = profile.clock(match.kv_cache_dtype)
    if clock is not None and "model" in changes:
        clock = transferred_clock(clock, measured, scaling)
    return ProfileStepTime(fitted, origin, uncertainty, max_num_seqs, max_num_batched_tokens, clock=clock)


def _complete(limits, profile: Profile, gpu: GpuSpec):
    """The limits with an fp8 rate, where the GPU has one that was not measured."""
    if limits.matmul_fp8_flops_per_s is not None:
        return limits
    measured_on = _measured_on(profile, gpu)
    return replace(limits, matmul_fp8_flops_per_s=limits_on(limits, measured_on, measured_on).matmul_fp8_flops_per_s)


def _measured_on(profile: Profile, gpu: GpuSpec) -> GpuSpec:
    """The GPU of a profile; the one that is asked for where the catalog has no name for it."""
    return load_gpu(profile.record.gpu) if profile.record.gpu else gpu


def _link(profile: Profile, model: ModelSpec, gpu: GpuSpec, ranks: int, other_gpu: bool) -> Callable[[int], float]:
    """What the ranks need to exchange the sums of a step of so many tokens.

    As measured; for another number of ranks or GPU by the data sheet, in the ratio that the nearest measured number of
    ranks has to it; by the data sheet alone where nothing was measured, or where GPUs are linked in another way.
    """
    if ranks == 1:
        return lambda tokens: 0.0
    sheet_s = RooflineStepTime(model, gpu, ranks).all_reduce_s
    measured_on = _measured_on(profile, gpu)
    worlds = {world for world, _, _ in profile.tables.allreduce}
    if not worlds or measured_on.fast_link != gpu.fast_link:
        return sheet_s
    nearest = min(worlds, key=lambda world: abs(math.log(world / ranks)))
    nearest_s = RooflineStepTime(model, measured_on, nearest).all_reduce_s
    shape = model.num_layers, model.hidden_size
    measured_s = measured_link_s(profile.tables.allreduce, nearest, *shape, nearest_s)
    if nearest == ranks and not other_gpu:
        return measured_s
    return lambda tokens: sheet_s(tokens) * measured_s(tokens) / nearest_s(tokens)
