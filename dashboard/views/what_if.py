"""What if: two to four configurations under the same traffic, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import streamlit as st

from dashboard import inputs
from dashboard.components import answer_of, ask, complain, escaped, give_up_but, note_warnings, show_chart, show_table
from dashboard.figures import compare as figures
from dashboard.figures.plan import kv_name
from dashboard.services import questions, results, work
from dashboard.services.questions import Engine, Speculating, Trial, key_of
from dashboard.services.results import Costs
from dashboard.services.work import Sweep, TrialAnswer
from planner.memory import KVCacheDtype
from planner.quality import described, load_kv_quality

_LETTERS = "ABCD"
_FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_AS_NEEDED = "as needed"
_CONTEXTS = (_AS_NEEDED, "8k", "16k", "32k", "64k", "128k")
_SEQS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_BUDGETS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_MOST_DRAFTS = 8
# Rather than a progress bar that is gone again at once.
_FIRST_PATIENCE_SECONDS = 1.5


@dataclass(frozen=True)
class Comparison:
    """What is set differently at first, configuration by configuration."""

    label: str
    settings: tuple[Mapping[str, object], ...]


_COMPARISONS = {
    "kv": Comparison("bf16 or fp8 KV cache", ({"kv": "bfloat16"}, {"kv": "fp8"})),
    "tp": Comparison("Tensor parallel or replicas", ({"tp": 2, "replicas": 1}, {"tp": 1, "replicas": 2})),
    "tp8": Comparison(
        "8 GPUs: TP 8, 4, 2 or 1",
        tuple({"tp": size, "replicas": 8 // size} for size in (8, 4, 2, 1)),
    ),
    "seqs": Comparison("Large or small batches", ({"seqs": 256}, {"seqs": 32})),
    "chunk": Comparison("Large or small token budget", ({"budget": 8192}, {"budget": 1024, "seqs": 128})),
    "gpu": Comparison("One GPU type or another", ({"gpu": "h200_sxm"}, {"gpu": "h100_sxm"})),
    "link": Comparison("NVLink or PCIe", ({"gpu": "h100_sxm", "tp": 4}, {"gpu": "h100_pcie", "tp": 4})),
    "k": Comparison("Without or with drafts", ({"k": 0}, {"k": 3})),
}


def page() -> None:
    """The whole page."""
    st.title("What if?")
    question = inputs.shared()
    st.caption(escaped(inputs.described(question)))
    trials, names = _configurations()
    answers = _answers(trials, names)
    if answers is None:
        return
    costs = [
        results.costs(trial.engine.deployment(), answer, inputs.price_list())
        for trial, answer in zip(trials, answers, strict=True)
    ]
    _verdicts(answers, names)
    _difference(answers, names, costs)
    # On a phone the values scroll beside the labels.
    labels = {"": st.column_config.Column(width=200, pinned=True)}
    show_table(_rows(answers, names, costs), key="comparison", height="content", column_config=labels)
    fitting = [(answer, name) for answer, name in zip(answers, names, strict=True) if answer.report.result]
    if not fitting:
        return
    shown, labels = [answer for answer, _ in fitting], [name for _, name in fitting]
    _latencies(shown, labels)
    _under_load([trial for trial, answer in zip(trials, answers, strict=True) if answer.report.result], labels)
    st.subheader("Over time")
    show_chart(figures.over_time(shown, labels), "over_time")
    _what_matters(trials, names)
    for answer, name in fitting:
        note_warnings([f"{name}: {warning}" for warning in answer.report.result.warnings])


# ---- configurations ------------------------------------------------------------------------------------------------


def _configurations() -> tuple[list[Trial], list[str]]:
    left, right = st.columns([3, 1])
    with left:
        kind = inputs.choose(
            "Compare",
            tuple(_COMPARISONS),
            "kv",
            "compare",
            format_func=lambda each: _COMPARISONS[each].label,
            help="Where to start from; every setting can be changed below.",
        )
    with right:
        usual = len(_COMPARISONS[kind].settings)
        count = inputs.whole("Configurations", 2, len(_LETTERS), usual, f"{kind}_configurations")
    engines = []
    for number, column in enumerate(st.columns(count)):
        start = _COMPARISONS[kind].settings
        with column, st.container(border=True):
            engines.append(_engine(kind, number, start[min(number, len(start) - 1)]))
    question = inputs.shared()
    traffic = replace(question.traffic, duration_s=questions.TRIAL_SECONDS)
    trials = [Trial(engine, traffic, question.slo, question.quantization) for engine in engines]
    return trials, _names(engines)


def _engine(kind: str, number: int, start: Mapping[str, object]) -> Engine:
    letter = _LETTERS[number]
    prefix = f"{kind}_{letter.lower()}"
    st.markdown(f"**{letter}**")
    left, right = st.columns(2)
    with left:
        gpu = inputs.choose("GPU", inputs.all_gpus(), start.get("gpu", inputs.DEFAULT_GPU), f"{prefix}_gpu")
        size = inputs.choose("TP", (1, 2, 4, 8), start.get("tp", 1), f"{prefix}_tp")
    with right:
        dtype = inputs.choose(
            "KV cache", inputs.KV_DTYPES, start.get("kv", "bfloat16"), f"{prefix}_kv", format_func=kv_name
        )
        replicas = inputs.whole("Replicas", 1, 64, int(start.get("replicas", 1)), f"{prefix}_replicas")
    with st.expander("More settings", key=f"{prefix}_more"):
        seqs = inputs.slide("max_num_seqs", _SEQS, start.get("seqs", 256), f"{prefix}_seqs")
        budget = inputs.slide("Token budget of a step", _BUDGETS, start.get("budget", 8192), f"{prefix}_budget")
        context = inputs.slide("Longest context", _CONTEXTS, _AS_NEEDED, f"{prefix}_context")
        drafts = inputs.slide("Draft length k", tuple(range(_MOST_DRAFTS + 1)), start.get("k", 0), f"{prefix}_k")
        rate = inputs.slide(
            "Drafts accepted, per position",
            [round(0.05 * i, 2) for i in range(21)],
            0.7,
            f"{prefix}_acceptance",
            help="Given that all before it were. An assumption, not a measurement; n-gram drafts, which cost nothing.",
        )
    question = inputs.shared()
    return replace(
        question.engine(inputs.gpu_of(gpu)),
        tensor_parallel_size=size,
        replicas=replicas,
        kv_cache_dtype=dtype,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=None if context == _AS_NEEDED else int(context[:-1]) << 10,
        speculation=Speculating(drafts, (rate,) * drafts) if drafts else None,
    )


def _names(engines: Sequence[Engine]) -> list[str]:
    """A letter, and what tells it from the others."""
    tellers = {
        "gpu": lambda engine: engine.gpu.id,
        "tp": lambda engine: f"TP {engine.tensor_parallel_size} × {engine.replicas}",
        "kv": lambda engine: f"{kv_name(engine.kv_cache_dtype)} KV",
        "seqs": lambda engine: f"{engine.max_num_seqs} seqs",
        "budget": lambda engine: f"budget {engine.max_num_batched_tokens:,}",
        "context": lambda engine: f"{engine.max_model_len >> 10}k" if engine.max_model_len else "context as needed",
        "k": lambda engine: f"k = {engine.speculation.k if engine.speculation else 0}",
    }
    differing = [tell for tell in tellers.values() if len({tell(engine) for engine in engines}) > 1]
    return [
        f"{letter}: {', '.join(tell(engine) for tell in differing)}" if differing else letter
        for letter, engine in zip(_LETTERS, engines, strict=False)
    ]


# ---- answers -------------------------------------------------------------------------------------------------------


def _answers(trials: Sequence[Trial], names: Sequence[str]) -> list[TrialAnswer] | None:
    """One load each at first, then with intervals; None while not all of them are there."""
    trace = inputs.shared().trace
    first = [key_of("trial", trial, 0) for trial in trials]
    whole = [key_of("trial", trial, work.NUM_OTHERS) for trial in trials]
    sweeps = [key_of("sweep", trial, _FACTORS) for trial in trials]
    slots = [f"{slot}_{number}" for slot in ("trial", "loads", "sweep") for number in range(len(_LETTERS))]
    give_up_but([*slots, "tornado"], {*first, *whole, *sweeps, *(key_of("tornado", trial) for trial in trials)})
    for number, trial in enumerate(trials):
        ask(f"trial_{number}", first[number], work.try_once, trial, trace)
    answers = [
        answer_of(f"trial_{number}", first[number], work.try_once, trial, trace, waiting=f"Simulating {name}",
                  patience=_FIRST_PATIENCE_SECONDS)
        for number, (trial, name) in enumerate(zip(trials, names, strict=True))
    ]  # fmt: skip
    if any(answer is None for answer in answers):
        return None
    for number, (trial, name) in enumerate(zip(trials, names, strict=True)):
        waiting = f"Intervals of {name}, from drawn loads and step times"
        better = answer_of(f"loads_{number}", whole[number], work.try_one, trial, trace, work.NUM_OTHERS,
                           waiting=waiting, patience=0.0)  # fmt: skip
        answers[number] = better or answers[number]
    return answers


def _verdicts(answers: Sequence[TrialAnswer], names: Sequence[str]) -> None:
    for column, answer, name in zip(st.columns(len(answers)), answers, names, strict=True):
        with column:
            _verdict(answer, name)


def _verdict(answer: TrialAnswer, name: str) -> None:
    report, result = answer.report, answer.report.result
    if result is None:
        complain(f"{name} does not fit: {report.memory.reason}")
        return
    held = sum(bool(each.slo_met) for each in answer.others)
    loads = f" in {held} of {len(answer.others)} draws" if answer.others else ""
    met = f", and meets it{loads}" if loads else ""
    text = {True: f"✓ meets the SLO{met}", False: f"✗ misses the SLO{met}", None: "no SLO is set"}[result.slo_met]
    if result.verdict != "stable":
        text = f"✗ saturated{met}"
    draw = st.success if result.slo_met else st.error
    draw(f"**{escaped(name)}** {text}")
    st.caption(escaped(f"{_cliff(answer)} Step times: {results.evidence_words(result)}."))


def _cliff(answer: TrialAnswer) -> str:
    """How far from where preemptions start."""
    result = answer.report.result
    near = [text for text in result.warnings if "cliff" in text or "preempted" in text]
    if near:
        return f"Near the preemption cliff: the KV cache is {result.kv_usage_peak:.0%} full at its peak."
    return f"The KV cache is {result.kv_usage_peak:.0%} full at its peak, no preemption: away from the cliff."


def _difference(answers: Sequence[TrialAnswer], names: Sequence[str], costs: Sequence[Costs]) -> None:
    """What the second does to the first, in a sentence."""
    first, second = answers[0].report, answers[1].report
    if first.result is None or second.result is None:
        return
    length = first.memory.max_model_len
    fitting = [results.shown_capacity(report.memory.max_concurrency) for report in (first, second)]
    parts = [f"sequences of {length:,} tokens that a replica holds {fitting[0]} → {fitting[1]}"]
    for metric, label in (("ttft_ms", "TTFT p99"), ("tpot_ms", "TPOT p99")):
        one, two = getattr(first.result, metric), getattr(second.result, metric)
        if one and two:
            spans = [results.metric_interval(answer, metric, "p99") for answer in answers[:2]]
            parts.append(f"{label} {results.from_to((one.p99, spans[0]), (two.p99, spans[1]))}")
    told = [cost.told("usd_per_million_output_tokens") for cost in costs[:2]]
    parts.append(f"1M output tokens {told[0]} → {told[1]}{' (the same)' * (told[0] == told[1])}")
    head = f"At {inputs.shared().rate:.3g} requests/s, from {names[0]} to {names[1]}:"
    st.markdown(f"**{escaped(head)}** {escaped('; '.join(parts))}.")
    dtypes = {report.deployment.kv_cache_dtype for report in (first, second)} - {"bfloat16"}
    study = load_kv_quality()
    for dtype in sorted(dtypes):
        quality = study.of(KVCacheDtype(dtype)) if study else None
        st.caption(
            escaped(
                f"Quality of {dtype} KV against bf16, measured on a small model, an indication: {described(quality)}."
            )
        )


def _rows(answers: Sequence[TrialAnswer], names: Sequence[str], costs: Sequence[Costs]) -> list[dict[str, object]]:
    """One row per number, one column per configuration."""
    rows: list[dict[str, object]] = []

    def add(label: str, tell) -> None:
        rows.append({"": label} | {name: tell(answer) for answer, name in zip(answers, names, strict=True)})

    def latency(metric: str, at: str):
        def tell(answer: TrialAnswer) -> str:
            found = getattr(answer.report.result, metric, None)
            if found is None:
                return "–"
            span = results.metric_interval(answer, metric, at)
            told = results.shown(getattr(found, at), span)
            return f"{told} ({results.shown_range(span)})" if span else told

        return tell

    def number(field: str, scale: float = 1.0):
        def tell(answer: TrialAnswer) -> str:
            if answer.report.result is None:
                return "–"
            span = results.number_interval(answer, field)
            scaled = (span[0] * scale, span[1] * scale) if span else None
            return results.shown(getattr(answer.report.result, field) * scale, scaled)

        return tell

    for metric, label in figures.METRICS.items():
        for at in ("p50", "p95", "p99"):
            add(f"{label} {at}, ms", latency(metric, at))
    add("output tokens/s", number("output_throughput_tokens_per_s"))
    add(
        "requests within the SLO, %", number("slo_attainment", 100.0) if inputs.shared().slo.limits() else lambda _: "–"
    )
    add("KV in use at the peak, %", number("kv_usage_peak", 100.0))
    add("running on average", number("mean_running"))
    add("preempted requests, %", number("preempted_share", 100.0))
    add("GPUs", lambda answer: str(answer.report.deployment.num_gpus))
    for field, label in _COSTS.items():
        told = (cost.told(field) for cost in costs)
        rows.append({"": label} | dict(zip(names, told, strict=True)))
    add("sequences that fit a replica", lambda answer: results.shown_capacity(answer.report.memory.max_concurrency))
    add("step times", lambda answer: _tag(answer))
    return rows


_COSTS = {
    "usd_per_hour": "US$ per hour",
    "usd_per_million_tokens": "US$/1M tokens, in and out",
    "usd_per_million_output_tokens": "US$/1M output tokens",
}


def _tag(answer: TrialAnswer) -> str:
    result = answer.report.result
    return "–" if result is None else results.evidence_tag(result) or "measured or between"


def _latencies(answers: Sequence[TrialAnswer], names: Sequence[str]) -> None:
    st.subheader("Latency")
    limits = inputs.shared().slo.limits()
    left, right = st.columns(2)
    with left:
        show_chart(figures.latencies("ttft_ms", answers, names, limits.get("ttft")), "ttft")
    with right:
        show_chart(figures.latencies("tpot_ms", answers, names, limits.get("tpot")), "tpot")
    left, right = st.columns(2)
    with left:
        show_chart(figures.latencies("e2el_ms", answers, names, limits.get("e2el")), "e2el")
    with right:
        st.markdown("**TTFT: queue or prefill?**")
        show_chart(figures.split(answers, names), "split")


def _under_load(trials: Sequence[Trial], names: Sequence[str]) -> None:
    st.subheader("Under more load")
    trace = inputs.shared().trace
    sweeps = [
        answer_of(
            f"sweep_{number}",
            key_of("sweep", trial, _FACTORS),
            work.sweep,
            trial,
            trace,
            _FACTORS,
            waiting=f"Load on {name}",
        )
        for number, (trial, name) in enumerate(zip(trials, names, strict=True))
    ]
    known = [(sweep, name) for sweep, name in zip(sweeps, names, strict=True) if sweep is not None]
    if not known:
        return
    found, labels = [sweep for sweep, _ in known], [name for _, name in known]
    slo = inputs.shared().slo
    left, right = st.columns(2)
    with left:
        show_chart(figures.against_rate("ttft_ms", found, labels, slo.ttft_ms, slo.percentile), "ttft_rate")
    with right:
        show_chart(figures.against_rate("tpot_ms", found, labels, slo.tpot_ms, slo.percentile), "tpot_rate")
    for sweep, name in known:
        st.markdown(_concurrency(sweep, name))
        st.markdown(_onset(sweep, name, inputs.shared().rate))


def _concurrency(sweep: Sweep, name: str) -> str:
    """Whether memory, the batch limit or the SLO decides how many requests run at once."""
    knee = sweep.knee
    if knee is None or knee.result is None:
        return f"**{escaped(name)}**: no rate that was tried meets the SLO."
    bounds = {
        "memory": sweep.held_by_memory,
        "max_num_seqs": float(sweep.max_num_seqs),
        "the SLO": knee.result.mean_running,
    }
    binding = min(bounds, key=lambda bound: bounds[bound])
    allowed = results.shown(bounds["the SLO"], digits=2)
    return (
        f"**{escaped(name)}, requests at once:** the memory holds {results.shown(bounds['memory'])} of this traffic, "
        f"max\\_num\\_seqs allows {sweep.max_num_seqs:,}, and the SLO about {allowed} (running on average at "
        f"{results.shown(knee.request_rate)} requests/s). **What binds first: {escaped(binding)}.**"
    )


def _onset(sweep: Sweep, name: str, rate: float) -> str:
    """How far preemptions are, in load."""
    before, first = sweep.preemptions_between
    start = f"**{escaped(name)}, preemption cliff:**"
    if first is None:
        reached = sweep.points[-1].request_rate
        return (
            f"{start} no request is preempted at any rate tried, up to {results.shown(reached)} requests/s, "
            f"{results.times(reached / rate)} this load."
        )
    if before is None:
        return f"{start} at {results.shown(first)} requests/s, the lowest rate tried, requests are preempted already."
    return (
        f"{start} preemptions begin between {results.shown(before)} and {results.shown(first)} requests/s, that is "
        f"{results.times(before / rate)} to {results.times(first / rate)} this load."
    )


def _what_matters(trials: Sequence[Trial], names: Sequence[str]) -> None:
    st.subheader("What matters most")
    left, right = st.columns(2)
    with left:
        name = inputs.choose("Configuration", names, names[0], "tornado_of")
    with right:
        metric = inputs.choose(
            "Metric", tuple(figures.METRICS), "ttft_ms", "tornado_metric", format_func=figures.METRICS.__getitem__
        )
    if not inputs.toggle("Compute it: some fifteen simulations", False, "tornado"):
        return
    trial, trace = trials[names.index(name)], inputs.shared().trace
    found = answer_of(
        "tornado", key_of("tornado", trial), work.tornado, trial, trace, waiting="Changing one thing at a time"
    )
    if found is not None:
        show_chart(figures.sensitivities(found, metric, inputs.shared().slo.percentile), "sensitivities")
