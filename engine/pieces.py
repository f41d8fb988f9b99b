"""What a decoder does outside of attention, as CUDA graphs: one for each stretch between two attentions and number of
tokens.

A step with prompt chunks has too many shapes to be captured whole. Launched kernel by kernel it costs the host some
10 ms, which a step of a thousand tokens does not take on the GPU. Attention alone looks at lengths, so the rest is
captured for a few numbers of tokens, and a step uses the next larger one:

    graph | attend | graph | attend | ...        attend: 1 to 3 launches; graph: one launch of 8 or 9 kernels

The writing of K and V is part of the graphs where it needs no more than each token's place, which a step puts in a
buffer first; in the low-bit formats it needs lengths too, and is launched like attention.

A larger size is not always slower: for some numbers of tokens there are only poor matrix kernels. So all captured sizes
are timed, and those that a larger one beats are left out.

All graphs work on the same few buffers, of which a step uses the first rows. Rows behind its tokens have no place, and
hold what earlier steps left there; they are computed with the others, and nobody looks at them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from engine.batch import Places
from engine.padding import padded_sizes

if TYPE_CHECKING:
    from engine.models.decoder import Decoder
    from engine.models.modules import DecoderWeights


def piece_sizes(weights: DecoderWeights, max_num_tokens: int) -> list[int]:
    """Padded numbers of tokens for which pieces are worth capturing: up to where the GPU takes longer than the host."""
    layer = weights.layers[0]
    elements = sum(matrix.weight.numel() for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down))
    return padded_sizes(elements, layer.qkv.scale is not None, max_num_tokens)


# A size is left out where a larger one takes so much less time: more than repetitions of one size differ by.
_MARGIN = 0.02
# Rounds in which each size is timed; of those before them, which warm the GPU up, nothing is kept.
_ROUNDS, _WARM_UP_ROUNDS = 7, 1
_QUEUED_BEHIND_CYCLES = 2_000_000  # of the GPU's clock, 1 to 2 ms: time to launch the graphs of all layers


class _Buffers:
    """What the graphs of all sizes share: [max_num_tokens, ...] each."""

    def __init__(self, decoder: Decoder, num_tokens: int, num_groups: int) -> None:
        config, embedding = decoder.config, decoder.weights.embedding
        heads = config.num_q_heads + 2 * config.num_kv_heads

        def make(width: int) -> torch.Tensor:
            return torch.zeros(num_tokens, width, dtype=embedding.dtype, device=embedding.device)

        self.token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=embedding.device)
        self.positions = torch.zeros_like(self.token_ids)
        self.slots = tuple(torch.full_like(self.token_ids, -1) for _ in range(num_groups))
        self.stream, self.hidden = make(config.hidden_size), make(config.hidden_size)
        self.qkv, self.attended = make(heads * config.head_dim), make(config.num_q_heads * config.head_dim)


class CapturedPieces:
    """`engine.models.decoder.Pieces` of one number of tokens.

    Attributes:
        size: tokens, padding included.
        attended: [size, num_q_heads, head_dim], where attention should put its result.
        places: of all tokens, to be filled before `start`; padding has slot -1.
        written: see `engine.models.decoder.Pieces`.
    """

    def __init__(self, decoder: Decoder, size: int, buffers: _Buffers, pool: object) -> None:
        self.size = size
        self._buffers = buffers  # all of them: graphs hold addresses, which keep nothing alive
        self.attended = buffers.attended[:size].unflatten(1, (-1, decoder.config.head_dim))
        self._token_ids, self._attended = buffers.token_ids[:size], buffers.attended[:size]
        self._qkv, self._hidden = buffers.qkv[:size], buffers.hidden[:size]
        self.places = Places(buffers.positions[:size], tuple(slots[:size] for slots in buffers.slots))
        stream, last = buffers.stream[:size], decoder.config.num_layers - 1
        self.written = frozenset(index for index in range(last + 1) if decoder.attention.writes_by_place(index))

        def start() -> None:
            stream.copy_(decoder.embed(self._token_ids))
            decoder.start(stream, self._qkv)
            write(0)

        def between(index: int) -> None:
            decoder.between(index, self._attended, stream, self._hidden if index == last else self._qkv)
            write(index + 1)

        def write(index: int) -> None:
            if index in self.written:
                decoder.write(index, self._qkv, self.places, keeps_key=True)

        # Compiles kernels and chooses products, which a capture must not.
        start()
        for index in range(last + 1):
            between(index)
        self._last = last
        self._start = _captured(start, pool)
        self._between = [_captured(lambda index=index: between(index), pool) for index in range(last + 1)]

    def replay_all(self) -> None:
        """Launch every graph once, on whatever the buffers hold."""
        self._start.replay()
        for graph in self._between:
            graph.replay()

    def start(self, token_ids: torch.Tensor) -> torch.Tensor:
        self._token_ids[: token_ids.shape[0]].copy_(token_ids)
        self._start.replay()
        return self._qkv

    def between(self, index: int, attended: torch.Tensor) -> torch.Tensor:
        if attended.data_ptr() != self._attended.data_ptr():
            self._attended[: attended.shape[0]].copy_(attended)
        self._between[index].replay()
        return self._hidden if index == self._last else self._qkv


@cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _captured(run: Callable[[], None], pool: object) -> torch.cuda.CUDAGraph:
    """As `torch.cuda.graph` does, without its wait for the GPU and its collections of garbage: there are hundreds."""
    graph, stream, current = torch.cuda.CUDAGraph(), _capture_stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        run()
        graph.capture_end()
    current.wait_stream(stream)
    return graph


def capture_pieces(decoder: Decoder, sizes: Sequence[int], num_groups: int, pool: object) -> list[CapturedPieces]:
    """Pieces for these numbers of tokens, ascending; captured from the largest, whose memory the others use again.

    Args:
        num_groups: KV groups.
        pool: of CUDA graphs.
    """
    buffers = _Buffers(decoder, max(sizes), num_groups)
    captured = [CapturedPieces(decoder, size, buffers, pool) for size in sorted(sizes, reverse=True)]
    return captured[::-1]


def without_slower(
    captured: Sequence[CapturedPieces], measure: Callable[[Sequence[CapturedPieces]], Sequence[float]] | None = None
) -> list[CapturedPieces]:
    """Those that no larger one beats clearly: steps of the others' sizes are faster in a larger one.

    Args:
        captured: ascending.
        measure: the time of each; `seconds_on_gpu` if None.
    """
    seconds = (measure or seconds_on_gpu)(captured)
    kept: list[CapturedPieces] = []
    fastest = float("inf")  # of the larger ones
    for pieces, taken in zip(reversed(captured), reversed(seconds), strict=True):
        if fastest > taken * (1 - _MARGIN):
            kept.append(pieces)
        fastest = min(fastest, taken)
    return kept[::-1]


def seconds_on_gpu(captured: Sequence[CapturedPieces]) -> list[float]:
    """What all graphs of each size take, one behind the other, on whatever the buffers hold: the median of rounds
    through all sizes, so that whatever changes meanwhile, such as the GPU's clock, changes for neighbours alike."""
    rounds = [[_timed(pieces) for pieces in captured] for _ in range(_WARM_UP_ROUNDS + _ROUNDS)]
    torch.cuda.synchronize()
    return [
        statistics.median(start.elapsed_time(end) * 1e-3 for start, end in samples)
        for samples in zip(*rounds[_WARM_UP_ROUNDS:], strict=True)
    ]


def _timed(pieces: CapturedPieces) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Launch all its graphs between two events, while the GPU is still busy: it is not to wait for the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_QUEUED_BEHIND_CYCLES)
    start.record()
    pieces.replay_all()
    end.record()
    return start, end
