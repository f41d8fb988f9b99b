"""The engine: schedule, execute, update, one step ahead of itself.

    host    schedule n + 1, launch n + 1 | wait for n's tokens, update n | schedule n + 2, launch n + 2 | ...
    GPU     ...  step n                     | step n + 1                                                | ...

A request that samples a stop token in step n may already be in step n + 1; the scheduler keeps its pages until that
step is over, and what it samples there is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import UserError
from engine.sampling import read_logprobs, sampling_requests
from engine.scheduling import KVCacheConfig, RequestStatus, Scheduler, SchedulerConfig, Step, StepShape
from engine.sequence import check_bias
from engine.setup import Engine, build
from engine.transfer import PendingTokens

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.models.modules import DecoderWeights
    from engine.outputs import TokenLogprobs
    from engine.sequence import Sequence


@dataclass(frozen=True)
class SequenceUpdate:
    """What a step did for a request: the tokens it gained, and why it ended ("stop", "length"), if it did.

    Attributes:
        logprobs: of the new tokens, where the request asked for them.
    """

    sequence: Sequence
    new_token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class StepRecord:
    """One completed step. Times are of `time.perf_counter`.

    Attributes:
        start_s: when it was scheduled. end_s: when its tokens were on the host.
        gpu_s: from the first to the last operation on the GPU; None on a CPU.
        host_s: CPU time to schedule, launch and update it.
        graph_size: of the CUDA graph that ran, if one did.
    """

    step_id: int
    start_s: float
    end_s: float
    shape: StepShape
    num_preempted: int
    graph_size: int | None
    host_s: float
    gpu_s: float | None


@dataclass
class _InFlight:
    step: Step
    tokens: PendingTokens
    start_s: float
    host_s: float
    graph_size: int | None


class EngineCore:
    """One model on one device, with its scheduler.

    Attributes:
        config, model_config, memory: what it was told, what it runs, where the memory went.
        weights: can be given to another engine of the same model.
        step_log: set it to a list to have every completed step appended.
    """

    def __init__(self, config: EngineConfig, *, weights: DecoderWeights | None = None) -> None:
        """Load the model, size the KV cache and capture CUDA graphs.

        Args:
            weights: of another engine with the same model, dtype and quantization, to load them once.

        Raises:
            UserError: a model that cannot be loaded or run, or a context that does not fit.
        """
        built: Engine = build(config, weights)
        self.config = config
        self.model_config, self.memory, self.weights = built.model_config, built.memory, built.weights
        self.device, self.dtype, self.max_model_len = built.device, built.dtype, built.memory.max_model_len
        self._cache, self._runner = built.cache, built.runner
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                max_model_len=self.max_model_len,
                enable_chunked_prefill=config.enable_chunked_prefill,
            ),
            KVCacheConfig(
                num_blocks=self.memory.num_blocks + 1,
                block_size=config.block_size,
                windows=built.cache.groups.windows,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
        )
        self.step_log: list[StepRecord] | None = None
        self._in_flight: deque[_InFlight] = deque()
        # A CPU runs a step while it is launched: launching another before the first is completed would only delay that.
        self._depth = 2 if config.async_scheduling and self.device.type == "cuda" else 1
        self._is_broken = False

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting, running, or in a step in flight."""
        return bool(self.scheduler.num_outstanding or self._in_flight)

    def add(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            UserError: a prompt that leaves no room for output or has tokens outside the vocabulary, or a logit_bias
                that has. Other requests are not disturbed.
        """
        vocab = self.model_config.vocab_size
        smallest, largest = min(sequence.token_ids), max(sequence.token_ids)
        if smallest < 0 or largest >= vocab:
            outside = smallest if smallest < 0 else largest
            raise UserError(
                f"request {sequence.request_id!r}: token id {outside} is outside the vocabulary of {vocab} tokens"
            )
        check_bias(sequence.params, vocab)
        try:
            self.scheduler.add(sequence)
        except ValueError as error:
            raise UserError(str(error)) from None

    def abort(self, sequence: Sequence) -> bool:
        """End a request now; what steps in flight still sample for it is dropped. False if it had already ended.

        Raises:
            UserError: the request was never added.
        """
        try:
            aborted = self.scheduler.abort(sequence)
        except ValueError:
            raise UserError(f"request {sequence.request_id!r} is not in this engine") from None
        if aborted:
            self._runner.slots.release(sequence)
        return aborted

    def adopt(self, sequences: Many[Sequence]) -> None:
        """Let requests run of whose tokens the first `num_computed_tokens` count as computed, for measuring steps.

        They get pages for all their tokens, with whatever these hold, and go to the end of the running list. Call it
        with nothing in flight, and end them by `abort`.

        Raises:
            UserError: too few free slots or pages; none of the requests then runs.
        """
        if len(sequences) > self._runner.slots.num_free:
            raise UserError(f"{len(sequences)} requests need as many slots; {self._runner.slots.num_free} are free")
        kv = self.scheduler.kv
        for index, sequence in enumerate(sequences):
            if not self._take_pages(sequence):
                for other in sequences[: index + 1]:
                    kv.free(other)
                raise UserError(f"the requests need more than the {self.memory.num_blocks} KV blocks that there are")
        for sequence in sequences:
            sequence.status = RequestStatus.RUNNING
            self._runner.slots.assign(sequence)
            self.scheduler.running.append(sequence)
        self._runner.adopt(sequences)

    def _take_pages(self, sequence: Sequence) -> bool:
        """Pages for all its tokens, asked for chunk by chunk, so that windows give theirs back as they move on."""
        kv, computed, chunk = self.scheduler.kv, sequence.num_computed_tokens, self.config.max_num_batched_tokens
        kv.adopt_prefix(sequence, 0, kv.no_pages)
        for end in (*range(chunk, sequence.num_tokens, chunk), sequence.num_tokens):
            if not kv.allocate(sequence, end):
                return False
            sequence.num_computed_tokens = min(end, computed)
        return True

    # ---- steps -----------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """How many steps are in flight at most."""
        return self._depth

    def step(self) -> list[SequenceUpdate]:
        """Launch the next step if there is one, and complete the oldest in flight if it is time to.

        Returns:
            What the completed step did, in the step's order; empty if none was completed.
        """
        launched = self._launch()
        if self._in_flight and (len(self._in_flight) >= self._depth or not launched):
            return self._complete()
        return []

    def settle(self) -> list[SequenceUpdate]:
        """Complete the steps in flight without launching another. Returns what they did."""
        updates = []
        while self._in_flight:
            updates += self._complete()
        return updates

    def _launch(self) -> bool:
        if self._is_broken:
            raise RuntimeError("a step of this engine failed; make a new one")
        started = time.perf_counter()
        step = self.scheduler.schedule()
        for sequence in step.preempted:
            self._runner.slots.release(sequence)
        if step.is_empty:
            return False
        for sequence in step.admitted:
            self._runner.slots.assign(sequence)
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = started
        try:
            tokens, graph_size = self._runner.execute(step)
        except BaseException:
            self._is_broken = True  # the scheduler counts on a step that never ran
            raise
        host_s = time.perf_counter() - started
        self._in_flight.append(_InFlight(step, tokens, started, host_s, graph_size))
        return True

    def _complete(self) -> list[SequenceUpdate]:
        flight = self._in_flight.popleft()
        step = flight.step
        tokens = flight.tokens.tokens()
        now = time.perf_counter()
        requests, _ = sampling_requests(step)
        logprobs = _logprobs(requests, tokens, flight.tokens)
        updates, stopped = [], set()
        for sequence, token in zip(requests, tokens, strict=True):
            if sequence in step.detached:
                continue
            if sequence.first_token_s is None:
                sequence.first_token_s = now
            sequence.last_token_s = now
            sequence.append([token])
            if token in sequence.stop_ids:
                stopped.add(sequence)
            updates.append((sequence, token))
        for sequence in self.scheduler.update(step, stopped=stopped):
            self._runner.slots.release(sequence)
        if self.step_log is not None:
            host_s = flight.host_s + time.perf_counter() - now
            self.step_log.append(
                StepRecord(
                    step.step_id,
                    flight.start_s,
                    now,
                    step.shape,
                    len(step.preempted),
                    flight.graph_size,
                    host_s,
                    flight.tokens.gpu_s(),
                )
            )
        return [
            SequenceUpdate(sequence, [token], _finish_reason(sequence), logprobs.get(sequence))
            for sequence, token in updates
        ]

    # ---- figures ---------------------------------------------------------------------------------------------------

    @property
    def graph_sizes(self) -> list[int]:
        """Sizes of the CUDA graphs of decode steps, ascending; empty without graphs."""
        return sorted(self._runner.graphs)

    @property
    def piece_sizes(self) -> list[int]:
        """Numbers of tokens that other steps are padded to, to run in pieces; ascending, empty without graphs."""
        return self._runner.piece_sizes

    def step_bytes(self, shape: StepShape) -> int:
        """Bytes of weights and KV cache that a step must read: the floor of a step of decodes."""
        contexts = [context + 1 for context in shape.decode_contexts]
        contexts += [context + query for query, context in (*shape.prefills, *shape.verifies)]
        total = self.weights.num_bytes_per_step
        for layer, window in zip(self._cache.layers, self.model_config.layer_windows, strict=True):
            heads, per_page = layer.pages.shape[1], layer.layout.page_bytes
            tokens = sum(contexts) if window is None else sum(min(context, window) for context in contexts)
            total += tokens * heads * per_page // layer.layout.page_size
        return total

    def check(self) -> None:
        """Assert the invariants of scheduler and slots.

        Raises:
            AssertionError: saying which does not hold.
        """
        self.scheduler.check()
        used = [sequence.slot for sequence in self.scheduler.running]
        assert len(set(used)) == len(used) and min(used, default=0) >= 0, f"slots are shared or missing: {used}"
        free = self._runner.slots.num_free
        assert free + len(used) == self.config.max_num_seqs, f"{free} free slots and {len(used)} used"


def _logprobs(
    requests: list[Sequence], tokens: list[int], pending: PendingTokens
) -> dict[Sequence, list[TokenLogprobs]]:
    """Log-probabilities of a completed step's tokens, by request."""
    packed = pending.logprobs()
    if packed is None:
        return {}
    pairs = zip(requests, tokens, strict=True)
    asking = [(sequence, token) for sequence, token in pairs if sequence.params.logprobs is not None]
    found = read_logprobs(packed, [token for _, token in asking], [each.params.logprobs for each, _ in asking])
    return {sequence: [logprob] for (sequence, _), logprob in zip(asking, found, strict=True)}


def _finish_reason(sequence: Sequence) -> str | None:
    status = sequence.status
    return status.value if status in (RequestStatus.FINISHED_LENGTH, RequestStatus.FINISHED_STOPPED) else None
