"""The few lines of `/metrics` text that tell how an engine is set up and what it did, with vLLM's names."""

from __future__ import annotations

import re
from typing import Any

from planner.external.server_facts import Acceptance, Found

_LINE = re.compile(r"^\s*(?:vllm|sglang):(\w+)(?:\{(.*)\})?\s+(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)(?:\s+\d+)?\s*$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Counters that add up over engines, by the names of ServerFacts; vLLM 0.8 says "gpu".
_COUNTERS = {
    "num_preemptions": "num_preemptions",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "gpu_prefix_cache_queries": "prefix_cache_queries",
    "gpu_prefix_cache_hits": "prefix_cache_hits",
}
_SPECULATION = "spec_decode_num_"


class SpeculationCounters:
    """Counters of drafts, added over engines."""

    def __init__(self) -> None:
        self.rounds = self.drafted = self.accepted = 0.0
        self.accepted_at: dict[int, float] = {}
        self.line = 0

    def result(self) -> Acceptance | None:
        if not self.drafted:
            return None
        rates, length = (), None
        if self.rounds:
            rates = tuple(self.accepted_at[i] / self.rounds for i in sorted(self.accepted_at))
            length = 1 + self.accepted / self.rounds
        return Acceptance(int(self.accepted), int(self.drafted), length, rates, self.line)


def read_metrics_line(line: str, number: int, found: dict[str, Any]) -> bool:
    """Add what one line says to `found` (by names of ServerFacts); False where it is no metric of an engine."""
    match = _LINE.match(line)
    if match is None:
        return False
    name, labels = match[1].removesuffix("_total"), dict(_LABEL.findall(match[2] or ""))
    if name == "cache_config_info":
        _cache_config(labels, number, found)
    elif name.startswith(_SPECULATION) and not name.endswith("_created"):
        _speculation(name.removeprefix(_SPECULATION), labels, float(match[3]), number, found)
    elif (counter := _COUNTERS.get(name)) is not None:
        before = found[counter].value if counter in found else 0
        found[counter] = Found(before + int(float(match[3])), number)
    if line.lstrip().startswith("vllm:"):
        found.setdefault("engine", Found("vllm", number))
    return True


def _cache_config(labels: dict[str, str], number: int, found: dict[str, Any]) -> None:
    numbers = {"num_gpu_blocks": int, "block_size": int, "gpu_memory_utilization": float, "kv_cache_size_tokens": int}
    for label, convert in numbers.items():
        try:
            value = convert(labels.get(label, ""))
        except ValueError:
            continue  # absent, or "None"
        found["kv_cache_tokens" if label == "kv_cache_size_tokens" else label] = Found(value, number)
    if labels.get("cache_dtype", "None") != "None":
        found["kv_cache_dtype"] = Found(labels["cache_dtype"], number)
    caching = labels.get("enable_prefix_caching", "").lower()
    if caching in ("true", "false"):
        found["enable_prefix_caching"] = Found(caching == "true", number)


def _speculation(what: str, labels: dict[str, str], value: float, number: int, found: dict[str, Any]) -> None:
    counters = found.setdefault("acceptance", SpeculationCounters())
    counters.line = number
    if what == "drafts":
        counters.rounds += value
    elif what == "draft_tokens":
        counters.drafted += value
    elif what == "accepted_tokens":
        counters.accepted += value
    elif what == "accepted_tokens_per_pos" and labels.get("position", "").isdigit():
        position = int(labels["position"])
        counters.accepted_at[position] = counters.accepted_at.get(position, 0.0) + value
