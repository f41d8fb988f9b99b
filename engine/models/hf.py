"""From a Hugging Face `config.json` to a `ModelConfig`.

A config file states only what differs from the defaults of its transformers configuration class, and the same key
means different things in different families (a `sliding_window` that `use_sliding_window` switches off, a `head_dim`
that is not hidden/heads). `_FAMILIES` is the table of those differences; everything below it is shared.

transformers 5 writes `dtype` and `rope_parameters` (theta and scaling in one object, or one such object per layer
type); older versions wrote `torch_dtype`, `rope_theta`, `rope_scaling` and, for Gemma-3, `rope_local_base_freq` and
`sliding_window_pattern`. Both are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.models.config import ModelConfig, RopeConfig
from kernels.pages import HEAD_DIMS

DTYPES = ("bfloat16", "float16", "float32")
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# What each kind of rotary embedding needs, and may have, beside its theta. True stands for "must be stated".
_ROPE_KEYS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": True,
    },
    "yarn": {
        "factor": True,
        "original_max_position_embeddings": True,
        "beta_fast": False,
        "beta_slow": False,
        "attention_factor": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
}
# A longer value is a typing error, and would only fill memory later and elsewhere.
_LIMITS = {"num_hidden_layers": 10_000}
_DEFAULT_LIMIT = 2**31 - 1
_LOCAL_THETA = 10_000.0
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # what YaRN takes where they are not stated


@dataclass(frozen=True)
class _Family:
    """How one `model_type` differs from the plain Llama layer.

    Attributes:
        architectures: what the config's `architectures` may name.
        defaults: what the transformers configuration class assumes for omitted keys, where it is not `_DEFAULTS`.
        windows: which layers slide: "none", "all", "switched" (Qwen's `use_sliding_window`) or "types" (`layer_types`,
            else all but every n-th, n from `sliding_window_pattern`).
        qkv_bias: biases on query, key and value whatever the config says.
        bias_keys: whether `attention_bias` (on all four projections) and `mlp_bias` are looked at.
        gemma: norm weights are differences from one, embeddings are scaled, four norms per layer, logits scaled by
            `query_pre_attn_scalar`.
        theta: rotary base where none is stated.
        local_rope: sliding layers have a rotary embedding of their own, with `_LOCAL_THETA` where none is stated.
    """

    architectures: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: str = "none"
    qkv_bias: bool = False
    bias_keys: tuple[str, ...] = ()
    qk_norm: bool = False
    gemma: bool = False
    attention_soft_cap: bool = False
    theta: float = 10_000.0
    local_rope: bool = False


_DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}
_QWEN = {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
_GEMMA = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}
_FAMILIES = {
    "llama": _Family(
        ("LlamaForCausalLM",),
        {"max_position_embeddings": 2048, "eos_token_id": 2},
        bias_keys=("attention_bias", "mlp_bias"),
    ),
    "mistral": _Family(
        ("MistralForCausalLM",),
        {
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "eos_token_id": 2,
        },
        windows="all",
    ),
    "qwen2": _Family(("Qwen2ForCausalLM",), _QWEN, windows="switched", qkv_bias=True),
    "qwen3": _Family(
        ("Qwen3ForCausalLM",),
        {**_QWEN, "head_dim": 128},
        windows="switched",
        bias_keys=("attention_bias",),
        qk_norm=True,
    ),
    "gemma2": _Family(
        ("Gemma2ForCausalLM",),
        {
            **_GEMMA,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows="types",
        bias_keys=("attention_bias",),
        gemma=True,
        attention_soft_cap=True,
    ),
    "gemma3_text": _Family(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        {**_GEMMA, "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6},
        windows="types",
        bias_keys=("attention_bias",),
        qk_norm=True,
        gemma=True,
        theta=1_000_000.0,
        local_rope=True,
    ),
}
_SUPPORTED = "llama, mistral, qwen2, qwen3, gemma2, gemma3_text and gemma3"


def read_config(folder: Path) -> ModelConfig:
    """Read config.json, and the end-of-sequence ids of generation_config.json if there is one.

    Raises:
        UserError: no such folder or file, not JSON, or a config that `model_config` refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; the model must be a folder with config.json and safetensors files")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; the model must be a Hugging Face folder")
    config = read_json(path)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    generation_ids = _Reader(generation, {}, str(generation_path)).token_ids("eos_token_id")
    if not generation_ids:
        return model_config(config, str(path))
    # The ids that the files state, and never the default of a class beside them.
    stated = _Reader(_text_config(config, str(path)), {}, str(path)).token_ids("eos_token_id")
    ids = list(dict.fromkeys((*stated, *generation_ids)))
    return model_config({**config, "eos_token_id": ids}, str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file cannot be read, is no JSON or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {_shown(content)}; it must be a JSON object")
    return content


def model_config(config: dict[str, Any], source: str) -> ModelConfig:
    """Read a parsed config.json.

    Multimodal Gemma-3 configs are read through their `text_config`: the language model without the vision tower.

    Args:
        config: the parsed file.
        source: what error messages call it.

    Raises:
        UserError: in one sentence, the key that is missing or wrong, the file, and what would be right.
    """
    config = _text_config(config, source)
    family = _family(config, source)
    reader = _Reader(config, {**_DEFAULTS, **family.defaults}, source)
    hidden, layers = reader.integer("hidden_size"), reader.integer("num_hidden_layers")
    heads = reader.integer("num_attention_heads")
    kv_heads = heads if reader.value("num_key_value_heads") is None else reader.integer("num_key_value_heads")
    if heads % kv_heads:
        raise reader.error(f"num_key_value_heads is {kv_heads}; it must divide num_attention_heads ({heads})")
    head_dim = _head_dim(reader, hidden, heads)
    positions = reader.integer("max_position_embeddings")
    types = _layer_types(reader, family, layers)
    ropes, layer_ropes = _ropes(reader, family, types, head_dim)
    positions = _stretched_positions(reader, positions)
    window = _window(reader, family, positions)
    attention_bias = "attention_bias" in family.bias_keys and reader.boolean("attention_bias")
    return ModelConfig(
        family=config["model_type"],
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=reader.number("rms_norm_eps"),
        softmax_scale=(reader.number("query_pre_attn_scalar") if family.gemma else head_dim) ** -0.5,
        layer_windows=tuple(window if kind == _SLIDING else None for kind in types),
        ropes=ropes,
        layer_ropes=layer_ropes,
        activation=_activation(reader, "hidden_activation" if family.gemma else "hidden_act"),
        tie_word_embeddings=reader.boolean("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias="mlp_bias" in family.bias_keys and reader.boolean("mlp_bias"),
        qk_norm=family.qk_norm,
        norm_weight_offset=1.0 if family.gemma else 0.0,
        sandwich_norms=family.gemma,
        embedding_scale=math.sqrt(hidden) if family.gemma else 1.0,
        attention_soft_cap=reader.optional_number("attn_logit_softcapping") if family.attention_soft_cap else None,
        logit_soft_cap=reader.optional_number("final_logit_softcapping") if family.gemma else None,
        dtype=_dtype(reader),
        eos_token_ids=reader.token_ids("eos_token_id"),
    )


class _Reader:
    """Typed access to one JSON object, where every complaint names the key and the file."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self._config = config
        self._defaults = defaults
        self._source = source
        self._prefix = prefix

    def error(self, message: str) -> UserError:
        return UserError(f"{self._source}: {message}")

    def value(self, key: str) -> Any:
        """The config's value, else the family's default, else None. A null in the file counts as stated."""
        return self._config[key] if key in self._config else self._defaults.get(key)

    def integer(self, key: str) -> int:
        value, limit = self.value(key), _LIMITS.get(key, _DEFAULT_LIMIT)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.error(f"{self._prefix}{key} is {_shown(value)}; it must be a whole number from 1 to {limit}")
        return value

    def count(self, key: str) -> int:
        """A whole number that may be 0."""
        return 0 if type(self.value(key)) is int and self.value(key) == 0 else self.integer(key)

    def number(self, key: str) -> float:
        value = self.value(key)
        # NaN compares false. What is smaller or larger is a typing error, and would overflow in a formula elsewhere.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-18 <= value <= 1e18:
            raise self.error(f"{self._prefix}{key} is {_shown(value)}; it must be a positive number (1e-18 to 1e18)")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.value(key) is None else self.number(key)

    def boolean(self, key: str) -> bool:
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{self._prefix}{key} is {_shown(value)}; it must be true or false")
        return bool(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A nested object, empty if absent or null."""
        value = self.value(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(f"{self._prefix}{key} is {_shown(value)}; it must be an object")
        return value or {}

    def nested(self, values: Mapping[str, Any], key: str) -> _Reader:
        """A reader of an object inside this one."""
        return _Reader(values, {}, self._source, f"{key}.")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none (null)."""
        value = self.value(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise self.error(f"{self._prefix}{key} is {_shown(value)}; it must be a token id or a list of token ids")
        return tuple(ids)


def _text_config(config: Any, source: str) -> dict[str, Any]:
    """The language model's part of a config: `text_config` of a multimodal one, else all of it."""
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: a model config must be a JSON object, not {_shown(config)}")
    if config.get("model_type") != "gemma3":
        return dict(config)
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"{source}: text_config is {_shown(text)}; a gemma3 config must have an object there")
    # These belong to the whole model and stand outside; a null there says nothing.
    shared = ("architectures", "dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings", "quantization_config")
    outer = {key: config[key] for key in shared if config.get(key) is not None}
    return {**text, **outer, "model_type": text.get("model_type", "gemma3_text")}


def _family(config: Mapping[str, Any], source: str) -> _Family:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(f"{source}: model_type is {_shown(model_type)}; supported are {_SUPPORTED}")
    if architectures and not (
        isinstance(architectures, list) and set(map(str, architectures)) & {*family.architectures}
    ):
        wanted = " or ".join(family.architectures)
        raise UserError(f"{source}: architectures is {_shown(architectures)}; a {model_type} model must be {wanted}")
    if config.get("quantization_config"):
        raise UserError(
            f"{source}: quantization_config says that the weights are quantised; "
            "only unquantised checkpoints are read (fp8 is made while loading)"
        )
    if family.gemma and config.get("use_bidirectional_attention"):
        raise UserError(f"{source}: use_bidirectional_attention is true; only causal models can generate text")
    return family


def _head_dim(reader: _Reader, hidden: int, heads: int) -> int:
    if reader.value("head_dim") is not None:
        head_dim, said = reader.integer("head_dim"), "head_dim"
    else:
        if hidden % heads:
            raise reader.error(f"hidden_size is {hidden}; it must be a multiple of num_attention_heads ({heads})")
        head_dim, said = hidden // heads, "head_dim (hidden_size / num_attention_heads)"
    if head_dim not in HEAD_DIMS:
        choices = ", ".join(map(str, HEAD_DIMS))
        raise reader.error(f"{said} is {head_dim}; there are attention kernels for {choices}")
    return head_dim


def _activation(reader: _Reader, key: str) -> str:
    value = reader.value(key)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise reader.error(f"{key} is {_shown(value)}; it must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _dtype(reader: _Reader) -> str:
    """The checkpoint's dtype; bfloat16 where the file does not say."""
    key = "dtype" if reader.value("dtype") is not None else "torch_dtype"
    value = reader.value(key)
    if value is not None and value not in DTYPES:
        raise reader.error(f"{key} is {_shown(value)}; it must be one of {', '.join(DTYPES)}")
    return value or "bfloat16"


# ---- Which layers slide --------------------------------------------------------------------------------------------


def _layer_types(reader: _Reader, family: _Family, layers: int) -> list[str]:
    """ "full_attention" or "sliding_attention" for each layer."""
    stated = reader.value("layer_types")
    # Mistral's class knows no layer_types, and neither does Llama's.
    if stated is not None and family.windows in ("switched", "types"):
        if not isinstance(stated, list) or len(stated) != layers:
            length = f"{len(stated)} entries" if isinstance(stated, list) else _shown(stated)
            raise reader.error(f"layer_types has {length}; it must list one type for each of the {layers} layers")
        for entry in stated:
            if entry not in (_FULL, _SLIDING):
                raise reader.error(f"layer_types has {_shown(entry)}; supported are {_FULL} and {_SLIDING}")
        return list(stated)
    if family.windows == "types":
        pattern = reader.integer("sliding_window_pattern")
        return [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(layers)]
    if family.windows == "switched" and reader.boolean("use_sliding_window"):
        first = reader.count("max_window_layers")
        return [_SLIDING if layer >= first else _FULL for layer in range(layers)]
    return [_SLIDING if family.windows == "all" else _FULL] * layers


def _window(reader: _Reader, family: _Family, positions: int) -> int | None:
    """The window of the layers that slide. One as long as the context hides nothing and becomes None."""
    if family.windows == "none" or reader.value("sliding_window") is None:
        return None
    if family.windows == "switched" and not reader.boolean("use_sliding_window"):
        return None  # Qwen ships a sliding_window that is switched off
    window = reader.integer("sliding_window")
    return window if window < positions else None


# ---- Rotary embeddings ---------------------------------------------------------------------------------------------


def _ropes(
    reader: _Reader, family: _Family, types: list[str], head_dim: int
) -> tuple[tuple[RopeConfig, ...], tuple[int, ...]]:
    """The different rotary embeddings, in order of first use, and which of them each layer uses."""
    parameters = _rope_parameters(reader, family)
    by_type = {kind: _rope(reader, family, kind, *parameters[kind], head_dim) for kind in set(types)}
    ropes = list(dict.fromkeys(by_type[kind] for kind in types))
    return tuple(ropes), tuple(ropes.index(by_type[kind]) for kind in types)


def _rope_parameters(reader: _Reader, family: _Family) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """By layer type: the key that its parameters stand under, and they themselves."""
    old, new = reader.mapping("rope_scaling"), reader.mapping("rope_parameters")
    nested = {kind: {} if new.get(kind) is None else new[kind] for kind in (_FULL, _SLIDING)}
    for kind, values in nested.items():
        if not isinstance(values, Mapping):
            raise reader.error(f"rope_parameters.{kind} is {_shown(values)}; it must be an object")
    if family.local_rope:
        if new and _FULL not in new and _SLIDING not in new:
            raise reader.error(f"rope_parameters must have {_FULL} and {_SLIDING}, for the two kinds of layers")
        full = ("rope_scaling", {**nested[_FULL], **old}) if old else (f"rope_parameters.{_FULL}", nested[_FULL])
        return {_FULL: full, _SLIDING: (f"rope_parameters.{_SLIDING}", nested[_SLIDING])}
    if old:
        return dict.fromkeys((_FULL, _SLIDING), ("rope_scaling", old))
    if _FULL in new or _SLIDING in new:
        return {kind: (f"rope_parameters.{kind}", values) for kind, values in nested.items()}
    return dict.fromkeys((_FULL, _SLIDING), ("rope_parameters", new))


def _rope(
    reader: _Reader, family: _Family, layer_type: str, key: str, values: Mapping[str, Any], head_dim: int
) -> RopeConfig:
    """The rotary embedding of the layers of one type; what its own object leaves out stands beside it."""
    kind = _rope_type(values)
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise reader.error(f"{key}.rope_type is {_shown(kind)}; supported are {', '.join(_ROPE_KEYS)}")
    partial = values.get("partial_rotary_factor", reader.value("partial_rotary_factor"))
    if isinstance(partial, bool) or partial not in (None, 1):
        raise reader.error(f"partial_rotary_factor is {_shown(partial)}; these models rotate whole heads, so it is 1")
    outer = {"original_max_position_embeddings": reader.value("max_position_embeddings")}
    stated = {name: value for name, value in values.items() if value is not None}
    if reader.value("original_max_position_embeddings") is not None:  # transformers prefers it to the inner one
        stated["original_max_position_embeddings"] = reader.value("original_max_position_embeddings")
    inner = reader.nested({**outer, **stated}, key)
    rope = RopeConfig(
        kind=kind,
        theta=_theta(reader, family, layer_type, inner),
        rotary_dim=head_dim,
        parameters=tuple(
            (name, float(inner.boolean(name)) if name == "truncate" else inner.number(name))
            for name, needed in _ROPE_KEYS[kind].items()
            if needed or name in stated
        ),
    )
    _check_rope(reader, key, kind, dict(rope.parameters))
    return rope


def _rope_type(values: Mapping[str, Any]) -> Any:
    """The kind that an object of rotary parameters states; transformers once called the key "type"."""
    stated = (values.get(name) for name in ("rope_type", "type"))
    return next((value for value in stated if value is not None), "default")


def _theta(reader: _Reader, family: _Family, layer_type: str, inner: _Reader) -> float:
    """The rotary base: of the object itself, else stated beside it, else the family's."""
    local = layer_type == _SLIDING and family.local_rope
    outer = "rope_local_base_freq" if local else "rope_theta"
    if inner.value("rope_theta") is None and reader.value(outer) is None:
        return _LOCAL_THETA if local else family.theta
    holder, name = (reader, outer) if inner.value("rope_theta") is None else (inner, "rope_theta")
    theta = holder.number(name)
    if theta <= 1:
        raise holder.error(f"{name} is {theta:g}; it must be above 1 (usually 10,000 or more)")
    return theta


def _check_rope(reader: _Reader, key: str, kind: str, parameters: Mapping[str, float]) -> None:
    """Raise UserError for numbers that are each in order but make no sense together, or for this kind."""
    if parameters.get("factor", 1.0) < 1:
        raise reader.error(
            f"{key}.factor is {parameters['factor']:g}; it must be at least 1, as it stretches a context"
        )
    if kind == "llama3" and parameters["high_freq_factor"] <= parameters["low_freq_factor"]:
        raise reader.error(f"{key}.high_freq_factor must be greater than low_freq_factor")
    fast, slow = parameters.get("beta_fast", _BETA_FAST), parameters.get("beta_slow", _BETA_SLOW)
    if kind == "yarn" and fast < slow:
        raise reader.error(f"{key}.beta_fast is {fast:g}; it must not be below beta_slow, which is {slow:g}")


def _stretched_positions(reader: _Reader, positions: int) -> int:
    """The context length: YaRN stretches the one the model was trained on, which configs state beside it."""
    rope = reader.mapping("rope_scaling") or reader.mapping("rope_parameters")
    if _rope_type(rope) != "yarn" or rope.get("original_max_position_embeddings") is None:
        return positions
    inner = reader.nested(rope, "rope_scaling")
    stretched = inner.number("factor") * inner.integer("original_max_position_embeddings")
    if stretched > _DEFAULT_LIMIT:
        raise reader.error(
            f"rope_scaling.factor stretches the context to {stretched:.3g} tokens, which cannot be meant"
        )
    return max(positions, round(stretched))


def _shown(value: Any) -> str:
    """A value as it appears in an error message: short, however long it was."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
