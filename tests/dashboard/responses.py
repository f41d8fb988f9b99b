"""How soon one person has an answer: `python -m tests.dashboard.responses --output record.json`.

A response is the time from a change of an input to the first new numbers on the screen, in a browser on the same
machine: of the first configuration on What if, of the verdict on the closed-form pages. A patient person waits until
everything is there before the next change, a hurried one changes the next thing while intervals and sweeps are still
being computed. No limit is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.dashboard.browser import Visitor, chromium, served

if TYPE_CHECKING:
    from playwright.sync_api import Locator

_HURRY_SECONDS = 1.0
#: Requests per second that each kind of person begins with on What if.
_RATES = {"patient": 8.2, "hurried": 7.1}


@dataclass(frozen=True)
class Change:
    """One change, and what the page says once it is answered.

    Attributes:
        key: of the input.
        prepare, make: what is done with it; `make` is the change.
        told: a pattern of the answer's text.
    """

    key: str
    prepare: Callable[[Locator], object]
    make: Callable[[Locator], object]
    told: str


def _typed(key: str, text: str, told: str) -> Change:
    """A number, a text, or an option of a select box."""
    return Change(key, lambda field: field.fill(text), lambda field: field.press("Enter"), told)


def _slider(key: str, arrow: str, told: str) -> Change:
    """The next place of a slider."""
    return Change(key, lambda slider: slider.focus(), lambda slider: slider.press(arrow), told)


def _what_if(rate: float) -> list[Change]:
    """Of loads around this rate, so that no answer is known from before."""

    def told(more: float, name: str) -> str:
        return f"At {rate + more:.3g} requests/s, from A: {name} to B.*TTFT p99 .* TPOT p99"

    return [
        _typed("rate", f"{rate:.3g}", told(0.0, "bf16 KV")),
        _typed("kv_a_kv", "int8", told(0.0, "int8 KV")),
        _typed("rate", f"{rate + 1:.3g}", told(1.0, "int8 KV")),
        _typed("kv_a_replicas", "2", told(1.0, "TP 1 × 2, int8 KV")),
        _slider("kv_a_seqs", "ArrowLeft", told(1.0, "TP 1 × 2, int8 KV, 128 seqs")),
        _typed("kv_a_kv", "bf16", told(1.0, "TP 1 × 2, bf16 KV, 128 seqs")),
        _typed("rate", f"{rate - 0.5:.3g}", told(-0.5, "TP 1 × 2, bf16 KV, 128 seqs")),
        _typed("kv_a_replicas", "1", told(-0.5, "bf16 KV, 128 seqs")),
        _slider("kv_a_seqs", "ArrowRight", told(-0.5, "bf16 KV")),
        _typed("kv_a_kv", "int4", told(-0.5, "int4 KV")),
    ]


def _memory(_: float) -> list[Change]:
    def told(tokens: int, dtype: str) -> str:
        return f"{tokens:,} tokens on 1 × h200_sxm, {dtype} KV: the KV pool holds"

    changes = []
    for dtype in ("fp8", "int8", "int4", "bf16"):
        changes.append(_typed("kv_dtype", dtype, told(32768, dtype)))
        changes.append(_slider("context", "ArrowRight", told(65536, dtype)))
        changes.append(_slider("context", "ArrowLeft", told(32768, dtype)))
    return changes


def _speculation(_: float) -> list[Change]:
    """The largest k is that of the rates that are given."""
    return [_typed("rates", ", ".join(["0.8"] * k), f"With {k} drafts ") for k in (3, 5, 8, 2, 6, 7, 4, 1)]


def _first_number(visitor: Visitor, change: Change) -> float:
    """Seconds from a change to its answer."""
    field = visitor.page.locator(f".st-key-{change.key} input").first
    change.prepare(field)
    started = time.perf_counter()
    change.make(field)
    visitor.page.wait_for_function(
        "told => new RegExp(told, 's').test(document.querySelector('[data-testid=\"stMain\"]').innerText)",
        arg=change.told,
        polling=20,
    )
    return time.perf_counter() - started


#: By the name of a page: where it is, and what is changed on it.
_PAGES: dict[str, tuple[str, Callable[[float], list[Change]]]] = {
    "What if": ("what-if", _what_if),
    "Context & memory": ("memory", _memory),
    "Speculation": ("speculation?acceptance=your+own+rates", _speculation),
}


def measure(visitor: Visitor, path: str, changes: list[Change], hurried: bool) -> dict[str, object]:
    """The responses of one page."""
    visitor.open(path)
    for each in visitor.page.locator(".st-key-kv_a_more summary").all():
        each.click()
    seconds = []
    for change in changes:
        if hurried:
            visitor.page.wait_for_timeout(1000 * _HURRY_SECONDS)
        else:
            visitor.settle()
        seconds.append(_first_number(visitor, change))
    ordered = sorted(seconds)
    return {
        "changes": len(seconds),
        "response_median_s": round(statistics.median(seconds), 3),
        "response_p95_s": round(ordered[max(0, -(-95 * len(ordered) // 100) - 1)], 3),
        "responses_s": [round(each, 3) for each in seconds],
    }


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    record = {
        "command": "python -m tests.dashboard.responses",
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    with served() as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        for name, (path, changes) in _PAGES.items():
            for kind, rate in _RATES.items():
                visitor = Visitor(browser, address)
                record[f"{name}, {kind}"] = measure(visitor, path, changes(rate), kind == "hurried")
                print(name, kind, record[f"{name}, {kind}"], flush=True)
                visitor.close()
        browser.close()
    if given.output:
        given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
