"""The training loop: batches, learning rate, and as many steps as the time allows.

The matrices of the layers are trained by Muon (Jordan et al. 2024), with the step sizes that Liu et al. 2025 match to
AdamW's; embedding and norms by AdamW. In the minutes that there are, Muon gets much further than AdamW alone.

The learning rate rises over a fixed number of steps, stays, and falls linearly to 0 over the last part of the run.
Until it falls it does not depend on how many steps there will be, so their number is planned from the speed seen so
far, and is settled when the fall begins::

    rate  |   ______________
          |  /              \\
          | /                 \\
          |/____________________\\___ step
           warm-up     stable      decay
           <- the number of steps is replanned ->|<- settled

A run with that number of steps given takes the same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

_SETTLED_STEPS = 5  # the first steps compile and warm up; they say nothing about speed
_MIN_STEPS = 20
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.1
_BETAS = (0.9, 0.95)
_CURVE_POINTS = 60
_SYNC_STEPS = 8  # steps between two looks at the loss, which waits for the device


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the steps.

    Attributes:
        matrices, others: the highest rates, of Muon and of AdamW.
        warmup_steps: until it is reached.
        decay_share: of all steps, over which it falls.
    """

    matrices: float
    others: float
    warmup_steps: int = 30
    decay_share: float = 0.5

    def share(self, step: int, total_steps: float) -> float:
        """What step `step`, counted from 0, of `total_steps`, which may be infinite, takes of the highest rates."""
        rise = min(1.0, (step + 1) / self.warmup_steps)
        if math.isinf(total_steps):
            return rise
        return min(rise, (total_steps - step) / max(1.0, self.decay_share * total_steps))

    def is_falling(self, step: int, total_steps: float) -> bool:
        return step >= (1 - self.decay_share) * total_steps


class Batches:
    """Windows of a token stream in random order. Every epoch cuts the stream elsewhere, and shuffles anew.

    The batch of a step follows from the seed and the step alone.
    """

    def __init__(self, stream: np.ndarray, context: int, batch_size: int, seed: int, device: torch.device) -> None:
        """
        Args:
            stream: token ids, int32 [num_tokens], at least `batch_size + 1` windows.
            context: tokens of a window.
            batch_size: windows of a batch.
            seed: of the order.
            device: where batches are made.
        """
        self.tokens_per_step = context * batch_size
        self._context, self._batch_size, self._seed = context, batch_size, seed
        self._stream = torch.from_numpy(stream).to(device)
        self._offsets = torch.arange(context + 1, device=device)
        # A window less, for the offset of an epoch's first.
        self._num_windows = (len(stream) - 1) // context - 1
        self.steps_per_epoch = self._num_windows // batch_size
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    @staticmethod
    def min_tokens(context: int, batch_size: int) -> int:
        """The shortest stream that gives a batch."""
        return (batch_size + 1) * context + 1

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Token ids and the ids that follow each, int64 [batch_size, context]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([self._seed, epoch])
            first = random.integers(self._context)
            self._starts = first + self._context * random.permutation(self._num_windows)
            self._epoch = epoch
        starts = self._starts[index * self._batch_size : (index + 1) * self._batch_size]
        windows = self._stream[torch.from_numpy(starts).to(self._stream.device)[:, None] + self._offsets].long()
        return windows[:, :-1], windows[:, 1:]


@dataclass
class Run:
    """What a training run was.

    Attributes:
        steps, tokens: taken and seen.
        seconds: of all steps, compiling included.
        settled_tokens_per_s: without the first steps.
        curve: (step, loss averaged since the last point), at most about 2 _CURVE_POINTS points.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    settled_tokens_per_s: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def facts(self) -> dict[str, object]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "tokens_per_s": round(self.settled_tokens_per_s),
            "loss_curve": [[step, round(loss, 4)] for step, loss in self.curve],
        }


def train(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batches: Batches,
    schedule: Schedule,
    *,
    seconds: float = math.inf,
    steps: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Train `model`.

    Args:
        loss_of: the mean loss of a batch: token ids and next ids, int64 [batch_size, context], to a scalar.
        seconds: to plan the number of steps for.
        steps: to take, in place of a plan.
        say: is told of the progress every few seconds.
    """
    optimisers = _optimisers(model, schedule)
    run, pending = Run(), []
    total = math.inf if steps is None else steps
    is_settled = steps is not None
    start_s = said_s = settled_s = clock()
    while run.steps < total:
        share = schedule.share(run.steps, total)
        for optimiser, peak in zip(optimisers, (schedule.matrices, schedule.others), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * share
        loss = loss_of(*batches.at(run.steps))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        run.steps += 1
        pending.append(loss.detach())
        if run.steps != _SETTLED_STEPS and run.steps % _SYNC_STEPS and run.steps < total:
            continue
        mean = torch.stack(pending).mean().item()  # waits for the device: from here the clock is right
        run.curve.append((run.steps, mean))
        pending = []
        now_s = clock()
        if run.steps == _SETTLED_STEPS:
            settled_s = now_s
        elif not is_settled:
            per_step_s = (now_s - settled_s) / (run.steps - _SETTLED_STEPS)
            planned = run.steps + max(0.0, seconds - (now_s - start_s)) / per_step_s
            total = max(_MIN_STEPS, math.floor(planned))
            is_settled = schedule.is_falling(run.steps, total)
            total = max(total, run.steps + 1)
        if now_s - said_s >= 5:
            said_s = now_s
            say(
                f"step {run.steps:,}/{total:,}, loss {mean:.3f}, {_rate(run, batches, now_s - settled_s):,.0f} tokens/s"
            )
    run.seconds = clock() - start_s
    run.tokens = run.steps * batches.tokens_per_step
    run.settled_tokens_per_s = _rate(run, batches, clock() - settled_s)
    run.curve = _thinned(run.curve)
    return run


def _optimisers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Of the layers' matrices, and of the rest."""
    matrices = [w for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name]
    others = [w for name, w in model.named_parameters() if w.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=schedule.matrices, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=schedule.others, betas=_BETAS, weight_decay=0.0, fused=True),
    ]


def _rate(run: Run, batches: Batches, seconds: float) -> float:
    return max(0, run.steps - _SETTLED_STEPS) * batches.tokens_per_step / seconds if seconds > 0 else 0.0


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about _CURVE_POINTS points, each the mean of a stretch, named by its last step."""
    length = math.ceil(len(curve) / _CURVE_POINTS)
    stretches = [curve[start : start + length] for start in range(0, len(curve), length)] if curve else []
    return [(stretch[-1][0], sum(loss for _, loss in stretch) / len(stretch)) for stretch in stretches]
