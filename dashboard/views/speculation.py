"""Speculation: does drafting pay, how far ahead, and from which batch on no longer?"""

from __future__ import annotations

import json
from dataclasses import replace

import streamlit as st

from dashboard import inputs
from dashboard.components import escaped, show_chart
from dashboard.figures import speculation as figures
from dashboard.figures.plan import kv_name
from dashboard.services import results, speculation, uploads
from dashboard.services.questions import Engine
from dashboard.services.speculation import Gain
from planner.errors import UserError
from planner.model import ModelSpec
from planner.step_time import Evidence

_NGRAM = "n-gram lookup (free)"
_OWN = "your own rates"
_RECORDED = "recorded: a server's log or /metrics"
_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def page() -> None:
    """The whole page."""
    st.title("Does drafting pay?")
    engine, draft, context = _engine()
    rates = _rates()
    if not rates:
        st.info("Drop the log of a server that speculates: the rates of its rounds are used here.")
        return
    if not any(rates):
        st.info("No draft is ever accepted: k should be 0.")
        return
    found = speculation.gains(engine, rates, draft, context)
    _answer(found)
    left, right = st.columns([3, 2])
    with left:
        st.subheader("Speed-up by k and batch")
        show_chart(figures.speedup(found), "speedup")
    with right:
        st.subheader("What is accepted")
        show_chart(figures.acceptance(rates), "acceptance")
    st.subheader("Which k when")
    show_chart(figures.best_k(found), "best_k")
    _export(found, draft)


def _engine() -> tuple[Engine, ModelSpec | None, int]:
    question = inputs.shared()
    first, second, third = st.columns(3)
    with first:
        gpu = inputs.choose("GPU", inputs.all_gpus(), inputs.DEFAULT_GPU, "spec_gpu")
        size = inputs.choose("GPUs per replica (TP)", (1, 2, 4, 8), 1, "spec_tp")
    with second:
        dtype = inputs.choose("KV cache format", inputs.KV_DTYPES, "bfloat16", "spec_kv", format_func=kv_name)
        context = inputs.slide("Context of every request, tokens", _CONTEXTS, 2048, "spec_context")
    with third:
        drafter = inputs.choose(
            "Drafter",
            (_NGRAM, *inputs.all_models()),
            _NGRAM,
            "drafter",
            help="A draft model has to share the tokenizer, e.g. llama-3.2-1b for llama-3.1-8b.",
        )
    engine = replace(
        question.engine(inputs.gpu_of(gpu)), tensor_parallel_size=size, kv_cache_dtype=dtype, max_model_len=2 * context
    )
    draft = None if drafter == _NGRAM else inputs.model_of(drafter)
    return engine, draft, context


def _rates() -> tuple[float, ...]:
    known = {**speculation.ASSUMED_RATES}
    for name, lengths in speculation.MEASURED_LENGTHS.items():
        known[f"{name} (measured by InferenceX)"] = speculation.rates_of_lengths(lengths)
    left, right = st.columns([2, 3])
    with left:
        source = inputs.choose("Acceptance", (*known, _OWN, _RECORDED), list(known)[2], "acceptance")
    if source in known:
        return known[source]
    with right:
        if source == _RECORDED:
            return _recorded()
        text = inputs.text(
            "Rates by position", "0.8, 0.7, 0.65, 0.6", "rates", help="Of recorded rounds, or of vLLM's metrics."
        )
        unconditional = inputs.toggle(
            "They are unconditional, as vLLM reports them",
            False,
            "unconditional",
            help="Share of rounds that get there.",
        )
    return speculation.parse_rates(text, unconditional)


def _recorded() -> tuple[float, ...]:
    """Rates of the rounds that a server counted; none until a file is dropped."""
    path, fault = inputs.kept_file(
        "What the server printed (SpecDecoding metrics), or the text of its /metrics",
        None,
        "acceptance_log",
        uploads.MAX_LOG_MIB,
        uploads.add_log,
        "Per-position acceptance of everything that the text covers.",
    )
    if fault is not None:
        raise UserError(fault)
    if path is None:
        return ()
    rates, told = speculation.recorded(path)
    st.caption(escaped(told))
    return rates


def _answer(found: tuple[Gain, ...]) -> None:
    best = speculation.best_by_batch(found)
    alone, (k, gain) = next(iter(best.items()))
    off = [batch for batch, (each, _) in best.items() if each == 0]
    if not any(each for each, _ in best.values()):
        st.error("**k should be 0**: drafting pays at no batch size.", icon=":material/block:")
    else:
        text = (
            f"**Alone (batch {alone}): k = {k}, {results.shown(gain, digits=2)} times as fast.** "
            if k
            else "**Alone: k = 0.** "
        )
        text += f"From a batch of {off[0]} on k should be 0." if off else "It pays up to the largest batch looked at."
        st.success(text, icon=":material/fast_forward:")
    evidence = {gain.evidence for gain in found}
    if Evidence.UNCALIBRATED in evidence:
        st.caption("Uncalibrated: step times come from data sheets, not from a measured GPU.")
    elif evidence & {Evidence.EXTRAPOLATED, Evidence.SCALED}:
        st.caption("Extrapolated: steps that verify drafts were not measured; they are worked out from plain steps.")
    st.caption(
        "Closed form: every request decodes at the same context and none waits. For a load with arrivals, compare k on "
        "the page What if."
    )


def _export(found: tuple[Gain, ...], draft: ModelSpec | None) -> None:
    best = speculation.best_by_batch(found)
    most = max(k for k, _ in best.values())
    if not most:
        return
    config: dict[str, object] = {"method": "draft_model" if draft else "ngram"}
    if draft:
        config["model"] = draft.hf_repo or draft.name
    config |= {
        "num_speculative_tokens": most,
        "num_speculative_tokens_per_batch_size": speculation.schedule(best),
    }
    with st.expander("The same for vLLM", key="spec_export"):
        st.code(f"--speculative-config '{json.dumps(config)}'", language="bash")
        st.caption(escaped("Batches from first to last, and k; 0 is off. vLLM ignores it with data parallelism."))
