"""Flags shared by several commands, spelled as in `vllm serve`, `vllm bench serve` and AIConfigurator.

Flags come in groups. A group is a dataclass whose fields are Typer options; a command takes whole groups, and
`takes_groups` spreads them into flags:

    @takes_groups
    def simulate(model: Model = DEFAULT_MODEL, workload: WorkloadOptions = GROUP, slo: SLOOptions = GROUP) -> None:
        load = workload_from_options(workload)
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from planner.errors import UserError

if TYPE_CHECKING:
    from planner.hardware import GpuSpec
    from planner.simulation import SLO, AcceptanceProcess, SimulationOptions
    from planner.speculation import SpeculationConfig
    from planner.workload import Workload

DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_SYSTEM = "h200_sxm"
GROUP: Any = None  # the default of a parameter that is a group; the flags have defaults of their own

# A synthetic load takes from planner.workload.default_workload what no flag says.
_DEFAULT_RATE = 8.0
_DEFAULT_DURATION_S = 600.0
_DEFAULT_ISL = "lognormal:mean=1024,cv=1.0,max=8192"
_DEFAULT_OSL = "lognormal:mean=256,cv=0.8,max=2048"
_LENGTH_FORMS = "1024, uniform:100-1024, lognormal:mean=1155,cv=1.1 or empirical:trace.csv"

_Result = TypeVar("_Result")


def takes_groups(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Replace each parameter of `command` that is an option group by the flags of the group."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if name != "return" and is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        flag_hints = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            kind, annotation = parameter.KEYWORD_ONLY, flag_hints[field.name]
            parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))

    @functools.wraps(command)
    def with_flags(**values: Any) -> _Result:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    with_flags.__signature__ = inspect.Signature(parameters)
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags


def flag(*names: str, help: str, panel: str, **settings: Any) -> Any:
    """A Typer option, listed under `panel` in the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


# --- what is served, and on what ------------------------------------------------------------------------------------

_SERVED = "Model and GPU"

Model = Annotated[
    str,
    flag(
        "--model",
        help="Catalog id, Hugging Face repository, or path to a config.json.",
        panel=_SERVED,
        metavar="NAME|PATH",
    ),
]
System = Annotated[
    str, flag("--system", help="GPU id; `memwall catalog gpus` lists them.", panel=_SERVED, metavar="GPU")
]
TensorParallelSize = Annotated[
    int, flag("--tensor-parallel-size", "-tp", help="GPUs per replica.", panel=_SERVED, metavar="N")
]
Replicas = Annotated[
    int,
    flag("--replicas", help="Engines behind the router.", panel=_SERVED, min=1, max=10_000, metavar="N"),
]
Quantization = Annotated[
    str | None,
    flag("--quantization", help="fp8 to quantise the linear weights while loading.", panel=_SERVED, metavar="fp8"),
]

Profiles = Annotated[
    list[str] | None,
    flag(
        "--profile",
        help="Step times of `memwall calibrate` or `calibrate-from`; repeatable. Default: shipped; none: data sheets.",
        panel=_SERVED,
        metavar="PATH|none",
    ),
]


def profiles_from_option(profiles: list[str] | None, quantization: str | None) -> tuple[str, ...] | None:
    """The `profiles` of a `Deployment`, each of them read once to see that it can be used.

    Args:
        quantization: of the model's weights; a calibration from outside was of an engine that had one too.

    Raises:
        UserError: one cannot.
    """
    from planner.profile.library import load_calibrations, load_profiles

    if not profiles:
        return None
    load_profiles(profiles)
    for name, calibration in load_calibrations(profiles):
        if calibration.quantization != quantization:
            words = [
                f"{each} weights" if each else "weights that were not quantised"
                for each in (calibration.quantization, quantization)
            ]
            raise UserError(f"{name}: the calibration is of {words[0]}, not of {words[1]}")
    return tuple(profiles)


def profile_files(profiles: list[str] | None) -> list[tuple[str, Path | None]]:
    """The files of `--profile`, as `ensure_distinct` takes inputs."""
    from planner.profile.library import NO_PROFILE

    return [("--profile", Path(name)) for name in profiles or () if name != NO_PROFILE]


def model_files(model: str | None) -> list[tuple[str, Path | None]]:
    """The file of `--model`, if it has one, as `ensure_distinct` takes inputs."""
    from planner.catalog import config_file

    return [("--model", config_file(model))]


def gpu_from_option(system: str) -> GpuSpec:
    """The GPU of a `--system` that takes a single id.

    Raises:
        UserError: an unknown id, or several.
    """
    from planner.catalog import load_gpu

    if "," in system:
        raise UserError(f"--system takes one GPU here, not {system!r}; `memwall plan` compares several")
    return load_gpu(system)


# --- the engine -----------------------------------------------------------------------------------------------------

_ENGINE = "Engine"

KVCacheDtypeName = Annotated[
    str,
    flag("--kv-cache-dtype", help="auto (bf16), fp8, int8, int4 or int2.", panel=_ENGINE, metavar="DTYPE"),
]
MaxModelLen = Annotated[
    int | None,
    flag(
        "--max-model-len",
        help="Longest sequence; default: what the workload needs, or in `memory` the model's limit.",
        panel=_ENGINE,
        metavar="TOKENS",
    ),
]
MaxNumSeqs = Annotated[int, flag("--max-num-seqs", help="Most sequences in one step.", panel=_ENGINE, metavar="N")]
MaxNumBatchedTokens = Annotated[
    int, flag("--max-num-batched-tokens", help="Token budget of one step.", panel=_ENGINE, metavar="TOKENS")
]
GpuMemoryUtilization = Annotated[
    float,
    flag("--gpu-memory-utilization", help="Share of GPU memory for the engine.", panel=_ENGINE, metavar="SHARE"),
]
BlockSize = Annotated[
    int | None,
    flag(
        "--block-size",
        help="Tokens per KV block; default 16, or 64 for int4 and int2.",
        panel=_ENGINE,
        metavar="TOKENS",
    ),
]
NumGpuBlocksOverride = Annotated[
    int | None,
    flag("--num-gpu-blocks-override", help="KV blocks, if they are known.", panel=_ENGINE, metavar="N"),
]
KVCachePolicy = Annotated[
    str,
    flag(
        "--kv-cache-policy",
        help="hybrid keeps the window of sliding layers, unified the full context.",
        panel=_ENGINE,
        metavar="POLICY",
    ),
]
EnforceEager = Annotated[bool, flag("--enforce-eager", help="No CUDA graphs.", panel=_ENGINE)]
EnablePrefixCaching = Annotated[
    bool | None,
    flag(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Reuse the KV of shared prompt beginnings; default: where the workload tells of any.",
        panel=_ENGINE,
        show_default=False,
    ),
]
EnableChunkedPrefill = Annotated[
    bool,
    flag(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        help="Split long prompts over steps.",
        panel=_ENGINE,
    ),
]
Router = Annotated[
    str,
    flag(
        "--router",
        help="auto, round-robin, least-outstanding or prefix-affinity.",
        panel=_ENGINE,
        metavar="NAME",
    ),
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of one engine that decide its memory."""

    max_model_len: MaxModelLen = None
    kv_cache_dtype: KVCacheDtypeName = "auto"
    max_num_seqs: MaxNumSeqs = 256
    max_num_batched_tokens: MaxNumBatchedTokens = 8192
    gpu_memory_utilization: GpuMemoryUtilization = 0.92
    block_size: BlockSize = None
    num_gpu_blocks_override: NumGpuBlocksOverride = None
    kv_cache_policy: KVCachePolicy = "hybrid"
    enforce_eager: EnforceEager = False

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of `Deployment`, with the KV format parsed.

        Raises:
            UserError: no such KV format.
        """
        from planner.memory import KVCacheDtype

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"kv_cache_dtype": KVCacheDtype.parse(self.kv_cache_dtype)}


# --- speculation ----------------------------------------------------------------------------------------------------

_SPECULATION = "Speculative decoding"


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """The drafter, and how often its drafts are accepted."""

    speculative_config: Annotated[
        str | None,
        flag(
            "--speculative-config",
            "-sc",
            help='vLLM\'s JSON: "method" ngram or draft_model (with a "model"), and "num_speculative_tokens".',
            panel=_SPECULATION,
            metavar="JSON",
        ),
    ] = None
    acceptance_rates: Annotated[
        str | None,
        flag(
            "--acceptance-rates",
            help="Per draft position, given that all before it were accepted: 0.8,0.7,0.7.",
            panel=_SPECULATION,
            metavar="RATES",
        ),
    ] = None
    acceptance_concentration: Annotated[
        float | None,
        flag(
            "--acceptance-concentration",
            help="How alike requests are: shape sum of a Beta; default: all the same.",
            panel=_SPECULATION,
            metavar="X",
        ),
    ] = None

    def files(self) -> list[tuple[str, Path | None]]:
        """The files that are read, as `ensure_distinct` takes inputs."""
        from planner.catalog import config_file

        try:
            config = json.loads(self.speculative_config or "{}")
        except (ValueError, RecursionError):  # which reading it will complain about
            return []
        drafter = config.get("model") if isinstance(config, dict) else None
        return [("--speculative-config", config_file(drafter))] if isinstance(drafter, str) else []


def acceptance_from_options(options: SpeculationOptions) -> AcceptanceProcess | None:
    """The acceptance process of the flags; None where no rates are given.

    Raises:
        UserError: rates that are no numbers from 0 to 1, or a concentration without rates.
    """
    from planner.simulation import AcceptanceProcess

    concentration = options.acceptance_concentration
    if options.acceptance_rates is None:
        if concentration is not None:
            raise UserError("--acceptance-concentration needs --acceptance-rates, e.g. 0.8,0.7,0.7")
        return None
    try:
        rates = tuple(float(rate) for rate in options.acceptance_rates.split(","))
    except ValueError:
        raise UserError(
            f"--acceptance-rates is {options.acceptance_rates!r}; write one rate per draft position, e.g. 0.8,0.7,0.7"
        ) from None
    return AcceptanceProcess(rates, math.inf if concentration is None else concentration)


def speculation_from_options(
    options: SpeculationOptions, assumed: AcceptanceProcess | None = None
) -> SpeculationConfig | None:
    """The speculation of the flags; None without `--speculative-config`, and for 0 speculative tokens.

    Args:
        options: the flags.
        assumed: what to assume where no acceptance is given; None to demand it.

    Raises:
        UserError: flags that are malformed, or acceptance rates with nothing to accept.
    """
    if options.speculative_config is None:
        if options.acceptance_rates is not None or options.acceptance_concentration is not None:
            raise UserError(
                "acceptance rates say nothing without --speculative-config, e.g. "
                """'{"method": "ngram", "num_speculative_tokens": 4}'"""
            )
        return None
    from planner.speculation import parse_speculation

    config = parse_speculation(options.speculative_config, acceptance_from_options(options) or assumed)
    return config if config.num_speculative_tokens else None


# --- workload -------------------------------------------------------------------------------------------------------

_TRACE = "Workload from a trace"
_SYNTHETIC = "Synthetic workload"
_EITHER = "Any workload"


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """A trace, or a synthetic load; the default load where no flag is given."""

    trace: Annotated[
        Path | None,
        flag(
            "--trace",
            help="Request log: Azure or BurstGPT CSV, Mooncake JSONL, `vllm bench` result, or any CSV or JSONL.",
            panel=_TRACE,
            metavar="PATH",
        ),
    ] = None
    trace_format: Annotated[
        str | None,
        flag(
            "--trace-format",
            help="auto, azure, mooncake, burstgpt, csv, jsonl or vllm_bench; default: told by the columns.",
            panel=_TRACE,
            metavar="FORMAT",
        ),
    ] = None
    columns: Annotated[
        str | None,
        flag(
            "--columns",
            help="Which columns to read: arrival=t_ms,input=n_in,output=n_out (also session, hash_ids).",
            panel=_TRACE,
            metavar="ROLE=NAME,…",
        ),
    ] = None
    sort_arrivals: Annotated[
        bool, flag("--sort-arrivals", help="Sort requests by arrival instead of refusing.", panel=_TRACE)
    ] = False
    skip_failed: Annotated[
        bool, flag("--skip-failed", help="Leave out requests without output instead of refusing.", panel=_TRACE)
    ] = False
    request_rate: Annotated[
        float | None,
        flag(
            "--request-rate",
            help=f"Requests per second, inf for all at once; default {_DEFAULT_RATE:g}.",
            panel=_SYNTHETIC,
            metavar="R",
        ),
    ] = None
    burstiness: Annotated[
        float | None,
        flag("--burstiness", help="Gamma shape of the gaps; 1 is Poisson.", panel=_SYNTHETIC, metavar="X"),
    ] = None
    num_prompts: Annotated[
        int | None,
        flag("--num-prompts", help="Requests; default: ten minutes of them.", panel=_SYNTHETIC, metavar="N"),
    ] = None
    isl: Annotated[
        str | None,
        flag("--isl", help=f"Input tokens: {_LENGTH_FORMS}.", panel=_SYNTHETIC, metavar="LENGTH"),
    ] = None
    osl: Annotated[
        str | None, flag("--osl", help="Output tokens, in the same forms.", panel=_SYNTHETIC, metavar="LENGTH")
    ] = None
    shared_prefix_tokens: Annotated[
        int | None,
        flag(
            "--shared-prefix-tokens",
            help="Tokens of a beginning that prompts share.",
            panel=_SYNTHETIC,
            metavar="TOKENS",
        ),
    ] = None
    shared_prefix_share: Annotated[
        float | None,
        flag(
            "--shared-prefix-share",
            help="Share of prompts that have one; default 1.",
            panel=_SYNTHETIC,
            metavar="SHARE",
        ),
    ] = None
    num_shared_prefixes: Annotated[
        int | None,
        flag("--num-shared-prefixes", help="How many there are; default 1.", panel=_SYNTHETIC, metavar="N"),
    ] = None
    start_s: Annotated[
        float | None,
        flag("--start-s", help="Leave out what arrives before this second.", panel=_EITHER, metavar="S"),
    ] = None
    end_s: Annotated[
        float | None,
        flag("--end-s", help="Leave out what arrives from this second on.", panel=_EITHER, metavar="S"),
    ] = None
    rate_scale: Annotated[
        float | None,
        flag("--rate-scale", help="Let requests arrive X times as fast.", panel=_EITHER, metavar="X"),
    ] = None
    max_requests: Annotated[
        int | None, flag("--max-requests", help="Keep the first N requests.", panel=_EITHER, metavar="N")
    ] = None
    seed: Annotated[int, flag("--seed", help="Same seed, same result.", panel=_EITHER, min=0, metavar="N")] = 0

    def files(self) -> list[tuple[str, Path | None]]:
        """The files that are read, as `ensure_distinct` takes inputs."""
        from planner.workload import length_trace

        return [
            ("--trace", self.trace),
            ("--isl", length_trace(self.isl or "")),
            ("--osl", length_trace(self.osl or "")),
        ]

    def given(self, *names: str) -> list[str]:
        """Those of these flags that were set, as they are written on the command line."""
        defaults = {field.name: field.default for field in fields(self)}
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != defaults[name]]


_TRACE_FLAGS = ("trace_format", "columns", "sort_arrivals", "skip_failed")
_PREFIX_FLAGS = ("shared_prefix_share", "num_shared_prefixes")
_SYNTHETIC_FLAGS = ("request_rate", "burstiness", "num_prompts", "isl", "osl", "shared_prefix_tokens", *_PREFIX_FLAGS)


def workload_from_options(options: WorkloadOptions) -> Workload:
    """The trace, else a synthetic load if any flag asks for one, else the default load; then windowed and scaled.

    Window and then rate: `--start-s` and `--end-s` are seconds of the trace, not of the scaled load.

    Raises:
        UserError: flags of both kinds, a flag that has no effect, a bad trace or an impossible load.
    """
    from planner.workload import default_workload, load_workload

    synthetic = options.given(*_SYNTHETIC_FLAGS)
    if options.trace is not None:
        if synthetic:
            raise UserError(
                f"--trace and {synthetic[0]} exclude each other: replay a trace, or synthesise a load "
                "(--rate-scale speeds up a trace)"
            )
        workload = load_workload(
            options.trace,
            format=options.trace_format or "auto",
            seed=options.seed,
            columns=_parse_columns(options.columns),
            sort=options.sort_arrivals,
            skip_failed=options.skip_failed,
        )
    elif useless := options.given(*_TRACE_FLAGS):
        raise UserError(f"{useless[0]} says how to read a trace; give one with --trace")
    else:
        workload = _synthetic(options) if synthetic else default_workload(options.seed)
    if options.start_s is not None or options.end_s is not None:
        workload = _windowed(workload, options.start_s, options.end_s)
    if options.rate_scale is not None:
        workload = workload.scaled(options.rate_scale)
    if options.max_requests is not None:
        workload = workload.head(options.max_requests)
    return workload


def _synthetic(options: WorkloadOptions) -> Workload:
    from planner.workload import SyntheticSpec, parse_length, synthesize

    if options.shared_prefix_tokens is None and (useless := options.given(*_PREFIX_FLAGS)):
        raise UserError(f"{useless[0]} needs --shared-prefix-tokens, the length of what prompts share")
    rate = _or(options.request_rate, _DEFAULT_RATE)
    if options.num_prompts is None and rate == math.inf:
        raise UserError("--request-rate inf sends all requests at once; say how many with --num-prompts")
    spec = SyntheticSpec(
        name=f"synthetic, {rate:g} requests/s",
        request_rate=rate,
        num_requests=options.num_prompts,
        duration_s=_DEFAULT_DURATION_S if options.num_prompts is None else None,
        burstiness=_or(options.burstiness, 1.0),
        input_tokens=parse_length(_or(options.isl, _DEFAULT_ISL), which="input"),
        output_tokens=parse_length(_or(options.osl, _DEFAULT_OSL), which="output"),
        shared_prefix_tokens=_or(options.shared_prefix_tokens, 0),
        shared_prefix_share=_or(options.shared_prefix_share, 1.0),
        num_shared_prefixes=_or(options.num_shared_prefixes, 1),
    )
    return synthesize(spec, options.seed)


def _windowed(workload: Workload, start_s: float | None, end_s: float | None) -> Workload:
    start, end = _or(start_s, 0.0), _or(end_s, math.inf)
    if not 0 <= start < end:
        raise UserError(f"the window from --start-s {start:g} to --end-s {end:g} is empty; it needs 0 <= start < end")
    return workload.window(start, end)


def _parse_columns(text: str | None) -> dict[str, str] | None:
    """`arrival=t_ms,input=n_in,output=n_out` as a dict."""
    if text is None:
        return None
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not (role and equals and name):
            raise UserError(
                f"--columns is {text!r}; write role=column pairs, e.g. arrival=t_ms,input=n_in,output=n_out"
            )
        if role in columns:
            raise UserError(f"--columns names the {role} column twice, {columns[role]!r} and {name!r}")
        columns[role] = name
    return columns


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


# --- SLO and simulation ---------------------------------------------------------------------------------------------

_SLO = "SLO"
_SIMULATION = "Simulation"


@dataclass(frozen=True, slots=True)
class SLOOptions:
    """Limits on latency, all at one percentile of requests."""

    ttft: Annotated[float | None, flag("--ttft", help="Limit on time to first token.", panel=_SLO, metavar="MS")] = None
    tpot: Annotated[
        float | None, flag("--tpot", help="Limit on time per output token after it.", panel=_SLO, metavar="MS")
    ] = None
    e2el: Annotated[float | None, flag("--e2el", help="Limit on arrival to last token.", panel=_SLO, metavar="MS")] = (
        None
    )
    percentile: Annotated[
        float, flag("--percentile", help="Share of requests within each limit.", panel=_SLO, metavar="PERCENT")
    ] = 99.0


def slo_from_options(options: SLOOptions) -> SLO:
    """The limits of the flags.

    Raises:
        UserError: a limit that is not positive, or a percentile outside (0, 100].
    """
    from planner.simulation import SLO

    return SLO(options.ttft, options.tpot, options.e2el, options.percentile)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a simulation is run."""

    warmup_s: Annotated[
        float | None,
        flag(
            "--warmup-s",
            help="Do not measure what arrives earlier; default 60, at most 5 % of the load.",
            panel=_SIMULATION,
            metavar="S",
        ),
    ] = None
    client_timeout_s: Annotated[
        float | None,
        flag("--client-timeout-s", help="Clients give up after this long.", panel=_SIMULATION, metavar="S"),
    ] = None
    reject_too_long: Annotated[
        bool,
        flag("--reject-too-long", help="Reject prompts beyond max-model-len instead of refusing.", panel=_SIMULATION),
    ] = False
    intervals: Annotated[
        int | None,
        flag(
            "--intervals",
            help="Simulations for intervals, 0 for none; default 16, where step times were measured and it is quick.",
            panel=_SIMULATION,
            min=0,
            metavar="N",
        ),
    ] = None
    jobs: Annotated[
        int, flag("--jobs", "-j", help="Processes; -1 for one per core.", panel=_SIMULATION, metavar="N")
    ] = -1


def simulation_from_options(run: RunOptions, slo: SLOOptions, seed: int) -> SimulationOptions:
    """The simulation options of the flags.

    Raises:
        UserError: as `slo_from_options`.
    """
    from planner.simulation import SimulationOptions

    return SimulationOptions(
        seed=seed,
        slo=slo_from_options(slo),
        warmup_s=run.warmup_s,
        reject_too_long=run.reject_too_long,
        client_timeout_s=run.client_timeout_s,
    )


# --- output ---------------------------------------------------------------------------------------------------------

_OUTPUT = "Output"


class Format(StrEnum):
    """How the answer is printed."""

    TABLE = "table"
    JSON = "json"


def checks_file_of(option: str) -> Callable[[Path | None], Path | None]:
    """A callback of this option that refuses what cannot be written before the work is done, not after."""

    def check(path: Path | None) -> Path | None:
        if path is None:
            return None
        if path.is_dir():
            raise UserError(f"{option} {path}: this is a folder; give a file in it")
        if not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{option} {path}: you may not write there")
        return path

    return check


OutputFile = Annotated[
    Path | None,
    flag(
        "--output-file",
        help="Also write the JSON here, whole or not at all.",
        panel=_OUTPUT,
        metavar="PATH",
        callback=checks_file_of("--output-file"),
    ),
]


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where the answer goes, and in which form."""

    output: Annotated[Format, flag("--output", help="What to print.", panel=_OUTPUT)] = Format.TABLE
    output_file: OutputFile = None

    def files(self) -> list[tuple[str, Path | None]]:
        """The file that is written, as `ensure_distinct` takes outputs."""
        return [("--output-file", self.output_file)]
