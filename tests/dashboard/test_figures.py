"""Figures hold the planner's own numbers, name their units, and say everything twice: in colour and in shape."""

import json
from dataclasses import replace

import pytest

from dashboard.figures import compare, memory, plan, theme
from dashboard.services import capacity, work
from dashboard.services.questions import Engine, Search, Traffic, Trial
from planner.catalog import load_gpu, load_model
from planner.deployment import PriceList
from planner.memory import GIB, plan_memory
from planner.search import DEFAULT_SLO

MODEL, GPU = load_model("llama-3.1-8b"), load_gpu("h200_sxm")
ENGINE = Engine(MODEL, GPU, max_model_len=16384)
LOAD = Traffic(request_rate=2.0, duration_s=40.0)


def silent(done, total, what):
    pass


@pytest.fixture(scope="module")
def answer():
    search = Search(Engine(MODEL, GPU), LOAD, DEFAULT_SLO, (GPU,), total_gpus=4, max_num_seqs=(64,))
    return work.plan(silent, search, None)


@pytest.fixture(scope="module")
def trials():
    both = [
        Trial(replace(Engine(MODEL, GPU), kv_cache_dtype=dtype), LOAD, DEFAULT_SLO) for dtype in ("bfloat16", "fp8")
    ]
    return both, [work.try_one(silent, trial, None, 2) for trial in both]


NAMES = ["A: bf16 KV", "B: fp8 KV"]


def check(chart: theme.Chart) -> None:
    """What holds for every chart: it can be drawn, its axes have names, and it says in words what it shows."""
    json.loads(chart.figure.to_json())
    assert len(chart.summary) > 20
    assert chart.summary.rstrip().endswith((".", "!"))
    assert chart.table, "no text alternative"
    axes = [*chart.figure.select_xaxes(), *chart.figure.select_yaxes()]
    assert any(axis.title.text for axis in axes)
    for trace in chart.figure.data:
        assert trace.hovertemplate or trace.hoverinfo == "skip"
        assert not trace.hovertemplate or trace.hovertemplate.endswith("<extra></extra>")


def test_series_differ_in_more_than_colour():
    styles = [theme.series(number) for number in range(6)]
    for pick in (
        lambda style: style["line"]["dash"],
        lambda style: style["line"]["color"],
        lambda style: style["marker"]["symbol"],
    ):
        assert len({pick(style) for style in styles}) == 6
    bars = [theme.bar(number) for number in range(6)]
    assert len({bar["pattern"]["shape"] for bar in bars}) == 6


def test_pareto(answer):
    chart = plan.pareto(answer.report)
    check(chart)
    drawn = sorted(
        (x, y) for trace in chart.figure.data if trace.mode == "markers" for x, y in zip(trace.x, trace.y, strict=True)
    )
    assert drawn == sorted((p.tokens_per_s_per_user, p.output_tokens_per_s_per_gpu) for p in answer.report.plans)
    front = next(trace for trace in chart.figure.data if trace.name == "Pareto front")
    assert list(front.x) == sorted(p.tokens_per_s_per_user for p in answer.report.plans if p.pareto)
    region = next(shape for shape in chart.figure.layout.shapes if shape.type == "rect")
    assert region.x0 == pytest.approx(1e3 / DEFAULT_SLO.tpot_ms)
    assert "1 / mean TPOT" in chart.figure.data[0].hovertemplate


def test_cost(answer):
    chart = plan.cost(answer.report)
    check(chart)
    both, output = chart.figure.data
    best = answer.report.plans[0]
    assert both.x[0] == best.usd_per_million_tokens
    assert output.x[0] == best.usd_per_million_output_tokens
    assert len(chart.table) == len(both.x)


def test_memory_stack_adds_up_to_the_gpu():
    report = plan_memory(MODEL, GPU, replace(ENGINE, profiles=("none",)).deployment().memory_settings())
    chart = memory.stack([report], ["bf16 KV"])
    check(chart)
    assert sum(trace.x[0] for trace in chart.figure.data) * GIB == pytest.approx(report.gpu_memory_bytes)
    cache = next(trace for trace in chart.figure.data if trace.name == "KV cache")
    assert cache.x[0] == report.ranks[0].kv_cache_bytes / GIB


def test_concurrency_is_the_planners():
    lines = capacity.concurrency_lines(ENGINE, 131072)
    chart = memory.concurrency(lines, 5, 16384)
    check(chart)
    drawn = {trace.name: dict(zip(trace.x, trace.y, strict=True)) for trace in chart.figure.data}
    for dtype, name in (("bfloat16", "bf16"), ("fp8", "fp8"), ("int4", "int4")):
        for length in (1024, 16384, 131072):
            engine = replace(ENGINE, kv_cache_dtype=dtype, max_model_len=length)
            report = plan_memory(MODEL, GPU, engine.deployment().memory_settings())
            assert drawn[name][length] == report.max_concurrency_decoding
    assert (chart.figure.data[-1].x[0], chart.figure.data[-1].y[0]) == (16384, 5)


def test_kinds_of_attention_hold_what_their_caches_allow():
    lines = {line.name: dict(line.points)[16384] for line in capacity.attention_lines(ENGINE, 131072)}
    by_kind = {name.split()[0].rstrip(","): value for name, value in lines.items()}
    # 32, 8 and 1 KV heads of 128 elements, K and V; a latent of 576 elements.
    assert by_kind["GQA"] / by_kind["MHA"] == pytest.approx(4, rel=0.01)
    assert by_kind["MQA"] / by_kind["GQA"] == pytest.approx(8, rel=0.01)
    assert by_kind["MLA"] / by_kind["MHA"] == pytest.approx(2 * 32 * 128 / 576, rel=0.01)
    assert by_kind["sliding"] > by_kind["GQA"]
    assert sum("this model" in name for name in lines) == 1


@pytest.mark.parametrize("name", ["deepseek-v3", "gemma-3-27b", "llama-2-7b", "gpt-oss-20b"])
def test_every_model_is_of_one_kind_and_its_own_line_is_itself(name):
    model = load_model(name)
    variants = capacity.attention_variants(model)
    own = [spec for label, spec in variants.items() if label.endswith("(this model)")]
    assert own == [model]


def test_speed_is_what_the_step_time_says():
    from engine.scheduling import StepShape

    lines = capacity.speed_lines(ENGINE, ("bfloat16",), 131072)
    chart = memory.speed(lines, 16384)
    check(chart)
    step_time = replace(ENGINE, max_model_len=131072).deployment().step_time()
    alone = dict(lines[0].points)
    assert alone[16384] == 1 / step_time.predict(StepShape(decode_contexts=[16384]))
    assert all(many >= one for (_, one), (_, many) in zip(lines[0].points, lines[1].points, strict=True))


def test_no_measured_step_is_above_the_data_sheets_roof():
    found = capacity.roofline_of(ENGINE)
    check(memory.roofline(found))
    assert len(found.points) > 100
    for point in found.points:
        roof = min(GPU.bf16_flops, point.intensity * GPU.memory_bandwidth_bytes_per_s)
        assert 0 < point.flops_per_s <= roof, point.name
    other = capacity.roofline_of(replace(ENGINE, gpu=load_gpu("l4")))
    assert not other.points
    assert other.limits is None


def test_gpus_that_hold_a_70b_of_128k_for_five(answer):
    """The sizes of vllm#12400: two H200 do with fp8 KV only, four H100 likewise, four H200 with either."""
    engine = Engine(load_model("llama-3.1-70b"), GPU, max_model_len=131072)
    gpus = (GPU, load_gpu("h100_sxm"))
    found = capacity.fits_on(engine, gpus, 5, PriceList(), ("bfloat16", "fp8"))
    fits = {(fit.gpu.id, fit.tensor_parallel_size, fit.kv_cache_dtype): fit.report.fits for fit in found}
    assert fits["h200_sxm", 2, "fp8"]
    assert not fits["h200_sxm", 2, "bfloat16"]
    assert fits["h200_sxm", 4, "bfloat16"]
    assert not fits["h100_sxm", 4, "bfloat16"]
    assert fits["h100_sxm", 4, "fp8"]
    holding = [fit.usd_per_hour for fit in found if fit.report.fits]
    assert holding == sorted(holding)


def test_latencies(trials):
    _, answers = trials
    chart = compare.latencies("ttft_ms", answers, NAMES, 1000.0)
    check(chart)
    for trace, answer in zip(chart.figure.data, answers, strict=True):
        found = answer.report.result.ttft_ms
        assert list(trace.y) == [found.p50, found.p90, found.p95, found.p99]
        lowest = min(each.ttft_ms.p99 for each in (answer.report.result, *answer.others))
        assert trace.y[3] - trace.error_y.arrayminus[3] == pytest.approx(lowest)
    assert "1000" in chart.summary
    assert "arrival to first token" in chart.figure.data[0].hovertemplate


def test_the_parts_of_ttft(trials):
    _, answers = trials
    chart = compare.split(answers, NAMES)
    check(chart)
    result = answers[0].report.result
    assert list(chart.figure.data[0].y) == [
        result.queue_ms.p50, result.prefill_ms.p50, result.queue_ms.p99, result.prefill_ms.p99
    ]  # fmt: skip


def test_over_time(trials):
    _, answers = trials
    chart = compare.over_time(answers, NAMES)
    check(chart)
    assert len(chart.figure.data) == 4 * len(answers)
    timeline = answers[0].report.result.timeline
    assert list(chart.figure.data[0].y) == [100 * point.kv_usage for point in timeline]
    assert list(chart.figure.data[1].y) == [point.running for point in timeline]


def test_against_rate(trials):
    both, _ = trials
    factors = (1.0, 4.0, 40.0, 80.0, 160.0)
    sweeps = [work.sweep(silent, both[0], None, factors)]
    knee = sweeps[0].knee
    assert knee is not None
    later = [point for point in sweeps[0].points if point.request_rate > knee.request_rate]
    assert later
    assert not later[0].result.slo_met
    assert len(later) <= 2, "beyond the knee two rates are enough"
    chart = compare.against_rate("ttft_ms", sweeps, NAMES[:1], 1000.0, 99.0)
    check(chart)
    assert list(chart.figure.data[0].y) == [point.result.ttft_ms.at_slo_percentile for point in sweeps[0].points]
    load = both[0].traffic.workload()
    pool = both[0].engine.deployment(load).memory()
    live = float((load.input_tokens + load.output_tokens / 2).mean())
    assert sweeps[0].held_by_memory == pytest.approx(pool.num_kv_blocks * pool.block_size / live)


def test_sensitivities(trials):
    both, _ = trials
    found = work.tornado(silent, both[0], None)
    chart = compare.sensitivities(found, "ttft_ms", 99.0)
    check(chart)
    base = found.base.ttft_ms.at_slo_percentile
    low, high = chart.figure.data
    assert low.base == high.base == base
    rate = next(bar for bar in found.bars if bar.name.startswith("request rate"))
    at = list(high.y).index(rate.name)
    assert base + high.x[at] == pytest.approx(rate.high_result.ttft_ms.at_slo_percentile)


def test_why_not_cheaper_is_simulated():
    """Two replicas of a small GPU are a plan; one of them is not, and the reason is in its own numbers."""
    gpu = load_gpu("l4")
    search = Search(
        Engine(load_model("llama-3.2-1b"), gpu),
        Traffic(request_rate=40.0, duration_s=60.0),
        DEFAULT_SLO,
        (gpu,),
        kv_cache_dtypes=("bfloat16",),
        max_num_seqs=(64,),
    )
    found = work.plan(silent, search, None)
    best = found.report.plans[0]
    assert best.deployment.replicas > 1
    first = found.cheaper[0]
    assert first.what.startswith(f"{best.num_gpus - best.deployment.tensor_parallel_size} × l4")
    assert first.usd_per_hour < best.usd_per_hour
    assert "above" in first.reason or "saturated" in first.reason


def test_why_not_fewer_replicas_of_another_engine():
    """A plan of one replica on two GPUs: one GPU costs half as much, and what it would take is simulated."""
    gpu = load_gpu("l4")
    traffic = Traffic(request_rate=40.0, duration_s=60.0)
    search = Search(
        Engine(load_model("llama-3.2-1b"), gpu),
        traffic,
        DEFAULT_SLO,
        (gpu,),
        kv_cache_dtypes=("bfloat16",),
        max_num_seqs=(64,),
    )
    report = work.plan(silent, search, None).report
    wide = next(plan for plan in report.plans if plan.deployment.tensor_parallel_size > 1)
    narrow = next(plan for plan in report.plans if plan.deployment.tensor_parallel_size == 1)
    assert narrow.deployment.replicas > 1
    wide = wide.model_copy(update={"usd_per_hour": narrow.usd_per_hour})
    rest = tuple(plan for plan in report.plans if plan.deployment.tensor_parallel_size == 1)
    turned = report.model_copy(update={"plans": (wide.model_copy(update={"rank": 1}), *rest)})
    question = search.question(traffic.workload())
    found = work.why_not_cheaper(question, turned)
    named = [each.what for each in found]
    assert any(f"{narrow.num_gpus - 1} × l4" in what and "of TP 1" in what for what in named)
    assert all(each.usd_per_hour < wide.usd_per_hour for each in found)
