"""What a profile says of model, GPU and engine beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.builtin import builtin_config
from engine.setup import choose_dtype, num_parameters

if TYPE_CHECKING:
    import torch

    from engine.config import EngineConfig
    from engine.core import EngineCore
    from engine.models.config import ModelConfig

# What the driver calls a GPU, and its id in the planner's catalog. The first that is part of the name counts.
_GPU_IDS = (
    ("H200 NVL", None),
    ("H200", "h200_sxm"),
    ("H100 PCIe", "h100_pcie"),
    ("H100 NVL", None),
    ("H100", "h100_sxm"),
    ("A100-SXM4-80GB", "a100_sxm_80"),
    ("A100-SXM4-40GB", "a100_sxm_40"),
    ("A100 80GB PCIe", "a100_pcie_80"),
    ("GB200", "gb200"),
    ("B200", "b200"),
    ("GB300", None),
    ("B300", "b300"),
    ("RTX PRO 6000 Blackwell Server", "rtx_pro_6000"),
    ("RTX 4090 ", None),
    ("RTX 4090", "rtx4090"),
    ("RTX 5090 ", None),
    ("RTX 5090", "rtx5090"),
    ("L40S", "l40s"),
    ("L40", None),
    ("NVIDIA L4", "l4"),
    ("A10G", "a10g"),
    ("NVIDIA A30", "a30"),
    ("MI300X", "mi300x"),
    ("MI325X", "mi325x"),
)
_ENGINE_SETTINGS = (
    "max_num_batched_tokens",
    "max_num_seqs",
    "block_size",
    "gpu_memory_utilization",
    "enable_chunked_prefill",
    "enforce_eager",
    "async_scheduling",
)


def gpu_id(name: str) -> str | None:
    """The planner's name of a GPU; None if it has none."""
    return next((found for part, found in _GPU_IDS if part in name), None)


def gpu(device: torch.device) -> dict[str, Any]:
    """Which GPU it is, and its memory as the framework sees it."""
    if device.type != "cuda":
        return {"gpu": None, "gpu_name": "CPU", "gpu_memory_bytes": None}
    import torch

    name = torch.cuda.get_device_name(device)
    return {"gpu": gpu_id(name), "gpu_name": name, "gpu_memory_bytes": torch.cuda.mem_get_info(device)[1]}


def model(config: EngineConfig, described: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Its name, its config.json, its size and what it runs in."""
    path = Path(config.model)
    builtin = builtin_config(config.model)
    if builtin is not None:
        name, content = config.model, builtin
    elif path.is_file():
        name, content = path.stem if path.stem != "config" else path.resolve().parent.name, _read(path)
    else:
        name, content = path.resolve().name, _read(path / "config.json")
    dtype = str(choose_dtype(config.dtype, described, device)).removeprefix("torch.")
    return {"name": name, "config": content, "num_parameters": num_parameters(described), "dtype": dtype}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def engine_settings(config: EngineConfig, core: EngineCore) -> dict[str, Any]:
    """What the engine was told, and what it found or captured."""
    settings = {name: getattr(config, name) for name in _ENGINE_SETTINGS}
    return settings | {
        "max_model_len": core.max_model_len,
        "graph_sizes": core.graph_sizes,
        "piece_sizes": core.piece_sizes,
    }
