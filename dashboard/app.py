"""The dashboard: `memwall dashboard`, or `streamlit run dashboard/app.py`."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from dashboard import inputs
from dashboard.components import complain, guarded
from dashboard.services.start import start
from dashboard.views import calibration, catalog, memory, plan, speculation, what_if

PAGES = (
    (plan, "Plan", ":material/fact_check:", "plan"),
    (what_if, "What if", ":material/compare_arrows:", "what-if"),
    (memory, "Context & memory", ":material/memory:", "memory"),
    (speculation, "Speculation", ":material/fast_forward:", "speculation"),
    (calibration, "Calibration", ":material/straighten:", "calibration"),
    (catalog, "Catalog", ":material/list:", "catalog"),
)

# Streamlit leaves 6 rem above a page's title, for a menu that is not shown here.
_STYLE = """<style>
[data-testid="stMainBlockContainer"] { padding-top: 2.75rem; }
[data-testid="stSidebarHeader"] { height: 2.5rem; margin-bottom: 0; }
</style>"""


def main() -> None:
    """Draw the shared inputs, then the page."""
    st.set_page_config(page_title="Memwall", page_icon="🧱", layout="wide")
    st.html(_STYLE)
    pages = {
        st.Page(f"views/{Path(view.__file__).name}", title=title, icon=icon, url_path=url, default=view is plan): view
        for view, title, icon, url in PAGES
    }
    chosen = st.navigation(list(pages))
    view = next(view for page, view in pages.items() if page == chosen)
    with guarded():
        start()
        inputs.sidebar()
        fault = inputs.shared().fault
        if fault is not None:
            complain(fault)
        # Not `chosen.run()`: inputs of a page's own script leave the address before the browser has left the page, and
        # its Back button then finds that page without them.
        view.page()


main()
