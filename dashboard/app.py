"""The dashboard: `memwall dashboard`, or `streamlit run dashboard/app.py`."""

from __future__ import annotations

import streamlit as st

from dashboard import inputs
from dashboard.components import complain, guarded
from dashboard.services.start import start

PAGES = (
    ("views/plan.py", "Plan", ":material/fact_check:", "plan"),
    ("views/what_if.py", "What if", ":material/compare_arrows:", "what-if"),
    ("views/memory.py", "Context & memory", ":material/memory:", "memory"),
    ("views/speculation.py", "Speculation", ":material/fast_forward:", "speculation"),
    ("views/calibration.py", "Calibration", ":material/straighten:", "calibration"),
    ("views/catalog.py", "Catalog", ":material/list:", "catalog"),
)


def main() -> None:
    """Draw the shared inputs, then the page."""
    st.set_page_config(page_title="Memwall", page_icon="🧱", layout="wide")
    pages = [
        st.Page(path, title=title, icon=icon, url_path=url, default=url == "plan") for path, title, icon, url in PAGES
    ]
    page = st.navigation(pages)
    with guarded():
        start()
        inputs.sidebar()
        fault = inputs.shared().fault
        if fault is not None:
            complain(fault)
        page.run()


main()
