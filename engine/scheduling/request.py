"""A request is a handful of token counts; prefill, chunk, decode and verification are arithmetic on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import Enum


class RequestStatus(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_LENGTH = "length"
    FINISHED_STOPPED = "stop"
    ABORTED = "abort"

    @property
    def is_finished(self) -> bool:
        """True once the request will never be scheduled again."""
        return self in _FINISHED


_FINISHED = frozenset({RequestStatus.FINISHED_LENGTH, RequestStatus.FINISHED_STOPPED, RequestStatus.ABORTED})


class Request:
    """One generation, as the scheduler sees it.

    The token counts, for a prompt of 6 with 3 tokens sampled, the last of them not yet run through the model,
    and 2 drafts that the next step will verify::

        | p p p p p p | o o | o |  d d  |
        |<---- num_computed -->|
        |<------- num_tokens ----->|<-num_draft->|

    The next step gives it `num_tokens + num_draft_tokens - num_computed_tokens` = 3 query tokens.

    Attributes:
        num_tokens: prompt and sampled tokens that are known (or known to be on the GPU).
        num_pending_tokens: tokens that steps in flight are sampling; they may already be scheduled again.
        num_computed_tokens: tokens whose KV is in the cache once all scheduled steps have run.
        num_in_flight_tokens: how many of those are being computed by steps that have not been updated yet.
        num_prefill_tokens: tokens to compute before the next one can be sampled: the prompt, or after a preemption
            the prompt and everything sampled so far.
        block_hashes: one chained hash per full block of known tokens, for the prefix cache; block i's hash stands
            for all tokens up to the end of block i. May cover fewer blocks than are full; the owner extends it.
        block_tables: one list of block ids per KV group, indexed by position // block_size.
        num_cached_tokens: tokens taken from the prefix cache at the first admission.
    """

    __slots__ = (
        "block_hashes",
        "block_tables",
        "max_output_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_draft_tokens",
        "num_hashed_blocks",
        "num_in_flight_tokens",
        "num_output_tokens",
        "num_pending_tokens",
        "num_preemptions",
        "num_prefill_tokens",
        "num_prompt_tokens",
        "num_slots",
        "num_tokens",
        "num_window_pages_released",
        "request_id",
        "status",
    )

    def __init__(
        self,
        request_id: Hashable,
        num_prompt_tokens: int,
        max_output_tokens: int,
        block_hashes: Sequence[Hashable] = (),
    ) -> None:
        """
        Args:
            request_id: unique among the requests of one scheduler.
            num_prompt_tokens: at least 1.
            max_output_tokens: sampled tokens after which it ends, at least 1.
            block_hashes: see the class.

        Raises:
            ValueError: for a count below 1.
        """
        if num_prompt_tokens < 1:
            raise ValueError(f"request {request_id!r}: a prompt needs at least 1 token, not {num_prompt_tokens}")
        if max_output_tokens < 1:
            raise ValueError(f"request {request_id!r}: max_output_tokens must be at least 1, not {max_output_tokens}")
        self.request_id = request_id
        self.num_prompt_tokens = num_prompt_tokens
        self.max_output_tokens = max_output_tokens
        self.block_hashes = block_hashes
        self.status = RequestStatus.WAITING
        self.num_tokens = num_prompt_tokens
        self.num_output_tokens = 0
        self.num_pending_tokens = 0
        self.num_draft_tokens = 0
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        self.num_prefill_tokens = num_prompt_tokens
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_tables: list[list[int]] = []
        # Token positions that the block tables can hold: len(table) * block_size.
        self.num_slots = 0
        # Leading blocks that have been offered to the prefix cache.
        self.num_hashed_blocks = 0
        # Leading pages that each group has given back because its window moved past them.
        self.num_window_pages_released: list[int] = []

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}/{self.max_output_tokens}, computed={self.num_computed_tokens})"
        )
