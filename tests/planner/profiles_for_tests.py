"""Profiles of a GPU that is made up: known physics, measured with as much noise as a test wants."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from engine.scheduling import StepShape
from planner.catalog import model_entry

BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
SPREAD = (1, 8, 32, 64, 128, 256)
PADDED = (3, 12, 20, 44, 100, 250)
CONTEXTS = (512, 1024, 2048, 8192, 32_768)
QUERIES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
BEHIND = (64, 128, 512, 2048, 4096)
GRAPHS = (1, 2, 4, *range(8, 257, 8))
PIECES = (16, 32, *range(64, 512, 64), *range(512, 1025, 128))
POOL_TOKENS = 800_000


def padded(size: int, sizes: tuple[int, ...]) -> int:
    return next((each for each in sizes if each >= size), size)


class Physics:
    """The truth, in seconds, by formulas of its own.

    Attributes:
        windows: of the layers. scale: all times times this. chunk_s, beside_row_s: what mixed steps add.
    """

    def __init__(self, windows=(None,) * 32, scale: float = 1.0, chunk_s: float = 1.5e-4, beside_row_s: float = 2e-6):
        self.windows, self.scale = windows, scale
        self.chunk_s, self.beside_row_s = chunk_s, beside_row_s

    def keys(self, contexts) -> int:
        return sum(sum(min(c + 1, w or c + 1) for c in contexts) for w in self.windows)

    def pairs(self, query: int, context: int) -> int:
        every = np.arange(context + 1, context + query + 1)
        windows = Counter(self.windows)
        return sum(count * int(np.minimum(every, w or context + query).sum()) for w, count in windows.items())

    def decode(self, contexts) -> float:
        graph = padded(len(contexts), GRAPHS)
        base = 4.0e-3 + 0.13e-3 * math.log2(graph + 1) + 2e-6 * graph
        return self.scale * (base + 3e-6 * len(contexts) + 26.6e-9 / 32 * self.keys(contexts))

    def dense(self, tokens: int) -> float:
        tokens = padded(tokens, PIECES) if tokens <= PIECES[-1] else -(-tokens // 128) * 128
        return self.scale * math.hypot(4.2e-3, 22e-6 * tokens)

    def attention(self, query: int, context: int) -> float:
        per_pair = 4 * 32 * 128 / (5e14 * query / (query + 300))
        return self.scale * per_pair * self.pairs(query, context)

    def prompt(self, step: StepShape) -> float:
        seconds = self.dense(step.num_tokens) + self.scale * self.chunk_s * (len(step.prefills) - 1)
        seconds += sum(self.attention(*chunk) for chunk in step.prefills)
        rows = len(step.decode_contexts)
        return seconds + self.scale * (self.beside_row_s * rows + 26.6e-9 / 32 * self.keys(step.decode_contexts))

    def seconds(self, step: StepShape) -> float:
        return self.prompt(step) if step.prefills else self.decode(step.decode_contexts)

    def host(self, step: StepShape) -> float:
        if not step.prefills:
            return 0.25e-3 + 2e-6 * len(step.decode_contexts)
        return 0.9e-3 + 0.2e-3 * len(step.prefills)

    def alone(self, step: StepShape) -> float:
        return self.seconds(step) + (0.6e-3 if step.prefills else self.host(step))


def point(physics: Physics, step: StepShape, noise: float = 0.0, rng=None) -> dict[str, Any]:
    """A measured point, whose spread is that of the noise."""
    factor = 1.0 + (float(rng.normal(0, noise)) if noise else 0.0)
    seconds = physics.seconds(step) * factor
    decodes: list[list[int]] = []
    for context in step.decode_contexts:
        if decodes and decodes[-1][0] == context:
            decodes[-1][1] += 1
        else:
            decodes.append([context, 1])
    return {
        "prefills": [list(chunk) for chunk in step.prefills],
        "decodes": decodes,
        "step_s": seconds,
        "low_s": seconds * (1 - 1.28 * noise),
        "high_s": seconds * (1 + 1.28 * noise),
        "samples": 20,
        "gpu_s": seconds * 0.999,
        "alone_s": physics.alone(step) * factor,
        "host_s": physics.host(step),
        "graph_size": None if step.prefills else padded(len(step.decode_contexts), GRAPHS),
    }


def shapes(seed: int = 0) -> dict[str, list[StepShape]]:
    """The steps that are measured."""
    rng = np.random.default_rng(seed)
    decode = [StepShape(decode_contexts=[128] * batch) for batch in BATCHES]
    decode += [StepShape(decode_contexts=[c] * b) for c in CONTEXTS for b in SPREAD if b * c <= POOL_TOKENS]
    decode += [StepShape(decode_contexts=[512] * batch) for batch in PADDED]
    for batch in (8, 64, 256):
        decode.append(StepShape(decode_contexts=np.exp(rng.uniform(4, 8, batch)).astype(int).tolist()))
    prefill = [StepShape(prefills=[(query, 0)]) for query in QUERIES]
    prefill += [StepShape(prefills=[(query, context)]) for query in BEHIND for context in (1024, 8192, 32_768)]
    mixed = []
    for _ in range(40):
        chunks = [(int(np.exp(rng.uniform(3, 7.2))), 0) for _ in range(rng.integers(1, 4))]
        contexts = np.exp(rng.uniform(4, 8, rng.integers(0, 150))).astype(int).tolist()
        mixed.append(StepShape(prefills=chunks, decode_contexts=contexts))
    return {"decode": decode, "prefill": prefill, "mixed": mixed}


def profile(
    physics: Physics | None = None,
    noise: float = 0.0,
    seed: int = 0,
    model: str = "llama-3.1-8b",
    quantization: str | None = None,
    kv: tuple[str, ...] = ("bfloat16",),
) -> dict[str, Any]:
    """A whole profile, as its file has it."""
    physics = physics or Physics()
    rng = np.random.default_rng(seed)
    config = dict(model_entry(model)["config"])
    tables = {name: [point(physics, step, noise, rng) for step in steps] for name, steps in shapes(seed).items()}
    section = {"num_kv_blocks": 12_345, "kv_cache_bytes": 1 << 36, "fit": None, **tables}
    return {
        "version": 1,
        "kind": "memwall-profile",
        "command": "memwall calibrate",
        "commit": "0000000",
        "date": "2026-01-01T00:00:00+00:00",
        "environment": {},
        "duration_s": 300.0,
        "gpu": "h200_sxm",
        "gpu_name": "NVIDIA H200",
        "gpu_memory_bytes": 150_109_880_320,
        "limits": {"copy_bytes_per_s": 4.08e12, "matmul_flops_per_s": 7.0e14, "matmul_fp8_flops_per_s": None},
        "model": {"name": model, "config": config, "num_parameters": 8_030_261_248, "dtype": "bfloat16"},
        "quantization": quantization,
        "engine": {
            "max_num_batched_tokens": 8192,
            "max_num_seqs": 256,
            "max_model_len": 131_072,
            "block_size": 64,
            "gpu_memory_utilization": 0.92,
            "enable_chunked_prefill": True,
            "enforce_eager": False,
            "async_scheduling": True,
            "graph_sizes": list(GRAPHS),
            "piece_sizes": list(PIECES),
        },
        "kv": {name: json.loads(json.dumps(section)) for name in kv},
        "allreduce": [],
    }


def write(folder: Path, content: dict[str, Any], name: str = "profile.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
