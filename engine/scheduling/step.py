"""What one engine step does, for the runner that executes it and for the model that predicts its time."""

from __future__ import annotations

from engine.scheduling.request import Request


class StepShape:
    """The work in one step: query length and context length of everything scheduled, and nothing else.

    This is the contract between the engine and every step-time model. `context` counts the tokens that are already
    in the KV cache before the step; the queries attend to them and, causally, to each other.

    Attributes:
        prefills: (query_tokens, context_tokens) of each prompt chunk.
        decode_contexts: context_tokens of each request that decodes one token.
        verifies: (query_tokens, context_tokens) of each request that verifies query_tokens - 1 drafts.
        num_sampled: rows that reach the LM head and the sampler.
    """

    __slots__ = ("decode_contexts", "num_sampled", "prefills", "verifies")

    def __init__(
        self,
        prefills: list[tuple[int, int]] | None = None,
        decode_contexts: list[int] | None = None,
        verifies: list[tuple[int, int]] | None = None,
        num_sampled: int | None = None,
    ) -> None:
        self.prefills = prefills if prefills is not None else []
        self.decode_contexts = decode_contexts if decode_contexts is not None else []
        self.verifies = verifies if verifies is not None else []
        if num_sampled is None:
            num_sampled = len(self.prefills) + len(self.decode_contexts) + sum(q for q, _ in self.verifies)
        self.num_sampled = num_sampled

    @property
    def num_tokens(self) -> int:
        """Query tokens in all: the rows of every dense matrix product."""
        return sum(q for q, _ in self.prefills) + len(self.decode_contexts) + sum(q for q, _ in self.verifies)

    @property
    def num_requests(self) -> int:
        return len(self.prefills) + len(self.decode_contexts) + len(self.verifies)

    def __repr__(self) -> str:
        return f"StepShape(prefills={self.prefills}, decodes={self.decode_contexts}, verifies={self.verifies})"


class Step:
    """One scheduled step: its shape, and the request behind each entry of the shape.

    Attributes:
        step_id: counts from 0.
        shape: what the step computes; entry i of each list belongs to entry i of the request list below.
        prefill_requests, decode_requests, verify_requests: aligned with the shape.
        admitted: requests that left the waiting queue for this step.
        preempted: requests that lost their pages to make room for this step.
    """

    __slots__ = (
        "admitted",
        "decode_requests",
        "detached",
        "preempted",
        "prefill_requests",
        "shape",
        "step_id",
        "verify_requests",
    )

    def __init__(self, step_id: int) -> None:
        self.step_id = step_id
        self.shape = StepShape(num_sampled=0)
        self.prefill_requests: list[Request] = []
        self.decode_requests: list[Request] = []
        self.verify_requests: list[Request] = []
        self.admitted: list[Request] = []
        self.preempted: list[Request] = []
        # Requests that were aborted, or found to have stopped, while this step was in flight.
        self.detached: set[Request] = set()

    @property
    def is_empty(self) -> bool:
        """True if nothing could be scheduled."""
        return not (self.prefill_requests or self.decode_requests or self.verify_requests)

    def requests(self) -> list[Request]:
        """Every request in the step."""
        return self.prefill_requests + self.decode_requests + self.verify_requests
