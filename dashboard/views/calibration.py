"""Calibration: which measurements the answers rest on, how old they are, and how good."""

from __future__ import annotations

import datetime

import streamlit as st

from dashboard import inputs
from dashboard.components import complain, escaped, show_chart, show_table
from dashboard.figures import calibration as figures
from dashboard.figures.plan import kv_name
from dashboard.services import profiles, uploads
from planner.errors import UserError
from planner.profile.schema import Profile

_OLD_DAYS = 180


def page() -> None:
    """The whole page."""
    st.title("What do the answers rest on?")
    _upload()
    paths = inputs.profiles()
    known = {profile.name: profile for profile in profiles.available(paths)}
    if not known:
        st.info("There is no profile here: every step time comes from data sheets, and says that it is uncalibrated.")
        return
    left, right = st.columns(2)
    with left:
        name = inputs.choose("Profile", tuple(known), next(iter(known)), "profile")
    profile = known[name]
    dtypes = [dtype.value for dtype in profile.kv_cache_dtypes]
    if not dtypes:
        st.info("This profile was measured without a GPU; it has no KV format that a deployment could have.")
        return
    with right:
        dtype = inputs.choose("KV cache format", dtypes, dtypes[0], "profile_kv", format_func=kv_name)
    _facts(profile, dtype)
    _errors(profile, dtype, paths)
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


def _upload() -> None:
    with st.expander("Use a profile of your own", icon=":material/upload_file:", key="profile_upload"):
        file = st.file_uploader(
            "Profile (JSON) from memwall calibrate",
            type=["json", "gz"],
            key="profile_file",
            max_upload_size=uploads.MAX_PROFILE_MIB,
            help="It is used on all pages of this session, before the shipped ones, wherever it is nearer.",
        )
        if file is not None:
            try:
                path, profile = uploads.add_profile(file.name, file.getvalue())
            except UserError as error:
                complain(str(error))
            else:
                inputs.own_profiles()[profile.name] = str(path)
                st.success(escaped(f"{profile.name} is in use on all pages of this session."))
        if inputs.own_profiles() and st.button("Use the shipped profiles only", key="profiles_forget"):
            inputs.own_profiles().clear()
            st.rerun()


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
        "Steps with prompts, ±", f"{spread.prefill:.1%}", border=True, help="Relative standard deviation."
    )
    weights = record.model.dtype + (f" quantised to {record.quantization}" if record.quantization else "")
    rates = [f"{limits.copy_bytes_per_s / 1e12:.3g} TB/s copy", f"{limits.matmul_flops_per_s / 1e12:.3g} TFLOP/s bf16"]
    if limits.matmul_fp8_flops_per_s is not None:
        rates.append(f"{limits.matmul_fp8_flops_per_s / 1e12:.4g} TFLOP/s fp8")
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


def _errors(profile: Profile, dtype: str, paths: tuple[str, ...] | None) -> None:
    st.subheader("How far the fit is off")

    def shares(found: dict[str, float] | None) -> dict[str, str]:
        names = {"median": "median", "p90": "90 %", "max": "worst"}
        return {label: f"{found[name]:.1%}" if found and name in found else "–" for name, label in names.items()}

    rows = []
    for row in profiles.errors(profile.name, paths, dtype):
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
