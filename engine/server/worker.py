"""The process that steps the engine.

    commands   | add a, b     | abort a           |               | add c
    steps      | step | step  | step | step | step  (waits)         | step | ...
    messages          v       v      v      v     v                      v

Commands are taken in before every step, and one message leaves after it. The engine has the interpreter to itself:
text, JSON and sockets to clients are the server's. While the GPU runs a step ahead, its host waits for nothing here.
"""

from __future__ import annotations

import gc
import signal
import socket
import traceback
from collections import deque
from typing import TYPE_CHECKING

from engine.errors import UserError
from engine.scheduling import RequestStatus
from engine.sequence import Sequence
from engine.server.messages import Add, Channel, Commands, Died, EngineInfo, Failed, Ready, StepMessage

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.core import EngineCore, SequenceUpdate

# How long the last message may take if the server does not read.
_LAST_WORDS_S = 5.0


def main(sock: socket.socket, config: EngineConfig) -> None:
    """The whole life of the process: load the model, run until the server says so or has gone.

    Ctrl-C and SIGTERM go to the whole process group; only the server acts on them, so that running requests can end in
    good order. When the server dies its end of the socket closes, and this process ends, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(sock)
    try:
        core = _load(channel, config)
        if core is not None:
            # A full collection walks every object that torch and transformers made, which takes longer than a step.
            gc.collect()
            gc.freeze()
            serve(channel, core)
    finally:
        channel.close(_LAST_WORDS_S)


def _load(channel: Channel, config: EngineConfig) -> EngineCore | None:
    try:
        from engine.core import EngineCore

        return EngineCore(config)
    except UserError as error:
        channel.send(Failed(str(error), is_user_error=True))
    except Exception:
        channel.send(Failed(traceback.format_exc(), is_user_error=False))
    return None


def serve(channel: Channel, core: EngineCore) -> None:
    """Obey commands and tell what steps do, until told to end, the channel is closed, or a step fails."""
    channel.send(Ready(_info(core)))
    try:
        _Worker(channel, core).run()
    except EOFError:
        return
    except Exception as error:
        told = " ".join(str(error).split())
        channel.send(Died(f"a step of the engine failed: {type(error).__name__}" + (f": {told}" if told else "")))
        traceback.print_exc()


class _Worker:
    """
    Attributes:
        live: requests that have not ended. unstarted: those of them that were never scheduled, in the queue's order.
    """

    def __init__(self, channel: Channel, core: EngineCore) -> None:
        self.channel, self.core = channel, core
        self.live: dict[int, Sequence] = {}
        self.unstarted: deque[Sequence] = deque()
        self.refused: list[tuple[int, str]] = []
        self.prefix_cache_queries = self.prefix_cache_hits = 0
        self.told_stats: tuple = ()
        core.step_log = []

    def run(self) -> None:
        core, channel = self.core, self.channel
        while True:
            for commands in channel.receive(wait=not core.has_work):
                self._obey(commands)
                if commands.shutdown:
                    return
            self._report(core.step() if core.has_work else [])

    # ---- commands --------------------------------------------------------------------------------------------------

    def _obey(self, commands: Commands) -> None:
        for add in commands.adds:
            self._add(add)
        for request_id in commands.aborts:
            sequence = self.live.pop(request_id, None)  # None: it ended while the command was on its way
            if sequence is not None:
                self.core.abort(sequence)

    def _add(self, add: Add) -> None:
        core = self.core
        try:
            sequence = Sequence(
                add.request_id,
                add.prompt_token_ids,
                add.params,
                max_model_len=core.max_model_len,
                eos_token_ids=core.model_config.eos_token_ids,
                block_size=core.config.block_size,
                hash_blocks=core.config.enable_prefix_caching,
                default_seed=core.config.seed,
            )
            sequence.arrival_s = add.arrival_s
            core.add(sequence)
        except UserError as error:
            self.refused.append((add.request_id, str(error)))
        except Exception as error:  # a request that is wrong in an unforeseen way is no reason to fail the others
            self.refused.append((add.request_id, f"{type(error).__name__}: {error}"))
        else:
            self.live[add.request_id] = sequence
            self.unstarted.append(sequence)

    # ---- messages --------------------------------------------------------------------------------------------------

    def _report(self, updates: list[SequenceUpdate]) -> None:
        """Send what a step did, if it did something."""
        started, stats = self._started(), self._changed_stats()
        num_step_tokens = sum(record.shape.num_tokens for record in self.core.step_log)
        self.core.step_log.clear()
        if not (updates or started or stats or self.refused or num_step_tokens):
            return
        token_ids = [token for update in updates for token in update.new_token_ids]
        several = len(token_ids) != len(updates)
        self.channel.send(
            StepMessage(
                request_ids=[update.sequence.request_id for update in updates],
                token_ids=token_ids,
                counts=[len(update.new_token_ids) for update in updates] if several else None,
                # All tokens of a step come to the host at once.
                token_s=updates[0].sequence.last_token_s if updates else 0.0,
                logprobs=_logprobs(updates),
                started=started,
                ended=self._ended(updates),
                refused=self.refused,
                stats=stats,
                num_step_tokens=num_step_tokens,
            )
        )
        self.refused = []

    def _ended(self, updates: list[SequenceUpdate]) -> list[tuple[int, str, int]]:
        ended = [
            (update.sequence.request_id, update.finish_reason, update.sequence.num_preemptions)
            for update in updates
            if update.finish_reason is not None
        ]
        for request_id, _, _ in ended:
            del self.live[request_id]
        return ended

    def _started(self) -> list[tuple[int, float, int]]:
        """Requests that were scheduled for the first time; the queue is first come first served."""
        started, unstarted = [], self.unstarted
        while unstarted and unstarted[0].status is not RequestStatus.WAITING:
            sequence = unstarted.popleft()
            if sequence.first_scheduled_s is not None:  # None: it was aborted before
                started.append((sequence.request_id, sequence.first_scheduled_s, sequence.num_cached_tokens))
                if self.core.config.enable_prefix_caching:
                    self.prefix_cache_queries += sequence.num_prompt_tokens
                    self.prefix_cache_hits += sequence.num_cached_tokens
        return started

    def _changed_stats(self) -> tuple | None:
        """The fields of EngineStats; None if they are as they were told last."""
        scheduler = self.core.scheduler
        stats = (
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.kv_usage,
            self.prefix_cache_queries,
            self.prefix_cache_hits,
            scheduler.num_preemptions,
        )
        if stats == self.told_stats:
            return None
        self.told_stats = stats
        return stats


def _logprobs(updates: list[SequenceUpdate]) -> dict[int, list[tuple]] | None:
    asked = {
        update.sequence.request_id: [(each.token_id, each.logprob, each.rank, each.top) for each in update.logprobs]
        for update in updates
        if update.logprobs is not None
    }
    return asked or None


def _info(core: EngineCore) -> EngineInfo:
    config = core.config
    return EngineInfo(
        max_model_len=core.max_model_len,
        vocab_size=core.model_config.vocab_size,
        eos_token_ids=tuple(core.model_config.eos_token_ids),
        block_size=config.block_size,
        num_blocks=core.scheduler.kv.pool.num_blocks - 1,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
        enable_prefix_caching=config.enable_prefix_caching,
        memory_lines=core.memory.lines(),
        device=core.device.type,
        dtype=str(core.dtype).removeprefix("torch."),
        kv_cache_dtype=config.kv_cache_dtype,
    )
