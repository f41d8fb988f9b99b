"""From a Hugging Face `config.json` to a `ModelSpec`: shapes, sliding windows, parameter counts and storage bits.

A config file states only what differs from the defaults of its transformers configuration class, and the same key
means different things in different families (a `sliding_window` that `use_sliding_window` switches off, a `head_dim`
that is not hidden/heads). `_FAMILIES` is the table of those differences; everything below it is shared.

Parameter counts per layer, with hidden H, heads n, KV heads m, head size d, MLP width I:
    attention   H·n·d + 2·H·m·d + n·d·H, plus biases; latent attention as in arXiv:2405.04434 section 2.1
    MLP         3·H·I (gate, up, down), times the experts in a mixture, plus the router H·E
    norms       2·H (4·H in Gemma), 2·d where queries and keys are normalised
and once: the embedding V·H, the output matrix V·H unless tied, the last norm H.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.errors import UserError
from planner.model import MLASpec, ModelSpec, MoESpec, ParameterGroup, ParameterRole

# Larger than anything published; a value beyond it is a typing error, and would only overflow later and elsewhere.
_LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 32,
    "sliding_window": 1 << 40,
}
_DEFAULT_LIMIT = 1 << 20
_SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")
_MXFP4_BITS = 4 + 8 / 32  # one 8-bit scale per 32 values (OCP Microscaling Formats 1.0)


@dataclass(frozen=True, slots=True)
class _Family:
    """How one `model_type` differs from the plain Llama layer.

    Attributes:
        name: the `ModelSpec.family` it becomes.
        defaults: what the transformers configuration class assumes for omitted keys (None: equal to the heads).
        windows: which layers slide when the config has no `layer_types`: "none", "all", "switched" (Qwen's
            `use_sliding_window`), "even" (layers 0, 2, 4, ...) or "pattern" (all but every n-th).
        qkv_bias: biases on query, key and value whatever the config says.
        qk_norm: queries and keys are normalised per head.
        norms_per_layer: vectors of hidden_size per layer.
        sinks: one learned attention sink per head and layer.
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: str = "none"
    qkv_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    sinks: bool = False


_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA3_TEXT = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
_FAMILIES: dict[str, _Family] = {
    "llama": _Family("llama"),
    "mistral": _Family("mistral", {"num_key_value_heads": 8, "sliding_window": 4096}, windows="all"),
    "mixtral": _Family(
        "mixtral", {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}, windows="all"
    ),
    "phi3": _Family("phi3", windows="all"),
    "qwen2": _Family("qwen2", {"num_key_value_heads": 32, **_QWEN_WINDOW}, windows="switched", qkv_bias=True),
    "qwen3": _Family(
        "qwen3", {"num_key_value_heads": 32, "head_dim": 128, **_QWEN_WINDOW}, windows="switched", qk_norm=True
    ),
    "qwen3_moe": _Family(
        "qwen3_moe",
        {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            **_QWEN_WINDOW,
        },
        windows="switched",
        qk_norm=True,
    ),
    "gemma2": _Family(
        "gemma2",
        {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096, "tie_word_embeddings": True},
        windows="even",
        norms_per_layer=4,
    ),
    "gemma3_text": _Family("gemma3", _GEMMA3_TEXT, windows="pattern", qk_norm=True, norms_per_layer=4),
    "gpt_oss": _Family(
        "gpt_oss",
        {
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "max_position_embeddings": 131072,
            "attention_bias": True,
        },
        windows="even",
        sinks=True,
    ),
    "deepseek_v2": _Family("deepseek_v2", {"first_k_dense_replace": 0}),
    "deepseek_v3": _Family("deepseek_v3", {"first_k_dense_replace": 3, "q_lora_rank": 1536}),
}
_MLA_FAMILIES = ("deepseek_v2", "deepseek_v3")


class _Reader:
    """Typed access to one config, where every complaint names the key and the file."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> None:
        self._config = config
        self._defaults = defaults
        self._source = source

    def error(self, message: str) -> UserError:
        return UserError(f"{self._source}: {message}")

    def value(self, key: str) -> Any:
        """The config's value, else the family's default, else None. A null in the file counts as stated."""
        return self._config[key] if key in self._config else self._defaults.get(key)

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number between `minimum` and the key's limit.

        Raises:
            UserError: it is missing, of another type, or out of range.
        """
        value = self.value(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing; it must be a whole number of at least {minimum}")
        limit = _LIMITS.get(key, _DEFAULT_LIMIT)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= limit:
            raise self.error(f"{key} is {_shown(value)}; it must be a whole number from {minimum} to {limit}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.value(key) is None else self.integer(key)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key} is {_shown(value)}; it must be true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A nested object, empty if absent or null."""
        value = self.value(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(f"{key} is {_shown(value)}; it must be an object")
        return value

    def number(self, holder: Mapping[str, Any], key: str, where: str) -> float:
        """A positive finite number of a nested object."""
        value = holder.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:  # NaN compares false
            raise self.error(f"{where}.{key} is {_shown(value)}; it must be a positive number")
        return float(value)


def model_from_config(
    config: dict[str, Any], name: str, quantization: str | None = None, source: str | None = None
) -> ModelSpec:
    """Read a Hugging Face config.

    Multimodal configs are read through their `text_config`: the language model only, without the vision tower.

    Args:
        config: the parsed config.json.
        name: what the model is to be called.
        quantization: "fp8" to quantise the linear weights of an unquantised checkpoint while loading.
        source: what error messages call the file; `name` if omitted.

    Raises:
        UserError: in one sentence, the key that is missing or wrong, the file, and what would be right.
    """
    source = source or name
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: a model config must be a JSON object, not {_shown(config)}")
    config = _text_config(config, source)
    model_type = config.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(sorted(_FAMILIES))
        raise UserError(f"{source}: model_type {_shown(model_type)} is not supported; it must be one of {supported}")
    reader = _Reader(config, family.defaults, source)
    shape = _read_shape(reader, family)
    precision = _read_precision(reader, quantization)
    return ModelSpec(
        name=name,
        family=family.name,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        layer_windows=_layer_windows(reader, family, shape),
        parameters=_parameter_groups(reader, family, shape, precision),
        mla=shape.mla,
        moe=shape.moe,
        fp8_compute=precision.fp8_compute,
    )


def _text_config(config: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The language model's part of a multimodal config; dtype and quantisation are stated on the outer level."""
    nested = config.get("text_config")
    if nested is None:
        if config.get("model_type") == "gemma3":
            raise UserError(f"{source}: text_config is missing; a gemma3 config must have one (gemma3_text has none)")
        return config
    if not isinstance(nested, Mapping):
        raise UserError(f"{source}: text_config is {_shown(nested)}; it must be an object")
    outer = {key: config[key] for key in ("torch_dtype", "dtype", "quantization_config") if key in config}
    merged = {**outer, **nested}
    if config.get("model_type") == "gemma3":
        merged.setdefault("model_type", "gemma3_text")
    return merged


@dataclass(frozen=True, slots=True)
class _Shape:
    """The checked integers of a config. `moe_layers` counts the layers with experts; the others are dense."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    mla: MLASpec | None
    moe: MoESpec | None

    @property
    def moe_layers(self) -> int:
        return self.moe.num_moe_layers if self.moe else 0


def _read_shape(reader: _Reader, family: _Family) -> _Shape:
    hidden = reader.integer("hidden_size")
    layers = reader.integer("num_hidden_layers")
    heads = reader.integer("num_attention_heads")
    kv_heads = reader.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise reader.error(f"num_key_value_heads is {kv_heads}; it must divide num_attention_heads ({heads})")
    mla = _read_mla(reader) if family.name in _MLA_FAMILIES else None
    if mla is not None:
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    elif reader.value("head_dim") is not None:
        head_dim = reader.integer("head_dim")
    elif hidden % heads:
        raise reader.error(f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}); state head_dim")
    else:
        head_dim = hidden // heads
    return _Shape(
        hidden=hidden,
        intermediate=reader.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=reader.integer("vocab_size"),
        max_positions=_max_positions(reader),
        tied=reader.boolean("tie_word_embeddings"),
        mla=mla,
        moe=_read_moe(reader, family, layers),
    )


def _max_positions(reader: _Reader) -> int:
    """The context length; YaRN configs may state the length before stretching (Qwen's model cards do)."""
    stated = reader.integer("max_position_embeddings")
    key = "rope_scaling" if reader.value("rope_scaling") is not None else "rope_parameters"
    rope = reader.mapping(key)
    if rope.get("rope_type", rope.get("type")) != "yarn" or "original_max_position_embeddings" not in rope:
        return stated
    stretched = reader.number(rope, "factor", key) * reader.number(rope, "original_max_position_embeddings", key)
    if stretched > _LIMITS["max_position_embeddings"]:
        raise reader.error(f"{key}.factor stretches the context to {stretched:.3g} tokens, which cannot be meant")
    return max(stated, round(stretched))


def _read_mla(reader: _Reader) -> MLASpec:
    return MLASpec(
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
        q_lora_rank=reader.optional_integer("q_lora_rank"),
    )


def _read_moe(reader: _Reader, family: _Family, layers: int) -> MoESpec | None:
    """The mixture of experts, or None for a dense model."""
    if family.name in ("mixtral", "gpt_oss"):
        moe = _moe(reader, "num_local_experts", "intermediate_size", layers)
    elif family.name == "qwen3_moe":
        dense = _layer_indices(reader, "mlp_only_layers")
        step = reader.integer("decoder_sparse_step", default=1)
        sparse = sum((layer + 1) % step == 0 and layer not in dense for layer in range(layers))
        moe = _moe(reader, "num_experts", "moe_intermediate_size", sparse)
    elif family.name in _MLA_FAMILIES:
        if reader.value("n_routed_experts") is None:
            return None
        first = reader.integer("first_k_dense_replace", minimum=0)
        step = reader.integer("moe_layer_freq", default=1)
        sparse = sum(layer >= first and layer % step == 0 for layer in range(layers))
        shared = 0 if reader.value("n_shared_experts") is None else reader.integer("n_shared_experts", minimum=0)
        moe = _moe(reader, "n_routed_experts", "moe_intermediate_size", sparse, shared)
    else:
        return None
    return moe if moe.num_moe_layers else None


def _moe(reader: _Reader, experts_key: str, width_key: str, layers: int, shared: int = 0) -> MoESpec:
    experts, chosen = reader.integer(experts_key), reader.integer("num_experts_per_tok")
    if chosen > experts:
        raise reader.error(f"num_experts_per_tok is {chosen}; it must be at most {experts_key} ({experts})")
    width = reader.integer(width_key)
    return MoESpec(experts, chosen, width, layers, num_shared_experts=shared, shared_intermediate_size=shared * width)


def _layer_indices(reader: _Reader, key: str) -> frozenset[int]:
    value = reader.value(key)
    if value is None:
        return frozenset()
    if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
        raise reader.error(f"{key} is {_shown(value)}; it must be a list of layer numbers")
    return frozenset(value)


def _layer_windows(reader: _Reader, family: _Family, shape: _Shape) -> tuple[int | None, ...]:
    """The sliding window of every layer. A window as long as the context hides nothing, so it becomes None."""
    window = None if family.windows == "none" else reader.optional_integer("sliding_window")
    if family.windows == "switched" and not reader.boolean("use_sliding_window"):
        window = None  # Qwen ships a sliding_window that is switched off
    if window is not None and window >= shape.max_positions:
        window = None
    slides = _sliding_layers(reader, family, shape.layers)
    return tuple(window if slide else None for slide in slides)


def _sliding_layers(reader: _Reader, family: _Family, layers: int) -> Iterable[bool]:
    """Which layers slide: by `layer_types` where the config has them, else by the family's rule."""
    types = reader.value("layer_types")
    if types is not None and family.windows != "none":
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers:
            length = f"{len(types)} entries" if isinstance(types, list) else _shown(types)
            raise reader.error(f"layer_types has {length}; it must list one type for each of the {layers} layers")
        for entry in types:
            if entry not in known:
                raise reader.error(f"layer_types has {_shown(entry)}; supported are {' and '.join(known)}")
        return [entry == "sliding_attention" for entry in types]
    if family.windows == "even":
        return [layer % 2 == 0 for layer in range(layers)]
    if family.windows == "pattern":
        key = "_sliding_window_pattern" if reader.value("_sliding_window_pattern") else "sliding_window_pattern"
        pattern = reader.integer(key)
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    if family.windows == "switched":
        first = reader.integer("max_window_layers", minimum=0)
        return [layer >= first for layer in range(layers)]
    return [family.windows == "all"] * layers


@dataclass(frozen=True, slots=True)
class _Precision:
    """Stored bits per parameter of the quantisable matrices; embeddings, output matrix, norms and router stay 16."""

    attention: float = 16.0
    mlp: float = 16.0
    expert: float = 16.0
    fp8_compute: bool = False


def _read_precision(reader: _Reader, quantization: str | None) -> _Precision:
    """The storage bits that dtype, `quantization_config` and quantisation at load time make.

    A float32 checkpoint counts 16 bits too: serving engines load it as bfloat16.
    """
    dtype = reader.value("dtype") or reader.value("torch_dtype")
    if dtype is not None and dtype not in _SUPPORTED_DTYPES:
        raise reader.error(f"torch_dtype is {_shown(dtype)}; it must be one of {', '.join(_SUPPORTED_DTYPES)}")
    if quantization not in (None, "fp8"):
        raise UserError(f"quantization {quantization!r} is not supported; it must be 'fp8' or omitted")
    stored = reader.mapping("quantization_config")
    method = stored.get("quant_method")
    if not stored:
        return _Precision(8.0, 8.0, 8.0, fp8_compute=True) if quantization == "fp8" else _Precision()
    bits, fp8_compute = _stored_bits(reader, stored, method)
    if quantization == "fp8" and not fp8_compute:
        raise reader.error(f"the checkpoint is already quantised ({method}); omit the quantization 'fp8'")
    if method == "mxfp4":
        return _Precision(expert=bits)  # released MXFP4 checkpoints quantise the experts alone
    attention = 16.0 if _skips_attention(stored) else bits
    return _Precision(attention, bits, bits, fp8_compute)


def _stored_bits(reader: _Reader, stored: Mapping[str, Any], method: Any) -> tuple[float, bool]:
    """Bits per weight including scales, and whether the matrix products run in fp8."""
    if method == "fp8":
        return 8 + _block_scale_bits(reader, stored), True
    if method == "mxfp4":
        return _MXFP4_BITS, False
    if method == "compressed-tensors":
        return _compressed_tensors_bits(reader, stored)
    if method in ("awq", "gptq"):
        bits = _small_integer(reader, stored, ("bits", "w_bit"))
        group = stored.get("group_size", stored.get("q_group_size", 128))
        return bits + _group_bits(reader, group, 16 + bits), False  # a 16-bit scale and a zero point of `bits`
    if method == "bitsandbytes":
        # Dettmers et al., arXiv:2305.14314: absmax per 64 values, itself quantised to 8 bits when double.
        if stored.get("load_in_4bit"):
            return 4 + (8 / 64 + 32 / (64 * 256) if stored.get("bnb_4bit_use_double_quant") else 32 / 64), False
        return 8.0, False
    supported = "fp8, compressed-tensors, awq, gptq, bitsandbytes, mxfp4"
    raise reader.error(f"quantization_config.quant_method is {_shown(method)}; supported are {supported}")


def _block_scale_bits(reader: _Reader, stored: Mapping[str, Any]) -> float:
    """A 32-bit scale per block of weights, or one per tensor, which is nothing per weight."""
    block = stored.get("weight_block_size")
    if block is None:
        return 0.0
    if not isinstance(block, list) or len(block) != 2 or any(type(side) is not int or side < 1 for side in block):
        raise reader.error(f"quantization_config.weight_block_size is {_shown(block)}; it must be two whole numbers")
    return 32 / (block[0] * block[1])


def _compressed_tensors_bits(reader: _Reader, stored: Mapping[str, Any]) -> tuple[float, bool]:
    groups = stored.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        raise reader.error("quantization_config.config_groups must have a group with 'weights'")
    bits = _small_integer(reader, weights, ("num_bits",))
    group = weights.get("group_size") if weights.get("strategy", "group") == "group" else None
    zero_point = 0 if weights.get("symmetric", True) else bits
    overhead = 0.0 if group is None else _group_bits(reader, group, 16 + zero_point)
    return bits + overhead, bits == 8 and weights.get("type") == "float" and bool(first.get("input_activations"))


def _small_integer(reader: _Reader, holder: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    value = next((holder[key] for key in keys if key in holder), None)
    if type(value) is not int or not 1 <= value <= 16:
        raise reader.error(f"quantization_config: {keys[0]} is {_shown(value)}; it must be a whole number from 1 to 16")
    return value


def _group_bits(reader: _Reader, group_size: Any, bits_per_group: float) -> float:
    """Scale bits per weight; a group size of -1 means a whole row, whose scale is negligible."""
    if group_size == -1:
        return 0.0
    if type(group_size) is not int or group_size < 1:
        raise reader.error(f"quantization_config: group_size is {_shown(group_size)}; it must be positive or -1")
    return bits_per_group / group_size


def _skips_attention(stored: Mapping[str, Any]) -> bool:
    """True if the checkpoint leaves the attention of every layer unquantised (a pattern without a layer number)."""
    skipped = stored.get("modules_to_not_convert") or stored.get("ignored_layers") or stored.get("ignore") or ()
    names = [name for name in skipped if isinstance(name, str)] if isinstance(skipped, list) else []
    return any("self_attn" in name and not any(char.isdigit() for char in name) for name in names)


def _parameter_groups(
    reader: _Reader, family: _Family, shape: _Shape, precision: _Precision
) -> tuple[ParameterGroup, ...]:
    """Count every parameter, grouped by role, storage bits and sharding."""
    role = ParameterRole
    hidden, layers = shape.hidden, shape.layers
    embedding = shape.vocab * hidden
    norms = layers * family.norms_per_layer * hidden + hidden
    if family.qk_norm:
        norms += layers * 2 * shape.head_dim
    if shape.mla is not None:
        norms += layers * (shape.mla.kv_lora_rank + (shape.mla.q_lora_rank or 0))
    groups = [
        ParameterGroup(role.EMBEDDING, embedding, 16.0, sharded=True),
        *_attention_groups(reader, family, shape, precision.attention),
        *_mlp_groups(reader, family, shape, precision),
        ParameterGroup(role.NORM, norms, 16.0, sharded=False),
    ]
    if not shape.tied:
        groups.append(ParameterGroup(role.LM_HEAD, embedding, 16.0, sharded=True))
    return tuple(group for group in groups if group.num_parameters)


def _attention_groups(reader: _Reader, family: _Family, shape: _Shape, bits: float) -> list[ParameterGroup]:
    """Projections (sharded by head), biases and sinks; MLA's down-projections make latents that every rank needs."""
    role = ParameterRole.ATTENTION
    hidden, layers, heads = shape.hidden, shape.layers, shape.heads
    has_bias = reader.boolean("attention_bias")
    if shape.mla is not None:
        mla = shape.mla
        latent = hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim) + hidden * (mla.q_lora_rank or 0)
        queries = (mla.q_lora_rank or hidden) * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        keys_values = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        output = heads * mla.v_head_dim * hidden
        bias = (mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim + hidden if has_bias else 0
        return [
            ParameterGroup(role, layers * (queries + keys_values + output), bits, sharded=True),
            ParameterGroup(role, layers * latent, bits, sharded=False),
            ParameterGroup(role, layers * bias, 16.0, sharded=False),
        ]
    projected = (heads + 2 * shape.kv_heads) * shape.head_dim
    matrices = hidden * projected + heads * shape.head_dim * hidden
    head_vectors = (projected if family.qkv_bias or has_bias else 0) + (heads if family.sinks else 0)
    output_bias = hidden if has_bias and not family.qkv_bias else 0
    return [
        ParameterGroup(role, layers * matrices, bits, sharded=True),
        ParameterGroup(role, layers * head_vectors, 16.0, sharded=True),
        ParameterGroup(role, layers * output_bias, 16.0, sharded=False),
    ]


def _mlp_groups(reader: _Reader, family: _Family, shape: _Shape, precision: _Precision) -> list[ParameterGroup]:
    """Dense layers, routed experts, shared experts and routers, with the biases that the family has."""
    role = ParameterRole
    hidden, dense_layers = shape.hidden, shape.layers - shape.moe_layers
    dense = dense_layers * 3 * hidden * shape.intermediate
    dense_bias = dense_layers * (2 * shape.intermediate + hidden) if reader.boolean("mlp_bias") else 0
    groups = [
        ParameterGroup(role.MLP, dense, precision.mlp, sharded=True),
        ParameterGroup(role.MLP, dense_bias, 16.0, sharded=True),
    ]
    moe = shape.moe
    if moe is None:
        return groups
    experts = moe.num_moe_layers * moe.num_experts
    router = hidden * moe.num_experts
    if family.name == "gpt_oss" or reader.value("topk_method") == "noaux_tc":
        router += moe.num_experts  # gpt-oss: a bias; DeepSeek-V3: the load-balancing correction
    expert_bias = experts * (2 * moe.intermediate_size + hidden) if family.name == "gpt_oss" else 0
    shared = moe.num_moe_layers * 3 * hidden * moe.shared_intermediate_size
    return [
        *groups,
        ParameterGroup(role.EXPERT, experts * 3 * hidden * moe.intermediate_size, precision.expert, sharded=True),
        ParameterGroup(role.EXPERT, expert_bias, 16.0, sharded=True),
        ParameterGroup(role.SHARED_EXPERT, shared, precision.mlp, sharded=True),
        ParameterGroup(role.ROUTER, moe.num_moe_layers * router, 16.0, sharded=False),
    ]


def _shown(value: Any) -> str:
    """A value as it appears in an error message: short, however long it was."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
