"""Read a pasted server log, or the text of `/metrics`: vLLM from 0.6 on, and SGLang where its lines say the same.

A table of patterns, tried on every line. What a later line says replaces what an earlier one said, None included: a log
may hold several starts, and vLLM first prints the settings it was given and then those it uses. Where either of them is
printed again, what it said before and does not say any more is forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from planner.errors import UserError
from planner.external.prometheus import read_metrics_line
from planner.external.server_facts import Acceptance, EngineStats, Found, ServerFacts


def _integer(text: str) -> int:
    return int(text.replace(",", ""))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _boolean(text: str) -> bool | None:
    return {"true": True, "false": False, "none": None}[text.lower()]


def _name(text: str) -> str | None:
    text = text.strip("'\" ").removeprefix("torch.")
    return None if text in ("None", "null", "auto", "") else text


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(size) for size in re.findall(r"\d+", text)}))


_INT, _REAL, _BOOL = r"(\d[\d,]*)", r"(\d[\d,]*(?:\.\d+)?)", r"(True|False|None)"
# In an engine-args dump a value follows its name as `name=value` (config) or `'name': value` (non-default args).
_IS = r"['\"]?\s*[=:]\s*"

_Pattern = tuple[str, str, Callable[[str], Any]]
_PATTERNS: tuple[_Pattern, ...] = (
    # The settings that vLLM prints when it starts.
    ("version", r"LLM engine \(v([\w.+-]+)\)", str),
    ("version", r"vLLM (?:API server )?version (\d[\w.+-]*)", str),
    ("model", rf"\bmodel{_IS}'([^']+)'", _name),
    ("model", r"\bmodel_path='([^']+)'", _name),
    ("dtype", rf"(?<![\w_])dtype{_IS}'?((?:torch\.)?\w+)", _name),
    ("quantization", rf"(?<![\w_])quantization{_IS}'?([\w-]+)", _name),
    ("kv_cache_dtype", rf"\bkv_cache_dtype{_IS}'?(\w+)", str),
    ("max_model_len", rf"\bmax_seq_len{_IS}{_INT}", _integer),
    ("max_model_len", rf"\bmax_model_len{_IS}{_INT}", _integer),
    ("max_model_len", r"Using max model len (\d+)", _integer),
    ("max_num_seqs", rf"\bmax_num_seqs{_IS}{_INT}", _integer),
    ("max_num_batched_tokens", rf"\bmax_num_batched_tokens{_IS}{_INT}", _integer),
    ("tensor_parallel_size", rf"\btensor_parallel_size{_IS}{_INT}", _integer),
    ("pipeline_parallel_size", rf"\bpipeline_parallel_size{_IS}{_INT}", _integer),
    ("data_parallel_size", rf"\bdata_parallel_size{_IS}{_INT}", _integer),
    ("gpu_memory_utilization", rf"\bgpu_memory_utilization{_IS}{_REAL}", _number),
    ("enable_prefix_caching", rf"\benable_prefix_caching{_IS}{_BOOL}", _boolean),
    ("enable_chunked_prefill", rf"\b(?:chunked_prefill_enabled|enable_chunked_prefill){_IS}{_BOOL}", _boolean),
    ("enforce_eager", rf"\benforce_eager{_IS}{_BOOL}", _boolean),
    ("async_scheduling", rf"\basync_scheduling{_IS}{_BOOL}", _boolean),
    ("async_scheduling", r"Asynchronous scheduling is (enabled|disabled)", lambda text: text == "enabled"),
    ("block_size", rf"(?<![\w_])block_size{_IS}{_INT}", _integer),
    ("cudagraph_sizes", r"cudagraph_capture_sizes['\"]?\s*[=:]\s*\[([\d,\s]+)\]", _sizes),
    ("num_speculative_tokens", r"num_spec(?:ulative)?_tokens['\"]?\s*[=:]\s*(\d+)", _integer),
    # The memory that it found.
    ("num_gpu_blocks", rf"# (?:GPU|CUDA|cuda) blocks: {_INT}", _integer),
    ("num_gpu_blocks", rf"Overriding num_gpu_blocks=\d+ with num_gpu_blocks_override={_INT}", _integer),
    ("kv_cache_tokens", rf"GPU KV cache size: {_INT} tokens", _integer),
    ("kv_cache_gib", rf"Available KV cache memory: {_REAL} GiB", _number),
    ("kv_cache_gib", rf"reserved for KV Cache is {_REAL}\s?GiB", _number),
    ("weights_gib", rf"(?:Model loading|Loading model weights) took {_REAL} Gi?B", _number),
    ("weights_gib", rf"model weights take {_REAL}\s?GiB", _number),
    ("graph_gib", rf"Graph capturing finished in \d+ secs?, took {_REAL} GiB", _number),
    ("max_model_len", rf"Maximum concurrency for {_INT} tokens per request", _integer),
    ("max_concurrency", rf"Maximum concurrency for [\d,]+ tokens per request: {_REAL}x", _number),
    # SGLang: its tokens are vLLM's blocks of page_size tokens.
    ("kv_cache_tokens", r"\bmax_total_num_tokens=(\d+)", _integer),
    ("kv_cache_tokens", rf"KV Cache is allocated\. .*#tokens: {_INT}", _integer),
    ("max_num_batched_tokens", r"\bchunked_prefill_size=(\d+)", _integer),
    ("max_num_seqs", r"\bmax_running_requests=(\d+)", _integer),
    ("max_model_len", r"\bcontext_len=(\d+)", _integer),
    ("tensor_parallel_size", r"\btp_size=(\d+)", _integer),
    ("pipeline_parallel_size", r"\bpp_size=(\d+)", _integer),
    ("data_parallel_size", r"\bdp_size=(\d+)", _integer),
    ("enforce_eager", r"\bdisable_cuda_graph=(True|False)", _boolean),
    ("block_size", r"\bpage_size=(\d+)", _integer),
    ("enable_prefix_caching", r"\bdisable_radix_cache=(True|False)", lambda text: text == "False"),
    ("cudagraph_sizes", r"Capture cuda graph bs \[([\d,\s]+)\]", _sizes),
)
_COMPILED = tuple((name, re.compile(pattern), convert) for name, pattern, convert in _PATTERNS)
_SGLANG = re.compile(r"max_total_num_tokens=|server_args=|ServerArgs\(|#running-req|\bsglang\b")
_VLLM = re.compile(r"\bvllm\b|vLLM|LLM engine \(v|GPU KV cache size|# (?:GPU|CUDA|cuda) blocks")

# Lines that list settings: those that were given, and those that are used.
_DUMPS = {
    "given": re.compile(r"non-default args: |\bargs: Namespace\(|\bserver_args="),
    "used": re.compile(r"LLM engine \(v[\w.+-]+\) with config"),
}
_STATS = re.compile(r"Running: (\d+) reqs")
_SGLANG_STATS = re.compile(r"#running-req: (\d+)")
_SPECULATION = re.compile(r"(?:SpecDecoding|Speculative) metrics: (.*)")
_PREEMPTED = re.compile(
    r"is preempted by PreemptionMode|num_cumulative_preemption|[Rr]etract(?:ing)? requests"
    r"|Decode out of memory happened"
)


def read_server_log(text: str) -> ServerFacts:
    """What a log says. Lines that say nothing known are passed over; Prometheus lines among them are read too.

    Raises:
        UserError: there is nothing in it that this module knows.
    """
    facts = _Facts()
    for number, line in enumerate(text.split("\n"), 1):
        for part in line.split("\r"):  # a progress bar writes over its line again and again
            if not read_metrics_line(part, number, facts.counters):
                _read_line(part, number, facts)
    found = facts.result()
    if found == ServerFacts():
        raise UserError(
            "nothing in the server log is known: paste the start-up lines of vLLM or SGLang (e.g. 'GPU KV cache size: "
            "… tokens'), its statistics lines, or the text of /metrics"
        )
    return found


def _read_line(line: str, number: int, facts: _Facts) -> None:
    facts.forget_earlier_dump(line, number)
    if "engine" not in facts.found:
        for engine, mark in (("sglang", _SGLANG), ("vllm", _VLLM)):
            if mark.search(line):
                facts.found["engine"] = Found(engine, number)
                break
    for name, pattern, convert in _COMPILED:
        match = pattern.search(line)
        if match:
            value = convert(match[1])
            facts.found.pop(name, None)
            if value is not None:
                facts.found[name] = Found(value, number)
    if _PREEMPTED.search(line):
        # vLLM 0.6 to 0.8 warns of every fiftieth, with the count so far.
        so_far = _field(line, r"num_cumulative_preemption=(\d+)")
        facts.preemptions = facts.preemptions + 1 if so_far is None else int(so_far)
        facts.preemption_line = number
    stats = _stats(line, number)
    if stats is not None:
        facts.stats.append(stats)
    speculation = _SPECULATION.search(line)
    if speculation:
        facts.add_speculation(speculation[1], number)
    elif "accept len:" in line and "#running-req" in line:
        facts.add_sglang_speculation(line, number)


def _field(line: str, pattern: str, scale: float = 1.0) -> float | None:
    match = re.search(pattern, line)
    try:
        return None if match is None else _number(match[1]) * scale
    except ValueError:  # dots without digits: the line was cut
        return None


def _stats(line: str, number: int) -> EngineStats | None:
    running = _STATS.search(line)
    if running:
        waiting = _field(line, r"(?:Waiting|Pending): (\d+) reqs")
        return EngineStats(
            number,
            int(running[1]),
            None if waiting is None else int(waiting),
            _field(line, r"GPU KV cache usage: ([\d.]+)%", 0.01),
            _field(line, r"Prefix cache hit rate: (?:GPU: )?([\d.]+)%", 0.01),
            _field(line, r"Avg generation throughput: ([\d.]+) tokens/s"),
        )
    running = _SGLANG_STATS.search(line)
    if running is None or "Decode batch" not in line:
        return None
    waiting = _field(line, r"#queue-req: (\d+)")
    return EngineStats(
        number,
        int(running[1]),
        None if waiting is None else int(waiting),
        _field(line, r"token usage: ([\d.]+)"),
        None,
        _field(line, r"gen throughput \(token/s\): ([\d.]+)"),
    )


def _rounds(accepted: float | None, drafted: float | None, length: float | None, positions: list[float]) -> float:
    """Rounds of an interval; 0 where the line does not tell."""
    if drafted and positions:
        return drafted / len(positions)  # a round drafts every position
    # Rates go before the length, so that both are the same story where only one of the counts was printed.
    per_round = sum(positions) or (length or 1.0) - 1
    return accepted / per_round if accepted and per_round > 0 else 0.0


class _Facts:
    """Collects while the lines go by."""

    def __init__(self) -> None:
        self.found: dict[str, Found] = {}
        self.counters: dict[str, Any] = {}
        self.stats: list[EngineStats] = []
        self.preemptions = 0
        self.preemption_line = 0
        self._dumped_on: dict[str, int] = {}  # line of the last one of each kind
        self._forget_speculation()

    def _forget_speculation(self) -> None:
        self._accepted = 0
        self._drafted = 0
        self._rounds = 0.0
        self._accepted_at: list[float] = []
        self._length = 0.0  # sum over lines, where no line counts its tokens
        self._lines = 0
        self._speculation_line = 0

    def forget_earlier_dump(self, line: str, number: int) -> None:
        """Drop what an earlier list of settings said where this line is such a list, as of another start."""
        for kind, mark in _DUMPS.items():
            if mark.search(line):
                earlier = self._dumped_on.get(kind)
                self._dumped_on[kind] = number
                if earlier is not None and kind == "used":
                    self._forget_speculation()  # of another drafter, or of one that there is no more
                for name in [name for name, found in self.found.items() if found.line == earlier]:
                    if name != "engine":
                        del self.found[name]

    def add_speculation(self, metrics: str, line: int) -> None:
        """A line of the engine's acceptance counters; each covers one interval, so they add up."""
        accepted = _field(metrics, r"(?:Accepted|Number of accepted tokens): (\d+)")
        drafted = _field(metrics, r"(?:Drafted|Number of draft tokens): (\d+)")
        if not accepted and not drafted:
            return
        cumulative = "Number of draft tokens" in metrics  # vLLM 0.6 and 0.7 count from the start
        if cumulative:
            self._accepted = self._drafted = 0
        length = _field(metrics, r"Mean acceptance length: ([\d.]+)")
        rates = re.search(r"Per-position acceptance rate: ((?:[\d.]+(?:, )?)+)", metrics)
        positions = [float(rate) for rate in re.findall(r"\d+(?:\.\d+)?", rates[1])] if rates else []
        rounds = _rounds(accepted, drafted, length, positions)
        if None in (accepted, drafted) and not rounds:
            self._add_length(length, line)
            return
        # Of a line that was cut, the missing count is what the rates make of the other.
        self._accepted += int(round(rounds * sum(positions)) if accepted is None else accepted)
        self._drafted += int(round(rounds * len(positions)) if drafted is None else drafted)
        self._speculation_line = line
        self._rounds += rounds
        self._accepted_at += [0.0] * (len(positions) - len(self._accepted_at))
        for i, rate in enumerate(positions):
            self._accepted_at[i] += rate * rounds

    def add_sglang_speculation(self, line: str, number: int) -> None:
        """SGLang prints the mean acceptance length of the last interval, the bonus token included."""
        self._add_length(_field(line, r"accept len: ([\d.]+)") or 0.0, number)

    def _add_length(self, length: float | None, line: int) -> None:
        if length is not None:
            self._length += length
            self._lines += 1
            self._speculation_line = line

    def _acceptance(self) -> Acceptance | None:
        if self._drafted or self._rounds:
            rates = tuple(count / self._rounds for count in self._accepted_at) if self._rounds else ()
            length = 1 + self._accepted / self._rounds if self._rounds else None
            return Acceptance(self._accepted, self._drafted or None, length, rates, self._speculation_line)
        if self._lines:
            return Acceptance(None, None, self._length / self._lines, (), self._speculation_line)
        return None

    def result(self) -> ServerFacts:
        found = dict(self.found)
        if self.preemptions:
            found["num_preemptions"] = Found(self.preemptions, self.preemption_line)
        counters = dict(self.counters)
        from_counters = counters.pop("acceptance", None)
        acceptance = from_counters.result() if from_counters is not None else None
        found |= counters
        return ServerFacts(**found, acceptance=acceptance or self._acceptance(), stats=tuple(self.stats))
