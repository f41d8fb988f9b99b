"""One run of a suite: engines one after the other, the limits of the device, and the record of it all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.bench.limits import Limits, measure_limits, release_memory
from engine.bench.record import Record, environment
from engine.bench.replay import Clock, WallClock
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.core import EngineCore

_Measured = TypeVar("_Measured")


class Session:
    """
    Attributes:
        record: what has been found so far. clock: what requests arrive by.
    """

    def __init__(self, record: Record, output: Path | None, clock: Clock | None = None) -> None:
        self.record = record
        self.clock = clock or WallClock()
        self._output = output
        self._weights: Any = None
        self._limits = Limits()

    def say(self, text: str) -> None:
        """A line for someone who waits, where it does not disturb the table."""
        print(text, file=sys.stderr, flush=True)

    # ---- engines -----------------------------------------------------------------------------------------------------

    def on_engine(self, config: EngineConfig, measure: Callable[[EngineCore], _Measured]) -> _Measured:
        """Build an engine, measure on it, and give its memory back. Engines of a session share their weights.

        Args:
            config: the same model, dtype and quantization in every call.
            measure: must not keep the engine.

        Raises:
            UserError: the engine cannot be built.
        """
        device = device_of(config)
        if not self.record.environment:
            self.record.environment = environment(device)
        core = self._build(config)
        try:
            self._weights = core.weights
            return measure(core)
        finally:
            del core
            release_memory(device)

    def _build(self, config: EngineConfig) -> EngineCore:
        from engine.core import EngineCore

        started = time.perf_counter()
        core = EngineCore(config, weights=self._weights)
        self.record.engines.append(
            {
                "config": asdict(config) | {"model": Path(config.model).name},
                "model": asdict(core.model_config),
                "dtype": str(core.dtype).removeprefix("torch."),
                "memory": asdict(core.memory),
                "build_s": round(time.perf_counter() - started, 2),
            }
        )
        for line in core.memory.lines():
            self.say(f"  {line}")
        return core

    # ---- limits ------------------------------------------------------------------------------------------------------

    def limits(self, config: EngineConfig, *, matmul: bool = False) -> Limits:
        """Measure what the device allows; call it while no engine is built. Again, it keeps the best of all."""
        measure_limits(device_of(config), self._limits, matmul=matmul, fp8=config.quantization == "fp8")
        self.record.limits = asdict(self._limits)
        return self._limits

    # ---- results -----------------------------------------------------------------------------------------------------

    def keep(self, results: list[dict[str, Any]]) -> None:
        """Make these the results, and write the record if it is wanted: what was measured survives what comes next."""
        self.record.results = results
        if self._output is not None:
            self.record.write(self._output)


def device_of(config: EngineConfig) -> Any:
    """The torch.device that an engine of this configuration runs on."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but no CUDA device was found; --device cpu runs without")
    return torch.device("cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda")
