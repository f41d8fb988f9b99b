"""Step times from the GPU's data sheet: bytes over bandwidth, FLOPs over the matrix rate, and stated efficiencies.

Nothing here is calibrated. The efficiencies were chosen once, against vLLM 0.25.1 with Llama-3.1-8B on one H200
(TPOT at 1,024 context and TTFT of single prompts), and are applied unchanged to every model and GPU; a plan that rests
on them says so wherever it shows a time.

    step = dense + attention + all-reduce + host

    dense       weights read once, and 2 FLOPs per weight and token. Between its two limits a matrix product reaches
                neither, so the two times are combined as the root of their squares' sum.
    attention   decode and verification: each cached token is read once per request (or computed, if the heads that
                share it are many, as in MLA). Prefill: 4 FLOPs per head element and (query, key) pair.
    all-reduce  two per layer, a latency and a ring's share of the link bandwidth.
    host        launches per layer, work per step and per request.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from engine.scheduling import StepShape
from planner.hardware import GpuSpec
from planner.memory import KVCacheDtype, kv_bytes_per_token_layer
from planner.model import ModelSpec, ParameterRole
from planner.profile.shape import attended_pairs
from planner.step_time import TICKS_PER_SECOND, AffineRun, DecodeRun, Evidence, StepTime, to_ticks


@dataclass(frozen=True, slots=True)
class RooflineAssumptions:
    """The share of each data-sheet rate that is reached, and the fixed costs.

    Attributes:
        memory_efficiency: of the HBM bandwidth, for weights and KV (AIConfigurator's starting value).
        bf16_efficiency: of the dense bf16 rate in large matrix products (cuBLAS on H200: 680 to 714 of 989 TFLOP/s).
        fp8_efficiency: of the dense fp8 rate (`torch._scaled_mm` on H200: 1,187 to 1,237 of 1,979 TFLOP/s).
        attention_efficiency: of the dense bf16 rate in prefill attention (FlashAttention-3 on H200, long prompts).
        link_efficiency: of the link bandwidth in an all-reduce (NCCL between two H200: 301 of 450 GB/s).
        all_reduce_latency_s: fixed part of an all-reduce (NCCL, two H200, 8 KB: 11.4 us).
        all_reduce_hop_s: added for each rank beyond two. An assumption: nothing was measured beyond two ranks.
        pcie_latency_factor: what both latencies are multiplied by without a fast link. An assumption.
        layer_s, step_s: launch gaps per layer, host time per step. Together they are what vLLM's TPOT at batch 1 takes
            beyond the weights (4.89 ms, of which 3.91 at the memory efficiency above); their split is an assumption.
        prefill_step_s: added host time of a step with prompt chunks, which does not replay a full CUDA graph: what
            vLLM's TTFT of prompts of 1,024 to 4,096 tokens takes beyond the compute (3 to 4 ms).
        request_s: host and sampling time per request of a step: the rest of vLLM's TPOT at batch 256 (18.2 ms).
    """

    memory_efficiency: float = 0.80
    bf16_efficiency: float = 0.70
    fp8_efficiency: float = 0.60
    attention_efficiency: float = 0.60
    link_efficiency: float = 0.67
    all_reduce_latency_s: float = 11.4e-6
    all_reduce_hop_s: float = 3.4e-6
    pcie_latency_factor: float = 3.0
    layer_s: float = 22e-6
    step_s: float = 200e-6
    prefill_step_s: float = 3e-3
    request_s: float = 4e-6


class RooflineStepTime(StepTime):
    """A `StepTime` for one model on one GPU type, with nothing measured."""

    evidence = Evidence.UNCALIBRATED

    def __init__(
        self,
        model: ModelSpec,
        gpu: GpuSpec,
        tensor_parallel_size: int = 1,
        kv_cache_dtype: KVCacheDtype = KVCacheDtype.BFLOAT16,
        block_size: int = 16,
        assumptions: RooflineAssumptions | None = None,
    ) -> None:
        """
        Args:
            model, gpu: what runs on what.
            tensor_parallel_size: ranks that share each layer.
            kv_cache_dtype, block_size: format of the KV cache, for the bytes that attention reads.
            assumptions: efficiencies; the stated defaults if None.
        """
        self.model = model
        self.gpu = gpu
        self.tensor_parallel_size = tensor_parallel_size
        self.assumptions = a = assumptions or RooflineAssumptions()
        self.description = f"uncalibrated roofline of {gpu.name}: data sheet × stated efficiencies"
        self._bandwidth = gpu.memory_bandwidth_bytes_per_s * a.memory_efficiency
        self._attention_flops = gpu.bf16_flops * a.attention_efficiency
        if model.fp8_compute and gpu.fp8_flops:
            self._dense_flops = gpu.fp8_flops * a.fp8_efficiency
        else:
            self._dense_flops = gpu.bf16_flops * a.bf16_efficiency
        self._kv_bytes = kv_bytes_per_token_layer(model, kv_cache_dtype, tensor_parallel_size, block_size)
        layers: dict[int | None, int] = {}
        for window in model.layer_windows:
            layers[window] = layers.get(window, 0) + 1
        # Ticks to attend to one cached token in all layers of a kind; integers make decode steps exactly affine.
        self._full_layers = layers.pop(None, 0)
        self._windows = sorted(layers.items())
        self._full_token_ticks = self._kv_token_ticks(self._full_layers, 1)
        self._window_token_ticks = [(window, self._kv_token_ticks(count, 1)) for window, count in self._windows]
        self._verify_base_ticks: dict[tuple[int, int, int], int] = {}
        self._verify_rates: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self._decode_base_ticks: dict[int, int] = {}
        self._host_s = a.step_s + a.layer_s * model.num_layers
        # Prefill attention: seconds per (query, key) pair and per key read, in one layer.
        self._pair_s = self._flops_per_pair(absorbed=False) / self._attention_flops
        self._key_s = self._kv_bytes / self._bandwidth

    # ---- the contract ----------------------------------------------------------------------------------------------

    def predict(self, step: StepShape) -> float:
        return self.ticks(step) / TICKS_PER_SECOND

    def ticks(self, step: StepShape) -> int:
        contexts = step.decode_contexts
        if not (step.prefills or step.verifies):
            return self._decode_base(len(contexts)) + self._decode_attention_ticks(contexts)
        num_tokens = len(contexts)
        attention_ticks = self._decode_attention_ticks(contexts)
        if step.verifies:
            num_tokens += sum([query for query, _ in step.verifies])
            attention_ticks += self._verify_attention_ticks(step.verifies)
        if not step.prefills:
            return attention_ticks + self._verify_base(num_tokens, step.num_requests, step.num_sampled)
        seconds = 0.0
        for query, context in step.prefills:
            num_tokens += query
            seconds += self._prefill_attention_s(query, context)
        seconds += self._base_s(num_tokens, step.num_requests, step.num_sampled, has_prefill=True)
        return attention_ticks + to_ticks(seconds, step)

    def decode_run(self, contexts: list[int], steps: int) -> DecodeRun:
        increment = self._full_token_ticks * len(contexts)
        for window, token_ticks in self._window_token_ticks:
            growing = [context for context in contexts if context + 1 < window]
            if growing:
                # Affine only until the next request fills its window.
                steps = min(steps, window - 1 - max(growing))
                increment += token_ticks * len(growing)
        first = self._decode_base(len(contexts)) + self._decode_attention_ticks(contexts)
        return AffineRun(first, increment, steps)

    # ---- attention -------------------------------------------------------------------------------------------------

    def _kv_token_ticks(self, num_layers: int, query: int) -> int:
        """Ticks to read one cached token in `num_layers` layers and to score `query` queries against it."""
        read_s = self._kv_bytes / self._bandwidth
        compute_s = query * self._flops_per_pair(absorbed=True) / self._attention_flops
        return round(num_layers * max(read_s, compute_s) * TICKS_PER_SECOND)

    def _flops_per_pair(self, absorbed: bool) -> float:
        """FLOPs per (query token, key token) pair in one layer of one rank, all its heads."""
        model = self.model
        heads = model.num_attention_heads / self.tensor_parallel_size
        mla = model.mla
        if mla is None:
            return 4.0 * heads * model.head_dim
        if absorbed:
            # Decode works on the latent itself (DeepSeek-V2, section 2.1.2): scores over latent and RoPE key, values
            # over the latent.
            return 2.0 * heads * (mla.latent_dim + mla.kv_lora_rank)
        return 2.0 * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)

    def _decode_attention_ticks(self, contexts: list[int]) -> int:
        # A query attends to its cached context and to itself.
        ticks = self._full_token_ticks * (sum(contexts) + len(contexts)) if self._full_layers else 0
        for window, token_ticks in self._window_token_ticks:
            ticks += token_ticks * sum([context + 1 if context + 1 < window else window for context in contexts])
        return ticks

    def _verify_attention_ticks(self, verifies: list[tuple[int, int]]) -> int:
        keys: dict[int, list[int]] = {}
        for query, context in verifies:
            keys.setdefault(query, []).append(context + query)
        ticks = 0
        for query, lengths in keys.items():
            full_ticks, windows = self._verify_rate(query)
            ticks += full_ticks * sum(lengths)
            for reach, token_ticks in windows:
                ticks += token_ticks * sum([min(length, reach) for length in lengths])
        return ticks

    def _verify_rate(self, query: int) -> tuple[int, list[tuple[int, int]]]:
        """Ticks per cached token in the full layers, and (keys in reach, ticks) of each window, for a query length."""
        rate = self._verify_rates.get(query)
        if rate is None:
            windows = [(window + query - 1, self._kv_token_ticks(count, query)) for window, count in self._windows]
            rate = self._verify_rates[query] = (self._kv_token_ticks(self._full_layers, query), windows)
        return rate

    def _prefill_attention_s(self, query: int, context: int) -> float:
        pairs = attended_pairs(query, context, None)
        seconds = self._full_layers * max(pairs * self._pair_s, (context + query) * self._key_s)
        for window, count in self._windows:
            pairs = attended_pairs(query, context, window)
            keys = min(context + query, window + query - 1)
            seconds += count * max(pairs * self._pair_s, keys * self._key_s)
        return seconds

    # ---- dense work, all-reduce, host ------------------------------------------------------------------------------

    def _decode_base(self, batch: int) -> int:
        """Ticks of a decode step without its attention; a function of the batch alone, so it is remembered."""
        ticks = self._decode_base_ticks.get(batch)
        if ticks is None:
            seconds = self._base_s(batch, batch, batch, has_prefill=False)
            self._decode_base_ticks[batch] = ticks = to_ticks(seconds, f"{batch} decodes")
        return ticks

    def _verify_base(self, num_tokens: int, num_requests: int, num_sampled: int) -> int:
        """The same for a step with verifications."""
        key = (num_tokens, num_requests, num_sampled)
        ticks = self._verify_base_ticks.get(key)
        if ticks is None:
            seconds = self._base_s(num_tokens, num_requests, num_sampled, has_prefill=False)
            self._verify_base_ticks[key] = ticks = to_ticks(seconds, f"a verification of {num_tokens} tokens")
        return ticks

    def _base_s(self, num_tokens: int, num_requests: int, num_sampled: int, has_prefill: bool) -> float:
        """Seconds of everything but attention."""
        a = self.assumptions
        host_s = self._host_s + a.request_s * num_requests
        if has_prefill:
            host_s += a.prefill_step_s
        return self.dense_s(num_tokens, num_sampled) + self.all_reduce_s(num_tokens) + host_s

    @cached_property
    def _dense_terms(self) -> tuple[float, float, float, float, float, float]:
        """Per rank: bytes and FLOPs per token of the layers, of all experts, and of the LM head."""
        model, ranks = self.model, self.tensor_parallel_size
        layers = model.parameters_of(
            ParameterRole.ATTENTION, ParameterRole.MLP, ParameterRole.SHARED_EXPERT, ParameterRole.ROUTER
        )
        experts = model.parameters_of(ParameterRole.EXPERT)
        head = model.parameters_of(ParameterRole.EMBEDDING if model.tie_word_embeddings else ParameterRole.LM_HEAD)

        def totals(groups) -> tuple[float, float]:
            stored = sum(group.bytes_per_rank(ranks) for group in groups)
            flops = sum(2.0 * group.num_parameters / (ranks if group.sharded else 1) for group in groups)
            return stored, flops

        return *totals(layers), *totals(experts), *totals(head)

    def dense_s(self, num_tokens: int, num_sampled: int) -> float:
        """Seconds of all matrix products with weights: `num_tokens` rows, of which `num_sampled` reach the LM head."""
        layer_bytes, layer_flops, expert_bytes, expert_flops, head_bytes, head_flops = self._dense_terms
        read = layer_bytes
        flops = layer_flops * num_tokens
        moe = self.model.moe
        if moe is not None:
            share = moe.experts_per_token / moe.num_experts
            # Experts that at least one of the tokens is routed to, if routing were uniform and independent.
            read += expert_bytes * (1.0 - (1.0 - share) ** num_tokens)
            flops += expert_flops * share * num_tokens
        if num_sampled:
            read += head_bytes
            flops += head_flops * num_sampled
        return ((read / self._bandwidth) ** 2 + (flops / self._dense_flops) ** 2) ** 0.5

    def all_reduce_s(self, num_tokens: int) -> float:
        """Seconds of the two all-reduces per layer over bf16 hidden states, ring algorithm; 0 on one rank."""
        ranks = self.tensor_parallel_size
        if ranks == 1:
            return 0.0
        a = self.assumptions
        latency_s = a.all_reduce_latency_s + a.all_reduce_hop_s * (ranks - 2)
        if not self.gpu.fast_link:
            latency_s *= a.pcie_latency_factor
        sent = 2.0 * (ranks - 1) / ranks * num_tokens * self.model.hidden_size * 2
        transfer_s = sent / (self.gpu.link_bandwidth_bytes_per_s * a.link_efficiency)
        return 2 * self.model.num_layers * (latency_s + transfer_s)
