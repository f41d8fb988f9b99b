"""The workload: a stream of requests with arrival times, lengths and, where a trace knows them, shared prefixes.

    arrival_s      0.0     0.4     0.9   …      seconds since the workload began
    input_tokens   1155    24      7000  …      prompt
    output_tokens  211     9       500   …      answer, as the trace recorded it
    prefix ids     [0 1 2] [3]     [0 1 4 5 …]  one id per `prefix_block_tokens` tokens of the prompt

Prefix ids are chained: an id stands for *all* tokens from the start of the prompt to the end of its block, so two
prompts share an id exactly when they share everything before it too. `Workload.page_hashes` translates them to a KV
cache's pages.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from pydantic import BaseModel, ConfigDict

from planner.errors import UserError

# A page hash packs (prefix id, page index) into one non-negative int64: 39 bits of id, 24 bits of page.
_PAGE_BITS = 24
MAX_TOKENS = 2**_PAGE_BITS - 1
_MAX_PREFIX_ID = 2**39 - 1

# Thirty years. Longer loads are a unit mistaken for another.
MAX_DURATION_S = 1e9


class LengthSummary(BaseModel):
    """Tokens per request: mean, percentiles (linear interpolation) and maximum."""

    model_config = ConfigDict(frozen=True)

    mean: float
    p50: float
    p95: float
    p99: float
    max: int


class WorkloadSummary(BaseModel):
    """What a workload looks like in a dozen numbers.

    `request_rate_per_s` is None when all requests arrive at once, `interarrival_cv` (standard deviation over mean of
    the gaps; 1 for Poisson) is None below two gaps, and the hit rate is None when the trace has no prefix ids.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    num_requests: int
    duration_s: float
    request_rate_per_s: float | None
    interarrival_cv: float | None
    input_tokens: LengthSummary
    output_tokens: LengthSummary
    infinite_cache_hit_rate: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Workload:
    """Requests in order of arrival. Arrays are copied where needed and set read-only.

    Attributes:
        name: where it came from, for reports.
        arrival_s: float64 [n], seconds since the workload began, sorted, >= 0.
        input_tokens, output_tokens: int64 [n], 1 … 16,777,215.
        prefix_block_hashes: per request int64 ids of its prompt's blocks, chained as the module says; a request may
            have fewer ids than blocks, its remaining tokens are then shared with nobody. None when nothing is known.
        prefix_block_tokens: tokens per id (512 in Mooncake traces).
        session: int64 [n], equal for requests of one conversation, or None.
        notes: what loading changed or skipped, one sentence each.

    Raises:
        UserError: lengths that differ, values out of range, arrivals not sorted.
    """

    name: str
    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    prefix_block_hashes: tuple[np.ndarray, ...] | None = None
    prefix_block_tokens: int | None = None
    session: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    _ids: np.ndarray = field(init=False)  # all requests' prefix ids, one after the other
    _num_ids: np.ndarray = field(init=False)  # how many of them each request has

    def __post_init__(self) -> None:
        n = np.size(self.arrival_s)
        if n == 0:
            raise UserError(f"workload {self.name!r} has no requests")
        self._set("arrival_s", _checked_arrivals(self.name, self.arrival_s))
        for what in ("input_tokens", "output_tokens"):
            self._set(what, _checked_tokens(self.name, what, getattr(self, what), n))
        if self.session is not None:
            self._set("session", _frozen(_integers(self.name, "session", self.session, n)))
        self._set("notes", tuple(self.notes))
        self._check_prefixes(n)

    def _set(self, attribute: str, value: object) -> None:
        object.__setattr__(self, attribute, value)

    def _check_prefixes(self, n: int) -> None:
        if self.prefix_block_hashes is None:
            self._set("prefix_block_tokens", None)
            self._set("_ids", _frozen(np.empty(0, np.int64)))
            self._set("_num_ids", _frozen(np.zeros(n, np.int64)))
            return
        if self.prefix_block_tokens is None or self.prefix_block_tokens < 1:
            raise UserError(f"workload {self.name!r} has prefix ids but no prefix_block_tokens of at least 1")
        if len(self.prefix_block_hashes) != n:
            raise UserError(f"workload {self.name!r} has {n} requests but {len(self.prefix_block_hashes)} id lists")
        num_ids = np.fromiter(map(len, self.prefix_block_hashes), np.int64, n)
        ids = np.concatenate(self.prefix_block_hashes) if num_ids.any() else np.empty(0, np.int64)
        ids = _frozen(_integers(self.name, "prefix ids", ids, ids.size))
        if ids.size and (ids.min() < 0 or ids.max() > _MAX_PREFIX_ID):
            raise UserError(f"workload {self.name!r} has prefix ids outside 0 … {_MAX_PREFIX_ID}; renumber them from 0")
        excess = np.flatnonzero((num_ids - 1) * self.prefix_block_tokens >= self.input_tokens)
        if excess.size:
            i = excess[0]
            raise UserError(
                f"workload {self.name!r} request {i} has {num_ids[i]} prefix ids of {self.prefix_block_tokens} tokens "
                f"for only {self.input_tokens[i]} input tokens; is prefix_block_tokens right?"
            )
        self._set("prefix_block_tokens", int(self.prefix_block_tokens))
        self._set("_ids", ids)
        self._set("_num_ids", _frozen(num_ids))
        self._set("prefix_block_hashes", split_rows(ids, num_ids))

    def __len__(self) -> int:
        return self.arrival_s.size

    def __repr__(self) -> str:
        return f"Workload({self.name!r}, {len(self)} requests in {self.duration_s:.6g} s)"

    @property
    def num_requests(self) -> int:
        return len(self)

    @property
    def duration_s(self) -> float:
        """Arrival of the last request, in seconds."""
        return float(self.arrival_s[-1])

    @property
    def request_rate(self) -> float:
        """Requests per second over the duration; inf when all arrive at once, as in `vllm bench serve`."""
        return len(self) / self.duration_s if self.duration_s > 0 else float("inf")

    def scaled(self, rate_scale: float) -> Workload:
        """The same requests arriving `rate_scale` times as fast."""
        if not (np.isfinite(rate_scale) and rate_scale > 0):
            raise UserError(f"the rate scale must be a positive number, not {rate_scale}")
        return replace(self, arrival_s=self.arrival_s / rate_scale)

    def window(self, start_s: float, end_s: float) -> Workload:
        """The requests arriving in [start_s, end_s), with start_s as the new zero. UserError when there are none."""
        lo, hi = np.searchsorted(self.arrival_s, [start_s, end_s], side="left")
        if lo >= hi:
            raise UserError(
                f"no request of {self.name!r} arrives in [{start_s:g}, {end_s:g}) s; it spans 0 … {self.duration_s:g} s"
            )
        return self._take(np.arange(lo, hi), self.arrival_s[lo:hi] - start_s)

    def head(self, n: int) -> Workload:
        """The first n requests, or all when there are fewer."""
        if n < 1:
            raise UserError(f"the number of requests to keep must be at least 1, not {n}")
        n = min(n, len(self))
        return self._take(np.arange(n), self.arrival_s[:n])

    def _take(self, index: np.ndarray, arrival_s: np.ndarray) -> Workload:
        """Requests `index` (int [m]) at new arrival times (float [m])."""
        rows = self.prefix_block_hashes
        return replace(
            self,
            arrival_s=arrival_s,
            input_tokens=self.input_tokens[index],
            output_tokens=self.output_tokens[index],
            prefix_block_hashes=None if rows is None else tuple(rows[i] for i in index.tolist()),
            session=None if self.session is None else self.session[index],
        )

    def page_hashes(self, index: int, block_size: int) -> list[int] | None:
        """One int per full page of `block_size` tokens in the prompt of request `index`; None without prefix ids.

        Two requests of one workload have the same int at page p exactly when the trace says that their tokens up to the
        end of page p are equal, that is, when they agree on the id of the block in which the page's last token lies.

            block ids (8 tokens)  |   id 5    |   id 9    |      page 1 of 5 tokens ends in id 9's block, so its hash
            pages   (5 tokens)    |  0   |  1   |  2   |         is (9, 1), although most of its tokens are id 5's

        Pages past the last id are shared with nobody and come as negative ints of (request, page).
        """
        if self.prefix_block_hashes is None:
            return None
        _check_block_size(block_size)
        ids, block_tokens = self.prefix_block_hashes[index], self.prefix_block_tokens
        num_pages = int(self.input_tokens[index]) // block_size
        num_known = min(num_pages, ids.size * block_tokens // block_size)
        page = np.arange(num_known)
        block = page if block_size == block_tokens else ((page + 1) * block_size - 1) // block_tokens
        hashes = ((ids[block] << _PAGE_BITS) | page).tolist()
        if num_known < num_pages:
            request = index % len(self)
            hashes += [-((request << _PAGE_BITS) | p) - 1 for p in range(num_known, num_pages)]
        return hashes

    @cached_property
    def _first_request(self) -> np.ndarray:
        """int64 [len(_ids)]: for each prefix id as it occurs, the first request of the trace that has it."""
        owner = np.repeat(np.arange(len(self)), self._num_ids)
        _, first, inverse = np.unique(self._ids, return_index=True, return_inverse=True)
        return owner[first][inverse]

    def infinite_cache_hit_rate(self, block_size: int | None = None) -> float:
        """Share of all prompt tokens that a prefix cache of infinite size would serve.

        Counts full pages of `block_size` tokens (default: the trace's own blocks) that an earlier request had, never
        the page with a prompt's last token, which the engine always recomputes. 0 when the trace has no prefix ids.
        """
        if self.prefix_block_hashes is None:
            return 0.0
        if block_size is None:
            block_size = self.prefix_block_tokens
        _check_block_size(block_size)
        owner = np.repeat(np.arange(len(self)), self._num_ids)
        seen_blocks = np.bincount(owner[self._first_request < owner], minlength=len(self))
        seen_tokens = np.minimum(seen_blocks * self.prefix_block_tokens, self.input_tokens - 1)
        return float((seen_tokens // block_size * block_size).sum() / self.input_tokens.sum())

    def summary(self) -> WorkloadSummary:
        """Rate, burstiness, lengths and sharing, for reports and JSON."""
        gaps = np.diff(self.arrival_s)
        known = self.prefix_block_hashes is not None
        return WorkloadSummary(
            name=self.name,
            num_requests=len(self),
            duration_s=self.duration_s,
            request_rate_per_s=self.request_rate if self.duration_s > 0 else None,
            interarrival_cv=float(gaps.std() / gaps.mean()) if gaps.size > 1 and gaps.any() else None,
            input_tokens=_length_summary(self.input_tokens),
            output_tokens=_length_summary(self.output_tokens),
            infinite_cache_hit_rate=self.infinite_cache_hit_rate() if known else None,
            notes=self.notes,
        )

    def resampled(self, seed: int, block_s: float = 60.0) -> Workload:
        """Another workload of the same duration, made of random stretches of this one: for intervals.

        Circular moving-block bootstrap (Künsch 1989; Politis and Romano 1992): stretches of `block_s` seconds starting
        anywhere, wrapping at the end, are laid one after the other until the duration is covered. Bursts shorter than
        a stretch survive and every request is expected once. Prefix ids and sessions go along, but a stretch that
        comes up again brings new prompts: what the trace saw for the first time in it gets new ids (`_fresh_ids`).

        Requests that all arrive at once have no stretches; they are drawn one by one.
        """
        if not (np.isfinite(block_s) and block_s > 0):
            raise UserError(f"the length of a bootstrap block must be a positive number of seconds, not {block_s}")
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        index, draw, arrival_s = self._draw_blocks(rng, block_s)
        while index.size == 0:  # possible where requests are rarer than blocks
            index, draw, arrival_s = self._draw_blocks(rng, block_s)
        drawn = self._take(index, arrival_s)
        if self.prefix_block_hashes is None:
            return drawn
        return replace(drawn, prefix_block_hashes=split_rows(self._fresh_ids(index, draw), drawn._num_ids))

    def _draw_blocks(self, rng: np.random.Generator, block_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Request indices, the number of the draw each came in, and new arrival times; all [m]."""
        n, duration_s = len(self), self.duration_s
        if duration_s == 0:
            return rng.integers(n, size=n), np.arange(n), np.zeros(n)
        block_s = min(block_s, duration_s)
        offset_s = np.arange(0.0, duration_s, block_s)
        start_s = rng.uniform(0.0, duration_s, offset_s.size)
        length_s = np.minimum(block_s, duration_s - offset_s)
        twice_s = np.concatenate([self.arrival_s, self.arrival_s + duration_s])
        lo, hi = np.searchsorted(twice_s, start_s), np.searchsorted(twice_s, start_s + length_s)
        draw = np.repeat(np.arange(offset_s.size), hi - lo)
        position = np.arange(draw.size) - np.repeat(np.cumsum(hi - lo) - (hi - lo), hi - lo) + lo[draw]
        # Rounding can put a request a few ulps past the end of its block; the running maximum keeps the order.
        arrival_s = np.maximum.accumulate(twice_s[position] - start_s[draw] + offset_s[draw])
        return position % n, draw, arrival_s

    def _fresh_ids(self, index: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Prefix ids of a resample, one row after the other: a prompt drawn twice must not hit the cache because of it.

        In draw d an id is renamed to (d, id) when the request that first had it is in d and was in an earlier draw as
        well; what the trace shares with requests outside the block keeps its id, and so its hits. An id's successors in
        a prompt are renamed with it, which keeps ids chained: whether (d, id) is new depends on d and id's path alone.
        """
        n = len(self)
        order = np.argsort(index, kind="stable")
        repeated = np.zeros(index.size, bool)
        repeated[order[1:]] = index[order[1:]] == index[order[:-1]]
        num_ids = self._num_ids[index]
        row = np.repeat(np.arange(index.size), num_ids)
        row_start = np.cumsum(num_ids) - num_ids
        position = np.arange(row.size) - row_start[row]
        source = (np.cumsum(self._num_ids) - self._num_ids)[index][row] + position
        renamed = np.isin(draw[row] * n + self._first_request[source], (draw * n + index)[repeated])
        first_renamed = np.full(index.size, np.iinfo(np.int64).max)
        np.minimum.at(first_renamed, row[renamed], position[renamed])
        renamed = position >= first_renamed[row]
        ids = self._ids[source]
        stride = int(self._ids.max(initial=0)) + 1
        if stride * (int(draw.max(initial=0)) + 2) > _MAX_PREFIX_ID:
            _, ids = np.unique(ids, return_inverse=True)
            stride = int(ids.max(initial=0)) + 1
        return ids + np.where(renamed, (draw[row] + 1) * stride, 0)


def split_rows(flat: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
    """Views of `flat` [sum(lengths)], one per row."""
    ends = np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    return tuple(flat[a:b] for a, b in zip(starts, ends, strict=True))


def _check_block_size(block_size: int) -> None:
    if block_size < 1:
        raise UserError(f"the block size must be at least 1 token, not {block_size}")


def _frozen(values: np.ndarray) -> np.ndarray:
    """`values`, read-only; a copy when the caller could still write to it."""
    if values.flags.writeable or values.base is not None:
        values = values.copy()
        values.flags.writeable = False
    return values


def _checked_arrivals(name: str, values: np.ndarray) -> np.ndarray:
    arrivals = np.asarray(values, np.float64)
    if arrivals.ndim != 1 or not np.isfinite(arrivals).all():
        raise UserError(f"workload {name!r} needs one finite arrival time per request")
    if arrivals[0] < 0 or (np.diff(arrivals) < 0).any():
        raise UserError(f"workload {name!r} needs arrival times that are sorted and not negative")
    if arrivals[-1] > MAX_DURATION_S:
        raise UserError(
            f"workload {name!r} lasts {arrivals[-1]:.3g} s; at most {MAX_DURATION_S:g} s can be simulated, so check "
            f"the unit of its arrival times, or its rate"
        )
    return _frozen(arrivals)


def _integers(name: str, what: str, values: np.ndarray, n: int) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (n,):
        raise UserError(f"workload {name!r} has {n} requests but {array.size} values of {what}")
    if array.dtype.kind not in "iu" and not (array.dtype.kind == "f" and np.equal(array, np.rint(array)).all()):
        raise UserError(f"workload {name!r} has values of {what} that are not whole numbers")
    return array.astype(np.int64, copy=False)


def _checked_tokens(name: str, what: str, values: np.ndarray, n: int) -> np.ndarray:
    tokens = _integers(name, what, values, n)
    bad = np.flatnonzero((tokens < 1) | (tokens > MAX_TOKENS))
    if bad.size:
        raise UserError(f"workload {name!r} request {bad[0]} has {tokens[bad[0]]} {what}, not from 1 to {MAX_TOKENS}")
    return _frozen(tokens)


def _length_summary(tokens: np.ndarray) -> LengthSummary:
    p50, p95, p99 = np.percentile(tokens, [50, 95, 99]).tolist()
    return LengthSummary(mean=float(tokens.mean()), p50=p50, p95=p95, p99=p99, max=int(tokens.max()))
