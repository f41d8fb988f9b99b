"""`memwall plan`: which deployments meet an SLO, ranked by cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from engine.commands.files import ensure_distinct
from planner.commands.options import (
    DEFAULT_MODEL,
    DEFAULT_SYSTEM,
    GROUP,
    BlockSize,
    EnableChunkedPrefill,
    EnablePrefixCaching,
    EnforceEager,
    GpuMemoryUtilization,
    KVCachePolicy,
    MaxModelLen,
    MaxNumBatchedTokens,
    Model,
    OutputOptions,
    Profiles,
    Quantization,
    Router,
    SLOOptions,
    SpeculationOptions,
    WorkloadOptions,
    flag,
    model_files,
    profile_files,
    profiles_from_option,
    slo_from_options,
    speculation_from_options,
    takes_groups,
    workload_from_options,
)
from planner.errors import UserError

if TYPE_CHECKING:
    from planner.hardware import GpuSpec
    from planner.memory import KVCacheDtype
    from planner.plan_report import Plan, PlanReport, Rejection
    from planner.search import Question

_SEARCH = "Search"
_SHOWN_PLANS = 10
_SEQS_COLUMN = 5
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What is searched, and how thoroughly."""

    system: Annotated[
        str, flag("--system", help="GPU ids to compare: h200_sxm,h100_sxm.", panel=_SEARCH, metavar="GPU,…")
    ] = DEFAULT_SYSTEM
    total_gpus: Annotated[
        int, flag("--total-gpus", help="Most GPUs that a plan may use.", panel=_SEARCH, metavar="N")
    ] = 64
    tensor_parallel_size: Annotated[
        str | None,
        flag(
            "--tensor-parallel-size",
            "-tp",
            help="Sizes to consider; default: 1,2,4,8 as far as they divide the model.",
            panel=_SEARCH,
            metavar="N,…",
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str,
        flag(
            "--kv-cache-dtype",
            help="KV formats to consider: auto, fp8, int8, int4, int2.",
            panel=_SEARCH,
            metavar="DTYPE,…",
        ),
    ] = "auto,fp8"
    max_kv_perplexity_increase: Annotated[
        float | None,
        flag(
            "--max-kv-perplexity-increase",
            help="Leave out KV formats that may increase perplexity by more, or were never measured; an indication, as "
            "it was measured on a small model.",
            panel=_SEARCH,
            metavar="PERCENT",
        ),
    ] = None
    max_num_seqs: Annotated[
        str, flag("--max-num-seqs", help="Batch limits to consider.", panel=_SEARCH, metavar="N,…")
    ] = "64,256"
    draft_lengths: Annotated[
        str | None,
        flag(
            "--draft-lengths",
            help="Values of k to consider with --speculative-config; default: 0, 1, 2, 4, … up to its k.",
            panel=_SEARCH,
            metavar="K,…",
        ),
    ] = None
    price: Annotated[
        list[str] | None,
        flag("--price", help="USD per GPU hour, e.g. h200_sxm=2.90; repeatable.", panel=_SEARCH, metavar="GPU=USD"),
    ] = None
    price_tier: Annotated[
        str,
        flag("--price-tier", help="low, typical or high of the catalog's prices.", panel=_SEARCH, metavar="TIER"),
    ] = "typical"
    finalists: Annotated[
        int, flag("--finalists", help="Plans to say how sure they are of.", panel=_SEARCH, min=0, metavar="N")
    ] = 3
    draws: Annotated[
        int | None,
        flag(
            "--draws",
            help="Simulations per finalist on resampled loads and with drawn step times; default 16, or 5 loads where "
            "step times have no known error.",
            panel=_SEARCH,
            min=1,
            metavar="N",
        ),
    ] = None
    jobs: Annotated[int, flag("--jobs", "-j", help="Processes; -1 for one per core.", panel=_SEARCH, metavar="N")] = -1


@takes_groups
def plan(
    model: Model = DEFAULT_MODEL,
    search: SearchOptions = GROUP,
    workload: WorkloadOptions = GROUP,
    slo: SLOOptions = GROUP,
    quantization: Quantization = None,
    profile: Profiles = None,
    max_model_len: MaxModelLen = None,
    max_num_batched_tokens: MaxNumBatchedTokens = 8192,
    gpu_memory_utilization: GpuMemoryUtilization = 0.92,
    block_size: BlockSize = None,
    kv_cache_policy: KVCachePolicy = "hybrid",
    enforce_eager: EnforceEager = False,
    enable_prefix_caching: EnablePrefixCaching = None,
    enable_chunked_prefill: EnableChunkedPrefill = True,
    router: Router = "auto",
    warmup_s: Annotated[
        float | None,
        flag("--warmup-s", help="Do not measure what arrives earlier.", panel=_SEARCH, metavar="S"),
    ] = None,
    reject_too_long: Annotated[
        bool,
        flag("--reject-too-long", help="Reject prompts beyond max-model-len instead of refusing.", panel=_SEARCH),
    ] = False,
    speculation: SpeculationOptions = GROUP,
    output: OutputOptions = GROUP,
) -> int:
    """Find the cheapest deployments that meet an SLO.

    Without arguments: Llama-3.1-8B on H200 under a synthetic chat load of 8 requests/s, TTFT within 1,000 ms and TPOT
    within 50 ms for 99 % of requests.
    """
    from planner.catalog import load_model
    from planner.commands.tables import deliver
    from planner.deployment import Deployment, length_for
    from planner.search import DEFAULT_SLO, Question
    from planner.search import plan as search_plans

    inputs = [*model_files(model), *profile_files(profile), *workload.files(), *speculation.files()]
    ensure_distinct(inputs, output.files())
    spec = load_model(model, quantization)
    gpus = _gpus(search.system)
    load = workload_from_options(workload)
    drafter = speculation_from_options(speculation)
    limits = slo_from_options(slo)
    hashes = load.prefix_block_hashes is not None
    engine = Deployment(
        model=spec,
        gpu=gpus[0],
        max_model_len=length_for(load, spec) if max_model_len is None else max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_policy=kv_cache_policy,
        enforce_eager=enforce_eager,
        enable_prefix_caching=hashes if enable_prefix_caching is None else enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        router=router,
        profiles=profiles_from_option(profile, quantization),
    )
    question = Question(
        engine=engine,
        workload=load,
        slo=limits if limits.limits() else DEFAULT_SLO,
        gpus=gpus,
        total_gpus=search.total_gpus,
        tensor_parallel_sizes=_numbers("--tensor-parallel-size", search.tensor_parallel_size, 1),
        kv_cache_dtypes=_kv_cache_dtypes(search.kv_cache_dtype),
        max_num_seqs=_numbers("--max-num-seqs", search.max_num_seqs, 1) or (),
        draft_lengths=_draft_lengths(search.draft_lengths, drafter.num_speculative_tokens if drafter else 0),
        speculation=drafter,
        prices=_prices(search, [gpu.id for gpu in gpus]),
        seed=workload.seed,
        num_finalists=search.finalists,
        num_draws=search.draws,
        warmup_s=warmup_s,
        reject_too_long=reject_too_long,
        quantization=quantization,
        max_kv_perplexity_increase_percent=search.max_kv_perplexity_increase,
    )
    with _progress_bar() as progress:
        report = search_plans(question, search.jobs, progress)
    deliver(report, _table(report), output)
    if not report.plans:
        print(f"no feasible plan: {_nearest(report, question)}", file=sys.stderr)
        return 1
    return 0


# ---- flags ---------------------------------------------------------------------------------------------------------


def _listed(name: str, text: str, read: Callable[[str], _Value], example: str) -> tuple[_Value, ...]:
    """The distinct values of a comma-separated flag, in the order given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{name} is {text!r}; write values separated by commas, e.g. {example}")
    return tuple(dict.fromkeys(read(part) for part in parts))


def _numbers(name: str, text: str | None, least: int) -> tuple[int, ...] | None:
    if text is None:
        return None

    def read(part: str) -> int:
        try:
            value = int(part)
        except ValueError:
            value = least - 1
        if value < least:
            raise UserError(
                f"{name} has {part!r}; it takes whole numbers from {least} on, e.g. {least + 1},{least + 3}"
            )
        return value

    return _listed(name, text, read, f"{least + 1},{least + 3}")


def _gpus(text: str) -> tuple[GpuSpec, ...]:
    from planner.catalog import load_gpu

    return _listed("--system", text, load_gpu, "h200_sxm,h100_sxm")


def _kv_cache_dtypes(text: str) -> tuple[KVCacheDtype, ...]:
    from planner.memory import KVCacheDtype

    return _listed("--kv-cache-dtype", text, KVCacheDtype.parse, "auto,fp8")


def _draft_lengths(text: str | None, longest: int) -> tuple[int, ...]:
    lengths = _numbers("--draft-lengths", text, 0)
    if lengths is not None:
        return lengths
    powers = [1 << i for i in range(longest.bit_length()) if 1 << i <= longest]
    return tuple(sorted({0, longest, *powers}))


def _prices(search: SearchOptions, systems: Sequence[str]) -> Any:
    import math

    from planner.catalog import load_gpu
    from planner.deployment import PriceList

    overrides = []
    for text in search.price or []:
        name, equals, usd = text.partition("=")
        try:
            value = float(usd)
        except ValueError:
            value = math.nan
        if not equals or not (math.isfinite(value) and value > 0):
            raise UserError(f"--price is {text!r}; write a GPU and USD per hour, e.g. h200_sxm=2.90")
        overrides.append((load_gpu(name.strip()).id, value))
        if overrides[-1][0] not in systems:
            raise UserError(f"--price is for {overrides[-1][0]}, which is not among --system {','.join(systems)}")
    return PriceList(search.price_tier, tuple(overrides))


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield advance


# ---- what people read ----------------------------------------------------------------------------------------------


def _table(report: PlanReport) -> str:
    from planner.commands.tables import columns, page, paragraph, verdict, warnings

    asked = report.question
    load = asked.workload
    limits = {"TTFT": asked.ttft_ms, "TPOT": asked.tpot_ms, "E2EL": asked.e2el_ms}
    slo = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items() if limit is not None)
    rate = f"{load.request_rate_per_s:.2f} requests/s" if load.request_rate_per_s else "all at once"
    head = [
        paragraph(f"{asked.model} · {load.name}: {load.num_requests:,} requests, {rate} · p{asked.percentile:g} {slo}"),
        paragraph(report.step_time, "step times: "),
    ]
    if not report.plans:
        return page(head, verdict(False, "no feasible plan"), _rejections(report.rejections), warnings(report.warnings))
    rows = _folded(report.plans)
    table = columns(
        _header(report), [row for place, row in enumerate(rows) if place < _SHOWN_PLANS or "*" in row[0]], left=2
    )
    notes = [
        _legend(report),
        "$/1M: input and output tokens at this load. * on the Pareto front of tok/s/GPU and tok/s/user.",
        f"{len(report.plans)} feasible plans in all; those that differ in nothing but seqs share a row; --output json "
        f"has each of them.",
    ]
    said = report.plans[0].warnings
    return page(
        head,
        table,
        [paragraph(note) for note in notes],
        _kv_quality(report.plans),
        _winner(report.plans[0]),
        _other_finalists(report.plans),
        _rejections(report.rejections),
        _effort(report),
        warnings([warning for warning in report.warnings if warning not in said]),
    )


def _legend(report: PlanReport) -> str:
    """What the marks of step times mean, those that are there."""
    from planner.basis import MARKS, MEANING

    there = {plan.step_times.basis for plan in report.plans}
    return "by, what step times rest on: " + "; ".join(
        f"{MARKS[basis]} {meaning}" for basis, meaning in MEANING.items() if basis in there
    )


def _other_finalists(plans: Sequence[Plan]) -> list[str]:
    """How sure the others are that were simulated several times."""
    from planner.commands.tables import pairs, step_times

    rows = [
        (f"plan {plan.rank}", f"{_how_sure(plan)}; step times {step_times(plan.step_times)}")
        for plan in plans[1:]
        if plan.loads is not None
    ]
    return ["other finalists:", pairs(rows)] if rows else []


def _how_sure(plan: Plan) -> str:
    from planner.commands.tables import between, chance, milliseconds

    sure = plan.confidence
    if sure is None or sure.slo_probability is None:
        assert plan.loads is not None, "only finalists are asked"
        return f"no interval: {plan.no_interval}; the SLO held on {plan.loads.met} of {plan.loads.of} loads"
    shown = [
        f"{term.term.upper()} p{term.percentile:g} {between(found.at_slo_percentile, milliseconds)} ms"
        for term in plan.terms
        if (found := sure.metric_ms(term.term)) is not None
    ]
    tokens = between(sure.output_throughput_tokens_per_s, lambda value: f"{value:,.0f}")
    return f"meets the SLO with probability {chance(sure.slo_probability)}; {', '.join(shown)}; {tokens} tokens/s"


def _header(report: PlanReport) -> list[str]:
    terms = [f"{term.term.upper()} ms" for term in report.plans[0].terms]
    return [
        "#",
        "system",
        "GPUs",
        "TP×rep",
        "KV",
        "seqs",
        "k",
        "$/h",
        "$/1M",
        *terms,
        "tok/s/GPU",
        "tok/s/user",
        "SLO held",
        "by",
    ]


def _folded(plans: Sequence[Plan]) -> list[list[str]]:
    """A row for each plan, those that read the same but for the batch limit in one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for plan in plans:
        row = _row(plan)
        same = rows.setdefault((*row[1:_SEQS_COLUMN], *row[_SEQS_COLUMN + 1 : -2], row[-1]), row)
        if same is not row:
            same[_SEQS_COLUMN] += f",{row[_SEQS_COLUMN]}"
            same[0] += "*" if "*" in row[0] and "*" not in same[0] else ""
    return list(rows.values())


def _row(plan: Plan) -> list[str]:
    from planner.basis import MARKS
    from planner.commands.tables import milliseconds

    used = plan.deployment
    return [
        f"{plan.rank}{'*' if plan.pareto else ''}",
        used.system,
        str(plan.num_gpus),
        f"{used.tensor_parallel_size}×{used.replicas}",
        _kv_name(used.kv_cache_dtype),
        str(used.max_num_seqs),
        str(used.num_speculative_tokens),
        _usd(plan.usd_per_hour),
        _usd(plan.usd_per_million_tokens),
        *[milliseconds(term.achieved_ms) for term in plan.terms],
        f"{plan.output_tokens_per_s_per_gpu:,.0f}",
        f"{plan.tokens_per_s_per_user:,.0f}",
        f"{plan.loads.met}/{plan.loads.of}" if plan.loads else "-",
        MARKS[plan.step_times.basis],
    ]


def _kv_name(kv_cache_dtype: str) -> str:
    return "bf16" if kv_cache_dtype == "bfloat16" else kv_cache_dtype


def _kv_quality(plans: Sequence[Plan]) -> list[str]:
    """What the KV formats of the plans cost in quality; nothing where all keep bfloat16."""
    from planner.commands.tables import pairs
    from planner.quality import described

    found = {_kv_name(plan.deployment.kv_cache_dtype): plan.kv_quality for plan in plans}
    rows = [(name, described(quality)) for name, quality in found.items() if name != "bf16"]
    return ["KV quality, against bf16:", pairs(rows)] if rows else []


def _usd(value: float | None) -> str:
    return f"{value:,.2f}" if value is not None else "?"


def _winner(plan: Plan) -> list[str]:
    """The first plan in full: what binds, how sure, how full."""
    from planner.commands.tables import (
        between,
        chance,
        milliseconds,
        pairs,
        paragraph,
        step_times,
        unknown,
        verdict,
        warnings,
    )

    used, result = plan.deployment, plan.result
    rows = []
    for term in plan.terms:
        text = f"{milliseconds(term.achieved_ms)} ms of {term.limit_ms:g} ms ({term.share_of_limit:.0%})"
        around = plan.confidence.metric_ms(term.term) if plan.confidence else None
        if around is not None:
            text += f"; 90 % interval {between(around.at_slo_percentile, milliseconds)} ms"
        elif term.range_ms is not None:
            low, high = milliseconds(term.range_ms.low), milliseconds(term.range_ms.high)
            text += f"; {low} to {high} ms over resampled loads"
        rows.append(
            (
                f"{term.term.upper()} p{term.percentile:g}",
                text + (", the nearest limit" if term.term == plan.binding_term else ""),
            )
        )
    if plan.confidence and plan.confidence.slo_probability:
        drawn = f"with probability {chance(plan.confidence.slo_probability)}; drawn: {plan.confidence.method}"
        rows.append(("meets the SLO", drawn))
        asked = {term.term for term in plan.terms}
        for name in ("ttft", "tpot", "e2el"):
            found, around = result.metric_ms(name), plan.confidence.metric_ms(name)
            if name not in asked and found is not None and around is not None:
                shown = between(around.at_slo_percentile, milliseconds)
                text = f"{milliseconds(found.at_slo_percentile)} ms; 90 % interval {shown} ms"
                rows.append((f"{name.upper()} p{plan.terms[0].percentile:g}", text))
        tokens = between(plan.confidence.output_throughput_tokens_per_s, lambda value: f"{value:,.0f}")
        rows.append(("throughput", f"{result.output_throughput_tokens_per_s:,.0f} tokens/s; 90 % interval {tokens}"))
    elif plan.loads:
        rows.append(("SLO held", f"on {plan.loads.met} of {plan.loads.of} loads ({plan.loads.method})"))
        rows.append(("no interval", plan.no_interval or "-"))
    rows.append(
        (
            "KV cache",
            f"{plan.num_kv_blocks:,} blocks per replica, {result.kv_usage_peak:.0%} full at the peak; "
            f"{plan.max_concurrency:.1f} sequences of {used.max_model_len:,} tokens fit",
        )
    )
    rows.append(("step times", step_times(plan.step_times)))
    if plan.usd_per_gpu_hour is not None:
        known = plan.price_date is None or plan.price_date in (plan.price_source or "")
        dated = f", {plan.price_date}" if plan.price_date and not known else ""
        rows.append(("price", f"${plan.usd_per_gpu_hour:.2f} per GPU hour ({plan.price_source}{dated})"))
    name = (
        f"plan 1: {plan.num_gpus} × {used.system} as {used.replicas} "
        f"replica{'s' if used.replicas > 1 else ''} of TP {used.tensor_parallel_size}"
    )
    launch = paragraph(
        "To launch it: memwall plan … --output-file plan.json, then memwall export plan.json --target vllm"
    )
    beyond = unknown(plan.confidence) if plan.confidence else []
    return [verdict(True, name), pairs(rows), *beyond, *warnings(plan.warnings), launch]


def _rejections(rejections: Sequence[Rejection]) -> list[str]:
    """Engines without a plan, those with the same constraint together."""
    from planner.commands.tables import pairs

    groups: dict[tuple[str, int, str], list[Rejection]] = {}
    for each in rejections:
        groups.setdefault((each.system, each.tensor_parallel_size, each.reason), []).append(each)
    if not groups:
        return []
    rows = []
    for (system, tp, reason), members in groups.items():
        kinds = ", ".join(dict.fromkeys(member.kv_cache_dtype for member in members))
        rows.append((f"{system} TP {tp}", f"{members[0].cause}: {reason} [{kinds}]"))
    return ["not feasible:", pairs(rows)]


def _effort(report: PlanReport) -> str:
    from planner.commands.tables import paragraph

    e = report.effort
    excluded = f"{e.num_engines_without_quality} excluded by KV quality, " if e.num_engines_without_quality else ""
    if e.num_engines_not_calibrated:
        excluded = f"{e.num_engines_not_calibrated} of which nothing was calibrated, {excluded}"
    return paragraph(
        f"searched {e.num_candidates:,} candidates ({e.num_engines} engines): {excluded}"
        f"{e.num_engines_without_memory} engines lack memory, {e.num_engines_out_of_reach} out of reach by bound, "
        f"{e.num_engines_simulated} simulated in {e.num_simulations} runs"
    )


def _nearest(report: PlanReport, question: Question) -> str:
    """The rejection that came furthest."""
    order = {"profile": 0, "quality": 1, "memory": 2, "floor": 3, "gpus": 4, "slo": 5}
    best = max(report.rejections, key=lambda r: (order[r.cause.value], r.tensor_parallel_size))
    return f"closest is {best.system} at tensor parallel {best.tensor_parallel_size}, where {best.reason}"
