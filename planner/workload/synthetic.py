"""Synthetic workloads: arrivals, lengths and shared prefixes from distributions and a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from planner.errors import UserError
from planner.workload.arrivals import gamma_gaps
from planner.workload.formats import load_workload
from planner.workload.workload import MAX_TOKENS, Workload, split_rows

_MAX_REQUESTS = 20_000_000
HASH_BLOCK_TOKENS = 16  # tokens per prefix id of a synthetic workload; vLLM's default KV block

MAX_SHARED_PREFIXES = 1_000_000


class LengthDistribution(Protocol):
    """Token counts of a request's prompt or answer."""

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """int64 [n], each from 1 to MAX_TOKENS."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def __post_init__(self) -> None:
        _check_range("a fixed length", self.tokens, self.tokens)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return np.full(n, self.tokens, np.int64)


@dataclass(frozen=True)
class Uniform:
    """Whole numbers from low to high, both possible and all equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range("a uniform length", self.low, self.high)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return rng.integers(self.low, self.high, size=n, endpoint=True)


@dataclass(frozen=True)
class LogNormal:
    """exp(N(ln median, sigma²)), rounded and clipped to [low, high]; clipping moves the mean, little if rare."""

    median: float
    sigma: float
    low: int = 1
    high: int = MAX_TOKENS

    def __post_init__(self) -> None:
        _check_range("a lognormal length", self.low, self.high)
        if not (0 < self.median <= MAX_TOKENS and 0 <= self.sigma < math.inf):
            raise UserError(f"a lognormal length needs a median from 0 to {MAX_TOKENS} tokens and a sigma of 0 or more")

    @classmethod
    def from_mean(cls, mean: float, cv: float, low: int = 1, high: int = MAX_TOKENS) -> LogNormal:
        """By mean and coefficient of variation: sigma² = ln(1 + cv²), median = mean/√(1 + cv²)."""
        if not (0 < mean < math.inf and 0 <= cv < math.inf):
            raise UserError(f"a lognormal length needs a positive mean and a cv of 0 or more, not {mean:g} and {cv:g}")
        return cls(mean / math.sqrt(1 + cv * cv), math.sqrt(math.log1p(cv * cv)), low, high)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        tokens = np.exp(math.log(self.median) + self.sigma * rng.standard_normal(n))
        return np.clip(np.rint(tokens), self.low, self.high).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Empirical:
    """Lengths drawn with replacement from observed ones (int [m]), clipped to [low, high].

    Prompt and answer are drawn apart: correlation between them is lost. To keep it, use the trace itself.
    """

    tokens: np.ndarray
    low: int = 1
    high: int = MAX_TOKENS

    def __post_init__(self) -> None:
        _check_range("an empirical length", self.low, self.high)
        tokens = np.array(self.tokens, np.int64)
        if tokens.size == 0 or tokens.min() < 1:
            raise UserError("an empirical length needs at least one observed length, and each at least 1 token")
        tokens.flags.writeable = False
        object.__setattr__(self, "tokens", tokens)

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        return np.clip(self.tokens[rng.integers(self.tokens.size, size=n)], self.low, self.high)


def _check_range(what: str, low: int, high: int) -> None:
    if not 1 <= low <= high <= MAX_TOKENS:
        bounds = f"{low}" if low == high else f"{low} to {high}"
        raise UserError(f"{what} must lie between 1 and {MAX_TOKENS} tokens, smaller bound first, not {bounds}")


@dataclass(frozen=True, kw_only=True)
class SyntheticSpec:
    """What to synthesise. Give exactly one of num_requests and duration_s.

    Attributes:
        request_rate: mean requests per second; inf sends all at once (num_requests only).
        burstiness: shape of the Gamma-distributed gaps; 1 is Poisson, smaller is burstier.
        input_tokens, output_tokens: distributions of lengths; shared prefixes count as input.
        shared_prefix_share: share of requests that begin with a common prefix, each independently.
        shared_prefix_tokens: its length; a prompt that has it is at least one token longer.
        num_shared_prefixes: how many such prefixes there are, equally likely.
    """

    request_rate: float
    num_requests: int | None = None
    duration_s: float | None = None
    burstiness: float = 1.0
    input_tokens: LengthDistribution = field(default_factory=lambda: Fixed(1024))
    output_tokens: LengthDistribution = field(default_factory=lambda: Fixed(256))
    shared_prefix_tokens: int = 0
    shared_prefix_share: float = 1.0
    num_shared_prefixes: int = 1
    name: str = "synthetic"

    def __post_init__(self) -> None:
        if (self.num_requests is None) == (self.duration_s is None):
            raise UserError("a synthetic workload needs either a number of requests or a duration, not both")
        if self.num_requests is not None and self.num_requests < 1:
            raise UserError(f"the number of requests must be at least 1, not {self.num_requests}")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise UserError(f"the duration must be a positive number of seconds, not {self.duration_s:g}")
        if not self.request_rate > 0:
            raise UserError(f"the request rate must be positive, not {self.request_rate:g}")
        if math.isinf(self.request_rate) and self.num_requests is None:
            raise UserError("an infinite request rate needs a number of requests instead of a duration")
        if not self.burstiness > 0:
            raise UserError(f"burstiness must be positive, not {self.burstiness:g}")
        if not 0 <= self.shared_prefix_share <= 1:
            raise UserError(
                f"the share of requests with a shared prefix must be from 0 to 1, not {self.shared_prefix_share:g}"
            )
        if not 0 <= self.shared_prefix_tokens < MAX_TOKENS:
            raise UserError(f"a shared prefix has from 0 to {MAX_TOKENS - 1} tokens, not {self.shared_prefix_tokens}")
        expected = self.num_requests or self.request_rate * self.duration_s
        if expected > _MAX_REQUESTS:
            raise UserError(
                f"about {expected:.3g} requests are too many to simulate; ask for at most {_MAX_REQUESTS:,}"
            )
        if not 1 <= self.num_shared_prefixes <= MAX_SHARED_PREFIXES:
            raise UserError(
                f"the number of shared prefixes must be from 1 to {MAX_SHARED_PREFIXES}, not {self.num_shared_prefixes}"
            )


def synthesize(spec: SyntheticSpec, seed: int = 0) -> Workload:
    """Draw a workload. Same spec and seed, same bytes.

    Arrivals, prompts, answers and prefixes each have a random stream of their own, so that changing one of them leaves
    the others as they are. The first request arrives after the first gap, so that requests/duration estimates the rate.
    """
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(5)]
    arrival_rng, input_rng, output_rng, member_rng, choice_rng = streams
    arrival_s = _arrivals(spec, arrival_rng)
    n = arrival_s.size
    input_tokens = spec.input_tokens.sample(input_rng, n)
    output_tokens = spec.output_tokens.sample(output_rng, n)
    rows = None
    if spec.shared_prefix_tokens:
        shares = member_rng.random(n) < spec.shared_prefix_share
        choice = choice_rng.integers(spec.num_shared_prefixes, size=n)
        input_tokens = np.where(shares, np.maximum(input_tokens, spec.shared_prefix_tokens + 1), input_tokens)
        rows = _prefix_ids(spec, input_tokens, shares, choice)
    return Workload(
        name=spec.name,
        arrival_s=arrival_s,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        prefix_block_hashes=rows,
        prefix_block_tokens=HASH_BLOCK_TOKENS if rows is not None else None,
    )


def _arrivals(spec: SyntheticSpec, rng: np.random.Generator) -> np.ndarray:
    """float64 [n], sorted, seconds."""
    if spec.num_requests is not None:
        if math.isinf(spec.request_rate):
            return np.zeros(spec.num_requests)
        return np.cumsum(gamma_gaps(rng, spec.num_requests, spec.request_rate, spec.burstiness))
    gaps = np.empty(0)
    expected = spec.duration_s * spec.request_rate
    while gaps.sum() < spec.duration_s:
        gaps = np.append(gaps, gamma_gaps(rng, int(1.1 * expected) + 64, spec.request_rate, spec.burstiness))
    arrival_s = np.cumsum(gaps)
    arrival_s = arrival_s[arrival_s < spec.duration_s]
    if not arrival_s.size:
        raise UserError(
            f"no request arrives within {spec.duration_s:g} s at {spec.request_rate:g} requests/s; extend the duration"
        )
    return arrival_s


def _prefix_ids(
    spec: SyntheticSpec, input_tokens: np.ndarray, shares: np.ndarray, choice: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Ids per request: its shared prefix's whole blocks, then its own (a partly shared block is its own)."""
    shared_blocks = spec.shared_prefix_tokens // HASH_BLOCK_TOKENS
    num_ids = -(-input_tokens // HASH_BLOCK_TOKENS)
    row = np.repeat(np.arange(num_ids.size), num_ids)
    position = np.arange(row.size) - (np.cumsum(num_ids) - num_ids)[row]
    own = spec.num_shared_prefixes * shared_blocks + np.arange(row.size)
    ids = np.where(shares[row] & (position < shared_blocks), choice[row] * shared_blocks + position, own)
    return split_rows(ids, num_ids)


def parse_length(text: str, *, which: Literal["input", "output"] = "input") -> LengthDistribution:
    """The distribution that a command-line option describes.

    `1024`, `uniform:100-1024`, `lognormal:mean=1155,cv=1.1`, `lognormal:median=780,sigma=0.9,max=8192` or
    `empirical:trace.csv`, the last with the trace's input or output lengths as `which` says. UserError for all else.
    """
    kind, _, rest = text.strip().partition(":")
    kind = kind.strip().lower()
    if not rest and kind.removeprefix("-").isdecimal():
        return Fixed(int(kind))
    if kind == "fixed":
        return Fixed(_whole(rest, text))
    if kind == "uniform":
        low, dash, high = rest.partition("-")
        if not dash:
            raise _no_length(text)
        return Uniform(_whole(low, text), _whole(high, text))
    if kind == "lognormal":
        return _parse_lognormal(rest, text)
    if (trace := length_trace(text)) is not None:
        workload = load_workload(trace, sort=True)
        return Empirical(workload.input_tokens if which == "input" else workload.output_tokens)
    raise _no_length(text)


def length_trace(text: str) -> Path | None:
    """The trace that `parse_length` reads for a description; None for one that needs none."""
    kind, _, rest = text.strip().partition(":")
    return Path(rest) if kind.strip().lower() == "empirical" and rest else None


def _parse_lognormal(rest: str, text: str) -> LogNormal:
    values = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if not equals or key in values or key not in ("mean", "cv", "median", "sigma", "min", "max"):
            raise _no_length(text)
        try:
            values[key] = float(value)
        except ValueError:
            raise _no_length(text) from None
    low, high = values.pop("min", 1.0), values.pop("max", float(MAX_TOKENS))
    if not (low.is_integer() and high.is_integer()):
        raise _no_length(text)
    if values.keys() == {"mean", "cv"}:
        return LogNormal.from_mean(values["mean"], values["cv"], int(low), int(high))
    if values.keys() == {"median", "sigma"}:
        return LogNormal(values["median"], values["sigma"], int(low), int(high))
    raise _no_length(text)


def _whole(digits: str, text: str) -> int:
    if not digits.strip().isdecimal():
        raise _no_length(text)
    return int(digits)


def _no_length(text: str) -> UserError:
    return UserError(
        f"{text!r} is no length: write 1024, uniform:100-1024, lognormal:mean=1155,cv=1.1 (or median=…,sigma=…, "
        "both with min=…,max=… if wanted) or empirical:trace.csv"
    )


def default_workload(seed: int = 0) -> Workload:
    """The chat load that is planned for when nobody brings one: ten minutes at 8 requests/s, Poisson.

    Lognormal lengths with mean 1024 in and 256 out; their spread (cv 1.0 and 0.8) is near that of the Azure 2023
    conversation trace, and the caps of 8192 and 2048 tokens (which take less than 1 % off the means) keep every request
    within a context of 10,240.
    """
    return synthesize(
        SyntheticSpec(
            name="synthetic chat, 8 requests/s",
            request_rate=8.0,
            duration_s=600.0,
            input_tokens=LogNormal.from_mean(1024, 1.0, high=8192),
            output_tokens=LogNormal.from_mean(256, 0.8, high=2048),
        ),
        seed,
    )
