"""Catalog: the models and GPUs that have a name, with prices to change and room for one's own."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from dashboard import inputs
from dashboard.components import complain, escaped, show_table
from dashboard.services import catalog, uploads
from planner.errors import UserError


def page() -> None:
    """The whole page."""
    st.title("Which models and GPUs are there?")
    st.subheader("GPUs and prices")
    _prices()
    _add_gpu()
    st.subheader("Models")
    rows = [*(catalog.own_model_row(model) for model in inputs.own_models().values()), *catalog.model_rows()]
    show_table(rows, key="models")
    _add_model()


def _prices() -> None:
    known = inputs.price_overrides()
    rows = catalog.gpu_rows(inputs.own_gpus(), known)
    frame = pd.DataFrame(rows)
    frame["your US$/h"] = frame["your US$/h"].astype("float64")
    edited = st.data_editor(
        frame,
        hide_index=True,
        key="prices_table",
        placeholder="",
        disabled=[column for column in frame.columns if column != "your US$/h"],
        column_config={
            "your US$/h": st.column_config.NumberColumn(
                help="Per GPU and hour. Used on all pages, and part of the link.", min_value=0.01, format="%.2f"
            ),
            "US$/h": st.column_config.NumberColumn(help="The catalog's, as it was seen.", format="%.2f"),
        },
    )
    st.caption(
        "Write your own prices into “your US$/h”; they are used everywhere at once, and stand in the link. Prices move."
    )
    wanted = catalog.prices_of(edited)
    if wanted != known:
        inputs.set_prices(wanted)
        st.rerun()
    if known and st.button("Back to the catalog's prices", key="prices_forget"):
        inputs.set_prices({})
        st.session_state.pop("prices_table", None)
        st.rerun()


def _add_gpu() -> None:
    with st.expander("Add a GPU", icon=":material/add:", key="add_gpu"), st.form("own_gpu", border=False):
        left, middle, right = st.columns(3)
        name = left.text_input("Id", key="own_gpu_id", placeholder="my_gpu", max_chars=40)
        memory = left.number_input("Memory that the driver reports, GiB", 1.0, 4096.0, 80.0, key="own_gpu_memory")
        bandwidth = left.number_input("Memory bandwidth, TB/s", 0.05, 100.0, 3.0, key="own_gpu_bandwidth")
        bf16 = middle.number_input("Dense bf16, TFLOP/s", 1.0, 1e5, 500.0, key="own_gpu_bf16")
        fp8 = middle.number_input("Dense fp8, TFLOP/s (0: none)", 0.0, 1e5, 0.0, key="own_gpu_fp8")
        link = middle.number_input("Link, GB/s per direction", 1.0, 1e4, 64.0, key="own_gpu_link")
        fast = right.toggle("NVLink or the like", False, key="own_gpu_fast")
        node = right.number_input("GPUs per node", 1, 72, 8, key="own_gpu_node")
        usd = right.number_input("US$ per hour (0: unknown)", 0.0, 1e5, 0.0, key="own_gpu_usd")
        if st.form_submit_button("Add", key="own_gpu_add"):
            try:
                inputs.add_gpu(name, memory, bandwidth, bf16, fp8, link, fast, int(node), usd)
            except UserError as error:
                complain(str(error))
                return
            st.rerun()
    if inputs.own_gpus():
        st.caption(escaped(f"Added: {', '.join(inputs.own_gpus())}. {_travels()}"))


def _travels() -> str:
    """Whether what was added is part of the link."""
    if inputs.is_own_linked():
        return "To be chosen on all pages, and part of the link."
    return (
        "To be chosen on all pages of this session. All that was added together is too long for a link: whoever opens "
        "one has to add it too."
    )


def _add_model() -> None:
    with st.expander("Add a model by its config.json", icon=":material/add:", key="add_model"):
        file = st.file_uploader(
            "Hugging Face config.json",
            type=["json"],
            key="config_file",
            max_upload_size=1,
            help="Shapes are all that planning needs; no weights are read.",
        )
        if file is None:
            return
        try:
            name, config = uploads.read_config(file.name, file.getvalue())
            if name not in inputs.own_models():
                inputs.add_model(name, config)
                st.rerun()
        except UserError as error:
            complain(str(error))
            return
        model = inputs.own_models()[name]
        st.success(escaped(f"{name} has {model.num_parameters / 1e9:.3g} billion parameters. {_travels()}"))
