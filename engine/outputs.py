"""What a request has given so far, in vLLM's shape."""

from __future__ import annotations

from dataclasses import dataclass

from engine.sequence import Sequence


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, on the clock of time.perf_counter; None until they do.

    The derived times are as `vllm bench serve` defines them.

    Attributes:
        first_scheduled_s, first_token_s: of the first continuation that got there. last_token_s: of the last one.
        num_output_tokens: of the longest continuation, so that `tpot_s` is what the reader of one text sees.
        num_preemptions: of all continuations.
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


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How probable an output token was to the model: log-softmax of its logits as they were, in float32.

    Attributes:
        logprob: of the token that was drawn, in nats.
        rank: 1 for the most probable; how many tokens were more probable, plus 1.
        top: the most probable tokens as (token id, logprob), most probable first, as many as `logprobs` asked for; the
            drawn token may be among them.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: which of the prompt's continuations, from 0.
        text: of all tokens so far, a stop token excepted, and up to a stop string. While the request goes on, a
            character whose bytes are not all there is held back, and so is what may be the beginning of a stop string.
        token_ids: all output tokens so far, a stop token and those of a stop string included.
        finish_reason: "stop" for a stop token or string, "length" for max_tokens or max_model_len, "abort"; None until
            then.
        stop_reason: the stop string, or the one of stop_token_ids, that ended it; None where the model's own end of
            text did, or anything else.
        logprobs: of each of token_ids, if sampling_params asked for them.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its continuations.

    Attributes:
        request_id: for `LLM.abort`.
        prompt: the text it came from; None for a prompt of token ids.
        outputs: one entry for each of the n continuations, each of which ends on its own.
        finished: nothing more will come, of any of them.
        num_cached_tokens: tokens of the prompt that the prefix cache already held, for the first continuation.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics


def metrics_of(*sequences: Sequence) -> RequestMetrics:
    """The times of a request as they are now, from the sequences of its continuations."""

    def times(name: str) -> list[float]:
        return [time for sequence in sequences if (time := getattr(sequence, name)) is not None]

    return RequestMetrics(
        arrival_s=min(times("arrival_s"), default=None),
        first_scheduled_s=min(times("first_scheduled_s"), default=None),
        first_token_s=min(times("first_token_s"), default=None),
        last_token_s=max(times("last_token_s"), default=None),
        num_output_tokens=max(len(sequence.token_ids) - sequence.num_prompt_tokens for sequence in sequences),
        num_preemptions=sum(sequence.num_preemptions for sequence in sequences),
    )


def _difference(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
