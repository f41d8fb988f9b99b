"""Weights: from safetensors, or random, into the fused tensors of `DecoderWeights`.

All tensors are allocated on the device first. A tensor of the checkpoint then goes straight to its rows of a fused one,

    qkv      [ q_proj | k_proj | v_proj ]        gate_up  [ gate_proj | up_proj ]

in pieces of at most _PIECE elements, so that the model is never in memory twice. With fp8 weights each piece is
quantised as it arrives, one scale per row (output channel).

Files are looked through, and everything that is wrong with them reported, before the first byte of a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.config import LOAD_FORMATS, QUANTIZATIONS
from engine.errors import UserError
from engine.models.config import ModelConfig
from engine.models.hf import read_json
from engine.models.modules import DecoderLayer, DecoderWeights, Linear

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STORED_DTYPES = ("BF16", "F16", "F32")
# Where the language model stands: alone, inside a multimodal model as written before transformers 5, and since.
_PREFIXES = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")
_PIECE = 16 * 2**20
_DUMMY_STD = 0.02
_FP8_ALIGNMENT = 16  # of both sides of a matrix, which cuBLAS's fp8 products want


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    load_format: str = "auto",
    quantization: str | None = None,
    seed: int = 0,
) -> DecoderWeights:
    """Load a model's weights, or make random ones.

    Args:
        folder: with model.safetensors, or shards and model.safetensors.index.json; not looked at for dummy weights.
        config: from the same folder.
        dtype: bfloat16, float16 or float32, what weights become whatever they are stored as.
        device: where they go.
        load_format: "auto" or "safetensors", "dummy" for random weights of the config's shapes: the same for the same
            seed and kind of device.
        quantization: "fp8" for float8_e4m3fn weights with a scale per output channel in all linear layers but the LM
            head, or None.
        seed: of dummy weights.

    Raises:
        UserError: an option that is not among these, a folder without safetensors, a file that is missing, truncated
            or corrupt, or a tensor that is missing, not foreseen by the config, or of the wrong shape or dtype.
    """
    if load_format not in LOAD_FORMATS:
        raise UserError(f"load format {load_format!r} is unknown; it must be one of {', '.join(LOAD_FORMATS)}")
    if quantization not in QUANTIZATIONS:
        known = " or ".join(filter(None, QUANTIZATIONS))
        raise UserError(f"quantization {quantization!r} is unknown; it must be {known}, or omitted")
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype} is not supported; it must be bfloat16, float16 or float32")
    if load_format == "dummy":
        weights = _allocate(config, dtype, device, quantization)
        _fill_randomly(_slots(config, weights), config, seed)
        return weights
    # The shapes first, without storage: what is wrong with a checkpoint shows before the device's memory is taken.
    shapes = {slot.name: slot.shape for slot in _slots(config, _allocate(config, dtype, "meta", quantization))}
    sources = _find_tensors(Path(folder), shapes, config)
    weights = _allocate(config, dtype, device, quantization)
    _read(_slots(config, weights), sources)
    return weights


def quantise_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of a matrix to float8_e4m3fn with scale absmax / 448.

    Args:
        weight: [out_features, in_features], any floating dtype.

    Returns:
        float8_e4m3fn of the same shape, and float32 [out_features]: weight ≈ fp8 · scale, and a row of zeros stays so.
    """
    weight = weight.float()
    # At least the smallest normal number, lest a row of zeros is divided by zero.
    scale = (weight.abs().amax(dim=1) / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


# ---- Where each tensor of a checkpoint goes ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """The place of one tensor of a checkpoint.

    Attributes:
        name: in the checkpoint, without prefix.
        target: a view of the fused tensor, of the tensor's own shape.
        scale: float32 [rows], a view too, where the target is float8.
    """

    name: str
    target: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.target.shape)

    @property
    def is_norm(self) -> bool:
        return self.name.endswith("norm.weight")

    def pieces(self) -> Iterator[slice]:
        """Runs of rows of at most _PIECE elements (or one row)."""
        rows = max(1, _PIECE // max(1, self.target[0].numel()))
        for first in range(0, self.shape[0], rows):
            yield slice(first, min(first + rows, self.shape[0]))

    def store(self, rows: slice, values: torch.Tensor) -> None:
        """Convert or quantise some rows into their place. Values of another device are moved as they are stored."""
        if self.scale is None:
            self.target[rows].copy_(values)
        else:
            quantised, scale = quantise_channels(values.to(self.target.device))
            self.target[rows].copy_(quantised)
            self.scale[rows].copy_(scale)


def _slots(config: ModelConfig, weights: DecoderWeights) -> Iterator[_Slot]:
    """Every tensor that the checkpoint must have, in the order of the forward pass."""
    query, key_value = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield _Slot("embed_tokens.weight", weights.embedding)
    for i, layer in enumerate(weights.layers):
        prefix = f"layers.{i}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        yield from _norm_slots(config, prefix, layer)
        yield from _linear_slots(attention, {"q_proj": query, "k_proj": key_value, "v_proj": key_value}, layer.qkv)
        yield from _linear_slots(attention, {"o_proj": config.hidden_size}, layer.output)
        width = config.intermediate_size
        yield from _linear_slots(mlp, {"gate_proj": width, "up_proj": width}, layer.gate_up)
        yield from _linear_slots(mlp, {"down_proj": config.hidden_size}, layer.down)
    yield _Slot("norm.weight", weights.final_norm)
    if not config.tie_word_embeddings:
        yield _Slot("lm_head.weight", weights.lm_head.weight)


def _norm_slots(config: ModelConfig, prefix: str, layer: DecoderLayer) -> Iterator[_Slot]:
    yield _Slot(f"{prefix}.input_layernorm.weight", layer.input_norm)
    if config.sandwich_norms:  # Gemma's "post" is behind attention; Llama's is behind the residual sum, before the MLP
        yield _Slot(f"{prefix}.post_attention_layernorm.weight", layer.attention_out_norm)
        yield _Slot(f"{prefix}.pre_feedforward_layernorm.weight", layer.mlp_norm)
        yield _Slot(f"{prefix}.post_feedforward_layernorm.weight", layer.mlp_out_norm)
    else:
        yield _Slot(f"{prefix}.post_attention_layernorm.weight", layer.mlp_norm)
    if config.qk_norm:
        yield _Slot(f"{prefix}.self_attn.q_norm.weight", layer.query_norm)
        yield _Slot(f"{prefix}.self_attn.k_norm.weight", layer.key_norm)


def _linear_slots(prefix: str, parts: dict[str, int], linear: Linear) -> Iterator[_Slot]:
    """The parts of a fused linear layer, given as rows by name."""
    first = 0
    for name, size in parts.items():
        rows = slice(first, first + size)
        scale = None if linear.scale is None else linear.scale[rows]
        yield _Slot(f"{prefix}.{name}.weight", linear.weight[rows], scale)
        if linear.bias is not None:
            yield _Slot(f"{prefix}.{name}.bias", linear.bias[rows])
        first += size


def _allocate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, quantization: str | None
) -> DecoderWeights:
    """All tensors of the model, not yet filled."""
    hidden, heads = config.hidden_size, config.num_q_heads + 2 * config.num_kv_heads

    def vector(size: int, wanted: bool = True) -> torch.Tensor | None:
        return torch.empty(size, dtype=dtype, device=device) if wanted else None

    def linear(out_features: int, in_features: int, bias: bool) -> Linear:
        if quantization is None:
            weight, scale = torch.empty(out_features, in_features, dtype=dtype, device=device), None
        else:
            if out_features % _FP8_ALIGNMENT or in_features % _FP8_ALIGNMENT:
                raise UserError(
                    f"a layer of {in_features} inputs and {out_features} outputs cannot have fp8 weights; "
                    f"both must be multiples of {_FP8_ALIGNMENT} (omit the quantization)"
                )
            weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device)
            scale = torch.empty(out_features, dtype=torch.float32, device=device)
        return Linear(weight, scale, vector(out_features, bias))

    embedding = torch.empty(config.vocab_size, hidden, dtype=dtype, device=device)
    layers = [
        DecoderLayer(
            input_norm=vector(hidden),
            qkv=linear(heads * config.head_dim, hidden, config.qkv_bias),
            output=linear(hidden, config.num_q_heads * config.head_dim, config.output_bias),
            mlp_norm=vector(hidden),
            gate_up=linear(2 * config.intermediate_size, hidden, config.mlp_bias),
            down=linear(hidden, config.intermediate_size, config.mlp_bias),
            query_norm=vector(config.head_dim, config.qk_norm),
            key_norm=vector(config.head_dim, config.qk_norm),
            attention_out_norm=vector(hidden, config.sandwich_norms),
            mlp_out_norm=vector(hidden, config.sandwich_norms),
        )
        for _ in range(config.num_layers)
    ]
    lm_head = embedding if config.tie_word_embeddings else torch.empty_like(embedding)
    return DecoderWeights(embedding, layers, vector(hidden), Linear(lm_head))


def _fill_randomly(slots: Iterator[_Slot], config: ModelConfig, seed: int) -> None:
    """Normal weights of std 0.02, made on the device; norms that multiply by about one."""
    generator = None
    for slot in slots:
        if generator is None:
            generator = torch.Generator(slot.target.device).manual_seed(seed)
        for rows in slot.pieces():
            if slot.scale is None:
                slot.target[rows].normal_(
                    1 - config.norm_weight_offset if slot.is_norm else 0, _DUMMY_STD, generator=generator
                )
            else:
                values = torch.empty(slot.target[rows].shape, device=slot.target.device)
                slot.store(rows, values.normal_(0, _DUMMY_STD, generator=generator))


# ---- Reading safetensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a tensor stands: file, and its name there with prefix."""

    path: Path
    name: str


def _read(slots: Iterator[_Slot], sources: dict[str, _Source]) -> None:
    """Fill all slots, file by file."""
    by_file: dict[Path, list[_Slot]] = {}
    for slot in slots:
        by_file.setdefault(sources[slot.name].path, []).append(slot)
    for path, file_slots in by_file.items():
        with _open(path) as file:
            for slot in file_slots:
                values = file.get_tensor(sources[slot.name].name)  # a view of the mapped file, read when it is copied
                for rows in slot.pieces():
                    slot.store(rows, values[rows])


def _open(path: Path) -> safe_open:
    try:
        with path.open("rb"):  # says in its own words why a whole file may not be read
            pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); it must be downloaded or copied again"
        ) from error


def _find_tensors(folder: Path, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> dict[str, _Source]:
    """Where each tensor stands, by its name without prefix, all of them checked.

    Raises:
        UserError: a file or tensor is missing or wrong.
    """
    found: dict[str, _Source] = {}
    for path in _weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                short = _short_name(name)
                if short not in shapes:
                    _check_unexpected(short, name, path, config)
                    continue
                if short in found:
                    first = found[short]
                    raise UserError(f"{path}: {name} stands in {first.path.name} too, as {first.name}; one must go")
                _check_stored(file.get_slice(name), name, path, shapes[short])
                found[short] = _Source(path, name)
    missing = [name for name in shapes if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} has no tensor {_written_name(missing[0])}{more}, which its config.json calls for")
    return found


def _check_stored(stored, name: str, path: Path, shape: tuple[int, ...]) -> None:
    """Raise UserError unless a tensor of a file has this shape and a dtype that can be read."""
    if tuple(stored.get_shape()) != shape:
        raise UserError(f"{path}: {name} has shape {stored.get_shape()}; config.json makes it {list(shape)}")
    if stored.get_dtype() not in _STORED_DTYPES:
        raise UserError(
            f"{path}: {name} is stored as {stored.get_dtype()}; it must be one of {', '.join(_STORED_DTYPES)}"
        )


def _short_name(name: str) -> str:
    """A tensor's name without the prefix that says where the language model stands."""
    return next(name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix))


def _written_name(short: str) -> str:
    return short if short.startswith("lm_head") else f"model.{short}"


def _check_unexpected(short: str, name: str, path: Path, config: ModelConfig) -> None:
    """Raise UserError for a tensor of a layer that the config does not foresee: the two do not belong together.

    Other parts (a vision tower, a tied LM head stored all the same) are not run; tables of frequencies are computed.
    """
    if short.startswith("layers.") and not short.endswith("rotary_emb.inv_freq"):
        raise UserError(
            f"{path} has {name}, which config.json ({config.family}, {config.num_layers} layers) does not call for; "
            "it must belong to these weights"
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model.

    Raises:
        UserError: there are none, or one that the index names is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; the model must be a folder with config.json and safetensors files")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(folder, index)
    if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
        raise UserError(f"{folder} has its weights as pickles, which are not read; convert them to safetensors")
    raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json with its shards")


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} has no weight_map from tensors to files of its own folder; it must be written again")
    paths = [folder / name for name in sorted(set(names))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}, "
            f"{len(missing)} of the {len(paths)} files that {index.name} names"
        )
    return paths
