"""What people choose: every input lives in the link, and survives a change of page.

Streamlit keeps a bound widget's value in the query string, cleaned where it is the default, and drops what is no valid
value; `persist_state` keeps it while another page is shown. The inputs that all pages share stand in the sidebar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import streamlit as st

from dashboard.services import catalog, links, questions, uploads
from dashboard.services.presets import DEFAULT_PRESET, PRESETS, Preset
from dashboard.services.questions import Engine, Traffic
from dashboard.services.uploads import MAX_TRACE_MIB, traces
from planner.catalog import list_gpus, list_models, load_gpu, load_model
from planner.deployment import PriceList
from planner.errors import UserError
from planner.hardware import GpuSpec
from planner.model import ModelSpec
from planner.simulation import SLO
from planner.workload import Workload

DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_GPU = "h200_sxm"
KV_DTYPES = ("bfloat16", "fp8", "int8", "int4", "int2")
_BOUND = {"bind": "query-params", "persist_state": "session"}
_TRACE_PARAMETER = "trace"
_PROFILES_PARAMETER = "profiles"
_OWN_PARAMETER = "own"
_HIGHEST_PRICE = 1e6


# ---- bound widgets -------------------------------------------------------------------------------------------------


def choose(label: str, options: Sequence[Any], default: Any, key: str, **more: Any) -> Any:
    """One of several; the default where a link says something that is none of them."""
    options = list(options)
    index = options.index(default) if default in options else 0
    found = st.selectbox(label, options, index=index, key=key, **_BOUND, **more)
    return found if found is not None else options[index]


def choose_several(label: str, options: Sequence[Any], default: Sequence[Any], key: str, **more: Any) -> tuple:
    """Any of several, in the order of `options`."""
    found = st.multiselect(label, list(options), list(default), key=key, **_BOUND, **more)
    return tuple(option for option in options if option in found)


def whole(label: str, low: int, high: int, default: int, key: str, step: int = 1, **more: Any) -> int:
    """A whole number."""
    return int(st.number_input(label, low, high, default, step, key=key, **_BOUND, **more))


def optional(
    label: str, low: float, high: float, key: str, usual: object, step: float | None = None, **more: Any
) -> Any:
    """A number, or None for what is usual, which the empty field shows."""
    return st.number_input(label, low, high, None, step, key=key, placeholder=str(usual), **_BOUND, **more)


def slide(label: str, options: Sequence[Any], default: Any, key: str, **more: Any) -> Any:
    """One of an ordered few."""
    return st.select_slider(label, list(options), default, key=key, **_BOUND, **more)


def toggle(label: str, default: bool, key: str, **more: Any) -> bool:
    """Yes or no."""
    return st.toggle(label, default, key=key, **_BOUND, **more)


def text(label: str, default: str, key: str, **more: Any) -> str:
    """A short text."""
    return st.text_input(label, default, key=key, max_chars=200, **_BOUND, **more) or ""


# ---- the catalog, with what people added ---------------------------------------------------------------------------


def _own(kind: str) -> dict[str, Any]:
    return st.session_state.setdefault(f"own_{kind}", {})


def own_models() -> dict[str, ModelSpec]:
    """Models that were added by their config.json, by name."""
    return _own("models")


def own_gpus() -> dict[str, GpuSpec]:
    """GPUs that were added, by id."""
    return _own("gpus")


def add_model(name: str, config: dict[str, Any]) -> None:
    """Make a model one of the catalog's, and part of the link.

    Raises:
        UserError: its config.json says too little.
    """
    own_models()[name] = uploads.model_of(name, config)
    _own("configs")[name] = config
    _link_own()


def add_gpu(name: str, *numbers: float) -> None:
    """Make a GPU one of the catalog's, and part of the link.

    Args:
        numbers: as `dashboard.services.catalog.own_gpu` takes them.

    Raises:
        UserError: as there.
    """
    gpu = catalog.own_gpu(name, *numbers)
    own_gpus()[gpu.id] = gpu
    _own("numbers")[gpu.name] = list(numbers)
    _link_own()


def _link_own() -> None:
    text = links.pack({"models": _own("configs"), "gpus": _own("numbers")})
    st.session_state["own_in_link"] = text is not None
    set_parameter(_OWN_PARAMETER, text or "")


def is_own_linked() -> bool:
    """Whether the link holds what was added; it does not if that is too long for a link."""
    return st.session_state.get("own_in_link", True)


def _read_own() -> str | None:
    """Take over what a link brings along; what is wrong with it, in one sentence."""
    text = parameter(_OWN_PARAMETER)
    if st.session_state.get("own_read", "") == text:
        return st.session_state.get("own_fault")
    st.session_state["own_read"], st.session_state["own_fault"] = text, None
    if not text:
        return None
    try:
        document = links.unpack(text)
        own_models().update(links.own_models(document))
        own_gpus().update(links.own_gpus(document))
    except UserError as error:
        st.session_state["own_fault"] = str(error)
        return str(error)
    _own("configs").update(document.get("models", {}))
    _own("numbers").update(document.get("gpus", {}))
    return None


def own_profiles() -> dict[str, Path]:
    """Uploaded profiles by the id that stands in the link, the newest last; those that this server has."""
    found = {identity: uploads.kept(identity) for identity in _profile_ids()}
    return {identity: path for identity, path in found.items() if path is not None}


def _profile_ids() -> list[str]:
    return [part for part in parameter(_PROFILES_PARAMETER).split(",") if part]


def add_profile(identity: str) -> None:
    """Use an uploaded profile on all pages, before those that are in use already."""
    others = [each for each in _profile_ids() if each != identity]
    set_parameter(_PROFILES_PARAMETER, ",".join([*others, identity]))


def forget_profiles() -> None:
    """Use the shipped profiles only."""
    set_parameter(_PROFILES_PARAMETER, "")


def profiles() -> tuple[str, ...] | None:
    """As `Deployment.profiles` takes them."""
    return tuple(str(path) for path in reversed(own_profiles().values())) or None


def all_models() -> list[str]:
    return [*list_models(), *own_models()]


def all_gpus() -> list[str]:
    return [*list_gpus(), *own_gpus()]


def priced_gpus() -> list[str]:
    """GPU types that a search can compare by what they cost."""
    prices = price_list()
    return [name for name in all_gpus() if prices.price(gpu_of(name)) is not None]


def set_gpus(names: Sequence[str]) -> None:
    """Choose the GPU types of a search; to be called before the page is drawn, by a button."""
    st.session_state["gpus"] = list(names)


def model_of(name: str) -> ModelSpec:
    """By id, the user's own included."""
    return own_models().get(name) or load_model(name)


def gpu_of(name: str) -> GpuSpec:
    """By id, the user's own included."""
    return own_gpus().get(name) or load_gpu(name)


@cache
def _gpu_names() -> dict[str, str]:
    return {name: load_gpu(name).name for name in list_gpus()}


def gpu_label(name: str) -> str:
    """A GPU for people."""
    return _gpu_names().get(name) or own_gpus()[name].name


def parameter(name: str) -> str:
    """What a link says that no widget holds; kept over page changes, which drop it from the address."""
    kept = st.session_state.setdefault("parameters", {})
    if name in st.query_params:
        kept[name] = st.query_params[name]
    elif kept.get(name):
        st.query_params[name] = kept[name]
    return kept.get(name, "")


def set_parameter(name: str, text: str) -> None:
    """Put something into the link, or, if it is empty, out of it."""
    st.session_state.setdefault("parameters", {})[name] = text
    if text:
        st.query_params[name] = text
    else:
        st.query_params.pop(name, None)


def kept_file(
    label: str, kinds: Sequence[str] | None, name: str, most_mib: int, add: Callable[[str, bytes], str], meaning: str
) -> tuple[Path | None, str | None]:
    """A field for a file whose id stands in the link.

    Args:
        kinds: endings that it may have; None for any.
        name: of the link's parameter.
        add: keeps the content, and gives its id.
        meaning: shown on hover.

    Returns:
        The file, and what is wrong, in one sentence; None for what there is not.
    """
    file = st.file_uploader(label, type=kinds, key=f"{name}_file", max_upload_size=most_mib, help=meaning)
    if file is not None:
        st.session_state[f"{name}_dropped"] = True
        try:
            set_parameter(name, add(file.name, file.getvalue()))
        except UserError as error:
            set_parameter(name, "")
            return None, str(error)
    elif st.session_state.pop(f"{name}_dropped", None):
        set_parameter(name, "")
    identity = parameter(name)
    path = uploads.kept(identity)
    if identity and path is None:
        return None, "the file that this link names is not on this server any more; drop it again"
    return path, None


def price_overrides() -> dict[str, float]:
    """USD per GPU hour, by GPU id, as they stand in the link; what is no price is left out."""
    found = {}
    for part in parameter("prices").split(","):
        name, _, usd = part.partition(":")
        try:
            value = float(usd)
        except ValueError:
            continue
        if name in all_gpus() and 0 < value < _HIGHEST_PRICE:
            found[name] = value
    return found


def set_prices(prices: dict[str, float]) -> None:
    """Put prices into the link."""
    set_parameter("prices", ",".join(f"{name}:{usd:g}" for name, usd in prices.items() if 0 < usd < _HIGHEST_PRICE))


def price_list() -> PriceList:
    """The catalog's prices and the user's."""
    return PriceList(overrides=tuple(sorted(price_overrides().items())))


# ---- the sidebar ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What every page is asked about.

    Attributes:
        model: with its weights quantised as chosen.
        trace: the upload behind `traffic`, if that is one.
        fault: why the trace cannot be used, in one sentence.
    """

    model: ModelSpec
    quantization: str | None
    traffic: Traffic
    slo: SLO
    trace: Workload | None = None
    fault: str | None = None

    @property
    def rate(self) -> float:
        """Requests per second."""
        if self.traffic.request_rate is not None:
            return self.traffic.request_rate
        return self.trace.request_rate if self.trace is not None else PRESETS[self.traffic.preset].request_rate

    def engine(self, gpu: GpuSpec) -> Engine:
        """One replica on one GPU, with the defaults of the command line."""
        return Engine(self.model, gpu, profiles=profiles())


def shared() -> Shared:
    """The answers of the sidebar, which `sidebar` has drawn before the page."""
    return st.session_state["shared"]


def sidebar() -> None:
    """Draw the inputs that all pages share, and keep the answers."""
    damage = _read_own()
    with st.sidebar:
        st.subheader("Model")
        name = choose(
            "Model", all_models(), DEFAULT_MODEL, "model", help="More under Catalog, from a Hugging Face config.json."
        )
        quantization = choose(
            "Weights",
            ("as released", "fp8"),
            "as released",
            "weights",
            help="fp8 quantises the linear weights at load.",
        )
        quantization = "fp8" if quantization == "fp8" else None
        st.subheader("Traffic")
        traffic, trace, fault = _traffic()
        preset = PRESETS[traffic.preset]
        st.subheader("SLO", help="Limits that this share of requests must keep. Empty: as the kind of traffic has it.")
        slo = _slo(preset)
    model = model_of(name)
    if quantization:
        try:
            config = _own("configs").get(name)
            model = uploads.model_of(name, config, quantization) if config else load_model(name, quantization)
        except UserError as error:
            fault, quantization = str(error), None
    fault = fault or damage
    if fault is None and len(own_profiles()) < len(_profile_ids()):
        fault = "a profile that this link names is not on this server any more; drop it again under Calibration"
    st.session_state["shared"] = Shared(model, quantization, traffic, slo, trace, fault)


def _traffic() -> tuple[Traffic, Workload | None, str | None]:
    name = choose(
        "Kind of traffic",
        tuple(PRESETS),
        DEFAULT_PRESET,
        "traffic",
        format_func=lambda each: PRESETS[each].label,
        help="Lengths, rate and SLO to start from; a trace brings its own lengths and rate.",
    )
    preset = PRESETS[name]
    identity, fault = _upload()
    trace = traces().get(identity)
    if identity is not None and trace is None and fault is None:
        fault = "the trace that this link names is not on this server any more; drop the file again"
        identity = None
    if trace is not None:
        st.caption(
            f"{trace.name}: {len(trace):,} requests at {trace.request_rate:.3g}/s, "
            f"{trace.input_tokens.mean():,.0f} tokens in and {trace.output_tokens.mean():,.0f} out on average. Lengths "
            f"are the trace's, and its rate unless you give another; the kind of traffic only gives the SLO now."
        )
    usual_rate = f"{trace.request_rate:.3g}" if trace is not None else f"{preset.request_rate:g}"
    rate = optional("Requests per second", 0.01, 10_000.0, "rate", usual_rate, help="Mean arrival rate, Poisson.")
    if trace is not None:
        return Traffic(name, rate, trace=identity, duration_s=questions.LOAD_SECONDS), trace, fault
    left, right = st.columns(2)
    with left:
        tokens_in = optional("Tokens in", 1, 1_000_000, "isl", f"{preset.input_tokens:,}", step=64)
    with right:
        tokens_out = optional("Tokens out", 1, 100_000, "osl", f"{preset.output_tokens:,}", step=16)
    return Traffic(name, rate, tokens_in, tokens_out, None, questions.LOAD_SECONDS), None, fault


def _upload() -> tuple[str | None, str | None]:
    """The id of the trace in use, and what is wrong with one that was dropped."""
    file = st.file_uploader(
        "Your own trace (CSV or JSONL)",
        type=["csv", "jsonl", "json", "gz"],
        key="trace_file",
        max_upload_size=MAX_TRACE_MIB,
        help="One row per request: arrival time, input tokens, output tokens. Azure, BurstGPT and Mooncake traces and "
        "results of vllm bench serve are known by their columns. The file stays on this machine.",
    )
    if file is None:
        if st.session_state.pop("trace_dropped", None):
            set_parameter(_TRACE_PARAMETER, "")
        return parameter(_TRACE_PARAMETER) or None, None
    st.session_state["trace_dropped"] = True
    try:
        identity = traces().add(file.name, file.getvalue())
    except UserError as error:
        set_parameter(_TRACE_PARAMETER, "")
        hint = "; name them e.g. arrival_s, input_tokens and output_tokens" if "no column" in str(error) else ""
        return None, f"{error}{hint}"
    set_parameter(_TRACE_PARAMETER, identity)
    return identity, None


def _slo(preset: Preset) -> SLO:
    def usual(value: float | None) -> str:
        return "none" if value is None else f"{value:g}"

    left, right = st.columns(2)
    with left:
        ttft = optional("TTFT, ms", 1.0, 1e7, "ttft", usual(preset.ttft_ms), help="Arrival to first token.")
        e2el = optional("E2EL, ms", 1.0, 1e8, "e2el", usual(preset.e2el_ms), help="Arrival to last token.")
    with right:
        tpot = optional(
            "TPOT, ms", 0.1, 1e6, "tpot", usual(preset.tpot_ms), help="(E2EL − TTFT) / (output tokens − 1)."
        )
        percentile = optional(
            "Percentile", 50.0, 100.0, "percentile", usual(preset.percentile), help="Share of requests, in %."
        )
    limits = SLO(preset.ttft_ms, preset.tpot_ms, preset.e2el_ms, preset.percentile)
    given = {"ttft_ms": ttft, "tpot_ms": tpot, "e2el_ms": e2el, "percentile": percentile}
    return replace(limits, **{name: value for name, value in given.items() if value is not None})


def described(question: Shared) -> str:
    """The question in one line."""
    traffic, preset = question.traffic, PRESETS[question.traffic.preset]
    if question.trace is not None:
        trace = question.trace
        load = (
            f"trace {trace.name}, {len(trace):,} requests of {trace.input_tokens.mean():,.0f} tokens in and "
            f"{trace.output_tokens.mean():,.0f} out on average"
        )
    else:
        load = preset.label.lower()
        tokens = (traffic.input_tokens or preset.input_tokens, traffic.output_tokens or preset.output_tokens)
        load += f" of {tokens[0]:,} tokens in and {tokens[1]:,} out on average"
    limits = ", ".join(f"{name.upper()} ≤ {limit:,g} ms" for name, limit in question.slo.limits().items())
    weights = ", fp8 weights" if question.quantization else ""
    judged = f"p{question.slo.percentile:g} {limits}"
    return f"{question.model.name}{weights} · {load} at {question.rate:.3g} requests/s · {judged}"
