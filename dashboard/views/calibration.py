"""Calibration: which measurements the answers rest on, how old they are, and how good."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard import inputs
from dashboard.components import answer_of, complain, escaped, note_warnings, show_chart, show_table
from dashboard.figures import calibration as figures
from dashboard.figures.plan import kv_name
from dashboard.services import benchmarks, profiles, results, uploads
from dashboard.services.benchmarks import Benchmark, BenchmarkAnswer, Compared
from dashboard.services.questions import key_of
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.profile.schema import Profile

_OLD_DAYS = 180
_NEAREST = "nearest"


def page() -> None:
    """The whole page."""
    st.title("What do the answers rest on?")
    left, right = st.columns(2)
    with left:
        _upload()
    with right:
        benchmark = _upload_benchmark()
    if benchmark is not None:
        _compare(benchmark)
    paths = inputs.profiles()
    known = profiles.available(paths)
    if not known:
        st.info("There is no profile here: every step time comes from data sheets, and says that it is uncalibrated.")
        return
    left, right = st.columns(2)
    with left:
        name, note = _chosen(known, paths)
    if note:
        st.info(escaped(note))
    if name is None:
        return
    profile = known[name]
    dtypes = [dtype.value for dtype in profile.kv_cache_dtypes]
    if not dtypes:
        st.info("This profile was measured without a GPU; it has no KV format that a deployment could have.")
        return
    with right:
        dtype = inputs.choose("KV cache format", dtypes, dtypes[0], "profile_kv", format_func=kv_name)
    _facts(profile, dtype)
    _errors(name, dtype, paths)
    left, right = st.columns(2)
    with left:
        st.subheader("Decode steps")
        show_chart(figures.curves(profiles.decode_curves(profile, dtype), "decode"), "decode_curves")
    with right:
        st.subheader("Prompt chunks")
        show_chart(figures.curves(profiles.prefill_curves(profile, dtype), "prefill"), "prefill_curves")
    st.subheader("Predicted against measured")
    show_chart(figures.parity(profiles.left_out_parity(name, paths, dtype)), "parity")
    st.caption("Each point predicted by a fit to all the others.")


def _chosen(known: dict[str, Profile], paths: tuple[str, ...] | None) -> tuple[str | None, str]:
    """The name of the profile to look at, and a note.

    Unless somebody chooses one, it is that from which the sidebar's model is foreseen on one GPU; None if none can be.
    """
    model, gpu = inputs.shared().model, inputs.gpu_of(inputs.DEFAULT_GPU)
    match = profiles.nearest(paths, model, gpu)
    nearest = None if match is None else next(name for name, each in known.items() if each is match.profile)
    name = inputs.choose(
        "Profile",
        (_NEAREST, *known),
        _NEAREST,
        "profile",
        format_func=lambda each: f"{each}: {nearest or 'none'}" if each == _NEAREST else each,
        help=f"The nearest one is that for the sidebar's model and weights with bf16 KV on one {gpu.name}.",
    )
    if name != _NEAREST:
        return name, ""
    if match is None:
        return None, f"No profile can serve {model.name}: its step times come from data sheets, and say uncalibrated."
    if match.changes:
        return nearest, f"For {model.name} this profile is transferred from {match.transfers(model, gpu)}."
    return nearest, ""


def _upload() -> None:
    with st.expander("Use a profile of your own", icon=":material/upload_file:", key="profile_upload"):
        file = st.file_uploader(
            "Profile (JSON) from memwall calibrate",
            type=["json", "gz"],
            key="profile_file",
            max_upload_size=uploads.MAX_PROFILE_MIB,
            help="It is used on all pages, before the shipped ones, wherever it is nearer. It stays on this machine.",
        )
        if file is not None:
            try:
                identity = uploads.add_profile(file.name, file.getvalue())
            except UserError as error:
                complain(str(error))
            else:
                # Once per file: it stays in the field when somebody goes back to the shipped ones.
                if st.session_state.get("profile_seen") != file.file_id:
                    st.session_state["profile_seen"] = file.file_id
                    inputs.add_profile(identity)
                    _show(identity)
        for path in inputs.own_profiles().values():
            st.caption(
                escaped(f"{path.name} is used wherever it is nearest, on all pages, for all who open this link here.")
            )
        if inputs.own_profiles() and st.button("Use the shipped profiles only", key="profiles_forget"):
            inputs.forget_profiles()
            st.rerun()


def _show(identity: str) -> None:
    """Look at a profile that was just uploaded, whether it is nearest or not."""
    path = uploads.kept(identity)
    if path is not None and path.name in profiles.available((str(path),)):
        st.session_state["profile"] = path.name


# ---- a benchmark beside the simulator ------------------------------------------------------------------------------

_UNSAID = "log, or bf16"


def _upload_benchmark() -> Benchmark | None:
    """The fields for a result; the question that they make."""
    with st.expander("Compare with a benchmark of yours", icon=":material/speed:", key="benchmark_upload"):
        path = _dropped(
            "Result of memwall bench serve, or of vllm bench serve --save-detailed",
            ["json", "jsonl", "csv", "gz"],
            "benchmark",
            uploads.MAX_BENCHMARK_MIB,
            uploads.add_benchmark,
            "Its arrivals and lengths are replayed through the simulator, and every request is compared. SGLang's "
            "bench_serving --output-details, and a table with arrival, first and last token and lengths work too.",
        )
        if path is None:
            return None
        question = inputs.shared()
        gpu, flags, log = inputs.gpu_of(inputs.DEFAULT_GPU), (), None
        if benchmarks.is_outside(path):
            st.caption(
                escaped(
                    f"This result does not say what served it. Say it here, or drop the server's log; the model is "
                    f"that of the sidebar, {question.model.name}."
                )
            )
            gpu, flags = _server()
            log = _dropped(
                "The server's log, or the text of its /metrics",
                None,
                "server_log",
                uploads.MAX_LOG_MIB,
                uploads.add_log,
                "Its start-up lines have the settings and the number of KV blocks.",
            )
    return Benchmark(path, log, question.model, gpu, question.quantization, inputs.profiles(), flags)


def _dropped(*field: Any) -> Path | None:
    """As `inputs.kept_file`, which says what is wrong."""
    path, fault = inputs.kept_file(*field)
    if fault is not None:
        complain(fault)
    return path


def _server() -> tuple[GpuSpec, tuple[tuple[str, Any], ...]]:
    """The GPU that served it, and what was set, by the names of `ServerFacts`; what is empty is left to the log."""
    left, right = st.columns(2)
    with left:
        gpu = inputs.choose("GPU", inputs.all_gpus(), inputs.DEFAULT_GPU, "bench_gpu")
        size = inputs.optional("TP", 1, 8, "bench_tp", "log, or 1", step=1)
        seqs = inputs.optional("max_num_seqs", 1, 65_536, "bench_seqs", "log, or vLLM's", step=1)
    with right:
        dtype = inputs.choose("KV cache", (_UNSAID, *inputs.KV_DTYPES), _UNSAID, "bench_kv")
        blocks = inputs.optional("KV blocks", 2, 1 << 30, "bench_blocks", "log, or computed", step=1)
        budget = inputs.optional("Token budget", 1, 1 << 20, "bench_budget", "log, or vLLM's", step=1)
    flags = {
        "tensor_parallel_size": size,
        "kv_cache_dtype": None if dtype == _UNSAID else dtype,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": budget,
        "num_gpu_blocks": blocks,
    }
    return inputs.gpu_of(gpu), tuple((name, value) for name, value in flags.items() if value is not None)


def _compare(question: Benchmark) -> None:
    st.subheader("The simulator against your benchmark")
    answer = answer_of(
        "benchmark", key_of("benchmark", question), benchmarks.compare, question, waiting="Replaying the benchmark"
    )
    if answer is None:
        return
    for load in answer.loads:
        _load(load)
    _parities(answer)
    note_warnings(answer.notes)


_FIRST = ("ttft_ms.p50", "tpot_ms.mean", "e2el_ms.p50")


def _load(load: Compared) -> None:
    errors = {benchmarks.METRICS[name]: load.metrics[name].error for name in _FIRST if name in load.metrics}
    told = ", ".join(f"{label.removesuffix(', ms')} {results.signed(error)}" for label, error in errors.items())
    runs = f"{load.num_requests:,} requests" + (f", {load.num_runs} runs" if load.num_runs > 1 else "")
    st.markdown(f"**{escaped(load.label)}: predicted against measured {escaped(told)}.**")
    st.caption(
        escaped(f"{load.served}; {runs}. Step times: {load.step_times}, {results.evidence_word(load.evidence)}.")
    )
    show_table([_metric_row(name, load) for name in load.metrics], key=f"errors_{load.label}", height="content")


def _metric_row(name: str, load: Compared) -> dict[str, str]:
    found = load.metrics[name]
    measured = (min(found.measured), max(found.measured)) if len(found.measured) > 1 else None
    predicted = (found.interval.low, found.interval.high) if found.interval else None
    each = load.request_errors.get(name.removesuffix("_ms.mean"))
    return {
        "metric": benchmarks.METRICS[name],
        "measured": results.shown(found.measured_median, measured),
        "predicted": results.shown(found.predicted, predicted),
        "predicted, 90 %": results.shown_range(predicted),
        "error": results.signed(found.error),
        "between runs": f"{found.spread:.1%}" if found.spread is not None else "one run",
        "mean |error| of requests": "" if each is None else f"{each:.0%}",
    }


def _parities(answer: BenchmarkAnswer) -> None:
    left, right = st.columns(2)
    for number, (latency, label) in enumerate(benchmarks.LABELS.items()):
        groups = tuple(load.points[latency] for load in answer.loads if load.points[latency].points)
        if groups:
            with (left, right)[number % 2]:
                st.markdown(f"**{label} of each request**")
                show_chart(figures.parity(groups, f"{label}, ms"), f"parity_{latency}")
    st.caption(
        escaped(
            f"Of the first run of each load, {benchmarks.MAX_POINTS} requests at most. Between runs: the largest "
            f"difference between runs of the same load; a prediction that is closer than that is lucky."
        )
    )


def _facts(profile: Profile, dtype: str) -> None:
    record, engine, limits = profile.record, profile.tables.engine, profile.tables.limits
    spread = profile.uncertainty(dtype)
    columns = st.columns([2, 1, 1, 1])
    columns[0].metric("Measured on", record.gpu_name, border=True)
    columns[1].metric("Age", _age(record.date), border=True, help=f"Measured {record.date}.")
    columns[2].metric(
        "Decode steps, ±", f"{spread.decode:.1%}", border=True, help="Relative standard deviation of predicted times."
    )
    columns[3].metric(
        "Prompt steps, ±",
        f"{spread.prefill:.1%}",
        border=True,
        help="Relative standard deviation of predicted times of steps with prompts.",
    )
    weights = record.model.dtype + (f" quantised to {record.quantization}" if record.quantization else "")
    rates = [f"{limits.copy_bytes_per_s / 1e12:.3g} TB/s copy", f"{limits.matmul_flops_per_s / 1e12:,.0f} TFLOP/s bf16"]
    if limits.matmul_fp8_flops_per_s is not None:
        rates.append(f"{limits.matmul_fp8_flops_per_s / 1e12:,.0f} TFLOP/s fp8")
    st.caption(
        escaped(
            f"{record.model.name}, {weights} weights; measured limits: {', '.join(rates)}; max_num_seqs "
            f"{engine.max_num_seqs}, token budget {engine.max_num_batched_tokens:,}, blocks of {engine.block_size} "
            f"tokens; commit {record.commit[:12] or 'unknown'}."
        )
    )


def _age(date: str) -> str:
    try:
        then = datetime.datetime.fromisoformat(date)
    except ValueError:
        return "unknown"
    now = datetime.datetime.now(then.tzinfo)
    days = (now - then).days
    text = "today" if days < 1 else f"{days} day{'s' * (days > 1)}"
    return f"{text}, old" if days > _OLD_DAYS else text


def _errors(name: str, dtype: str, paths: tuple[str, ...] | None) -> None:
    st.subheader("How far the fit is off")

    def shares(found: dict[str, float] | None) -> dict[str, str]:
        names = {"median": "median", "p90": "90 %", "max": "worst"}
        return {label: f"{found[name]:.1%}" if found and name in found else "–" for name, label in names.items()}

    rows = []
    for row in profiles.errors(name, paths, dtype):
        inside, outside = shares(row.in_sample), shares(row.left_out)
        rows.append(
            {"table": row.table, "points": row.points}
            | {f"left out, {label}": value for label, value in outside.items()}
            | {f"in sample, {label}": value for label, value in inside.items()}
        )
    show_table(rows, key="errors", height="content")
    st.caption(
        "Relative errors of step times. Left out: each point predicted by a fit to all others, which is what a step "
        "between measured ones has to expect."
    )
