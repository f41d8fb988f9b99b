"""One way to serve a model: GPU, parallelism, precision, limits. What a plan ranks and an export launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.scheduling import KVCacheConfig, SchedulerConfig
from planner.errors import UserError
from planner.hardware import GpuSpec, Price
from planner.memory import KVCacheDtype, MemoryReport, MemorySettings, kv_layout, plan_memory, validate_parallelism
from planner.model import ModelSpec
from planner.profile.library import (
    Match,
    find_profile,
    load_calibrations,
    load_profiles,
    shipped_profiles,
    step_time_of,
    why_unusable,
)
from planner.roofline import RooflineStepTime
from planner.simulation import System
from planner.simulation.router import ROUTERS
from planner.speculation import DraftedStepTime, SpeculationConfig
from planner.step_time import StepTime
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.external.calibration import ExternalCalibration

AUTO_ROUTER = "auto"
_LENGTH_STEP = 1024
_USUAL_MEMORY_SHARE = 0.92


@dataclass(frozen=True, slots=True)
class Deployment:
    """Replicas of one engine configuration; names as `vllm serve` spells them.

    Attributes:
        model, gpu: what is served, and on what.
        replicas: engines behind the router, `tensor_parallel_size` GPUs each.
        max_model_len: longest sequence in tokens; None for the model's limit.
        router: a name of `planner.simulation.router.ROUTERS`, or "auto".
        num_gpu_blocks_override: size of the KV pool of one replica; None to derive it from the memory model.
        speculation: None for plain decoding.
        profiles: paths of measured profiles, which the shipped ones stand behind; None for the shipped ones alone,
            ("none",) for none at all, so that step times come from the data sheet. Calibrations from outside may be
            among them; then one of these has to be of this deployment.
    """

    model: ModelSpec
    gpu: GpuSpec
    tensor_parallel_size: int = 1
    replicas: int = 1
    kv_cache_dtype: KVCacheDtype = KVCacheDtype.BFLOAT16
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int | None = None
    gpu_memory_utilization: float = _USUAL_MEMORY_SHARE
    kv_cache_policy: str = "hybrid"
    enforce_eager: bool = False
    enable_prefix_caching: bool = False
    enable_chunked_prefill: bool = True
    router: str = AUTO_ROUTER
    num_gpu_blocks_override: int | None = None
    speculation: SpeculationConfig | None = None
    profiles: tuple[str, ...] | None = None

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel_size * self.replicas

    @property
    def num_speculative_tokens(self) -> int:
        """Draft length k; 0 without speculation."""
        return self.speculation.num_speculative_tokens if self.speculation else 0

    @property
    def active_speculation(self) -> SpeculationConfig | None:
        """The speculation that is really done: none where k is 0, not even a draft model in memory."""
        return self.speculation if self.num_speculative_tokens else None

    def memory_settings(self) -> MemorySettings:
        """What the memory model needs of it.

        Raises:
            UserError: a setting out of its range.
        """
        speculation = self.active_speculation
        block_size, num_blocks = self.block_size, self.num_gpu_blocks_override
        measured = self._measured_pool()
        if measured is not None:
            block_size, num_blocks = measured
        return MemorySettings(
            tensor_parallel_size=self.tensor_parallel_size,
            max_model_len=self.max_model_len,
            kv_cache_dtype=self.kv_cache_dtype,
            block_size=block_size,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            kv_cache_policy=self.kv_cache_policy,
            enforce_eager=self.enforce_eager,
            num_gpu_blocks=num_blocks,
            draft_model=speculation.draft_model if speculation else None,
            num_lookahead_tokens=self.num_speculative_tokens,
        )

    def memory(self, with_remedies: bool = False) -> MemoryReport:
        """The memory of one replica.

        Raises:
            UserError: an impossible parallelism or setting.
        """
        validate_parallelism(self.model, self.gpu, self.tensor_parallel_size)
        return plan_memory(self.model, self.gpu, self.memory_settings(), with_remedies=with_remedies)

    def step_time(self) -> StepTime:
        """The step-time model, drafting included.

        From the profile that is nearest, transferred as far as it has to be; the uncalibrated roofline without one.
        A calibration from outside scales that.

        Raises:
            UserError: a profile that cannot be used, or that was given and tells nothing of this deployment.
        """
        target = self._step_time_of(self.model)
        calibration = self._calibration()
        if calibration is not None:
            target = calibration.step_time(target)
        speculation = self.active_speculation
        if speculation is None or speculation.draft_model is None:
            return target
        return DraftedStepTime(target, self._step_time_of(speculation.draft_model), self.num_speculative_tokens)

    def calibration_fault(self) -> str | None:
        """Why none of the calibrations from outside that were given is of this deployment; None if nothing is wrong."""
        given = load_calibrations(self.profiles)
        faults = [each.differs(*self._seen_as()) for _, each in given]
        return f"{given[0][0]}: {faults[0]}" if given and None not in faults else None

    def _calibration(self) -> ExternalCalibration | None:
        """The calibration from outside that is of this deployment; None if none was given.

        Raises:
            UserError: some were given, and none is, or several are.
        """
        fault = self.calibration_fault()
        if fault is not None:
            raise UserError(fault)
        found = [(name, each) for name, each in load_calibrations(self.profiles) if not each.differs(*self._seen_as())]
        if len(found) > 1:
            names = " and ".join(name for name, _ in found)
            raise UserError(f"{names} are calibrations of the same deployment; give one of them")
        return found[0][1] if found else None

    def calibration_failure(self) -> str | None:
        """Why nothing should be planned with the calibration from outside that is given; None if nothing is wrong."""
        calibration = self._usable_calibration()
        return calibration.failure() if calibration else None

    def _usable_calibration(self) -> ExternalCalibration | None:
        """As `_calibration`, but None, too, where some were given and none is of this deployment."""
        return None if self.calibration_fault() else self._calibration()

    def _seen_as(self) -> tuple[str, str, int, str]:
        return self.model.name, self.gpu.id, self.tensor_parallel_size, str(self.kv_cache_dtype)

    def _step_time_of(self, model: ModelSpec) -> StepTime:
        block_size, tp = self.memory_settings().resolved_block_size, self.tensor_parallel_size
        match = self._profile_for(model)
        if match is None:
            return RooflineStepTime(model, self.gpu, tp, self.kv_cache_dtype, block_size)
        limits = self.max_num_seqs, self.max_num_batched_tokens
        return step_time_of(match, model, self.gpu, self.kv_cache_dtype, tp, block_size, *limits)

    def _profile_for(self, model: ModelSpec) -> Match | None:
        profiles = load_profiles(self.profiles)
        usable = [p for p in profiles if why_unusable(p, model, self.gpu, self.enforce_eager) is None]
        if usable:
            return find_profile(model, self.gpu, self.kv_cache_dtype, self.tensor_parallel_size, usable)
        if profiles and not any(profiles[0] is each for each in shipped_profiles()):
            reason = why_unusable(profiles[0], model, self.gpu, self.enforce_eager)
            raise UserError(
                f"profile {profiles[0].name} cannot serve {model.name} on {self.gpu.id}: {reason}; leave --profile out"
            )
        return None

    def _measured_pool(self) -> tuple[int, int] | None:
        """Block size and number of KV blocks that the engine had with these very settings, where that was measured."""
        if self.num_gpu_blocks_override is not None or self.active_speculation is not None:
            return None
        if (calibration := self._usable_calibration()) is not None:
            limits, share = (self.max_num_seqs, self.max_num_batched_tokens), self.gpu_memory_utilization
            blocks = calibration.pool(*limits, share, is_usual=share == _USUAL_MEMORY_SHARE)
            size = calibration.settings.get("block_size")
            return (size, blocks) if blocks and self.block_size in (None, size) else None
        match = self._profile_for(self.model)
        if match is None or match.changes:
            return None
        engine = match.profile.tables.engine
        names = ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "enforce_eager")
        if any(getattr(self, name) != getattr(engine, name) for name in names):
            return None
        if self.block_size not in (None, engine.block_size) or self.kv_cache_policy != "hybrid":
            return None
        return engine.block_size, match.profile.tables.kv[self.kv_cache_dtype.value].num_kv_blocks

    def router_for(self, workload: Workload) -> str:
        """The router's name, with "auto" resolved: prefix affinity where there are prefixes to reuse."""
        if self.router != AUTO_ROUTER:
            if self.router not in ROUTERS:
                raise UserError(f"router is {self.router!r}; it must be one of {AUTO_ROUTER}, {', '.join(ROUTERS)}")
            return self.router
        shares = self.enable_prefix_caching and workload.prefix_block_hashes is not None
        return "prefix-affinity" if shares else "least-outstanding"

    def system(self, workload: Workload, memory: MemoryReport | None = None) -> System:
        """What the simulator runs.

        Args:
            workload: decides the router, if that is "auto".
            memory: the report of `memory()`, if it is at hand.

        Raises:
            UserError: if one sequence of max_model_len does not fit.
        """
        memory = memory or self.memory()
        if not memory.fits:
            raise UserError(memory.reason or "it does not fit")
        settings = self.memory_settings()
        layout = kv_layout(self.model, settings)
        speculation = self.active_speculation
        try:
            scheduler = SchedulerConfig(
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_num_seqs=self.max_num_seqs,
                max_model_len=memory.max_model_len,
                enable_chunked_prefill=self.enable_chunked_prefill,
                num_lookahead_tokens=speculation.num_lookahead_tokens if speculation else 0,
            )
            cache = KVCacheConfig(
                # The null block is scratch memory on top of the pool.
                num_blocks=memory.num_kv_blocks + 1,
                block_size=layout.block_size,
                windows=layout.groups.windows,
                enable_prefix_caching=self.enable_prefix_caching,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        simulated = speculation.simulated() if speculation else None
        step_time = self.step_time()
        return System(
            scheduler,
            cache,
            step_time,
            self.replicas,
            self.router_for(workload),
            simulated,
            # With drafts to verify, the next step has to wait for the last.
            pipeline_depth=1 if simulated else step_time.pipeline_depth,
        )


def length_for(workload: Workload, model: ModelSpec) -> int:
    """The max_model_len that a workload needs: its longest request, rounded up, within the model's limit."""
    longest = int((workload.input_tokens + workload.output_tokens).max())
    return min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, model.max_position_embeddings)


@dataclass(frozen=True, slots=True)
class PriceList:
    """What a GPU hour costs: the catalog's dated prices at one tier, and the user's own.

    Attributes:
        tier: "low", "typical" or "high" of the catalog.
        overrides: USD per GPU hour by GPU id.
    """

    tier: str = "typical"
    overrides: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.tier not in ("low", "typical", "high"):
            raise UserError(f"price tier is {self.tier!r}; it must be low, typical or high")
        names = [name for name, _ in self.overrides]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the price of {name} is given {names.count(name)} times; give it once")

    def price(self, gpu: GpuSpec) -> Price | None:
        """The price of one GPU and hour; None where none is known.

        Where the tier has no price, the nearest one that has is used: its source and date say so.
        """
        for gpu_id, usd in self.overrides:
            if gpu_id == gpu.id:
                return Price(usd, "given by the user", "")
        by_tier = {
            "low": (gpu.price_low, gpu.price_typical, gpu.price_high),
            "typical": (gpu.price_typical, gpu.price_low, gpu.price_high),
            "high": (gpu.price_high, gpu.price_typical, gpu.price_low),
        }
        return next((price for price in by_tier[self.tier] if price is not None), None)
