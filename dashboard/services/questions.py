"""Questions to the planner, as plain values: what a page's inputs say. Equal values are the same question."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from dashboard.services.presets import DEFAULT_PRESET, PRESETS
from planner.deployment import Deployment, PriceList, length_for
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.memory import KVCacheDtype
from planner.model import ModelSpec
from planner.search import DEFAULT_MAX_NUM_SEQS, Question
from planner.simulation import SLO, AcceptanceProcess, SimulationOptions
from planner.speculation import SpeculationConfig
from planner.workload import LogNormal, SyntheticSpec, Workload, synthesize

LOAD_SECONDS = 600.0
#: Where several configurations are compared.
TRIAL_SECONDS = 300.0
#: Of a first look, while the whole answer is computed.
QUICK_SECONDS = 60.0
#: Beyond it a page would take minutes; the command line has no such limit.
MAX_REQUESTS = 200_000


def key_of(*parts: object) -> str:
    """The hash of a question: equal values give equal keys, in every process."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Traffic:
    """A load: a preset with overrides, or an uploaded trace.

    Attributes:
        preset: a name of `PRESETS`; of a trace it gives the SLO only.
        request_rate, input_tokens, output_tokens: None for those of the preset, or of the trace.
        trace: the id of an upload; None for a synthetic load.
        duration_s: of a synthetic load.
    """

    preset: str = DEFAULT_PRESET
    request_rate: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    trace: str | None = None
    duration_s: float = LOAD_SECONDS
    seed: int = 0

    def workload(self, trace: Workload | None = None) -> Workload:
        """The requests.

        Args:
            trace: the upload's content, where `trace` names one.

        Raises:
            UserError: an impossible load, or one that is too large for a page.
        """
        if self.trace is not None:
            if trace is None:
                raise UserError("the trace that this link names was not uploaded to this server; drop the file again")
            if self.request_rate is not None and trace.duration_s > 0:
                return trace.scaled(self.request_rate / trace.request_rate)
            return trace
        preset = PRESETS[self.preset]
        rate = self.request_rate if self.request_rate is not None else preset.request_rate
        if rate * self.duration_s > MAX_REQUESTS:
            raise UserError(
                f"{rate:g} requests/s over {self.duration_s:g} s are more than the {MAX_REQUESTS:,} requests that a "
                f"page simulates; use memwall plan for such a load"
            )
        spec = SyntheticSpec(
            name=f"synthetic {preset.label.partition(',')[0].lower()}, {rate:g} requests/s",
            request_rate=rate,
            duration_s=self.duration_s,
            input_tokens=_lengths(self.input_tokens, preset.input_tokens, preset.input_cv, preset.input_max),
            output_tokens=_lengths(self.output_tokens, preset.output_tokens, preset.output_cv, preset.output_max),
        )
        return synthesize(spec, self.seed)

    def shortened(self, workload: Workload, seconds: float) -> Workload:
        """The first `seconds` of a load, for a first look."""
        if workload.duration_s <= seconds or workload.arrival_s[0] >= seconds:
            return workload
        return workload.window(0.0, seconds)


def _lengths(given: int | None, usual: int, cv: float, longest: int) -> LogNormal:
    """The preset's distribution, stretched to another mean."""
    mean = given or usual
    return LogNormal.from_mean(mean, cv, high=max(1, round(longest * mean / usual)))


@dataclass(frozen=True)
class Speculating:
    """A drafter and how often its drafts are accepted.

    Attributes:
        rates: conditional acceptance per position, at least k of them.
        draft_model: None for n-gram lookup, whose drafts cost nothing on the GPU.
    """

    k: int
    rates: tuple[float, ...]
    draft_model: ModelSpec | None = None

    def config(self) -> SpeculationConfig | None:
        """As the planner takes it; None for k = 0.

        Raises:
            UserError: rates that are none, or too few.
        """
        if not self.k:
            return None
        method = "draft_model" if self.draft_model else "ngram"
        name = self.draft_model.name if self.draft_model else None
        return SpeculationConfig(method, self.k, AcceptanceProcess(self.rates), self.draft_model, name)


@dataclass(frozen=True)
class Engine:
    """One configuration: an engine and its replicas. Defaults as the command line's."""

    model: ModelSpec
    gpu: GpuSpec
    tensor_parallel_size: int = 1
    replicas: int = 1
    kv_cache_dtype: str = "bfloat16"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.92
    kv_cache_policy: str = "hybrid"
    enable_prefix_caching: bool | None = None
    speculation: Speculating | None = None
    profiles: tuple[str, ...] | None = None

    def deployment(self, workload: Workload | None = None) -> Deployment:
        """As the planner takes it.

        Args:
            workload: gives the length limit and prefix caching where they are not set.

        Raises:
            UserError: a setting out of its range.
        """
        length, caching = self.max_model_len, self.enable_prefix_caching
        if workload is not None:
            length = length_for(workload, self.model) if length is None else length
            caching = workload.prefix_block_hashes is not None if caching is None else caching
        return Deployment(
            model=self.model,
            gpu=self.gpu,
            tensor_parallel_size=self.tensor_parallel_size,
            replicas=self.replicas,
            kv_cache_dtype=KVCacheDtype.parse(self.kv_cache_dtype),
            max_model_len=length,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_policy=self.kv_cache_policy,
            enable_prefix_caching=bool(caching),
            speculation=self.speculation.config() if self.speculation else None,
            profiles=self.profiles,
        )


@dataclass(frozen=True)
class Search:
    """A question for the plan page."""

    engine: Engine
    traffic: Traffic
    slo: SLO
    gpus: tuple[GpuSpec, ...]
    total_gpus: int = 64
    kv_cache_dtypes: tuple[str, ...] = ("bfloat16", "fp8")
    max_num_seqs: tuple[int, ...] = DEFAULT_MAX_NUM_SEQS
    prices: PriceList = field(default_factory=PriceList)
    quantization: str | None = None

    def question(self, workload: Workload, quick: bool = False) -> Question:
        """As the planner takes it.

        Args:
            workload: the whole load.
            quick: only the beginning of it, the largest batch limit, and nothing resampled.

        Raises:
            UserError: nothing to search, or nothing to meet.
        """
        if not self.kv_cache_dtypes:
            raise UserError("a plan needs at least one KV cache format: choose one under Search")
        if not self.gpus:
            raise UserError("a plan needs at least one GPU type: choose one under Search")
        deployment = replace(self.engine, gpu=self.gpus[0]).deployment(workload)
        load = self.traffic.shortened(workload, QUICK_SECONDS) if quick else workload
        question = Question(
            engine=deployment,
            workload=load,
            slo=self.slo,
            gpus=self.gpus,
            total_gpus=self.total_gpus,
            kv_cache_dtypes=tuple(KVCacheDtype.parse(name) for name in self.kv_cache_dtypes),
            max_num_seqs=(max(self.max_num_seqs),) if quick else self.max_num_seqs,
            prices=self.prices,
            seed=self.traffic.seed,
            quantization=self.quantization,
        )
        return replace(question, num_finalists=0, num_draws=1) if quick else question


@dataclass(frozen=True)
class Trial:
    """One configuration under one load: a question for the what-if page."""

    engine: Engine
    traffic: Traffic
    slo: SLO
    quantization: str | None = None

    def options(self) -> SimulationOptions:
        return SimulationOptions(seed=self.traffic.seed, slo=self.slo)
