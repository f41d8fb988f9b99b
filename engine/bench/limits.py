"""What the device allows: copy bandwidth and matmul rate, measured in the run that is compared with them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

_COPY_BYTES = 2 << 30
_MATMUL_SIZES = (4096, 8192)
_ROUNDS, _REPLAYS = 3, 3
# On a CPU: large enough to leave its caches, small enough for tests.
_CPU_COPY_BYTES, _CPU_MATMUL_SIZE, _CPU_REPETITIONS = 64 << 20, 512, 5


@dataclass
class Limits:
    """Rates, each the best that was seen.

    Attributes:
        copy: bytes read and written per second. matmul: FLOP/s of 16-bit matrices (float32 on a CPU).
        matmul_fp8: FLOP/s of float8 matrices with scales per row and column, where the engine multiplies them.
        repetitions_s: raw times by what was timed. clocks: of the GPU meanwhile.
    """

    copy: float = 0.0
    matmul: float = 0.0
    matmul_fp8: float | None = None
    repetitions_s: dict[str, list[float]] = field(default_factory=dict)
    clocks: dict[str, Any] = field(default_factory=dict)

    def note(self, kind: str, name: str, work: float, times_s: Sequence[float]) -> None:
        """Take in repetitions of something that moves `work` bytes or does `work` FLOPs."""
        self.repetitions_s.setdefault(name, []).extend(times_s)
        rate = work / statistics.median(times_s)
        setattr(self, kind, max(getattr(self, kind) or 0.0, rate))


def measure_limits(device: Any, limits: Limits, *, matmul: bool, fp8: bool) -> None:
    """Measure into `limits`; a second call, with the GPU warm, keeps the better rate of both."""
    if device.type == "cuda":
        _measure_gpu(device, limits, matmul=matmul, fp8=fp8)
        release_memory(device)
    else:
        _measure_cpu(limits, matmul=matmul)


def release_memory(device: Any) -> None:
    """Give back what Python and PyTorch keep of things that are gone."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure_gpu(device: Any, limits: Limits, *, matmul: bool, fp8: bool) -> None:
    import torch

    from kernels.bench import works
    from kernels.bench.timing import Stopwatch

    bench, stopwatch = works.Bench(device, torch.bfloat16), Stopwatch(_ROUNDS, _REPLAYS)

    def time_work(kind: str, name: str, work: works.Work) -> None:
        calls = [partial(work.implementations["torch"], one) for one in work.sets]
        timings, absent = stopwatch.compare({name: calls})
        if timings:
            limits.note(kind, name, work.bytes or work.flops, timings[name].repetitions_s)
        elif kind != "matmul_fp8":  # which not every GPU has
            raise RuntimeError(f"{name} could not be measured: {absent[name]}")

    time_work("copy", "copy", works.copy_work(_COPY_BYTES, bench))
    for n in _MATMUL_SIZES if matmul else ():
        time_work("matmul", f"matmul {n}", works.matmul_work(n, bench))
    for n in _MATMUL_SIZES if matmul and fp8 else ():
        time_work("matmul_fp8", f"matmul fp8 {n}", _fp8_work(n, bench))
    limits.clocks = stopwatch.clocks


def _fp8_work(n: int, bench: Any) -> Any:
    import torch

    from kernels.bench import works

    def operand() -> torch.Tensor:
        return bench.randn(n, n).to(torch.float8_e4m3fn)

    rows, columns = (torch.ones(shape, device=bench.device) for shape in ((n, 1), (1, n)))

    def multiply(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch._scaled_mm(pair[0], pair[1].t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    sets = [(operand(), operand()) for _ in range(works.num_sets(2 * n * n))]
    return works.Work(sets, {"torch": multiply}, flops=2 * n**3)


def _measure_cpu(limits: Limits, *, matmul: bool) -> None:
    import torch

    source, target = (torch.ones(_CPU_COPY_BYTES // 8, dtype=torch.int64) for _ in range(2))
    limits.note("copy", "copy", 2 * _CPU_COPY_BYTES, _times(lambda: torch.bitwise_not(source, out=target)))
    if matmul:
        n = _CPU_MATMUL_SIZE
        left, right = torch.randn(n, n), torch.randn(n, n)
        limits.note("matmul", f"matmul {n}", 2 * n**3, _times(lambda: left @ right))


def _times(call: Callable[[], Any]) -> list[float]:
    call()
    found = []
    for _ in range(_CPU_REPETITIONS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found
