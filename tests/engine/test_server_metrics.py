"""What /metrics says, read by prometheus_client's own parser."""

import asyncio
import random
from bisect import bisect_left

import pytest
from driven import INFO, Core, Script, over, read, tokens_of, until
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.parser import text_string_to_metric_families

from engine.sampling_params import SamplingParams
from engine.server.metrics import Histogram, Metrics, one_two_five

NAMES = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"],
    "counter": [
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "prompt_tokens_cached",
        "generation_tokens",
        "request_success",
    ],
    "histogram": [
        "iteration_tokens_total",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_prefill_kv_computed_tokens",
        "request_generation_tokens",
    ],
}


class Parsed:
    """The page as a scraper has it."""

    def __init__(self, metrics: Metrics) -> None:
        body, self.content_type = metrics.render()
        self.families = {family.name: family for family in text_string_to_metric_families(body.decode())}
        self.values = {
            (sample.name.removeprefix("vllm:"), *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.values[(name, *sorted({"model_name": "m", **labels}.items()))]

    def bounds(self, name: str) -> list[float]:
        samples = self.families[f"vllm:{name}"].samples
        return [float(sample.labels["le"]) for sample in samples if sample.name.endswith("_bucket")]

    def histogram(self, name: str) -> tuple[float, float]:
        """How many values, and their sum."""
        assert self(f"{name}_count") == self(f"{name}_bucket", le="+Inf")
        return self(f"{name}_count"), self(f"{name}_sum")


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def test_names_types_and_buckets():
    async def run() -> Parsed:
        script = Script()
        engine = await script.start()
        parsed = Parsed(Metrics("m", engine))
        await engine.close(timeout_s=0)
        return parsed

    parsed = asyncio.run(run())
    assert {name: family.type for name, family in parsed.families.items()} == {
        f"vllm:{name}": kind for kind, names in NAMES.items() for name in names
    }
    assert all(sample.labels["model_name"] == "m" for each in parsed.families.values() for sample in each.samples)
    assert all(parsed("request_success_total", finished_reason=reason) == 0 for reason in ("stop", "length", "abort"))
    inf = float("inf")
    assert parsed.bounds("request_prompt_tokens") == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, inf]
    assert parsed.bounds("time_to_first_token_seconds")[:4] == [0.001, 0.005, 0.01, 0.02]
    assert parsed.bounds("time_to_first_token_seconds")[-3:] == [640, 2560, inf]
    assert parsed.bounds("inter_token_latency_seconds")[:4] == [0.01, 0.025, 0.05, 0.075]
    assert parsed.bounds("e2e_request_latency_seconds")[-2:] == [7680, inf]
    info = {"block_size": "32", "num_gpu_blocks": "10", "cache_dtype": "auto", "enable_prefix_caching": "True"}
    assert parsed("cache_config_info", **info) == 1
    assert parsed.content_type.startswith("text/plain")


def test_figures_of_a_story_that_is_known():
    """Three requests, step by step, at times that a test chose."""

    async def run() -> tuple[Parsed, list[float]]:
        script = Script()
        engine = await script.start()
        metrics = Metrics("m", engine)
        one, two, three = (engine.submit([1] * length, greedy(9)) for length in (10, 30, 5))
        for stream in (one, two, three):
            stream.arrival_s = 100.0
        await script.step(engine, started=[(0, 100.5, 4)], num_step_tokens=6, stats=(1, 2, 0.25, 10, 4, 0))
        assert [Parsed(metrics)(f"num_requests_{state}") for state in ("running", "waiting")] == [1, 2]
        await script.step(engine, tokens=[(0, [7])], token_s=101.0, started=[(1, 100.9, 0)], num_step_tokens=31)
        await script.step(engine, tokens=[(0, [7]), (1, [7])], token_s=103.0, num_step_tokens=2)
        three.abort()
        await script.step(
            engine,
            tokens=[(0, [7, 7]), (1, [7]), (2, [7])],
            token_s=103.2,
            ended=[(0, "length", 0), (1, "stop", 2)],
            stats=(0, 0, 0.0, 40, 4, 2),
            num_step_tokens=3,
        )
        await engine.close(timeout_s=0)
        return Parsed(metrics)

    parsed = asyncio.run(run())
    expected = {
        "iteration_tokens_total": [6, 31, 2, 3],
        "time_to_first_token_seconds": [1.0, 3.0],
        "inter_token_latency_seconds": [2.0, 0.2, 0.2],
        "request_time_per_output_token_seconds": [2.2 / 3, 0.2],
        "e2e_request_latency_seconds": [3.2, 3.2],
        "request_queue_time_seconds": [0.5, 0.9],
        "request_inference_time_seconds": [2.7, 2.3],
        "request_prefill_time_seconds": [0.5, 2.1],
        "request_decode_time_seconds": [2.2, 0.2],
        "request_prompt_tokens": [10, 30],
        "request_prefill_kv_computed_tokens": [6, 30],
        "request_generation_tokens": [4, 2],
    }
    for name, values in expected.items():
        assert parsed.histogram(name) == pytest.approx((len(values), sum(values))), name
    assert parsed("inter_token_latency_seconds_bucket", le="0.3") == 2
    counters = {"prompt_tokens": 40, "prompt_tokens_cached": 4, "generation_tokens": 6, "num_preemptions": 2}
    counters |= {"prefix_cache_queries": 40, "prefix_cache_hits": 4}
    for name, value in counters.items():
        assert parsed(f"{name}_total") == value, name
    reasons = {
        reason: parsed("request_success_total", finished_reason=reason) for reason in ("stop", "length", "abort")
    }
    assert reasons == {"stop": 1, "length": 1, "abort": 1}
    assert [parsed(f"num_requests_{state}") for state in ("running", "waiting")] == [0, 0]
    assert parsed("kv_cache_usage_perc") == 0


def test_figures_agree_with_what_the_streams_gave():
    choose = random.Random(1)
    core = Core(depth=2)

    async def one(engine) -> tuple[str, int, int]:
        stream = engine.submit([7] * choose.randint(1, 40), greedy(choose.randint(1, 20)))
        if choose.random() < 0.3:
            await anext(stream)
            stream.abort(choose.choice(["abort", "stop"]))
            events = []
        else:
            events = await read(stream)
        return stream.finish_reason, stream.num_prompt_tokens, len(tokens_of(events)), stream.num_output_tokens

    async def run():
        engine = await over(core)
        metrics = Metrics("m", engine)
        ended = await asyncio.gather(*(one(engine) for _ in range(100)))
        await until(lambda: engine.stats.num_running == 0 and engine.stats.kv_cache_usage == 0)
        await engine.close(timeout_s=0)
        return ended, Parsed(metrics)

    ended, parsed = asyncio.run(run())
    core.drain()
    for reason in ("stop", "length", "abort", "error"):
        count = sum(each[0] == reason for each in ended)
        assert parsed("request_success_total", finished_reason=reason) == count, reason
    assert parsed("generation_tokens_total") == sum(each[3] for each in ended)
    assert parsed("prompt_tokens_total") == sum(each[1] for each in ended)
    assert parsed.histogram("time_to_first_token_seconds")[0] == 100
    assert parsed.histogram("inter_token_latency_seconds")[0] == sum(each[3] - 1 for each in ended)
    complete = [each for each in ended if each[0] in ("stop", "length")]
    assert parsed.histogram("request_generation_tokens") == (len(complete), sum(each[3] for each in complete))
    assert parsed.histogram("request_prompt_tokens") == (len(complete), sum(each[1] for each in complete))
    # A step computes prompt chunks and decodes; aborted requests were computed to an unknown extent.
    assert parsed.histogram("iteration_tokens_total")[1] >= sum(each[1] + each[3] - 1 for each in ended)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.011, 1.0, 2.5, 3.0, 100.0]), st.integers(1, 300)), max_size=20))
def test_a_histogram_counts_as_prometheus_does(observed):
    bounds = [0.01, 1.0, 2.5]
    registry = CollectorRegistry()
    reference, histogram = PrometheusHistogram("h", "h", buckets=bounds, registry=registry), Histogram(bounds)
    for value, times in observed:
        histogram.observe(value, times)
        for _ in range(times):
            reference.observe(value)
    for bound, count in histogram.buckets():
        assert registry.get_sample_value("h_bucket", {"le": bound}) == count
    assert registry.get_sample_value("h_sum") == pytest.approx(histogram.sum)


@given(st.integers(1, 10**7))
def test_token_buckets_go_up_to_the_longest(most):
    found = one_two_five(most)
    assert found[0] == 1 and found[-1] <= most < 2.5 * found[-1]
    assert found == sorted(set(found)) and {int(str(step)[0]) for step in found} <= {1, 2, 5}
    assert bisect_left(found, most) in (len(found) - 1, len(found))


def test_a_registry_may_be_given():
    async def run() -> None:
        registry = CollectorRegistry()
        Gauge("other", "of somebody else", registry=registry).set(3)
        script = Script(INFO)
        engine = await script.start()
        assert b"\nother 3.0\n" in Metrics("m", engine, registry).render()[0]
        await engine.close(timeout_s=0)

    asyncio.run(run())
