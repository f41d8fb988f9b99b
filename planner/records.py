"""What the command line writes as JSON about models, GPUs and deployments: flat, units in the names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.schema import Record

if TYPE_CHECKING:
    from planner.deployment import Deployment


class DeploymentRecord(Record):
    """One engine configuration and its replicas, with every default filled in. Exporters read only this."""

    model: str
    """Model name: a catalog id, or the folder of the user's own config."""
    hf_repo: str | None
    """Hugging Face repository of the weights; None for a user's own config."""
    system: str
    """GPU id."""
    tensor_parallel_size: int
    """GPUs of one replica."""
    replicas: int
    """Engines behind the router."""
    num_gpus: int
    """GPUs in all."""
    kv_cache_dtype: str
    """KV storage format, never "auto": bfloat16, fp8, int8, int4 or int2."""
    kv_cache_policy: str
    """"hybrid" (sliding layers keep their window) or "unified" (all layers keep everything)."""
    max_model_len: int
    """Longest sequence in tokens, prompt and answer."""
    max_position_embeddings: int | None = None
    """Longest context the model was made for; None in records from before it was written down."""
    max_num_seqs: int
    """Most sequences in one step."""
    max_num_batched_tokens: int
    """Token budget of one step."""
    block_size: int
    """Tokens per KV block."""
    num_gpu_blocks_override: int | None
    """KV blocks of one replica where they were given, not derived from memory."""
    gpu_memory_utilization: float
    """Share of GPU memory that the engine may use."""
    enable_prefix_caching: bool
    """Whether the KV of shared prompt beginnings is reused."""
    enable_chunked_prefill: bool
    """Whether a long prompt is split over steps."""
    enforce_eager: bool
    """True for no CUDA graphs."""
    quantization: str | None
    """"fp8" if the linear weights are quantised while loading."""
    num_speculative_tokens: int
    """Draft length k; 0 without speculation."""
    speculative_method: str | None
    """"ngram" or "draft_model"; None without speculation."""
    draft_model: str | None
    """Repository or name of the draft model."""
    router: str
    """"round-robin", "least-outstanding" or "prefix-affinity"; "auto" if no workload has decided yet."""

    @classmethod
    def from_deployment(cls, deployment: Deployment, quantization: str | None = None) -> DeploymentRecord:
        """The record of a deployment.

        Args:
            deployment: what was planned or simulated.
            quantization: what the model was loaded with.

        Raises:
            UserError: a setting out of its range.
        """
        settings = deployment.memory_settings()
        speculation = deployment.speculation if deployment.num_speculative_tokens else None
        draft = speculation.draft_model if speculation else None
        return cls(
            model=deployment.model.name,
            hf_repo=deployment.model.hf_repo,
            system=deployment.gpu.id,
            tensor_parallel_size=deployment.tensor_parallel_size,
            replicas=deployment.replicas,
            num_gpus=deployment.num_gpus,
            kv_cache_dtype=settings.dtype.value,
            kv_cache_policy=deployment.kv_cache_policy,
            max_model_len=settings.resolved_max_model_len(deployment.model),
            max_position_embeddings=deployment.model.max_position_embeddings,
            max_num_seqs=deployment.max_num_seqs,
            max_num_batched_tokens=deployment.max_num_batched_tokens,
            block_size=settings.resolved_block_size,
            num_gpu_blocks_override=deployment.num_gpu_blocks_override,
            gpu_memory_utilization=deployment.gpu_memory_utilization,
            enable_prefix_caching=deployment.enable_prefix_caching,
            enable_chunked_prefill=deployment.enable_chunked_prefill,
            enforce_eager=deployment.enforce_eager,
            quantization=quantization,
            num_speculative_tokens=deployment.num_speculative_tokens,
            speculative_method=speculation.method if speculation else None,
            draft_model=(draft.hf_repo or speculation.draft_name or draft.name) if draft else None,
            router=deployment.router,
        )


class SLORecord(Record):
    """Limits on latency; None where nothing was asked."""

    ttft_ms: float | None
    """Time to first token."""
    tpot_ms: float | None
    """Time per output token after the first."""
    e2el_ms: float | None
    """Arrival to last token."""
    percentile: float
    """Share of requests, in percent, that must be within each limit."""


class PriceRecord(Record):
    """A rental price as it was seen."""

    usd_per_gpu_hour: float
    """US dollars per GPU and hour."""
    source: str
    """Where."""
    date: str
    """When."""


class GpuRecord(Record):
    """A GPU as the catalog knows it; rates are dense data-sheet peaks."""

    id: str
    """What --system takes."""
    name: str
    """Marketing name."""
    vendor: str
    """Maker."""
    architecture: str
    """Generation."""
    memory_bytes: int
    """Total that the driver reports, less than the marketed size."""
    memory_bandwidth_bytes_per_s: float
    """Peak."""
    bf16_flops_per_s: float
    """Dense, with fp32 accumulation."""
    fp8_flops_per_s: float | None
    """Dense; None where the tensor cores have no fp8."""
    link: str
    """What connects the GPUs of a node."""
    link_bandwidth_bytes_per_s: float
    """Per GPU and direction."""
    fast_link: bool
    """True for NVLink or Infinity Fabric, False for PCIe."""
    gpus_per_node: int
    """The largest tensor-parallel group."""
    price_low: PriceRecord | None
    """Lowest price found."""
    price_typical: PriceRecord | None
    """What a mid-market cloud asks."""
    price_high: PriceRecord | None
    """A large cloud's list price."""
    memory_source: str
    """Where the memory size comes from."""
    spec_source: str
    """Where the rates come from."""
    spec_confidence: str
    """How good that source is."""
    notes: str
    """What else to know."""


class ModelRecord(Record):
    """A model as its config.json describes it."""

    id: str
    """What --model takes."""
    hf_repo: str | None
    """Hugging Face repository; None for a user's own config."""
    family: str
    """Architecture family."""
    num_parameters: int
    """All parameters, counted from the shapes."""
    num_active_parameters: int
    """Those that one token touches."""
    published_num_parameters: int | None
    """An independent count, where one was found."""
    weights_bytes: int
    """Parameters in their released precision, and the RoPE table, on one GPU."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    vocab_size: int
    """Tokens of the vocabulary."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """KV heads, as the config states them."""
    head_dim: int
    """Elements per head."""
    mla_latent_dim: int | None
    """Elements cached per token and layer with latent attention (MLA); None without it."""
    sliding_window_tokens: int | None
    """Window of the sliding layers; None if all layers see everything."""
    num_sliding_window_layers: int
    """Layers with that window."""
    num_experts: int | None
    """Routed experts of a layer; None for a dense model."""
    experts_per_token: int | None
    """How many of them a token goes to."""
    kv_bytes_per_token_bf16: int
    """One token in all layers, full context, before sharding."""
    max_position_embeddings: int
    """Longest context the model was made for."""
    source: str
    """Where the config comes from."""
    note: str
    """What else to know."""


class CatalogRecord(Record):
    """Everything that has a name."""

    models: tuple[ModelRecord, ...]
    """Catalog order."""
    gpus: tuple[GpuRecord, ...]
    """Catalog order."""
