"""What a request has given so far, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass

from engine.sequence import Sequence


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, on the clock of time.perf_counter; None until they do.

    The derived times are as `vllm bench serve` defines them.
    """

    arrival_s: float | None
    first_scheduled_s: float | None
    first_token_s: float | None
    last_token_s: float | None
    num_output_tokens: int
    num_preemptions: int

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return _difference(self.arrival_s, self.first_token_s)

    @property
    def e2el_s(self) -> float | None:
        """End-to-end latency: from arrival to the latest token."""
        return _difference(self.arrival_s, self.last_token_s)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token behind the first; None for a single one."""
        decode_s = _difference(self.first_token_s, self.last_token_s)
        return None if decode_s is None or self.num_output_tokens < 2 else decode_s / (self.num_output_tokens - 1)


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: which of the prompt's continuations; always 0 here.
        text: of all tokens so far, a stop token excepted. While the request goes on, a character whose bytes are not
            all there is held back.
        token_ids: all output tokens so far, a stop token included.
        finish_reason: "stop" for a stop token, "length" for max_tokens or max_model_len, "abort"; None until then.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its continuations.

    Attributes:
        request_id: for `LLM.abort`.
        prompt: the text it came from; None for a prompt of token ids.
        outputs: one entry.
        finished: nothing more will come.
        num_cached_tokens: tokens of the prompt that the prefix cache already held.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics


def metrics_of(sequence: Sequence) -> RequestMetrics:
    """The times of a sequence as they are now."""
    return RequestMetrics(
        arrival_s=sequence.arrival_s,
        first_scheduled_s=sequence.first_scheduled_s,
        first_token_s=sequence.first_token_s,
        last_token_s=sequence.last_token_s,
        num_output_tokens=len(sequence.token_ids) - sequence.num_prompt_tokens,
        num_preemptions=sequence.num_preemptions,
    )


def _difference(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
