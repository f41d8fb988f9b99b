"""What people added, as text for a link: models by their config.json, GPUs by what their data sheet says."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from typing import Any

from dashboard.services import catalog, uploads
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.model import ModelSpec

#: Of a link's part; browsers and chat windows cut longer ones.
MOST_CHARACTERS = 6000
_MOST_BYTES = 1 << 20


def pack(document: Mapping[str, Any]) -> str | None:
    """A document as text for a link; None if it would be too long for one."""
    packed = zlib.compress(json.dumps(document, separators=(",", ":")).encode(), 9)
    text = base64.urlsafe_b64encode(packed).decode().rstrip("=")
    return text if len(text) <= MOST_CHARACTERS else None


def unpack(text: str) -> dict[str, Any]:
    """The document in a link's text.

    Raises:
        UserError: it is damaged.
    """
    try:
        packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        unpacked = zlib.decompressobj().decompress(packed, _MOST_BYTES)
        document = json.loads(unpacked)
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UserError("the part of this link that holds somebody's own models and GPUs is damaged; ask for it again")
    return document


def own_models(document: Mapping[str, Any]) -> dict[str, ModelSpec]:
    """The models of a link, by name.

    Raises:
        UserError: one is no model.
    """
    found = _part(document, "models")
    return {name: uploads.model_of(name, config) for name, config in found.items()}


def own_gpus(document: Mapping[str, Any]) -> dict[str, GpuSpec]:
    """The GPUs of a link, by id.

    Raises:
        UserError: one is no GPU.
    """
    specs = [catalog.own_gpu(name, *_numbers(name, values)) for name, values in _part(document, "gpus").items()]
    return {gpu.id: gpu for gpu in specs}


def _part(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = document.get(name, {})
    if not isinstance(part, dict):
        raise UserError(f"the {name} of this link are damaged; ask for it again")
    return part


def _numbers(name: str, values: Any) -> list[float]:
    if not isinstance(values, list) or len(values) != catalog.GPU_NUMBERS:
        raise UserError(f"the GPU {name[:40]!r} of this link is damaged; ask for it again")
    if not all(isinstance(value, int | float) for value in values):
        raise UserError(f"the GPU {name[:40]!r} of this link is damaged; ask for it again")
    return values
