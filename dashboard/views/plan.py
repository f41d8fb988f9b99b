"""Plan: how many GPUs does this load need, and what does it cost?"""

from __future__ import annotations

import streamlit as st

from dashboard import inputs
from dashboard.components import answer_of, begun, escaped, give_up_but, note_warnings, show_chart, show_table
from dashboard.figures import plan as figures
from dashboard.services import results, work
from dashboard.services.jobs import jobs
from dashboard.services.questions import QUICK_SECONDS, Search, key_of
from dashboard.services.work import PlanAnswer
from planner.errors import UserError
from planner.export import TARGETS, export_plan, length_remark
from planner.plan_report import Plan, PlanReport, SloTerm
from planner.workload import Workload

_EXPORT_NAMES = {"vllm": ("vLLM start script", "serve.sh")}


def page() -> None:
    """The whole page."""
    st.title("How many GPUs?")
    question = inputs.shared()
    st.caption(escaped(inputs.described(question)))
    if question.trace is None:
        st.caption(
            ":material/upload_file: Have a log of your own requests? Drop it under *Traffic* in the sidebar, and the "
            "plan is for that."
        )
    search = _search()
    trace = question.trace
    key = key_of("plan", search, False)
    give_up_but(["plan"], {key})
    top = st.container()  # what is being computed is told above the answer that is there
    with top:
        quick = _first_look(search, trace)
    if quick is None:
        return
    with top:
        whole = answer_of("plan", key, work.plan, search, trace, jobs().free_cores(), waiting=_WHOLE)
    _answer(whole or quick, search)


_WHOLE = "Searching with the whole load, then drawing loads and step times"
# From so many GPU types on a first look takes some seconds on one core.
_MANY_TYPES = 4
_WIDE_SEARCH = "it takes about two minutes on two cores for the load that this page starts with, and can be cancelled."


def _first_look(search: Search, trace: Workload | None) -> PlanAnswer | None:
    key, waiting = key_of("plan", search, True), "First look"
    if len(search.gpus) < _MANY_TYPES:
        return answer_of("plan_quick", key, work.first_look, search, trace, waiting=waiting)
    cores = jobs().free_cores()
    return answer_of("plan_quick", key, work.wide_first_look, search, trace, cores, waiting=waiting)


def _search() -> Search:
    question = inputs.shared()
    with st.expander("Search: GPUs, KV formats, budget", icon=":material/tune:", key="plan_search"):
        left, middle, right = st.columns(3)
        with left:
            gpus = inputs.choose_several("GPU types", inputs.all_gpus(), (inputs.DEFAULT_GPU,), "gpus")
        with middle:
            dtypes = inputs.choose_several(
                "KV cache formats", inputs.KV_DTYPES, ("bfloat16", "fp8"), "kv", format_func=figures.kv_name
            )
        with right:
            most = inputs.whole("Most GPUs", 1, 512, 64, "total_gpus")
    if not gpus:
        raise UserError("a plan needs at least one GPU type: choose one under Search")
    specs = tuple(inputs.gpu_of(name) for name in gpus)
    prices = inputs.price_list()
    kept = tuple((name, usd) for name, usd in prices.overrides if name in gpus)
    return Search(
        engine=question.engine(specs[0]),
        traffic=question.traffic,
        slo=question.slo,
        gpus=specs,
        total_gpus=most,
        kv_cache_dtypes=dtypes,
        prices=type(prices)(prices.tier, kept),
        quantization=question.quantization,
    )


def _answer(answer: PlanAnswer, search: Search) -> None:
    report = answer.report
    if not report.plans:
        _no_plan(answer, search)
        return
    best = report.plans[0]
    _sentence(best, answer.is_quick)
    if not answer.is_quick:
        _surer(report)
    note_warnings((*answer.notes, *best.warnings))
    measured = results.measured_instead(report)
    if measured is not None:
        told = f"{figures.name_of(measured)}, at {results.usd(measured.usd_per_hour)} per hour"
        st.caption(escaped(f"The cheapest plan whose step times were measured is plan {measured.rank}: {told}."))
    _numbers(best, answer.is_quick)
    if answer.is_quick:
        st.subheader("Plans of the first look, preliminary")
        _table(report)
        return
    _why_not_cheaper(answer, search)
    st.subheader("All plans that meet the SLO")
    _table(report)
    for sentence in results.warnings_of_others(report, (*answer.notes, *best.warnings)):
        st.caption(f":material/info: {escaped(begun(sentence))}.")
    left, right = st.columns(2)
    with left:
        st.subheader("Throughput against speed")
        show_chart(figures.pareto(report), "pareto")
    with right:
        st.subheader("Cost per 1M tokens")
        show_chart(figures.cost(report), "cost")
    _exports(report)
    _foundations(answer)


def _no_plan(answer: PlanAnswer, search: Search) -> None:
    if answer.is_quick:
        st.info(f"{_FIRST_LOOK} no deployment of this search meets the SLO.", icon=":material/hourglass_top:")
    else:
        st.error("No deployment of this search meets the SLO.", icon=":material/block:")
    _others(search)
    st.subheader("Why each engine fails")
    show_table(_rejections(answer.report), key="rejections")
    st.caption("Loosen the SLO on the left, or add GPU types and KV formats under Search.")


_FIRST_LOOK = f"First look, from the first {QUICK_SECONDS:.0f} s of the load:"


def _sentence(best: Plan, is_quick: bool) -> None:
    used = best.deployment
    gpus = f"{best.num_gpus} × {inputs.gpu_label(used.system)}"
    replicas = f"{used.replicas} replica{'s' * (used.replicas > 1)} of tensor parallel {used.tensor_parallel_size}"
    price = f", for {results.usd(best.usd_per_hour)} per hour" if best.usd_per_hour is not None else ""
    what = f"{gpus}: {replicas}, {figures.kv_name(used.kv_cache_dtype)} KV cache{price}."
    if is_quick:
        text = f"{_FIRST_LOOK} {what} All numbers are preliminary; the search with the whole load may change them."
        st.info(escaped(text), icon=":material/hourglass_top:")
    else:
        draw = st.success if results.is_sure(best) else st.info
        sure = f"How sure: {results.confidence(best)}."
        head = "Take" if results.is_sure(best) else "The cheapest on this load, but not a sure one:"
        draw(f"**{escaped(f'{head} {what}')}** {escaped(sure)}", icon=":material/fact_check:")
    st.caption(escaped(f"Step times: {results.evidence_words(best.result)} ({best.result.step_time})."))


def _surer(report: PlanReport) -> None:
    """What to take instead by those whom the cheapest is not sure enough."""
    if results.is_sure(report.plans[0]):
        return
    surer = next((plan for plan in report.plans if plan.loads is not None and results.is_sure(plan)), None)
    if surer is None:
        st.caption("None of the plans that were drawn meets the SLO in every draw: add a replica, or loosen the SLO.")
        return
    price = f" for {results.usd(surer.usd_per_hour)} per hour" if surer.usd_per_hour is not None else ""
    told = f"To be sure, take plan {surer.rank}, {figures.name_of(surer)}{price}."
    draws = f"It meets the SLO in {surer.loads.met} of {surer.loads.of} draws."
    st.success(f"**{escaped(told)}** {escaped(draws)}", icon=":material/fact_check:")


def _numbers(best: Plan, is_quick: bool) -> None:
    tag = results.evidence_tag(best.result)
    beside = f" ({tag})" if tag else ""
    about, digits = ("≈ ", 2) if is_quick else ("", 3)
    columns = st.columns(3 + len(best.terms))
    costs = (
        ("US$ per hour", best.usd_per_hour, best.price_source),
        ("US$/1M tokens", best.usd_per_million_tokens, results.definition("usd_per_million_tokens")),
        ("US$/1M output", best.usd_per_million_output_tokens, results.definition("usd_per_million_output_tokens")),
    )
    for column, (label, value, meaning) in zip(columns, costs, strict=False):
        column.metric(label, about + results.usd(value, digits), border=True, help=meaning)
    for column, term in zip(columns[3:], best.terms, strict=True):
        interval = results.term_interval(term)
        column.metric(
            f"{results.TERMS[term.term]} p{term.percentile:g}, ms",
            about + results.shown(term.achieved_ms, interval, digits),
            border=True,
            help=results.definition(f"{term.term}_ms"),
        )
    st.caption(escaped("; ".join(_judged(term) + beside for term in best.terms) + "."))


def _judged(term: SloTerm) -> str:
    interval = results.term_interval(term)
    span = f", {results.shown_range(interval)} ms over all draws" if interval else ""
    name, good = results.TERMS[term.term], results.verdict(term.achieved_ms <= term.limit_ms)
    return f"{name} p{term.percentile:g} {good} its limit of {term.limit_ms:,g} ms{span}"


def _why_not_cheaper(answer: PlanAnswer, search: Search) -> None:
    st.subheader("Why nothing cheaper")
    if answer.cheaper:
        first = answer.cheaper[0]
        price = results.usd(first.usd_per_hour)
        st.write(escaped(f"The next cheaper in this search, {first.what} at {price} per hour: {first.reason}."))
    else:
        st.write("Nothing in this search costs less: one GPU, the cheapest of it, already meets the SLO.")
    _others(search)
    if len(answer.cheaper) > 1:
        rows = [
            {"what": each.what, "US$/h at least": results.usd(each.usd_per_hour), "why not": each.reason}
            for each in answer.cheaper
        ]
        with st.expander("Everything cheaper, and why not", key="cheaper"):
            show_table(rows, key="cheaper_rows")


def _others(search: Search) -> None:
    """Which GPU types were not looked at, and a button that looks at them."""
    tried = [gpu.id for gpu in search.gpus]
    untried = [name for name in inputs.priced_gpus() if name not in tried]
    if not untried:
        return
    every = [name for name in inputs.all_gpus() if name in (*tried, *untried)]
    why = f": this search was of the {inputs.gpu_label(tried[0])} alone" if len(tried) == 1 else ""
    if tried == [inputs.DEFAULT_GPU]:
        why += ", the GPU type that step times were measured on"
    told = f"{len(untried)} of the {len(every)} GPU types with a price were not tried and may cost less{why}."
    text, button = st.columns([2, 1], vertical_alignment="center")
    text.write(escaped(told))
    text.caption(f"All of them at once: {_WIDE_SEARCH}")
    button.button(
        f"Compare all {len(every)} GPU types",
        key="compare_all_gpus",
        help="Step times of GPUs without a profile of their own come from data sheets, and the plan says so.",
        on_click=inputs.set_gpus,
        args=(every,),
        width="stretch",
    )


def _table(report: PlanReport) -> None:
    columns = {name: st.column_config.Column(width=width) for name, width in _WIDTHS.items()}
    rows = [_row(plan) for plan in report.plans]
    if not any(plan.loads for plan in report.plans):
        rows = [row | {"SLO held in": ""} for row in rows]
    told = [name for name in rows[0] if any(row[name] != "" for row in rows)]
    show_table([{name: row[name] for name in told} for row in rows], key="plans", column_config=columns)
    st.caption(
        "Cheapest per hour first; at the same price the more precise KV cache first. For each engine, the fewest "
        "replicas that meet the SLO."
    )


# Narrow enough that what decides is seen in a window of 1,280 pixels.
_WIDTHS = {"plan": 45, "KV": 50, "US$/h": 65, "P(SLO)": 85, "SLO held in": 85, "step times": 95}


def _row(plan: Plan) -> dict[str, object]:
    """What decides first."""
    used = plan.deployment
    digits = 2 if results.evidence_tag(plan.result) else 3
    row: dict[str, object] = {
        "plan": plan.rank,
        "GPUs": f"{plan.num_gpus} × {used.system}",
        "KV": figures.kv_name(used.kv_cache_dtype),
        "US$/h": results.usd(plan.usd_per_hour),
    }
    for term in plan.terms:
        interval = results.term_interval(term)
        sign = results.verdict(term.achieved_ms <= term.limit_ms)[0]
        achieved = results.shown(term.achieved_ms, interval, digits)
        row[f"{results.TERMS[term.term]} p{term.percentile:g}, ms"] = f"{sign} {achieved}"
    return row | {
        "P(SLO)": results.likely(plan),
        "SLO held in": f"{plan.loads.met} of {plan.loads.of}" if plan.loads else "this load",
        "step times": str(plan.step_times.basis),
        "replicas × TP": f"{used.replicas} × {used.tensor_parallel_size}",
        "max_num_seqs": used.max_num_seqs,
        "US$/1M tokens": results.usd(plan.usd_per_million_tokens),
        "tokens/s per GPU": results.shown(plan.output_tokens_per_s_per_gpu),
        "tokens/s per user": results.shown(plan.tokens_per_s_per_user, digits=digits),
    }


def _rejections(report: PlanReport) -> list[dict[str, object]]:
    return [
        {
            "GPU": each.system,
            "TP": each.tensor_parallel_size,
            "KV": figures.kv_name(each.kv_cache_dtype),
            "max_num_seqs": each.max_num_seqs,
            "fails": str(each.cause),
            "why": each.reason,
        }
        for each in report.rejections
    ]


def _exports(report: PlanReport) -> None:
    st.subheader("Take it with you")
    ranks = [plan.rank for plan in report.plans]
    columns = st.columns(2 + len(TARGETS), vertical_alignment="bottom")
    with columns[0]:
        rank = inputs.choose("Plan", ranks, ranks[0], "rank")
    columns[1].download_button(
        "Plan as JSON",
        report.model_dump_json(indent=2),
        "plan.json",
        "application/json",
        key="download_json",
        width="stretch",
    )
    chosen = report.plans[rank - 1]
    for column, target in zip(columns[2:], TARGETS, strict=True):
        label, file = _EXPORT_NAMES.get(target, (f"For {target}", f"{target}.txt"))
        try:
            text = export_plan(chosen, target)
        except UserError as error:
            column.caption(escaped(f"{label}: {error}"))
            continue
        column.download_button(label, text, file, "text/plain", key=f"download_{target}", width="stretch")
        with st.expander(f"Show the {label}", key=f"show_{target}"):
            st.code(text, language="bash")
    st.caption(escaped(f"In the start script, {length_remark(chosen.deployment)}"))


def _foundations(answer: PlanAnswer) -> None:
    report = answer.report
    effort = report.effort
    with st.expander("What this rests on", key="foundations"):
        st.write(
            escaped(
                f"Searched {effort.num_candidates:,} candidates ({effort.num_engines} engines) with "
                f"{effort.num_simulations} simulations of {report.question.workload.num_requests:,} requests; "
                f"{effort.num_engines_without_memory} engines lack memory, {effort.num_engines_out_of_reach} cannot "
                f"meet the SLO even without load. Seed {report.question.seed}."
            )
        )
        st.write(escaped(f"Step times: {report.step_time}."))
        if report.rejections:
            show_table(_rejections(report), key="rejections")
