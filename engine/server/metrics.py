"""What Prometheus is told, under vLLM's names and with vLLM's buckets.

    metrics = Metrics("my-model", engine)     # counts from here on
    body, content_type = metrics.render()     # for GET /metrics

Counting is a few additions per step, whatever the number of requests: requests that had their tokens before in the
same step have the same inter-token latency, so one bucket takes them all. The text is made when somebody asks for it.
Counting and rendering belong to the thread of the engine's loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from engine.server.async_engine import AsyncEngine, RequestStream

FINISHED_REASONS = ("stop", "length", "abort", "error")

_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Histogram:
    """Counts by bucket, of values that come many at a time."""

    def __init__(self, bounds: Iterable[float]) -> None:
        """
        Args:
            bounds: upper bounds, inclusive, ascending; there is one bucket more, for what is beyond them.
        """
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, int]]:
        """(upper bound, values up to it) as Prometheus writes them."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


class Metrics(Collector):
    """The figures of one engine.

    Times are from the worker's stamps, not from when the server saw the tokens. Those of whole requests, and their
    numbers of tokens, are of requests that came to their end ("stop" or "length"); every request is in request_success.
    """

    def __init__(self, model_name: str, engine: AsyncEngine, registry: CollectorRegistry | None = None) -> None:
        """Watch an engine from now on.

        Args:
            model_name: the label.
            registry: where to register; None for one of its own.
        """
        self._model_name, self._engine = model_name, engine
        self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = 0
        self._ended = dict.fromkeys(FINISHED_REASONS, 0)
        tokens = one_two_five(engine.info.max_model_len)
        self._step_tokens = Histogram(_STEP_TOKENS)
        self._ttft, self._itl, self._tpot = Histogram(_TTFT_S), Histogram(_TOKEN_S), Histogram(_TOKEN_S)
        self._e2e, self._queue, self._inference, self._prefill, self._decode = (Histogram(_REQUEST_S) for _ in range(5))
        self._prompt_tokens, self._output_tokens, self._computed = (
            Histogram(tokens),
            Histogram(tokens),
            Histogram(tokens),
        )
        self._registry = registry or CollectorRegistry()
        self._registry.register(self)
        engine.observer = self

    def render(self) -> tuple[bytes, str]:
        """The body of GET /metrics and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    # ---- counting --------------------------------------------------------------------------------------------------

    def on_step(
        self, num_step_tokens: int, num_new_tokens: int, gaps_s: Mapping[float, int], first: list[RequestStream]
    ) -> None:
        """See `engine.server.async_engine.Observer`."""
        if num_step_tokens:
            self._step_tokens.observe(num_step_tokens)
        self._num_output_tokens += num_new_tokens
        for gap_s, times in gaps_s.items():
            self._itl.observe(gap_s, times)
        for stream in first:
            self._ttft.observe(stream.first_token_s - stream.arrival_s)
            self._num_prompt_tokens += stream.num_prompt_tokens
            self._num_cached_tokens += stream.num_cached_tokens

    def on_end(self, stream: RequestStream) -> None:
        """See `engine.server.async_engine.Observer`."""
        self._ended[stream.finish_reason] += 1
        if stream.finish_reason not in ("stop", "length") or stream.first_token_s is None:
            return
        scheduled_s, first_s, last_s = stream.first_scheduled_s, stream.first_token_s, stream.last_token_s
        self._e2e.observe(last_s - stream.arrival_s)
        self._queue.observe(scheduled_s - stream.arrival_s)
        self._inference.observe(last_s - scheduled_s)
        self._prefill.observe(first_s - scheduled_s)
        self._decode.observe(last_s - first_s)
        if stream.num_output_tokens > 1:
            self._tpot.observe((last_s - first_s) / (stream.num_output_tokens - 1))
        self._prompt_tokens.observe(stream.num_prompt_tokens)
        self._computed.observe(stream.num_prompt_tokens - stream.num_cached_tokens)
        self._output_tokens.observe(stream.num_output_tokens)

    # ---- what Prometheus sees --------------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        for name, text, histogram in self._histograms():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], histogram.buckets(), histogram.sum)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, text, value in (
            ("num_requests_running", "Requests that are being computed.", stats.num_running),
            ("num_requests_waiting", "Requests that wait to be computed.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV cache that requests hold; 1 is all of it.", stats.kv_cache_usage),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        info = self._engine.info
        labels = {
            "model_name": self._model_name,
            "block_size": str(info.block_size),
            "num_gpu_blocks": str(info.num_blocks),
            "cache_dtype": info.kv_cache_dtype,
            "enable_prefix_caching": str(info.enable_prefix_caching),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        yield family

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
            ("num_preemptions", "Requests that lost their pages to others.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens of requests that have a first token.", self._num_prompt_tokens),
            ("prompt_tokens_cached", "Of these, tokens from the prefix cache.", self._num_cached_tokens),
            ("generation_tokens", "Output tokens.", self._num_output_tokens),
        ):
            family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        family = CounterMetricFamily(
            "vllm:request_success", "Requests that have ended.", labels=["model_name", "finished_reason"]
        )
        for reason, count in self._ended.items():
            family.add_metric([self._model_name, reason], count)
        yield family

    def _histograms(self) -> tuple[tuple[str, str, Histogram], ...]:
        return (
            ("iteration_tokens_total", "Query tokens of a step.", self._step_tokens),
            ("time_to_first_token_seconds", "From arrival to the first token.", self._ttft),
            ("inter_token_latency_seconds", "Between output events of a request.", self._itl),
            ("request_time_per_output_token_seconds", "Mean per token behind the first.", self._tpot),
            ("e2e_request_latency_seconds", "From arrival to the last token.", self._e2e),
            ("request_queue_time_seconds", "From arrival to the first scheduling.", self._queue),
            ("request_inference_time_seconds", "From the first scheduling to the last token.", self._inference),
            ("request_prefill_time_seconds", "From the first scheduling to the first token.", self._prefill),
            ("request_decode_time_seconds", "From the first token to the last.", self._decode),
            ("request_prompt_tokens", "Prompt tokens of a request.", self._prompt_tokens),
            ("request_prefill_kv_computed_tokens", "Prompt tokens beyond the cached ones.", self._computed),
            ("request_generation_tokens", "Output tokens of a request.", self._output_tokens),
        )


def one_two_five(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [step for step in steps if step <= most]
