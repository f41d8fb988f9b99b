"""The step times for a record: a profile that was measured on what the record was served by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.validate.records import EngineSettings, ServedRecord
from engine.errors import UserError
from planner.step_time import StepTime

# The same settings leave the same memory for the KV cache, but for what the driver and its libraries take.
_BLOCKS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Predictor:
    """Step times, and what is said of them.

    Attributes:
        origin: where they come from, one line.
        largest_piece: most tokens of a step that runs in pieces; None if unknown.
        notes: what differs between profile and record without harm, one sentence each.
    """

    step_time: StepTime
    origin: str
    largest_piece: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProfileFacts:
    """What of a profile has to agree with a record.

    Attributes:
        name: for messages.
        num_kv_blocks: by KV dtype, of the dtypes that were measured.
        engine: settings it was measured with.
    """

    name: str
    model: str
    gpu: str
    quantization: str | None
    num_kv_blocks: Mapping[str, int]
    engine: Mapping[str, Any]


def step_time_for(record: ServedRecord, path: Path | None = None) -> Predictor:
    """The step times of a profile, or of the shipped one that was measured on what served the record.

    The one place that knows what a profile looks like.

    Raises:
        UserError: there is no such profile, or it was measured on something else.
    """
    try:
        from planner.profile.library import load_calibrations, shipped_profiles
        from planner.profile.schema import load_profile
    except ModuleNotFoundError as error:
        raise UserError(f"this installation of memwall reads no profiles ({error}); reinstall it") from None

    engine = record.engine
    if calibrations := load_calibrations(None if path is None else [path]):
        return _scaled_for(record, calibrations[0][1], path)
    if path is None:
        profile = _chosen(record, [(each, _facts_of(each)) for each in shipped_profiles()])
    else:
        profile = load_profile(path)
    notes = check_same(record, _facts_of(profile))
    limits = engine.max_num_seqs, engine.max_num_batched_tokens
    step_time = profile.step_time(engine.kv_cache_dtype, *limits, engine.device_id)
    if engine.gpu is not None and not profile.is_of(engine.device_id):
        notes += (
            f"{profile.name} is of another {engine.gpu}, as far as is known: intervals count with what two differ in",
        )
    return _predictor(step_time, profile, engine, notes)


def _predictor(step_time: StepTime, profile: Any, engine: EngineSettings, notes: Iterable[str]) -> Predictor:
    pieces = [size for size in profile.record.engine.piece_sizes if size <= engine.max_num_batched_tokens]
    return Predictor(step_time, step_time.description, max(pieces, default=0), tuple(notes))


def _facts_of(profile: Any) -> ProfileFacts:
    told = profile.record
    engine = {name: getattr(told.engine, name) for name in (*_EQUAL, *_MEASURED_UP_TO, *_OF_MEMORY)}
    blocks = {str(dtype): table.num_kv_blocks for dtype, table in told.kv.items()}
    return ProfileFacts(profile.name, told.model.name, told.gpu_name, told.quantization, blocks, engine)


def _scaled_for(record: ServedRecord, calibration: Any, path: Path) -> Predictor:
    """A profile's step times, scaled to what runs of the same server showed."""
    from planner.deployment import Deployment
    from planner.kv_format import KVCacheDtype

    engine, (model, gpu) = record.engine, _catalogued(record)
    refuse = _refusal(record, path.name)
    settings = calibration.settings
    for what, one, other in (
        ("model", calibration.model, model.name),
        ("GPU", calibration.gpu, gpu.id),
        ("quantization", calibration.quantization, engine.quantization),
        ("tensor_parallel_size", calibration.tensor_parallel_size, engine.tensor_parallel_size),
        ("a KV cache in", calibration.kv_cache_dtype, engine.kv_cache_dtype),
        *((name, settings[name], getattr(engine, name)) for name in (*_EQUAL, *_MEASURED_UP_TO) if name in settings),
    ):
        if one != other and one is not None:
            refuse(what, one, other)
    deployment = Deployment(
        model=model,
        gpu=gpu,
        tensor_parallel_size=engine.tensor_parallel_size,
        kv_cache_dtype=KVCacheDtype(engine.kv_cache_dtype),
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        block_size=engine.block_size,
        enforce_eager=engine.enforce_eager,
        profiles=(str(path),),
    )
    step_time = deployment.step_time()
    fitted = getattr(step_time.inner, "fitted", None)
    return Predictor(step_time, step_time.description, max(fitted.engine.piece_sizes, default=0) if fitted else None)


def transferred_for(record: ServedRecord, path: Path) -> Predictor:
    """The step times of a profile of something else, transferred to what served a record, as planning does it.

    Raises:
        UserError: there is no such profile; what served is not in the catalog; the record was served with other
            settings than were measured; or the profile cannot tell anything of it.
    """
    from planner.kv_format import KVCacheDtype
    from planner.profile.library import find_profile, step_time_of, why_unusable
    from planner.profile.schema import load_profile

    profile, engine, (model, gpu) = load_profile(path), record.engine, _catalogued(record)
    try:
        kv_cache_dtype = KVCacheDtype(engine.kv_cache_dtype)
    except ValueError:
        raise UserError(f"{record.name} was served with a KV cache in {engine.kv_cache_dtype}") from None
    reason = why_unusable(profile, model, gpu, engine.enforce_eager)
    match = find_profile(model, gpu, kv_cache_dtype, engine.tensor_parallel_size, [profile])
    if reason is not None or match is None:
        raise UserError(f"{profile.name} tells nothing of {_what(engine)}: {reason or 'no table of it can be used'}")
    if not match.changes:
        raise UserError(f"{profile.name} was measured on {_what(engine)} itself; leave out --transfer")
    facts = _facts_of(profile)
    notes = _check_settings(record, facts, _refusal(record, facts.name))
    limits = engine.max_num_seqs, engine.max_num_batched_tokens
    step_time = step_time_of(match, model, gpu, kv_cache_dtype, engine.tensor_parallel_size, engine.block_size, *limits)
    return _predictor(step_time, profile, engine, notes)


def _catalogued(record: ServedRecord) -> tuple[Any, Any]:
    """Model and GPU of a record, of the catalog.

    Raises:
        UserError: it has one of them not.
    """
    from calibration.measure.facts import gpu_id
    from planner.catalog import load_gpu, load_model

    engine = record.engine
    gpu_name = gpu_id(engine.gpu or "")
    if gpu_name is None:
        raise UserError(f"{record.name} was served on {engine.gpu or 'a CPU'}, of which no step times can be told")
    return load_model(engine.model, engine.quantization), load_gpu(gpu_name)


def _chosen(record: ServedRecord, profiles: Sequence[tuple[Any, ProfileFacts]]) -> Any:
    """The first of some profiles that fits a record.

    Raises:
        UserError: none does; if one is of its model, saying what it differs in.
    """
    reasons = []
    # Of those that do not fit the nearest says why.
    nearest = sorted(profiles, key=lambda each: each[1].quantization != record.engine.quantization)
    for profile, facts in nearest:
        try:
            check_same(record, facts)
        except UserError as error:
            if facts.model == record.engine.model:
                reasons.append(str(error))
        else:
            return profile
    reason = f" ({reasons[0]})" if reasons else ""
    raise UserError(f"no profile is shipped for {_what(record.engine)}{reason}; give one with --profile")


# Settings that change the time of a step of the same shape, and those up to which steps were measured.
_EQUAL = ("block_size", "enforce_eager", "async_scheduling")
_MEASURED_UP_TO = ("max_num_batched_tokens", "max_num_seqs")
# Settings that decide how many blocks there are.
_OF_MEMORY = ("gpu_memory_utilization",)


def check_same(record: ServedRecord, profile: ProfileFacts) -> tuple[str, ...]:
    """What differs without harm, in sentences.

    Raises:
        UserError: something differs that step times or blocks depend on.
    """
    engine = record.engine

    refuse = _refusal(record, profile.name)
    for what, one, other in (
        ("model", profile.model, engine.model),
        ("GPU", profile.gpu, engine.gpu or "a CPU"),
        ("quantization", profile.quantization, engine.quantization),
    ):
        if one != other:
            refuse(what, one, other)
    blocks = profile.num_kv_blocks.get(engine.kv_cache_dtype)
    if blocks is None:
        refuse("a KV cache in", ", ".join(profile.num_kv_blocks), engine.kv_cache_dtype)
    notes = _check_settings(record, profile, refuse)
    same_memory = engine.num_gpu_blocks_override is None and all(
        profile.engine[name] == getattr(engine, name) for name in (*_OF_MEMORY, *_MEASURED_UP_TO)
    )
    if same_memory and abs(engine.num_kv_blocks - blocks) > _BLOCKS_TOLERANCE * blocks:
        refuse("a number of KV blocks of", blocks, engine.num_kv_blocks)
    if engine.num_kv_blocks != blocks:
        notes.append(
            f"{record.name} had {engine.num_kv_blocks:,} KV blocks and {profile.name} {blocks:,}; it is simulated with "
            "its own"
        )
    return tuple(notes)


def _refusal(record: ServedRecord, profile: str) -> Callable[[str, Any, Any], None]:
    def refuse(what: str, of_profile: Any, of_record: Any) -> None:
        values = ["none" if each is None else each for each in (of_record, of_profile)]
        raise UserError(
            f"{record.name} was served with {what} {values[0]}, but {profile} was measured with {values[1]}"
        )

    return refuse


def _check_settings(record: ServedRecord, profile: ProfileFacts, refuse: Callable[[str, Any, Any], None]) -> list[str]:
    """What differs without harm of the scheduler's and the engine's settings; the rest is refused."""
    engine = record.engine
    for name in _EQUAL:
        if profile.engine[name] != getattr(engine, name):
            refuse(name, profile.engine[name], getattr(engine, name))
    for name in _MEASURED_UP_TO:
        if getattr(engine, name) > profile.engine[name]:
            refuse(name, profile.engine[name], getattr(engine, name))
    return [
        f"{record.name} was served with {name} {getattr(engine, name)}, {profile.name} was measured with "
        f"{profile.engine[name]}; the record's counts"
        for name in _MEASURED_UP_TO
        if getattr(engine, name) != profile.engine[name]
    ]


def _what(engine: EngineSettings) -> str:
    weights = f", {engine.quantization} weights" if engine.quantization else ""
    return f"{engine.model} on {engine.gpu or 'a CPU'}{weights} with {engine.kv_cache_dtype} KV"
