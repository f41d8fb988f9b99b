"""Figures of a plan: the Pareto front, and what a million tokens cost."""

from __future__ import annotations

from dashboard.figures import theme
from dashboard.figures.theme import Chart
from dashboard.services.results import definition, shown, usd
from planner.plan_report import Plan, PlanReport

_SHOWN = 12


def name_of(plan: Plan) -> str:
    """A plan in a few words."""
    used = plan.deployment
    return f"{plan.num_gpus} × {used.system}, TP {used.tensor_parallel_size}, {kv_name(used.kv_cache_dtype)} KV"


def kv_name(dtype: str) -> str:
    """As people write it."""
    return "bf16" if dtype == "bfloat16" else dtype


def pareto(report: PlanReport) -> Chart:
    """Tokens/s per GPU against tokens/s per user, one point per plan; the region that the TPOT limit leaves shaded."""
    chart = theme.figure("tokens/s per user (1 / mean TPOT)", "output tokens/s per GPU")
    kinds = list(dict.fromkeys(kv_name(plan.deployment.kv_cache_dtype) for plan in report.plans))
    sizes = sorted({plan.deployment.tensor_parallel_size for plan in report.plans})
    told = definition("tokens_per_s_per_user") + "; " + definition("pareto")
    for kind, dtype in enumerate(kinds):
        for tp in sizes:
            plans = [
                plan
                for plan in report.plans
                if kv_name(plan.deployment.kv_cache_dtype) == dtype and plan.deployment.tensor_parallel_size == tp
            ]
            if not plans:
                continue
            chart.add_scatter(
                x=[plan.tokens_per_s_per_user for plan in plans],
                y=[plan.output_tokens_per_s_per_gpu for plan in plans],
                mode="markers",
                name=f"TP {tp}, {dtype} KV",
                marker={
                    "color": theme.COLOURS[kind % len(theme.COLOURS)],
                    "symbol": theme.MARKERS[sizes.index(tp) % len(theme.MARKERS)],
                    "size": [16 if plan.rank == 1 else 10 for plan in plans],
                    "line": {"width": [3 if plan.pareto else 0 for plan in plans], "color": theme.NEUTRAL},
                },
                customdata=[
                    (plan.rank, name_of(plan), plan.deployment.max_num_seqs, usd(plan.usd_per_hour)) for plan in plans
                ],
                hovertemplate=theme.hover(
                    "<b>plan %{customdata[0]}</b>: %{customdata[1]}",
                    "max_num_seqs %{customdata[2]}, %{customdata[3]} per hour",
                    "%{x:.3g} tokens/s per user",
                    "%{y:.3g} output tokens/s per GPU",
                    definition=told,
                ),
            )
    front = sorted((plan for plan in report.plans if plan.pareto), key=lambda plan: plan.tokens_per_s_per_user)
    if len(front) > 1:
        chart.add_scatter(
            x=[plan.tokens_per_s_per_user for plan in front],
            y=[plan.output_tokens_per_s_per_gpu for plan in front],
            mode="lines",
            name="Pareto front",
            line={"color": theme.NEUTRAL, "dash": "dot", "width": 1},
            hoverinfo="skip",
        )
    slowest = 1e3 / report.question.tpot_ms if report.question.tpot_ms else 0.0
    if report.plans and slowest:
        most = 1.1 * max(plan.tokens_per_s_per_user for plan in report.plans)
        chart.add_vrect(
            x0=slowest, x1=max(most, 1.1 * slowest), fillcolor=theme.GOOD_REGION, line_width=0, layer="below"
        )
        theme.limit_line(chart, slowest, f"TPOT ≤ {report.question.tpot_ms:g} ms", axis="x")
    chart.update_xaxes(rangemode="tozero")
    chart.update_yaxes(rangemode="tozero")
    return Chart(chart, _pareto_summary(report), [_row(plan) for plan in report.plans])


def _pareto_summary(report: PlanReport) -> str:
    if not report.plans:
        return "No plan meets the SLO."
    fastest = max(report.plans, key=lambda plan: plan.tokens_per_s_per_user)
    densest = max(report.plans, key=lambda plan: plan.output_tokens_per_s_per_gpu)
    return (
        f"All {len(report.plans)} plans meet the SLO, so that all lie in the shaded region. Most tokens per GPU: "
        f"{name_of(densest)}, with {shown(densest.output_tokens_per_s_per_gpu)} tokens/s per GPU. Fastest for a user: "
        f"{name_of(fastest)}, with {shown(fastest.tokens_per_s_per_user)} tokens/s per user. The large marker is "
        f"plan 1; rimmed ones are on the front."
    )


def _row(plan: Plan) -> dict[str, object]:
    return {
        "plan": plan.rank,
        "what": name_of(plan),
        "max_num_seqs": plan.deployment.max_num_seqs,
        "tokens/s per user": shown(plan.tokens_per_s_per_user),
        "output tokens/s per GPU": shown(plan.output_tokens_per_s_per_gpu),
        "on the front": "yes" if plan.pareto else "no",
    }


def cost(report: PlanReport) -> Chart:
    """US dollars per million tokens of the first plans: of input and output, and of output alone."""
    seen: dict[str, Plan] = {}
    for plan in report.plans:
        if plan.usd_per_million_tokens is not None:
            seen.setdefault(name_of(plan), plan)
    plans = list(seen.values())[:_SHOWN]
    chart = theme.figure("US$/1M tokens", "", height=120 + 34 * max(2, len(plans)), barmode="group")
    names = [f"{plan.rank}: {name_of(plan)}" for plan in plans]
    for number, (field, label) in enumerate(
        (("usd_per_million_tokens", "input and output"), ("usd_per_million_output_tokens", "output only"))
    ):
        chart.add_bar(
            x=[getattr(plan, field) for plan in plans],
            y=names,
            orientation="h",
            name=label,
            marker=theme.bar(number),
            text=[usd(getattr(plan, field)) for plan in plans],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=theme.hover("<b>%{y}</b>", f"%{{text}} per 1M tokens, {label}", definition=definition(field)),
        )
    chart.update_yaxes(autorange="reversed")
    if plans:  # room for the number behind the longest bar
        most = max(plan.usd_per_million_output_tokens or plan.usd_per_million_tokens or 0.0 for plan in plans)
        chart.update_xaxes(range=[0, 1.25 * most])
    rows = [
        {
            "plan": plan.rank,
            "what": name_of(plan),
            "US$/1M, input and output": usd(plan.usd_per_million_tokens),
            "US$/1M, output only": usd(plan.usd_per_million_output_tokens),
        }
        for plan in plans
    ]
    summary = "No price is known for these GPUs."
    if plans:
        # Of those that cost the same but for noise, the first.
        cheapest = min(plan.usd_per_million_tokens or 0.0 for plan in plans)
        least = next(plan for plan in plans if (plan.usd_per_million_tokens or 0.0) <= 1.005 * cheapest)
        summary = (
            f"Cheapest per token at this load: {name_of(least)}, at {usd(least.usd_per_million_tokens)} per 1M tokens "
            f"of input and output, {usd(least.usd_per_million_output_tokens)} per 1M of output alone. A fleet "
            f"that is not full costs more per token than a full one."
        )
    return Chart(chart, summary, rows)
