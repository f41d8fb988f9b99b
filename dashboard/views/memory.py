"""Context and memory: what fits, how many of it, how fast, and why it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import streamlit as st

from dashboard import inputs
from dashboard.components import escaped, note_warnings, show_chart, show_table
from dashboard.figures import memory as figures
from dashboard.figures.plan import kv_name
from dashboard.services import capacity, results
from dashboard.services.capacity import Fit, Line
from dashboard.services.questions import Engine
from planner.memory import GIB, MemoryReport
from planner.model import ModelSpec

_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
_TABLE_DTYPES = ("bfloat16", "fp8")


def page() -> None:
    """The whole page."""
    st.title("What fits in memory?")
    engine, users = _inputs()
    report = capacity.memory_of(engine, users)
    _verdict(report)
    _numbers(report)
    _measured(report, capacity.modelled_memory_of(engine, users))
    left, right = st.columns(2)
    with left:
        st.subheader("Where the memory goes")
        show_chart(_stack(engine, report, users), "memory_stack")
    with right:
        st.subheader("How many fit, by KV format")
        _lines(capacity.concurrency_lines(engine, _longest(engine)), users, report, "concurrency")
    _gpus(engine, users)
    left, right = st.columns(2)
    with left:
        st.subheader("How fast, by context")
        dtypes = tuple(
            dict.fromkeys(("bfloat16", "fp8" if engine.kv_cache_dtype == "bfloat16" else engine.kv_cache_dtype))
        )
        lines = capacity.speed_lines(engine, dtypes, _longest(engine))
        if any(line.points for line in lines):
            show_chart(figures.speed(lines, report.max_model_len), "speed")
        else:
            st.info("Nothing fits, so nothing is generated.")
    with right:
        st.subheader("How many fit, by kind of attention")
        _lines(capacity.attention_lines(engine, _longest(engine)), users, report, "attention")
        st.caption("The same weights with another cache: what a change of architecture would leave of the wall.")
    st.subheader("Roofline")
    show_chart(figures.roofline(capacity.roofline_of(engine)), "roofline")
    note_warnings(report.warnings)


def _inputs() -> tuple[Engine, int]:
    question = inputs.shared()
    first, second, third = st.columns(3)
    with first:
        gpu = inputs.choose("GPU", inputs.all_gpus(), inputs.DEFAULT_GPU, "gpu")
        dtype = inputs.choose("KV cache format", inputs.KV_DTYPES, "bfloat16", "kv_dtype", format_func=kv_name)
    with second:
        size = inputs.slide("GPUs per replica (TP)", (1, 2, 4, 8), 1, "tp")
        length = _context(question.model)
    with third:
        users = inputs.whole("Sequences at once (users)", 1, 100_000, 5, "users")
        utilization = inputs.slide(
            "gpu_memory_utilization", [round(0.5 + 0.01 * i, 2) for i in range(50)], 0.92, "utilization"
        )
    engine = replace(
        question.engine(inputs.gpu_of(gpu)),
        tensor_parallel_size=size,
        kv_cache_dtype=dtype,
        max_model_len=length,
        gpu_memory_utilization=utilization,
    )
    return engine, users


def _context(model: ModelSpec) -> int:
    """A length, no longer than the model was made for."""
    most = model.max_position_embeddings
    lengths = [*(length for length in _LENGTHS if length < most), most]
    chosen = st.session_state.get("context")
    if chosen is not None and chosen not in lengths:  # it was of a model with a longer context
        st.session_state["context"] = max(length for length in lengths if length <= max(chosen, lengths[0]))
    usual = max(length for length in lengths if length <= max(32768, lengths[0]))
    return inputs.slide(
        "Context, tokens",
        lengths,
        usual,
        "context",
        format_func=lambda n: f"{n >> 10}k" if n % 1024 == 0 else f"{n:,}",
        help=f"{model.name} was made for at most {most:,} tokens.",
    )


def _longest(engine: Engine) -> int:
    return max(engine.model.max_position_embeddings, engine.max_model_len or 0, 2048)


def _verdict(report: MemoryReport) -> None:
    asked = f"{report.concurrency:,} sequence{'s' * (report.concurrency > 1)} of {report.max_model_len:,} tokens"
    where = f"{report.tensor_parallel_size} × {report.system}, {kv_name(report.kv_cache_dtype)} KV"
    if report.fits:
        held = results.shown_capacity(report.max_concurrency)
        st.success(f"**It fits.** {escaped(f'{asked} on {where}: the KV pool holds {held}.')}", icon=":material/check:")
        return
    st.error(f"**It does not fit.** {escaped(f'{asked} on {where}: {report.reason}.')}", icon=":material/block:")
    if not report.remedies:
        st.write("No single change of utilisation, KV format or GPUs within a node would help.")
        return
    st.markdown("**What would help, best first**")
    show_table(
        [
            {
                "change": remedy.change,
                "then it": "✓ fits" if remedy.fits else "✗ does not fit",
                "longest context, tokens": f"{remedy.max_model_len_that_fits:,}",
                "sequences": results.shown_capacity(remedy.max_concurrency),
            }
            for remedy in report.remedies
        ],
        key="remedies",
    )


def _numbers(report: MemoryReport) -> None:
    columns = st.columns(4)
    fields = type(report).model_fields
    columns[0].metric(
        "Sequences that fit",
        results.shown_capacity(report.max_concurrency),
        border=True,
        help=fields["max_concurrency"].description,
    )
    columns[1].metric(
        "KV pool, tokens",
        results.shown(report.kv_cache_tokens),
        border=True,
        help=fields["kv_cache_tokens"].description,
    )
    columns[2].metric(
        "KV per token, KiB",
        results.shown(report.kv_bytes_per_token / 1024, digits=4),
        border=True,
        help=fields["kv_bytes_per_token"].description,
    )
    columns[3].metric(
        "KV per sequence, GiB",
        results.shown(report.kv_bytes_per_sequence / GIB),
        border=True,
        help=fields["kv_bytes_per_sequence"].description,
    )


def _measured(report: MemoryReport, modelled: MemoryReport) -> None:
    """Why the numbers are not those of the model of memory."""
    if report.num_kv_blocks * report.block_size == modelled.num_kv_blocks * modelled.block_size:
        return
    st.caption(
        escaped(
            f"This is what Memwall's engine had room for when it was profiled with these settings; Plan and What if go "
            f"by it too. Worked out for vLLM's layout of the cache it would be "
            f"{results.shown_capacity(modelled.max_concurrency)} sequences."
        )
    )


def _lines(lines: Sequence[Line], users: int, report: MemoryReport, key: str) -> None:
    if any(line.points for line in lines):
        show_chart(figures.concurrency(lines, users, report.max_model_len), key)
        return
    st.info(
        escaped(f"No KV cache is left on {report.tensor_parallel_size} × {report.system}: take more GPUs per replica.")
    )


def _stack(engine: Engine, report: MemoryReport, users: int):
    other = "fp8" if engine.kv_cache_dtype == "bfloat16" else "bfloat16"
    reports = (report, capacity.memory_of(replace(engine, kv_cache_dtype=other), users))
    return figures.stack(reports, [f"{kv_name(each.kv_cache_dtype)} KV" for each in reports])


def _gpus(engine: Engine, users: int) -> None:
    length = engine.max_model_len or 0
    st.subheader(f"Which GPUs hold {users:,} × {length:,} tokens")
    specs = tuple(inputs.gpu_of(name) for name in inputs.all_gpus())
    found = capacity.fits_on(engine, specs, users, inputs.price_list(), _TABLE_DTYPES)
    holding = [fit for fit in found if fit.report.fits]
    if holding:
        best = holding[0]
        st.write(
            escaped(
                f"Cheapest that holds it: {best.tensor_parallel_size} × {best.gpu.name} with "
                f"{kv_name(best.kv_cache_dtype)} KV, room for "
                f"{results.shown_capacity(best.report.max_concurrency)} sequences, "
                f"{results.usd(best.usd_per_hour)} per hour. This is memory only: whether it is fast "
                f"enough, Plan and What if say."
            )
        )
        show_table([_fit_row(fit) for fit in holding], key="fits")
    else:
        st.write("No GPU type of the catalog holds it in one node, with bf16 or fp8 KV.")
    rejected = [fit for fit in found if not fit.report.fits]
    with st.expander(f"{len(rejected)} that do not", key="misfits"):
        show_table([_fit_row(fit) for fit in rejected], key="misfit_rows")


def _fit_row(fit: Fit) -> dict[str, object]:
    return {
        "GPUs": f"{fit.tensor_parallel_size} × {fit.gpu.id}",
        "KV": kv_name(fit.kv_cache_dtype),
        "": "✓ fits" if fit.report.fits else "✗ does not fit",
        "sequences": results.shown_capacity(fit.report.max_concurrency),
        "US$/h": results.usd(fit.usd_per_hour),
        "longest context, tokens": f"{fit.report.max_model_len_that_fits:,}",
    }
