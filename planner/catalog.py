"""The models and GPUs that Memwall knows by name, and the way in for a user's own model.

The data are `planner/data/models.json` (Hugging Face configs, read by `planner.hf_config` like a user's own file) and
`planner/data/gpus.json` (data-sheet rates, usable memory, dated prices). Each entry says where it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from planner.errors import UserError, unknown_name
from planner.hardware import GpuSpec, Price
from planner.hf_config import model_from_config
from planner.model import ModelSpec

_VARIANT_SUFFIXES = ("-instruct", "-it", "-chat", "-hf", "-base", "-pt")
_WHERE_MODELS = "`memwall catalog` lists the known ones, and a path to a Hugging Face config.json works too"
_WHERE_GPUS = "`memwall catalog` lists the known ones"
_MAX_CONFIG_BYTES = 16 << 20  # real configs are a few kB; a file this large is something else, e.g. the weights


def list_models() -> tuple[str, ...]:
    """Catalog ids of all models, in catalog order."""
    return tuple(_model_entries())


def list_gpus() -> tuple[str, ...]:
    """Catalog ids of all GPUs, in catalog order."""
    return tuple(_gpu_entries())


def model_entry(model_id: str) -> Mapping[str, Any]:
    """The catalog's own record of a model: id, hf_repo, source, published_num_parameters, note, config (read-only).

    Raises:
        UserError: no model of the catalog has this id.
    """
    entry = _model_entries().get(model_id.strip().lower())
    if entry is None:
        raise unknown_name("model", model_id, list_models(), _WHERE_MODELS)
    return entry


def gpu_entry(gpu_id: str) -> Mapping[str, Any]:
    """The catalog's own record of a GPU, with the sources of its memory size and prices (read-only).

    Raises:
        UserError: no GPU of the catalog has this id.
    """
    entry = _gpu_entries().get(gpu_id.strip().lower().replace("-", "_"))
    if entry is None:
        raise unknown_name("GPU", gpu_id, list_gpus(), _WHERE_GPUS)
    return entry


def load_model(name_or_path: str | Path, quantization: str | None = None) -> ModelSpec:
    """A model by catalog id, by Hugging Face repository, or from a config.json.

    Args:
        name_or_path: a catalog id or repository (case does not matter, nor does a suffix such as -Instruct), a path
            to a config.json, or a folder that holds one.
        quantization: "fp8" to quantise the linear weights while loading.

    Raises:
        UserError: an unknown name (with the nearest known one), an unreadable file, or a config that is wrong.
    """
    name = str(name_or_path).strip()
    model_id = catalog_id(name)
    if model_id is not None:
        model = _catalog_model(model_id, quantization)
        return replace(model, hf_repo=_repository(model_id, name))
    if not name:
        raise unknown_name("model", name, list_models(), _WHERE_MODELS)
    file = config_file(name)
    if file is not None:
        label = file.resolve().parent.name if file.name == "config.json" else file.stem
        return model_from_config(_read_config(file), label or "model", quantization, source=str(file))
    if name.endswith(".json") or name.startswith(("/", "./", "../", "~", "\\")):
        raise UserError(f"{name}: no such file or folder; give a Hugging Face config.json or the folder that holds it")
    raise unknown_name("model", name, list_models(), _WHERE_MODELS)


def config_file(name_or_path: str | Path | None) -> Path | None:
    """The config.json that `load_model` reads for a name; None where the catalog has the name, or nobody."""
    name = str(name_or_path or "").strip()
    if not name or catalog_id(name) is not None:
        return None
    path = Path(name).expanduser()
    if not _exists(path):
        return None
    return path / "config.json" if path.is_dir() else path


def catalog_id(name: str) -> str | None:
    """The id of the model that a name means, as `load_model` takes it; None for one that the catalog does not know."""
    return _model_names().get(_canonical(name.strip()))


def load_gpu(gpu_id: str) -> GpuSpec:
    """A GPU by catalog id, where case does not matter and `-` equals `_`.

    Raises:
        UserError: an unknown id, with the nearest known one.
    """
    return _catalog_gpu(gpu_entry(str(gpu_id))["id"])


@cache
def _catalog_model(model_id: str, quantization: str | None) -> ModelSpec:
    entry = _model_entries()[model_id]
    model = model_from_config(entry["config"], model_id, quantization, source=f"models.json ({model_id})")
    return replace(model, hf_repo=entry["hf_repo"])


def _repository(model_id: str, name: str) -> str:
    """The repository that a user's spelling means: what is exported must serve the variant that was asked for."""
    entry = _model_entries()[model_id]
    if name.lower() == model_id:
        return entry["hf_repo"]
    for repo in (entry["hf_repo"], *entry.get("aliases", ())):
        if name.lower() in (repo.lower(), repo.split("/")[-1].lower()):
            return repo
    if "/" in name:
        return name
    for alias in entry.get("aliases", ()):
        if _canonical(alias.split("/")[-1]) == _canonical(name):
            return alias
    return f"{entry['hf_repo'].split('/')[0]}/{name}"


@cache
def _catalog_gpu(gpu_id: str) -> GpuSpec:
    entry = _gpu_entries()[gpu_id]
    fp8 = entry["fp8_tflops"]
    return GpuSpec(
        id=entry["id"],
        name=entry["name"],
        vendor=entry["vendor"],
        architecture=entry["architecture"],
        memory_bytes=entry["memory_bytes"],
        memory_bandwidth_bytes_per_s=entry["memory_bandwidth_gb_per_s"] * 1e9,
        bf16_flops=entry["bf16_tflops"] * 1e12,
        fp8_flops=None if fp8 is None else fp8 * 1e12,
        link_bandwidth_bytes_per_s=entry["link_bandwidth_gb_per_s"] * 1e9,
        fast_link=entry["fast_link"],
        gpus_per_node=entry["gpus_per_node"],
        price_low=_price(entry["price_low"]),
        price_typical=_price(entry["price_typical"]),
        price_high=_price(entry["price_high"]),
        spec_source=entry["spec_source"],
        spec_confidence=entry["spec_confidence"],
        notes=f"Memory: {entry['memory_source']}. {entry['notes']}".strip(),
    )


def _price(record: Mapping[str, Any] | None) -> Price | None:
    return None if record is None else Price(**record)


@cache
def _model_entries() -> Mapping[str, Mapping[str, Any]]:
    return MappingProxyType({entry["id"]: MappingProxyType(entry) for entry in _data_file("models.json")["models"]})


@cache
def _gpu_entries() -> Mapping[str, Mapping[str, Any]]:
    return MappingProxyType({entry["id"]: MappingProxyType(entry) for entry in _data_file("gpus.json")["gpus"]})


@cache
def _model_names() -> Mapping[str, str]:
    """Every canonical spelling of a model's id, repository and aliases, with and without the organisation."""
    names: dict[str, str] = {}
    for model_id, entry in _model_entries().items():
        for repo in (entry["hf_repo"], *entry.get("aliases", ())):
            names.setdefault(_canonical(repo), model_id)
            names.setdefault(_canonical(repo.split("/")[-1]), model_id)
        names[_canonical(model_id)] = model_id
    return MappingProxyType(names)


def _canonical(name: str) -> str:
    """Lower case, without the suffixes that name a fine-tuned variant of the same shapes."""
    name = name.lower()
    while (shorter := next((name.removesuffix(end) for end in _VARIANT_SUFFIXES if name.endswith(end)), name)) != name:
        name = shorter
    return name


def _data_file(name: str) -> dict[str, Any]:
    return json.loads((resources.files("planner") / "data" / name).read_text(encoding="utf-8"))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for the file system, or with a null byte: no path, so a name
        return False


def _read_config(file: Path) -> Any:
    """The JSON of a config file.

    Raises:
        UserError: it is absent, unreadable, too large, or not JSON.
    """
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise UserError(f"{file}: this file is too large to be a config.json; give the model's config.json")
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; the folder must hold the model's Hugging Face config.json") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); give a readable config.json") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not valid JSON ({error}); give the model's Hugging Face config.json") from None
