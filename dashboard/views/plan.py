"""Plan: how many GPUs does this load need, and what does it cost?"""

from __future__ import annotations

import streamlit as st

from dashboard import inputs
from dashboard.components import answer_of, escaped, note_warnings, show_chart, show_table
from dashboard.figures import plan as figures
from dashboard.services import results, work
from dashboard.services.jobs import jobs
from dashboard.services.questions import Search, key_of
from dashboard.services.work import PlanAnswer
from planner.errors import UserError
from planner.export import TARGETS, export_plan
from planner.plan_report import Plan, PlanReport, SloTerm

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
    quick = answer_of(
        "plan_quick", key_of("plan", search, True), work.plan, search, trace, True, 1, waiting="First look"
    )
    if quick is None:
        return
    place = st.container()
    key, cores = key_of("plan", search, False), jobs().free_cores()
    whole = answer_of("plan", key, work.plan, search, trace, False, cores, waiting=_WHOLE)
    with place:
        _answer(whole or quick)


_WHOLE = "This is a first look at the beginning of the load. Searching with all of it, and drawing loads and step times"


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


def _answer(answer: PlanAnswer) -> None:
    report = answer.report
    if not report.plans:
        _no_plan(report)
        return
    best = report.plans[0]
    _sentence(best, answer.is_quick)
    if not answer.is_quick:
        _surer(report)
    _numbers(best)
    _why_not_cheaper(answer)
    st.subheader("All plans that meet the SLO")
    show_table([_row(plan) for plan in report.plans], key="plans")
    st.caption(
        "Cheapest per hour first; at the same price the more precise KV cache first. For each engine, the fewest "
        "replicas that meet the SLO."
    )
    left, right = st.columns(2)
    with left:
        st.subheader("Throughput against speed")
        show_chart(figures.pareto(report), "pareto")
    with right:
        st.subheader("Cost per 1M tokens")
        show_chart(figures.cost(report), "cost")
    _exports(report)
    note_warnings((*report.warnings, *best.warnings))
    _foundations(answer)


def _no_plan(report: PlanReport) -> None:
    st.error("No deployment of this search meets the SLO.", icon=":material/block:")
    st.subheader("Why each engine fails")
    show_table(_rejections(report), key="rejections")
    st.caption("Loosen the SLO on the left, or add GPU types and KV formats under Search.")


def _sentence(best: Plan, is_quick: bool) -> None:
    used = best.deployment
    gpus = f"{best.num_gpus} × {inputs.gpu_label(used.system)}"
    replicas = f"{used.replicas} replica{'s' * (used.replicas > 1)} of tensor parallel {used.tensor_parallel_size}"
    price = f", for {results.usd(best.usd_per_hour)} per hour" if best.usd_per_hour is not None else ""
    text = f"Take {gpus}: {replicas}, {figures.kv_name(used.kv_cache_dtype)} KV cache{price}."
    sure = results.confidence(best)
    draw = st.success if results.is_sure(best) and not is_quick else st.info
    draw(f"**{escaped(text)}** {escaped(f'How sure: {sure}.')}", icon=":material/fact_check:")
    st.caption(escaped(f"Step times: {results.evidence_words(best.result)} ({best.result.step_time})."))


def _surer(report: PlanReport) -> None:
    """What to take instead by those whom the cheapest is not sure enough."""
    if results.is_sure(report.plans[0]):
        return
    surer = next((plan for plan in report.plans if plan.loads is not None and results.is_sure(plan)), None)
    if surer is None:
        st.caption("No plan that was drawn more often meets the SLO in every draw: leave a margin.")
        return
    price = f" for {results.usd(surer.usd_per_hour)} per hour" if surer.usd_per_hour is not None else ""
    st.caption(
        escaped(
            f"To be surer, take plan {surer.rank}, {figures.name_of(surer)}{price}: it meets the SLO in "
            f"{surer.loads.met} of {surer.loads.of} draws."
        )
    )


def _numbers(best: Plan) -> None:
    tag = results.evidence_tag(best.result)
    beside = f" ({tag})" if tag else ""
    columns = st.columns(3 + len(best.terms))
    columns[0].metric("US$ per hour", results.usd(best.usd_per_hour), border=True, help=best.price_source)
    columns[1].metric(
        "US$/1M tokens",
        results.usd(best.usd_per_million_tokens),
        border=True,
        help=results.definition("usd_per_million_tokens"),
    )
    columns[2].metric(
        "US$/1M output",
        results.usd(best.usd_per_million_output_tokens),
        border=True,
        help=results.definition("usd_per_million_output_tokens"),
    )
    for column, term in zip(columns[3:], best.terms, strict=True):
        interval = results.term_interval(term)
        column.metric(
            f"{results.TERMS[term.term]} p{term.percentile:g}, ms",
            results.shown(term.achieved_ms, interval),
            border=True,
            help=results.definition(f"{term.term}_ms"),
        )
    st.caption(escaped("; ".join(_judged(term) + beside for term in best.terms) + "."))


def _judged(term: SloTerm) -> str:
    interval = results.term_interval(term)
    span = f", {results.shown_range(interval)} ms over all draws" if interval else ""
    name, good = results.TERMS[term.term], results.verdict(term.achieved_ms <= term.limit_ms)
    return f"{name} p{term.percentile:g} {good} its limit of {term.limit_ms:,g} ms{span}"


def _why_not_cheaper(answer: PlanAnswer) -> None:
    st.subheader("Why nothing cheaper")
    if answer.is_quick:
        st.caption("Comes with the whole search.")
        return
    if not answer.cheaper:
        st.write("Nothing in this search costs less: one replica of its cheapest GPU already meets the SLO.")
        return
    first = answer.cheaper[0]
    st.write(escaped(f"The next cheaper, {first.what} at {results.usd(first.usd_per_hour)} per hour: {first.reason}."))
    if len(answer.cheaper) > 1:
        rows = [
            {"what": each.what, "US$/h at least": results.usd(each.usd_per_hour), "why not": each.reason}
            for each in answer.cheaper
        ]
        with st.expander("Everything cheaper, and why not", key="cheaper"):
            show_table(rows, key="cheaper_rows")


def _row(plan: Plan) -> dict[str, object]:
    used = plan.deployment
    row: dict[str, object] = {
        "plan": plan.rank,
        "GPUs": f"{plan.num_gpus} × {used.system}",
        "replicas × TP": f"{used.replicas} × {used.tensor_parallel_size}",
        "KV": figures.kv_name(used.kv_cache_dtype),
        "max_num_seqs": used.max_num_seqs,
        "US$/h": results.usd(plan.usd_per_hour),
        "US$/1M tokens": results.usd(plan.usd_per_million_tokens),
    }
    digits = 2 if results.evidence_tag(plan.result) else 3
    for term in plan.terms:
        interval = results.term_interval(term)
        sign = results.verdict(term.achieved_ms <= term.limit_ms)[0]
        achieved = results.shown(term.achieved_ms, interval, digits)
        row[f"{results.TERMS[term.term]} p{term.percentile:g}, ms"] = f"{sign} {achieved}"
    row["tokens/s per GPU"] = results.shown(plan.output_tokens_per_s_per_gpu)
    row["tokens/s per user"] = results.shown(plan.tokens_per_s_per_user, digits=digits)
    likely = results.probability(plan)
    if likely is not None:
        low, high = (results.shown(100 * share, digits=2) for share in likely)
        row["P(SLO)"] = f"{low} to {high} %"
    row["SLO held in"] = f"{plan.loads.met} of {plan.loads.of} draws" if plan.loads else "this load"
    row["step times"] = results.evidence_tag(plan.result) or "measured or between"
    return row


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
