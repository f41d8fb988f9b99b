"""An engine core without a model: the real scheduler, and tokens that are a function of those before them."""

import hashlib
from collections import deque
from types import SimpleNamespace

from engine.config import EngineConfig
from engine.core import SequenceUpdate, StepRecord
from engine.scheduling import KVCacheConfig, RequestStatus, Scheduler, SchedulerConfig

VOCAB_SIZE, EOS = 259, 257


def next_token(token_ids: list[int]) -> int:
    """A printable character most of the time, any byte or special token now and then."""
    digest = hashlib.blake2b(str(token_ids).encode(), digest_size=4).digest()
    return digest[0] + digest[1] % 4 if digest[2] < 64 else 32 + digest[3] % 95


class FakeCore:
    """As much of `engine.core.EngineCore` as its users see."""

    def __init__(
        self, config: EngineConfig | None = None, *, max_model_len: int = 64, num_blocks: int = 33, depth: int = 1
    ) -> None:
        """
        Args:
            depth: steps in flight before the oldest is completed; 2 is what a GPU has.
        """
        self.config = config or EngineConfig(model="no such folder", max_num_seqs=4, max_num_batched_tokens=16)
        self.model_config = SimpleNamespace(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))
        self.memory = SimpleNamespace(lines=lambda: ["memory: a little"])
        self.device = SimpleNamespace(type="cpu")
        self.max_model_len = self.config.max_model_len or max_model_len
        self.step_log = None
        self.on_step = lambda: None
        self.scheduler = Scheduler(
            SchedulerConfig(self.config.max_num_batched_tokens, self.config.max_num_seqs, self.max_model_len),
            KVCacheConfig(num_blocks, 8, enable_prefix_caching=False),
        )
        self.clock = 0.0
        self._depth = depth
        self._in_flight = deque()

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.num_outstanding or self._in_flight)

    def add(self, sequence) -> None:
        self.scheduler.add(sequence)

    def abort(self, sequence) -> bool:
        return self.scheduler.abort(sequence)

    def step_bytes(self, shape) -> int:
        return 1000 + sum(shape.decode_contexts)

    def step(self) -> list[SequenceUpdate]:
        self.on_step()
        step = self.scheduler.schedule()
        if not step.is_empty:
            self._in_flight.append(step)
        if self._in_flight and (len(self._in_flight) >= self._depth or step.is_empty):
            return self._complete(self._in_flight.popleft())
        return []

    def _complete(self, step) -> list[SequenceUpdate]:
        start, self.clock = self.clock, self.clock + 1.0
        chunks = zip(step.prefill_requests, step.shape.prefills, strict=True)
        sampling = step.decode_requests + [r for r, (q, c) in chunks if q + c >= r.num_prefill_tokens]
        updates = []
        for sequence in sampling:
            if sequence in step.detached:
                continue
            token = next_token(sequence.token_ids)
            sequence.append([token])
            sequence.first_token_s = sequence.first_token_s or sequence.arrival_s + self.clock
            sequence.last_token_s = sequence.arrival_s + self.clock
            updates.append((sequence, token))
        self.scheduler.update(step, stopped={s for s, token in updates if token in s.stop_ids})
        if self.step_log is not None:
            self.step_log.append(
                StepRecord(step.step_id, start, self.clock, step.shape, len(step.preempted), None, 0.1, None)
            )
        ended = (RequestStatus.FINISHED_LENGTH, RequestStatus.FINISHED_STOPPED)
        return [SequenceUpdate(s, [token], s.status.value if s.status in ended else None) for s, token in updates]

    def check_idle(self) -> None:
        """Nothing is left: no request, no block."""
        assert not self.has_work
        self.scheduler.check()
        assert self.scheduler.kv.pool.num_used == 0
