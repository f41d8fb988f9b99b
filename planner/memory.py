"""GPU memory of one serving replica: what each rank holds, how many KV blocks remain, how many sequences they serve.

    gpu_memory_utilization × total memory
    ├── weights            sharded by tensor parallelism, the RoPE table included
    ├── activations        the peak of one step: hidden states of max_num_batched_tokens, or the sampler's logits
    ├── non-torch          CUDA context, NCCL buffers
    ├── CUDA graphs        private pools of the captured batch sizes
    ├── KV residual pages  low-bit formats only: the newest page of every running sequence in bf16
    └── KV cache           the rest, as blocks of `block_size` tokens

Everything is per rank and in bytes unless a name says otherwise. The model is checked against logs that users
published: vllm#10517 (RTX 3090, Llama-3.1-8B, block counts to 0.1 %) and llm-d-planner's measurements on H100
(KV cache of Llama-3.1-8B to 1 %).

What one pool of equal blocks means for a model with sliding windows ("hybrid" policy, as vLLM lays it out): layers are
put in groups of equal size, each group has its own block table, and one block holds `block_size` tokens of one group.

    gemma-3-27b      full group      [10 layers]                         grows with the context
                     sliding groups  [10] [10] [10] [10] [10] [2 + pad]  hold the window, and the chunk being written
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from engine.kv.groups import kv_groups
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.kv_format import KVCacheDtype, kv_bytes_per_token_layer
from planner.model import ModelSpec, ParameterRole
from planner.schema import Record

GIB = 1 << 30
MIB = 1 << 20

_COMPUTE_BYTES = 2  # activations are bf16 or fp16
_NON_TORCH_SINGLE_BYTES = round(0.13 * GIB)  # measured by llm-d-planner on H100, one GPU
_NON_TORCH_PARALLEL_BYTES = round(0.55 * GIB)  # the same with two: NCCL's buffers come on top
_GRAPH_BYTES_PER_LAYER_AND_SIZE = MIB // 4  # an assumption, see cuda_graph_bytes_per_rank
_CUBLAS_WORKSPACE_BYTES = 8_519_680  # torch before Hopper: 2 × 4096 KiB + 8 × 16 KiB
_CUBLAS_WORKSPACE_HOPPER_BYTES = 32 * MIB
_BEFORE_HOPPER = ("volta", "turing", "ampere", "ada")
_LOW_BIT_BLOCK_SIZES = (32, 64, 128)
_LARGEST_BLOCK_SIZE = 1024
_MAX_UTILIZATION_ADVISED = 0.95
_POLICIES = ("hybrid", "unified")
# Beyond these a number is a slip of the hand. A simulated pool keeps a few words per block.
_LARGEST_INTEGER = 1 << 62
_MAXIMA = {"num_gpu_blocks": 1 << 24}


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """Engine settings that decide memory; names and defaults as `vllm serve` spells them.

    Attributes:
        max_model_len: longest sequence in tokens; None for the model's max_position_embeddings.
        block_size: tokens per KV block; None for 16, or 64 in the low-bit formats (their scales are per block).
        max_num_batched_tokens: token budget of one step, which sets the activation peak.
        kv_cache_policy: "hybrid" keeps only the window of sliding layers, "unified" keeps the full context of all.
        enforce_eager: True for no CUDA graphs.
        total_memory_bytes, weights_bytes, activation_bytes, non_torch_bytes, cuda_graph_bytes: measured values per
            rank that replace the modelled ones; None to model them. weights_bytes covers a draft model too, and
            activation_bytes covers the cuBLAS workspace.
        sampler_bytes_per_logit: peak bytes per logit while sampling. 40 reproduces llm-d-planner's H100 measurement
            (fp32 copies, sort with indices, softmax, cumulative sum); vLLM 0.6.3 profiled only 2.
        num_gpu_blocks: the KV pool's size in blocks, where it is known (a profile, --num-gpu-blocks-override).
        draft_model: a draft model for speculation, on the same ranks; its weights and KV are added.
        num_lookahead_tokens: draft tokens per step; each is one more row of logits, and one more KV slot.

    Raises:
        UserError: a setting out of its range, in one sentence.
    """

    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    kv_cache_dtype: KVCacheDtype | str = KVCacheDtype.AUTO
    block_size: int | None = None
    gpu_memory_utilization: float = 0.92
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    kv_cache_policy: str = "hybrid"
    enforce_eager: bool = False
    total_memory_bytes: int | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    non_torch_bytes: int | None = None
    cuda_graph_bytes: int | None = None
    sampler_bytes_per_logit: float = 40.0
    num_gpu_blocks: int | None = None
    draft_model: ModelSpec | None = None
    num_lookahead_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_cache_dtype", KVCacheDtype.parse(self.kv_cache_dtype))
        for name in ("tensor_parallel_size", "max_num_batched_tokens", "max_num_seqs"):
            _require_integer(name, getattr(self, name), 1)
        _require_integer("num_lookahead_tokens", self.num_lookahead_tokens, 0)
        for name in ("max_model_len", "total_memory_bytes", "block_size"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), 1)
        for name in ("weights_bytes", "activation_bytes", "non_torch_bytes", "cuda_graph_bytes", "num_gpu_blocks"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), 0)
        _require_number("gpu_memory_utilization", self.gpu_memory_utilization, 1.0, "above 0 and at most 1")
        _require_number("sampler_bytes_per_logit", self.sampler_bytes_per_logit, 1e6, "a positive number of bytes")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise UserError(
                f"max_num_seqs ({self.max_num_seqs}) must not exceed max_num_batched_tokens "
                f"({self.max_num_batched_tokens}): every running sequence needs a token of the budget"
            )
        if self.kv_cache_policy not in _POLICIES:
            raise UserError(f"kv_cache_policy is {self.kv_cache_policy!r}; it must be one of {', '.join(_POLICIES)}")
        if self.block_size is not None and self.block_size > _LARGEST_BLOCK_SIZE:
            raise UserError(f"block_size is {self.block_size}; it must be at most {_LARGEST_BLOCK_SIZE} tokens")
        if self.dtype.is_low_bit and self.block_size not in (None, *_LOW_BIT_BLOCK_SIZES):
            raise UserError(f"block_size is {self.block_size}; with {self.dtype} KV it must be 32, 64 or 128")

    @property
    def dtype(self) -> KVCacheDtype:
        """The resolved KV format, never AUTO."""
        assert isinstance(self.kv_cache_dtype, KVCacheDtype)
        return self.kv_cache_dtype

    @property
    def resolved_block_size(self) -> int:
        """Tokens per block, with the format's default filled in."""
        return self.block_size or (64 if self.dtype.is_low_bit else 16)

    def resolved_max_model_len(self, model: ModelSpec) -> int:
        """Longest sequence in tokens, with the model's own limit filled in."""
        return self.max_model_len or model.max_position_embeddings


def _require_integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {minimum}")
    maximum = _MAXIMA.get(name, _LARGEST_INTEGER)
    if value > maximum:
        raise UserError(f"{name} is {value}; it must be at most {maximum}")


def _require_number(name: str, value: object, maximum: float, requirement: str) -> None:
    # A NaN fails the comparison, as it should.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= maximum:
        raise UserError(f"{name} is {value!r}; it must be {requirement}")


def validate_parallelism(model: ModelSpec, gpu: GpuSpec, tensor_parallel_size: int) -> None:
    """Check that a model can be sharded over so many GPUs of one node.

    Raises:
        UserError: the attention heads do not divide, KV heads can be neither sharded nor replicated evenly, or the
            node has fewer GPUs.
    """
    _require_integer("tensor_parallel_size", tensor_parallel_size, 1)
    if tensor_parallel_size > gpu.gpus_per_node:
        raise UserError(
            f"tensor_parallel_size is {tensor_parallel_size}, but a node has {gpu.gpus_per_node} {gpu.id} GPUs; "
            "use more replicas instead"
        )
    if model.num_attention_heads % tensor_parallel_size:
        raise UserError(
            f"tensor_parallel_size is {tensor_parallel_size}; it must divide the {model.num_attention_heads} "
            f"attention heads of {model.name}"
        )
    kv_heads = model.num_key_value_heads
    if model.mla is None and kv_heads % tensor_parallel_size and tensor_parallel_size % kv_heads:
        raise UserError(
            f"tensor_parallel_size is {tensor_parallel_size}; it must divide the {kv_heads} KV heads of {model.name}, "
            "or be a multiple of them"
        )


# --- KV cache -------------------------------------------------------------------------------------------------------


def residual_bytes_per_sequence(
    model: ModelSpec, dtype: KVCacheDtype | str, tensor_parallel_size: int, block_size: int
) -> int:
    """Bytes per rank of the bf16 page, over all layers, that a low-bit format keeps for each running sequence.

    Keys are quantised per channel over a whole block, which must first be full. Zero for the formats with scales per
    token, thus also for latent attention.
    """
    if not KVCacheDtype.parse(dtype).is_low_bit or model.mla is not None:
        return 0
    per_token = kv_bytes_per_token_layer(model, KVCacheDtype.BFLOAT16, tensor_parallel_size, block_size)
    return round(per_token * block_size * model.num_layers)


@dataclass(frozen=True, slots=True)
class KVLayerGroups:
    """How layers share one pool of equal blocks.

    Attributes:
        windows: one entry per group: its sliding window in tokens, None for full attention. Full groups come first.
        layers_per_group: layers of which a block holds the KV; the last group of a kind may be padded.
    """

    windows: tuple[int | None, ...]
    layers_per_group: int


def kv_layer_groups(model: ModelSpec, policy: str = "hybrid") -> KVLayerGroups:
    """Layers of equal window in groups of the same size, by the engine's own rule (`engine.kv.groups.kv_groups`).

    "unified" puts all layers in one full group.
    """
    if policy not in _POLICIES:
        raise UserError(f"kv_cache_policy is {policy!r}; it must be one of {', '.join(_POLICIES)}")
    if policy == "unified":
        return KVLayerGroups((None,), model.num_layers)
    groups = kv_groups(model.layer_windows)
    return KVLayerGroups(groups.windows, groups.layers_per_group)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The block pool of one rank, and how many of its blocks a sequence takes.

    Attributes:
        block_bytes: bytes of one pool block: `block_size` tokens of one layer group (and of the draft model).
        chunk_tokens: most tokens that one step writes for a sequence (max_num_batched_tokens).
        lookahead_tokens: KV slots beyond a decoding sequence's tokens that speculation may write.
    """

    groups: KVLayerGroups
    block_size: int
    block_bytes: int
    chunk_tokens: int
    lookahead_tokens: int = 0

    def blocks_per_sequence(self, num_tokens: int) -> int:
        """Blocks of a sequence while its last prefill chunk is written: the number to reserve, and vLLM's notion.

        A full group holds every token; a sliding group holds the window before the chunk, the chunk and the slots that
        speculation may write beyond it, which start anywhere in a block, hence the extra one. The scheduler's
        `KVCacheConfig.max_pages` counts the same.
        """
        return self._blocks(num_tokens, self.chunk_tokens + self.lookahead_tokens)

    def blocks_per_decoding_sequence(self, num_tokens: int) -> int:
        """Blocks of a sequence in steady decode, where sliding groups have let go of what left the window.

        Lookahead slots are no extra in a full group: the scheduler never lets a sequence pass its length limit.
        """
        return self._blocks(num_tokens, self.lookahead_tokens)

    def _blocks(self, num_tokens: int, new_tokens: int) -> int:
        every = _ceil_div(num_tokens, self.block_size)
        total = 0
        for window in self.groups.windows:
            if window is None:
                total += every
            else:
                total += min(every, _ceil_div(window - 1 + new_tokens, self.block_size) + 1)
        return total

    def max_model_len(self, num_blocks: int, concurrency: int, limit: int) -> int:
        """Longest sequence, at most `limit` tokens, of which the pool holds `concurrency`; 0 if none fits."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if concurrency * self.blocks_per_sequence(middle) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def kv_layout(model: ModelSpec, settings: MemorySettings) -> KVLayout:
    """The block layout of a model under these settings.

    A draft model's layers join every block as full-context layers: exact for a target with one group, and an upper
    bound for a hybrid target or a draft with windows.
    """
    groups = kv_layer_groups(model, settings.kv_cache_policy)
    block_size, ranks = settings.resolved_block_size, settings.tensor_parallel_size
    per_token = groups.layers_per_group * kv_bytes_per_token_layer(model, settings.dtype, ranks, block_size)
    draft = settings.draft_model
    if draft is not None:
        per_token += draft.num_layers * kv_bytes_per_token_layer(draft, settings.dtype, ranks, block_size)
    return KVLayout(
        groups=groups,
        block_size=block_size,
        block_bytes=math.ceil(block_size * per_token),
        chunk_tokens=settings.max_num_batched_tokens,
        lookahead_tokens=settings.num_lookahead_tokens,
    )


# --- what comes before the KV cache ---------------------------------------------------------------------------------


def weights_bytes_per_rank(model: ModelSpec, tensor_parallel_size: int) -> int:
    """Bytes of parameters and of the RoPE table.

    The table is max_position_embeddings × rotary size × 2 B, on every rank: with it Llama-3.1-8B's 14.9576 GiB of
    parameters become the 14.9888 GiB that vllm#10517 logged. Where tensor parallelism exceeds the KV heads, their
    projections are replicated like the heads.
    """
    parameters = sum(group.bytes_per_rank(tensor_parallel_size) for group in model.parameters)
    rotary = model.mla.qk_rope_head_dim if model.mla else model.head_dim
    rope_table = model.max_position_embeddings * rotary * _COMPUTE_BYTES
    return parameters + rope_table + _replicated_kv_projection_bytes(model, tensor_parallel_size)


def _replicated_kv_projection_bytes(model: ModelSpec, tensor_parallel_size: int) -> int:
    """What a rank holds of the key and value projections beyond an even share."""
    if model.mla is not None or tensor_parallel_size <= model.num_key_value_heads:
        return 0
    bits = next(group.bits_per_parameter for group in model.parameters_of(ParameterRole.ATTENTION))
    one_head = model.num_layers * 2 * model.hidden_size * model.head_dim * bits / 8
    return round(one_head * (1 - model.num_key_value_heads / tensor_parallel_size))


def activation_bytes_per_rank(model: ModelSpec, gpu: GpuSpec, settings: MemorySettings) -> int:
    """Peak of torch beyond the weights in one step: the larger of hidden states and sampling, plus cuBLAS.

    Hidden states: tokens × 2 B × 3·(H + I/TP), which is the 108 KiB per token of vllm#10517 (and does not depend on
    the context length). In a mixture of experts a token is copied to k experts, each with gate and up (2·I_e/TP),
    their product (I_e/TP) and its output (H); the shared experts add 3·I_s/TP. Sampling: rows of logits over the whole
    vocabulary × sampler_bytes_per_logit, one row per sequence and one more per draft token.
    """
    tokens, ranks = settings.max_num_batched_tokens, settings.tensor_parallel_size
    hidden = tokens * _COMPUTE_BYTES * _widest_layer_elements(model, ranks)
    rows = min(settings.max_num_seqs * (1 + settings.num_lookahead_tokens), tokens)
    sampling = rows * model.vocab_size * settings.sampler_bytes_per_logit
    if settings.draft_model is not None:  # the two models run one after the other
        hidden = max(hidden, tokens * _COMPUTE_BYTES * _widest_layer_elements(settings.draft_model, ranks))
    old = gpu.architecture.lower() in _BEFORE_HOPPER
    return math.ceil(max(hidden, sampling)) + (_CUBLAS_WORKSPACE_BYTES if old else _CUBLAS_WORKSPACE_HOPPER_BYTES)


def _widest_layer_elements(model: ModelSpec, ranks: int) -> float:
    """Elements per token that are live at once in the widest layer of a rank."""
    moe = model.moe
    dense = 0.0
    if moe is None or moe.num_moe_layers < model.num_layers:
        dense = 3 * model.intermediate_size / ranks
    routed = 0.0
    if moe is not None:
        routed = moe.experts_per_token * (3 * moe.intermediate_size / ranks + model.hidden_size)
        routed += 3 * moe.shared_intermediate_size / ranks
    return 3 * model.hidden_size + max(dense, routed)


def cuda_graph_bytes_per_rank(model: ModelSpec, settings: MemorySettings) -> int:
    """Memory of captured CUDA graphs: 0.25 MiB per layer and captured batch size.

    The rate is an assumption, fitted to no measurement (a user of vLLM 0.5.4 saw 2.4 GiB, vllm#7553); give a measured
    value as `cuda_graph_bytes` where there is one. The sizes are vLLM's: 1, 2, 4, then every 8 up to 256, then every 16
    up to min(2·max_num_seqs, 512).
    """
    if settings.enforce_eager:
        return 0
    largest = min(2 * settings.max_num_seqs, 512)
    sizes = [size for size in (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)) if size <= largest]
    layers = model.num_layers + (settings.draft_model.num_layers if settings.draft_model else 0)
    return len(sizes) * layers * _GRAPH_BYTES_PER_LAYER_AND_SIZE


@dataclass(frozen=True, slots=True)
class _Budget:
    """One rank's memory, item by item, in bytes; overrides of the settings applied."""

    total: int
    usable: int
    weights: int
    activation: int
    non_torch: int
    cuda_graph: int
    residual: int

    @property
    def fixed(self) -> int:
        return self.weights + self.activation + self.non_torch + self.cuda_graph + self.residual

    @property
    def available(self) -> int:
        """What is left for KV blocks; never negative."""
        return max(0, self.usable - self.fixed)


def _budget(model: ModelSpec, gpu: GpuSpec, settings: MemorySettings) -> _Budget:
    ranks, block_size = settings.tensor_parallel_size, settings.resolved_block_size
    models = [model] if settings.draft_model is None else [model, settings.draft_model]
    residual = sum(residual_bytes_per_sequence(each, settings.dtype, ranks, block_size) for each in models)
    total = _given(settings.total_memory_bytes, gpu.memory_bytes)
    return _Budget(
        total=total,
        usable=math.floor(total * settings.gpu_memory_utilization),
        weights=_given(settings.weights_bytes, sum(weights_bytes_per_rank(each, ranks) for each in models)),
        activation=_given(settings.activation_bytes, activation_bytes_per_rank(model, gpu, settings)),
        non_torch=_given(
            settings.non_torch_bytes, _NON_TORCH_SINGLE_BYTES if ranks == 1 else _NON_TORCH_PARALLEL_BYTES
        ),
        cuda_graph=_given(settings.cuda_graph_bytes, cuda_graph_bytes_per_rank(model, settings)),
        residual=residual * settings.max_num_seqs,
    )


# --- the report -----------------------------------------------------------------------------------------------------


class RankMemory(Record):
    """What one rank holds."""

    rank: int
    """Rank within the tensor-parallel group, from 0."""
    weights_bytes: int
    """Parameters and RoPE table."""
    activation_bytes: int
    """Peak of a step beyond the weights."""
    cuda_graph_bytes: int
    """Captured CUDA graphs."""
    non_torch_bytes: int
    """CUDA context and NCCL."""
    kv_residual_bytes: int
    """bf16 pages of the running sequences (low-bit KV only)."""
    kv_cache_bytes: int
    """The block pool, reserved at start-up."""
    unused_bytes: int
    """Total memory less all of the above, most of it the share that gpu_memory_utilization leaves alone."""
    num_kv_heads: int
    """KV heads cached here; with latent attention 1, the whole latent."""


class Remedy(Record):
    """One change of the settings, and what would then fit."""

    change: str
    """The change, in the words of the command line."""
    max_model_len_that_fits: int
    """Longest sequence in tokens that would fit at the asked concurrency."""
    max_concurrency: float
    """Sequences of max_model_len that would fit."""
    fits: bool
    """True if it would hold what was asked."""


class MemoryReport(Record):
    """The memory of one replica. Bytes are per rank where the name says so."""

    model: str
    """Model name."""
    system: str
    """GPU id."""
    tensor_parallel_size: int
    """GPUs of the replica."""
    kv_cache_dtype: str
    """KV storage format, never "auto"."""
    kv_cache_policy: str
    """"hybrid" or "unified"."""
    block_size: int
    """Tokens per KV block."""
    max_model_len: int
    """Longest sequence in tokens that was asked for."""
    gpu_memory_bytes: int
    """Total memory of one GPU."""
    gpu_memory_utilization: float
    """Share of it that the engine may use."""
    weights_bytes_per_rank: int
    """Parameters and RoPE table, with the draft model's."""
    activation_bytes_per_rank: int
    """Peak of a step beyond the weights, cuBLAS workspace included."""
    cuda_graph_bytes_per_rank: int
    """Captured CUDA graphs (an assumption, see cuda_graph_bytes_per_rank)."""
    non_torch_bytes_per_rank: int
    """CUDA context and NCCL."""
    kv_residual_bytes_per_rank: int
    """bf16 pages of max_num_seqs running sequences (low-bit KV only)."""
    kv_bytes_per_token: int
    """One token in all layers of the model, before sharding or replication, the draft model not counted."""
    kv_bytes_per_token_per_rank: int
    """One token in all layers on one rank, with the draft model's."""
    kv_bytes_per_sequence: int
    """A sequence of max_model_len before sharding, token by token; sliding layers count their window if hybrid."""
    kv_cache_bytes_available: int
    """Per rank, what is left for KV blocks."""
    kv_block_bytes_per_rank: int
    """One pool block."""
    num_kv_blocks: int
    """Blocks of the pool; the same on every rank."""
    blocks_per_sequence: int
    """Blocks that one sequence of max_model_len reserves, prefill chunk included."""
    kv_cache_tokens: int
    """Pool size as vLLM logs it: max_concurrency × max_model_len, not bytes divided by bytes."""
    max_concurrency: float
    """Sequences of max_model_len that the pool holds, each with its prefill chunk (vLLM's notion)."""
    max_concurrency_decoding: float
    """The same in steady decode, where sliding layers hold just their window; equal to it without windows."""
    max_model_len_that_fits: int
    """Longest sequence in tokens of which the pool holds `concurrency`, at most what the model or the user allows."""
    concurrency: int
    """Sequences of max_model_len that were asked for."""
    fits: bool
    """True if the pool holds them."""
    reason: str | None
    """Why not, in one sentence; None if it fits."""
    remedies: tuple[Remedy, ...]
    """Changes that help, best first; empty if it fits."""
    warnings: tuple[str, ...]
    """What to know before believing the numbers."""
    ranks: tuple[RankMemory, ...]
    """One table per rank. Shards are even, so they differ only if an override makes them."""


def plan_memory(
    model: ModelSpec,
    gpu: GpuSpec,
    settings: MemorySettings | None = None,
    concurrency: int = 1,
    with_remedies: bool = True,
) -> MemoryReport:
    """Lay out one replica's memory.

    Args:
        model: the model to serve.
        gpu: the GPU, of which the replica takes `settings.tensor_parallel_size`.
        settings: engine settings; all defaults if omitted.
        concurrency: how many sequences of max_model_len must fit at once.
        with_remedies: False to leave out the search for changes that help, e.g. within a search of its own.

    Returns:
        The report. That something does not fit is an answer, not an error.

    Raises:
        UserError: the model cannot be sharded that way, or concurrency is not a positive whole number.
    """
    settings = settings or MemorySettings()
    _require_integer("concurrency", concurrency, 1)
    for each in (model, settings.draft_model):
        if each is not None:
            validate_parallelism(each, gpu, settings.tensor_parallel_size)
    budget, layout = _budget(model, gpu, settings), kv_layout(model, settings)
    num_blocks = budget.available // layout.block_bytes
    if settings.num_gpu_blocks is not None and budget.available > 0:
        num_blocks = settings.num_gpu_blocks
    length = settings.resolved_max_model_len(model)
    blocks = layout.blocks_per_sequence(length)
    fits = concurrency * blocks <= num_blocks
    longest = layout.max_model_len(num_blocks, concurrency, max(length, model.max_position_embeddings))
    reason = None if fits else _reason(model, gpu, settings, budget, layout, concurrency, longest)
    return MemoryReport(
        model=model.name,
        system=gpu.id,
        tensor_parallel_size=settings.tensor_parallel_size,
        kv_cache_dtype=settings.dtype.value,
        kv_cache_policy=settings.kv_cache_policy,
        block_size=layout.block_size,
        max_model_len=length,
        gpu_memory_bytes=budget.total,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        weights_bytes_per_rank=budget.weights,
        activation_bytes_per_rank=budget.activation,
        cuda_graph_bytes_per_rank=budget.cuda_graph,
        non_torch_bytes_per_rank=budget.non_torch,
        kv_residual_bytes_per_rank=budget.residual,
        kv_bytes_per_token=kv_bytes_per_sequence(model, settings, 1, unified=True),
        kv_bytes_per_token_per_rank=_kv_bytes_per_token_per_rank(model, settings),
        kv_bytes_per_sequence=kv_bytes_per_sequence(model, settings, length),
        kv_cache_bytes_available=budget.available,
        kv_block_bytes_per_rank=layout.block_bytes,
        num_kv_blocks=num_blocks,
        blocks_per_sequence=blocks,
        kv_cache_tokens=num_blocks * length // blocks,
        max_concurrency=num_blocks / blocks,
        max_concurrency_decoding=num_blocks / layout.blocks_per_decoding_sequence(length),
        max_model_len_that_fits=longest,
        concurrency=concurrency,
        fits=fits,
        reason=reason,
        remedies=() if fits or not with_remedies else _remedies(model, gpu, settings, concurrency, longest),
        warnings=_warnings(model, settings, length, num_blocks * layout.block_bytes > budget.available),
        ranks=_rank_tables(model, settings, budget, num_blocks * layout.block_bytes),
    )


def kv_bytes_per_sequence(model: ModelSpec, settings: MemorySettings, num_tokens: int, unified: bool = False) -> int:
    """KV bytes of one sequence in the whole model, before sharding and without rounding up to blocks.

    Sliding layers count at most their window, unless `unified` or the settings' policy keeps everything.
    """
    everything = unified or settings.kv_cache_policy == "unified"
    cached = sum(
        num_tokens if everything or window is None else min(window, num_tokens) for window in model.layer_windows
    )
    return math.ceil(cached * kv_bytes_per_token_layer(model, settings.dtype, 1, settings.resolved_block_size))


def _kv_bytes_per_token_per_rank(model: ModelSpec, settings: MemorySettings) -> int:
    models = [model] if settings.draft_model is None else [model, settings.draft_model]
    ranks, block_size = settings.tensor_parallel_size, settings.resolved_block_size
    return math.ceil(
        sum(each.num_layers * kv_bytes_per_token_layer(each, settings.dtype, ranks, block_size) for each in models)
    )


def _rank_tables(
    model: ModelSpec, settings: MemorySettings, budget: _Budget, pool_bytes: int
) -> tuple[RankMemory, ...]:
    kv_heads = 1 if model.mla else model.kv_heads_per_rank(settings.tensor_parallel_size)
    return tuple(
        RankMemory(
            rank=rank,
            weights_bytes=budget.weights,
            activation_bytes=budget.activation,
            cuda_graph_bytes=budget.cuda_graph,
            non_torch_bytes=budget.non_torch,
            kv_residual_bytes=budget.residual,
            kv_cache_bytes=pool_bytes,
            unused_bytes=max(0, budget.total - budget.fixed - pool_bytes),
            num_kv_heads=kv_heads,
        )
        for rank in range(settings.tensor_parallel_size)
    )


def _reason(
    model: ModelSpec,
    gpu: GpuSpec,
    settings: MemorySettings,
    budget: _Budget,
    layout: KVLayout,
    concurrency: int,
    longest: int,
) -> str:
    """Why it does not fit, in the shape of vLLM's start-up error."""
    offered = (
        f"{_gib(budget.usable)} that {gpu.id} offers at gpu_memory_utilization {settings.gpu_memory_utilization:g}"
    )
    if budget.weights > budget.usable:
        return (
            f"the weights of {_weights_of(model, settings)} need {_gib(budget.weights)} per GPU at tensor parallel "
            f"{settings.tensor_parallel_size}, more than the {offered}"
        )
    if budget.available == 0:
        return (
            f"the weights of {_weights_of(model, settings)} ({_gib(budget.weights)} per GPU) and the engine's own "
            f"memory ({_gib(budget.fixed - budget.weights)}) take all of the {offered}, and leave nothing for the KV "
            f"cache"
        )
    length = settings.resolved_max_model_len(model)
    needed = concurrency * layout.blocks_per_sequence(length) * layout.block_bytes
    subject, verb = ("one sequence", "needs") if concurrency == 1 else (f"{concurrency} sequences", "need")
    available = budget.available
    if settings.num_gpu_blocks is not None:
        available = settings.num_gpu_blocks * layout.block_bytes
    return (
        f"{subject} of {length} tokens {verb} {_gib(needed)} of KV cache per GPU, more than the {_gib(available)} "
        f"available; the estimated maximum model length is {longest}"
    )


def _remedies(
    model: ModelSpec, gpu: GpuSpec, settings: MemorySettings, concurrency: int, longest: int
) -> tuple[Remedy, ...]:
    """Higher utilisation, fp8 KV, more GPUs: what helps, what suffices first, and of those the cheapest first."""
    if settings.num_gpu_blocks is not None:
        return ()  # the pool's size was dictated, so no memory that is freed would reach it
    helpful: dict[str, Remedy] = {}
    for flag, value, changed in _changes(model, gpu, settings):
        if flag in helpful and helpful[flag].fits:
            continue  # fewer GPUs already suffice
        report = plan_memory(model, gpu, changed, concurrency, with_remedies=False)
        if report.fits or report.max_model_len_that_fits > longest:
            helpful[flag] = Remedy(
                change=f"{flag} {value}",
                max_model_len_that_fits=report.max_model_len_that_fits,
                max_concurrency=report.max_concurrency,
                fits=report.fits,
            )
    # The sort is stable: those that fit keep the order of _changes (no cost, some accuracy, more GPUs).
    return tuple(sorted(helpful.values(), key=lambda it: (not it.fits, not it.fits and -it.max_model_len_that_fits)))


def _changes(model: ModelSpec, gpu: GpuSpec, settings: MemorySettings) -> list[tuple[str, str, MemorySettings]]:
    """Candidate remedies as (flag, value, settings), the least costly first."""
    changes = []
    if settings.gpu_memory_utilization < _MAX_UTILIZATION_ADVISED:
        higher = replace(settings, gpu_memory_utilization=_MAX_UTILIZATION_ADVISED)
        changes.append(("--gpu-memory-utilization", str(_MAX_UTILIZATION_ADVISED), higher))
    if settings.dtype is KVCacheDtype.BFLOAT16:
        changes.append(("--kv-cache-dtype", "fp8", replace(settings, kv_cache_dtype=KVCacheDtype.FP8)))
    for size in range(settings.tensor_parallel_size + 1, gpu.gpus_per_node + 1):
        try:
            for each in (model, settings.draft_model):
                if each is not None:
                    validate_parallelism(each, gpu, size)
        except UserError:
            continue
        changes.append(("--tensor-parallel-size", str(size), _with_tensor_parallel(model, settings, size)))
    return changes


def _with_tensor_parallel(model: ModelSpec, settings: MemorySettings, size: int) -> MemorySettings:
    """The same settings on more GPUs; a measured weight size shrinks as the modelled one does."""
    weights = settings.weights_bytes
    if weights is not None:
        modelled = weights_bytes_per_rank(model, settings.tensor_parallel_size)
        weights = round(weights * weights_bytes_per_rank(model, size) / modelled)
    return replace(settings, tensor_parallel_size=size, weights_bytes=weights)


def _warnings(model: ModelSpec, settings: MemorySettings, length: int, pool_too_large: bool) -> tuple[str, ...]:
    warnings = []
    if length > model.max_position_embeddings:
        warnings.append(
            f"max_model_len {length} exceeds the {model.max_position_embeddings} positions that {model.name} was made "
            "for: the memory is right, the model's answers may not be"
        )
    if settings.gpu_memory_utilization > _MAX_UTILIZATION_ADVISED:
        warnings.append(
            f"gpu_memory_utilization {settings.gpu_memory_utilization:g} leaves little room for what the model of "
            f"memory does not know; at most {_MAX_UTILIZATION_ADVISED} is advised"
        )
    if pool_too_large:
        warnings.append(f"num_gpu_blocks {settings.num_gpu_blocks} is more than the memory is estimated to hold")
    draft = settings.draft_model
    if draft is not None and settings.kv_cache_policy == "hybrid" and any(model.layer_windows + draft.layer_windows):
        warnings.append(f"the KV cache of the draft model {draft.name} is counted at full context, an upper bound")
    return tuple(warnings)


def _given(override: int | None, modelled: int) -> int:
    return modelled if override is None else override


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _weights_of(model: ModelSpec, settings: MemorySettings) -> str:
    draft = settings.draft_model
    return f"{model.name} and its draft {draft.name}" if draft else model.name
