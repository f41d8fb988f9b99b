"""Loads and SLOs that people start from. Every number can be overridden on the page."""

from __future__ import annotations

from dataclasses import dataclass

TRACE = "trace"


@dataclass(frozen=True)
class Preset:
    """A kind of traffic.

    Attributes:
        label: for people.
        request_rate: requests per second.
        input_tokens, output_tokens: mean lengths; input_cv, output_cv: standard deviation over mean (lognormal).
        input_max, output_max: longest.
        ttft_ms, tpot_ms, e2el_ms, percentile: the SLO; None where such traffic has no such limit.
        source: where the numbers come from.
    """

    label: str
    request_rate: float
    input_tokens: int
    output_tokens: int
    input_cv: float
    output_cv: float
    input_max: int
    output_max: int
    ttft_ms: float | None
    tpot_ms: float | None
    e2el_ms: float | None
    percentile: float
    source: str


_LENGTHS = "lengths and limits as llm-d-planner's preset; the spread is an assumption"

#: By the name that stands in a link. The first is what is planned for when nobody says anything: `memwall plan`'s own
#: default load and SLO.
PRESETS: dict[str, Preset] = {
    "chat": Preset("Chat", 8.0, 1024, 256, 1.0, 0.8, 8192, 2048, 1000.0, 50.0, None, 99.0, "memwall plan's default"),
    "rag": Preset("RAG", 2.0, 4096, 512, 0.5, 0.5, 16384, 2048, 600.0, 30.0, None, 95.0, _LENGTHS),
    "code": Preset("Code completion", 6.0, 1024, 1024, 0.5, 0.5, 8192, 4096, 200.0, 20.0, None, 95.0, _LENGTHS),
    "long": Preset("Long document", 0.5, 10240, 1536, 0.4, 0.5, 32768, 8192, 2000.0, 40.0, None, 95.0, _LENGTHS),
    "batch": Preset("Batch, overnight", 20.0, 1024, 512, 0.5, 0.5, 8192, 4096, None, None, 120_000.0, 95.0, _LENGTHS),
}
DEFAULT_PRESET = "chat"
