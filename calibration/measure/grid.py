"""Which steps are measured: few, and where the curves bend.

Priority 0 is what a profile cannot do without; 1 makes it better; 2 is left out first when time runs out. What an
engine has no room for is left out silently: its pool, slots, token budget and model length say how far a grid goes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from engine.scheduling import KVCacheConfig

DECODE, PREFILL, MIXED = TABLES = ("decode", "prefill", "mixed")

# ---- decode: requests, and tokens in the cache of each ---------------------------------------------------------------

BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # sizes of CUDA graphs
BASE_CONTEXT = 128
SPREAD_BATCHES = (1, 8, 32, 64, 128, 256)
SPREAD_CONTEXTS = (1024, 4096)  # of priority 0
MORE_CONTEXTS = (512, 8192, 32_768)
LONGEST_CONTEXT = 131_072  # at batch 1
# Requests whose contexts are drawn log-uniformly, with as many tokens in all as so many of the second number have.
RAGGED = ((8, 4096), (32, 1024), (64, 4096), (256, 1024))
# Between sizes of graphs: padding.
PADDED = ((3, 512), (12, 512), (20, 1024), (44, 512), (100, 512), (250, 512))
FULL_POOL = 0.95  # share of the pool that the longest contexts of a batch take

# ---- prefill: new tokens, and tokens in the cache --------------------------------------------------------------------

# Where nothing is padded. Engines that pad have a point for every size they pad to, and of these the larger ones: there
# the matrix kernels change.
QUERIES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
LARGE_QUERIES = (1152, 1280, 1536, 1792, 2048, 2560, 3072, 4096, 5120, 6144, 8192)
CONTEXT_QUERIES, MORE_CONTEXT_QUERIES = (128, 512, 2048), (32, 64, 256, 1024, 4096)  # of priority 0 and 1
CONTEXTS = (1024, 8192)
# Of each of CONTEXT_QUERIES.
LONGER_CONTEXTS = (4096, 16_384, 32_768)
LONG_PREFILLS = ((64, 32_768), (256, 32_768), (1024, 32_768), (512, 65_536), (2048, 65_536), (128, 122_880))

# ---- mixed -----------------------------------------------------------------------------------------------------------

BESIDE_QUERIES, BESIDE_DECODES, BESIDE_CONTEXT = (128, 512, 1024), (16, 64, 192), 512
PADDED_FROM, PADDED_TO, PADDED_DECODES = 192, 1024, (24, 8, 96, 48)  # sizes of pieces, and decodes by turns
NUM_DRAWN, NUM_DRAWN_FIRST = 24, 16  # the first of them have priority 0
_CHUNKS = ((1, 0.5), (2, 0.22), (3, 0.11), (4, 0.08), (5, 0.05), (6, 0.04))  # prompt chunks of a step, how often
_DRAWN_QUERY, _DRAWN_CONTEXT, _DRAWN_DECODE = (16, 2048), (64, 8192), (32, 4096)
_WITH_CONTEXT, _WITHOUT_DECODES = 0.25, 0.1

# ---- what --quick keeps ----------------------------------------------------------------------------------------------

QUICK_BATCHES, QUICK_CONTEXTS, QUICK_SPREAD = (1, 4, 8, 32, 64, 128, 256), (1024,), (1, 32, 256)
QUICK_QUERIES, QUICK_CONTEXT_QUERIES = (16, 64, 128, 512, 1024, 2048, 8192), (128, 1024)
QUICK_BESIDE_QUERIES, QUICK_DRAWN = (512,), 4


@dataclass(frozen=True)
class Point:
    """A step to be measured.

    Attributes:
        table: of the profile: decode, prefill or mixed.
        prefills: (new tokens, tokens in the cache) of each prompt chunk; those with a context come first, as running
            requests come before admitted ones.
        decodes: (tokens in the cache, how many neighbours have as many).
    """

    table: str
    prefills: tuple[tuple[int, int], ...] = ()
    decodes: tuple[tuple[int, int], ...] = ()
    priority: int = 1

    @classmethod
    def of(
        cls, table: str, prefills: Iterable[tuple[int, int]] = (), contexts: Iterable[int] = (), priority: int = 1
    ) -> Point:
        """From chunks in any order and the context of every decode."""
        decodes = tuple((context, len(list(same))) for context, same in groupby(contexts))
        return cls(table, tuple(sorted(prefills, key=lambda chunk: chunk[1] == 0)), decodes, priority)

    @property
    def key(self) -> tuple:
        """What tells it from the other points of a profile."""
        return self.table, self.prefills, self.decodes

    @property
    def contexts(self) -> list[int]:
        """Of each decode."""
        return [context for context, count in self.decodes for _ in range(count)]

    @property
    def num_decodes(self) -> int:
        return sum(count for _, count in self.decodes)

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return self.num_decodes + sum(query for query, _ in self.prefills)


@dataclass(frozen=True)
class Room:
    """What an engine has room for.

    Attributes:
        num_blocks: KV blocks, the null block not counted. windows: of its KV groups.
        piece_sizes: numbers of tokens that steps with prompts are padded to, ascending; larger ones are not padded.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int
    windows: tuple[int | None, ...] = (None,)
    piece_sizes: tuple[int, ...] = ()

    def padded(self, num_tokens: int) -> int:
        """Tokens that a step with prompts computes."""
        return next((size for size in self.piece_sizes if size >= num_tokens), num_tokens)

    def holds(self, point: Point) -> bool:
        """Whether the engine can run such steps one behind the other.

        A prompt without context is a new request in every step, and the one of the step in flight is still there.
        """
        admitted = [query for query, context in point.prefills if context == 0]
        if point.num_decodes + len(point.prefills) + len(admitted) > self.max_num_seqs:
            return False
        if point.num_tokens > self.max_num_batched_tokens or self.longest(point) > self.max_model_len:
            return False
        pages = sum(count * self._pages(context + 1) for context, count in point.decodes)
        pages += sum(self._pages(query + context) for query, context in point.prefills)
        return pages + sum(map(self._pages, admitted)) <= self.num_blocks

    def holds_stream(self, points: Iterable[Point]) -> bool:
        """Whether the engine can run steps of these shapes in any order: all their requests are there all the time, and
        of prompts without context those of two steps in flight."""
        points = list(dict.fromkeys(points))
        held = [(context + 1, count) for point in points for context, count in point.decodes]
        held += [(query + context, 1) for point in points for query, context in point.prefills if context]
        admitted = [[query for query, context in point.prefills if context == 0] for point in points]
        slots = sum(count for _, count in held) + 2 * max(map(len, admitted), default=0)
        pages = sum(count * self._pages(length) for length, count in held)
        pages += 2 * max((sum(map(self._pages, queries)) for queries in admitted), default=0)
        return slots <= self.max_num_seqs and pages <= self.num_blocks and all(map(self.holds, points))

    def most_requests(self, num_tokens: int) -> int:
        """How many requests of so many tokens there can be at once."""
        return min(self.max_num_seqs, self.num_blocks // self._pages(num_tokens))

    @staticmethod
    def longest(point: Point) -> int:
        """Tokens of its longest request, with the one that is sampled."""
        lengths = [query + context + 1 for query, context in point.prefills]
        return max([*lengths, *(context + 1 for context, _ in point.decodes)])

    def _pages(self, num_tokens: int) -> int:
        config = KVCacheConfig(num_blocks=2, block_size=self.block_size, windows=self.windows)
        return config.max_pages(num_tokens, self.max_num_batched_tokens)

    def longest_context(self, batch: int, share: float) -> int:
        """Whole pages, in tokens, of each of `batch` decodes that fill a share of the pool together."""
        low, high = 0, self.max_model_len // self.block_size
        while low < high:
            middle = (low + high + 1) // 2
            if batch * self._pages(middle * self.block_size) <= share * self.num_blocks:
                low = middle
            else:
                high = middle - 1
        return low * self.block_size

    def within_page(self, context: int) -> int:
        """About `context` tokens, the next one in the middle of a page: formats that quantise whole pages do so when
        one is full, which in a served batch a few of the requests are at in every step, and here all would be."""
        size = self.block_size
        page = min(context, self.max_model_len - 1) // size
        inside = page * size + size // 2
        return inside if inside < self.max_model_len else max(inside - size, 1)


def points(room: Room, *, quick: bool = False, seed: int = 0) -> list[Point]:
    """Every step to measure that an engine has room for, the important ones first, none twice.

    Args:
        quick: only enough of them to see that all works.
        seed: of the drawn ones.
    """
    made = [*_decodes(room, quick, seed), *_prefills(room, quick), *_mixed(room, quick, seed)]
    made.sort(key=lambda point: point.priority)  # stable, and of equal points the most important one goes first
    kept: dict[tuple, Point] = {}
    for point in made:
        if room.holds(point):
            kept.setdefault(point.key, point)
    return list(kept.values())


def _decodes(room: Room, quick: bool, seed: int) -> Iterator[Point]:
    most, limit = room.max_num_seqs, room.max_model_len - 1

    def point(batch: int, context: int, priority: int) -> Point:
        return Point(DECODE, (), ((room.within_page(context), batch),), priority)

    base = min(BASE_CONTEXT, room.longest_context(most, FULL_POOL))
    for batch in _up_to(QUICK_BATCHES if quick else BATCHES, most):
        yield point(batch, base, 0)
    spread = _up_to(QUICK_SPREAD if quick else SPREAD_BATCHES, most)
    for context in QUICK_CONTEXTS if quick else SPREAD_CONTEXTS:
        yield from (point(batch, context, 0) for batch in spread)
    if quick:
        return
    for batch in spread:
        yield point(batch, min(room.longest_context(batch, FULL_POOL), LONGEST_CONTEXT), 0 if batch > 1 else 1)
    for context in MORE_CONTEXTS:
        yield from (point(batch, context, 1) for batch in spread)
    yield from (point(batch, context, 1) for batch, context in PADDED if batch <= most)
    for batch, mean in RAGGED:
        draw = random.Random(f"{seed} ragged {batch} {mean}")
        if contexts := _ragged(draw, batch, mean, limit):
            yield Point.of(DECODE, (), contexts, 1)


def _prefills(room: Room, quick: bool) -> Iterator[Point]:
    longest = min(room.max_num_batched_tokens, room.max_model_len - 1)

    def behind(query: int, context: int, priority: int) -> Point:
        return Point(PREFILL, ((query, room.within_page(context)),), (), priority)

    for query in _up_to(QUICK_QUERIES if quick else _queries(room), longest):
        yield Point(PREFILL, ((query, 0),), (), 0)
    if quick:
        yield from (behind(query, CONTEXTS[0], 1) for query in QUICK_CONTEXT_QUERIES)
        return
    for query in CONTEXT_QUERIES:
        yield from (behind(query, context, 0) for context in CONTEXTS)
        yield from (behind(query, context, 1) for context in LONGER_CONTEXTS)
    for query in MORE_CONTEXT_QUERIES:
        yield from (behind(query, context, 1) for context in CONTEXTS)
    yield from (behind(query, context, 2) for query, context in LONG_PREFILLS)


def _queries(room: Room) -> list[int]:
    """New tokens of prompts without context, ascending."""
    if not room.piece_sizes:
        return [*QUERIES, *LARGE_QUERIES]
    return [*room.piece_sizes, *(query for query in LARGE_QUERIES if query > room.piece_sizes[-1])]


def _mixed(room: Room, quick: bool, seed: int) -> Iterator[Point]:
    context = room.within_page(min(BESIDE_CONTEXT, room.longest_context(room.max_num_seqs, FULL_POOL / 2)))
    for query in QUICK_BESIDE_QUERIES if quick else BESIDE_QUERIES:
        for decodes in BESIDE_DECODES:
            yield Point.of(MIXED, [(query, 0)], [context] * decodes, 0)
    if not quick:
        yield from _padded(room, context)
    draw = random.Random(f"{seed} mixed")
    for index in range(QUICK_DRAWN if quick else NUM_DRAWN):
        yield _drawn(room, draw, 0 if index < NUM_DRAWN_FIRST else 1)


def _padded(room: Room, context: int) -> Iterator[Point]:
    """A prompt beside decodes for every number of tokens that such steps are padded to, itself a little below it."""
    pairs = zip((0, *room.piece_sizes), room.piece_sizes, strict=False)
    sizes = [(below, size) for below, size in pairs if PADDED_FROM <= size <= PADDED_TO]
    for index, (below, size) in enumerate(sizes):
        num_tokens = size - min((size - below) // 4, 32)
        decodes = min(PADDED_DECODES[index % len(PADDED_DECODES)], room.max_num_seqs - 2)
        if decodes > 0:
            yield Point.of(MIXED, [(num_tokens - decodes, 0)], [context] * decodes, 1)


def _drawn(room: Room, draw: random.Random, priority: int) -> Point:
    """A step as serving makes them, of which an engine with room for little makes smaller ones."""
    longest = room.max_model_len - 1
    num_chunks = min(draw.choices(*zip(*_CHUNKS, strict=True))[0], max(room.max_num_seqs // 3, 1))
    left = room.max_num_batched_tokens
    chunks = []
    for _ in range(num_chunks):
        share = max(left // 2, 1)
        query = min(_log_uniform(draw, *_DRAWN_QUERY), share, max(longest // 2, 1))
        context = _log_uniform(draw, *_DRAWN_CONTEXT) if draw.random() < _WITH_CONTEXT else 0
        chunks.append((query, min(context, longest - query)))
        left -= query
    seqs = room.max_num_seqs - 2 * num_chunks
    decodes = 0 if draw.random() < _WITHOUT_DECODES else draw.randint(1, max(seqs, 1))
    decodes = max(min(decodes, left, seqs), 0)
    low, high = _DRAWN_DECODE
    contexts = [min(_log_uniform(draw, low, high), longest) for _ in range(decodes)]
    point = Point.of(MIXED, chunks, contexts, priority)
    while contexts and not room.holds(point):  # a small pool: fewer of them
        contexts = contexts[: len(contexts) // 2]
        point = Point.of(MIXED, chunks, contexts, priority)
    return point


def _up_to(values: Iterable[int], most: int) -> list[int]:
    """Those up to `most`, and `most` itself."""
    return [value for value in values if value < most] + [most]


def _log_uniform(draw: random.Random, low: int, high: int) -> int:
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def _ragged(draw: random.Random, batch: int, mean: int, limit: int) -> list[int]:
    """Contexts over two decades whose sum is batch · mean; none if one of them is longer than `limit`."""
    drawn = [math.exp(draw.uniform(0.0, math.log(100.0))) for _ in range(batch)]
    contexts = [max(round(batch * mean * value / sum(drawn)), 1) for value in drawn]
    contexts[contexts.index(max(contexts))] += batch * mean - sum(contexts)
    return contexts if max(contexts) <= limit else []
