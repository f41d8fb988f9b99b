"""All-reduce by bytes: what tensor parallelism waits for twice per layer. Needs two GPUs or more.

Every rank is a process of its own. On GPUs a CUDA graph holds many reductions one behind the other, as a decode step
has them; where NCCL cannot be captured they are launched so. Times are those of the first rank.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from engine.bench.record import rounded

SIZES = tuple(1 << power for power in range(13, 29))  # 8 KiB to 256 MiB
_CALLS, _WARM_UP, _SAMPLES = 10, 3, 15
_FEW_CALLS_FROM = 32 << 20  # bytes, of which few make a long enough graph
_LIMIT = timedelta(seconds=60)


def world_sizes(num_gpus: int) -> list[int]:
    """Powers of two from 2 on."""
    return [size for size in (2, 4, 8, 16) if size <= num_gpus]


def measure_allreduce(world_size: int, backend: str = "nccl", sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """Seconds of an all-reduce of 16-bit numbers for each number of bytes: median, 10 and 90 % quantile.

    Args:
        backend: nccl, a GPU for each rank; or gloo, on CPUs.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        arguments = (world_size, backend, list(sizes), str(Path(folder) / "store"), str(found))
        torch.multiprocessing.spawn(_rank, arguments, nprocs=world_size, join=True)
        times = json.loads(found.read_text(encoding="utf-8"))
    rows = []
    for size, samples in zip(sizes, times, strict=True):
        low_s, high_s = np.quantile(samples, (0.1, 0.9))
        rows.append(
            {
                "world_size": world_size,
                "bytes": size,
                "time_s": rounded(statistics.median(samples)),
                "low_s": rounded(float(low_s)),
                "high_s": rounded(float(high_s)),
                "samples": len(samples),
            }
        )
    return rows


def _rank(rank: int, world_size: int, backend: str, sizes: list[int], store: str, found: str) -> None:
    """One process."""
    on_gpu = backend == "nccl"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=_LIMIT)
    try:
        times = []
        for size in sizes:
            tensor = torch.randn(size // 2, device=device).to(torch.bfloat16)
            times.append((_gpu_times if on_gpu else _cpu_times)(tensor))
        if rank == 0:
            Path(found).write_text(json.dumps(times), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _cpu_times(tensor: torch.Tensor) -> list[float]:
    found = []
    for _ in range(_WARM_UP + _SAMPLES):
        started = time.perf_counter()
        dist.all_reduce(tensor)
        found.append(time.perf_counter() - started)
    return found[_WARM_UP:]


def _gpu_times(tensor: torch.Tensor) -> list[float]:
    calls = 2 if tensor.nbytes >= _FEW_CALLS_FROM else _CALLS

    def reduce_all() -> None:
        for _ in range(calls):
            dist.all_reduce(tensor)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # where captures want to be warmed up
        reduce_all()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    launch = _captured(reduce_all)
    found = []
    for _ in range(_WARM_UP + _SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e-3 / calls)
    return found[_WARM_UP:]


def _captured(reduce_all: Callable[[], None]) -> Callable[[], None]:
    """As a graph; every rank finds alike whether it can be one."""
    graph = torch.cuda.CUDAGraph()
    try:
        # NCCL's own thread looks at events meanwhile, which a stricter mode would take for a mistake.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            reduce_all()
    except RuntimeError:
        torch.cuda.synchronize()
        return reduce_all
    return graph.replay
