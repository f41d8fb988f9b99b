"""Runs steps on the device: scheduled requests in, sampled tokens out, without waiting for either.

A step goes through four stages, all of them queued on one stream:

    upload     slots, lengths, new pages and prompt tokens, packed in one pinned copy
    gather     block tables and the decodes' input tokens, from per-slot state that stays on the device (`engine.slots`)
    forward    the decoder; for a step of decodes only as one CUDA graph of the next larger size, for other steps of up
               to a few thousand tokens with everything but attention in graphs (`engine.pieces`)
    sample     into the per-slot state, where the next step finds its input, and to the host; behind a graph once more
               for the requests that ask for more of their logits than a graph gives (`engine.sampling`)

The host therefore never needs step n's tokens to launch step n + 1.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.batch import GroupBatch, PrefillBatch, StepBatch
from engine.kv.cache import KVCache
from engine.models.decoder import Decoder
from engine.pieces import CapturedPieces, capture_pieces, without_slower
from engine.sampling import LogitsProcessor, Plan, sampling_requests, token_logprobs
from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.scheduling import Step
from engine.slots import Slots
from engine.transfer import PendingTokens, Upload, aligned

if TYPE_CHECKING:
    from engine.ops import Ops
    from engine.sequence import Sequence


class _Inputs:
    """What a graph of so many decodes reads, as views of one int32 tensor or array.

        num_seqs | slots [size] | seq_lens [size] | pages [num_groups, size]

    Sequences from num_seqs on are padding: they have the trash slot and no tokens. Every part begins at a multiple of
    16 bytes.

    Attributes:
        pages: of each sequence's new token, per KV group.
    """

    def __init__(self, size: int, num_groups: int, whole: torch.Tensor | np.ndarray) -> None:
        stride = aligned(size)
        rows = whole[4:].reshape(2 + num_groups, stride)
        self.num_seqs, self.slots, self.seq_lens, self.pages = (
            whole[:1],
            rows[0, :size],
            rows[1, :size],
            rows[2:, :size],
        )

    @staticmethod
    def length(size: int, num_groups: int) -> int:
        """Elements of the whole."""
        return 4 + (2 + num_groups) * aligned(size)


@dataclass
class _Graph:
    """A captured step of decodes.

    Attributes:
        inputs: int32, see `_Inputs`.
        tokens: int64 [size], what was sampled. logits: what from.
    """

    size: int
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor


class ModelRunner:
    """One model on one device.

    Attributes:
        slots: the per-request state; the engine core assigns and releases them.
        graphs: captured decode steps by size, empty on a CPU or with enforce_eager.
    """

    def __init__(
        self, decoder: Decoder, ops: Ops, cache: KVCache, *, max_num_seqs: int, max_model_len: int, device: torch.device
    ) -> None:
        self.decoder, self.ops, self.device = decoder, ops, device
        self.block_size = cache.layers[0].layout.page_size
        self._num_groups = len(cache.groups.windows)
        self._num_blocks = cache.num_blocks
        self._low_bit = any(layer.layout.is_low_bit for layer in cache.layers)
        max_pages = aligned(-(-max_model_len // self.block_size))
        self.slots = Slots(max_num_seqs, self._num_groups, max_pages, device)
        self._upload = Upload(device)
        self._processor = LogitsProcessor(decoder.weights.lm_head.weight.shape[0], max_num_seqs, device)
        self.graphs: dict[int, _Graph] = {}
        self._graph_for: list[int] = []
        self._pieces: list[CapturedPieces] = []

    @property
    def piece_sizes(self) -> list[int]:
        """Numbers of tokens that steps are padded to, where everything but attention is captured; ascending."""
        return [pieces.size for pieces in self._pieces]

    # ---- one step --------------------------------------------------------------------------------------------------

    def execute(self, step: Step) -> tuple[PendingTokens, int | None]:
        """Launch a step.

        Every request of the step has a slot. Sampled tokens come in the order of its decodes, then of those prompt
        chunks that end their prompt.

        Returns:
            The tokens to be, and the size of the CUDA graph that ran, if one did.
        """
        if step.verify_requests:
            raise NotImplementedError("verification of drafts")
        start = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else None
        admitted = [sequence for sequence in step.admitted if sequence.slot >= 0]
        if admitted:
            self._set_parameters(admitted)
            self._processor.admit(admitted)
        decodes = step.decode_requests
        if not step.prefill_requests and not step.verify_requests and len(decodes) < len(self._graph_for):
            graph = self.graphs[self._graph_for[len(decodes)]]
            return self._replay(graph, step, start), graph.size
        return self._run(step, start), None

    def _set_parameters(self, sequences: Many[Sequence]) -> None:
        slots = np.array([sequence.slot for sequence in sequences], np.int32)
        slots, words = self._upload.send([slots, Slots.parameters(sequences)])
        self.slots.set_parameters(slots.long(), words)

    @torch.inference_mode()
    def adopt(self, sequences: Many[Sequence]) -> None:
        """Give requests with slots and pages what steps would have left for them: parameters, block tables and, as the
        newest token, the last one known. Waits for the device."""
        self._set_parameters(sequences)
        self._processor.admit(sequences)
        slots = torch.tensor([sequence.slot for sequence in sequences], device=self.device)
        for group, table in enumerate(self.slots.block_tables):
            rows = np.zeros((len(sequences), max(len(each.block_tables[group]) for each in sequences)), np.int32)
            for row, sequence in zip(rows, sequences, strict=True):
                row[: len(sequence.block_tables[group])] = sequence.block_tables[group]
            table[:, : rows.shape[1]].index_copy_(0, slots, torch.from_numpy(rows).to(self.device))
        newest = torch.tensor([sequence.token_ids[-1] for sequence in sequences], device=self.device)
        self.slots.last_token.index_copy_(0, slots, newest)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the uploads' buffers are few

    @torch.inference_mode()
    def _run(self, step: Step, start: torch.cuda.Event | None) -> PendingTokens:
        """A step of any shape: attention launched kernel by kernel, and in large steps all else too."""
        host = _pack(step, self.block_size, self._num_groups)
        if start is not None:
            start.record()  # what the host does before is not the GPU's time
        pieces = self._pieces_for(int(host.query_start[-1]))
        batch, sample_slots, sample_positions = self._batch(step, host, pieces)
        hidden = self.decoder.forward(batch, pieces)
        if not sample_slots.numel():
            return PendingTokens(sample_slots.new_empty(0, dtype=torch.int64), start)
        logits = self.decoder.logits(hidden, batch.sampled_rows)
        if any(request.params.needs_logits for request in step.decode_requests + step.prefill_requests):
            return self._sample_as_asked(step, logits, sample_slots, sample_positions, None, start)
        return PendingTokens(self._sample(logits, sample_slots, sample_positions, filtered=False), start)

    def _pieces_for(self, num_tokens: int) -> CapturedPieces | None:
        return next((pieces for pieces in self._pieces if pieces.size >= num_tokens), None)

    def _batch(
        self, step: Step, host: _Packed, pieces: CapturedPieces | None
    ) -> tuple[StepBatch, torch.Tensor, torch.Tensor]:
        """Upload a step, for these pieces.

        Also returns slot and position of each token that will be sampled, int64 [num_samples].
        """
        arrays = [host.slots, host.seq_lens, host.query_start, host.decode_pages, host.prefill_pages, host.token_ids]
        arrays += [host.prefill_start, host.prefill_contexts, host.sampled_rows, host.sampled_seqs]
        uploaded = self._upload.send(arrays)
        slots, seq_lens, query_start, decode_pages, prefill_pages, token_ids = uploaded[:6]
        prefill_start, prefill_contexts, sampled_rows, sampled_seqs = uploaded[6:]
        slots = slots.long()
        num_decodes, page_size = len(step.decode_requests), self.block_size
        decode_slots, prefill_slots = slots[:num_decodes], slots[num_decodes:]
        decode_columns = (seq_lens[:num_decodes] - 1).long() // page_size
        width = host.prefill_pages.shape[2]
        columns = min(aligned(max(width, host.decode_columns)), self.slots.block_tables[0].shape[1])
        groups, positions = [], None
        num_tokens = int(host.query_start[-1])
        for group, table in enumerate(self.slots.block_tables):
            if num_decodes:
                table.index_put_((decode_slots, decode_columns), decode_pages[group])
            if width:
                table[:, :width].index_copy_(0, prefill_slots, prefill_pages[group])
            of_step = table[:, :columns].index_select(0, slots)
            out = None if pieces is None else (pieces.places.positions, pieces.places.slots[group])
            rows = num_tokens if pieces is None else pieces.size
            positions, token_slots = self.ops.slot_mapping(of_step, query_start, seq_lens, rows, page_size, out)
            groups.append(GroupBatch(of_step, token_slots[:num_tokens]))
        prefill = None
        if step.prefill_requests:
            prefill = PrefillBatch(
                first_seq=num_decodes,
                first_token=num_decodes,
                query_start=prefill_start,
                context_lens=prefill_contexts,
                max_query_len=max(query for query, _ in step.shape.prefills),
                max_context_len=max(context for _, context in step.shape.prefills),
                host_context_lens=[context for _, context in step.shape.prefills],
                host_query_lens=[query for query, _ in step.shape.prefills],
            )
        batch = StepBatch(
            token_ids=torch.cat([self.slots.last_token[decode_slots], token_ids.long()]),
            positions=positions[:num_tokens],
            seq_lens=seq_lens,
            query_start=query_start,
            num_decode_seqs=num_decodes,
            num_decode_tokens=num_decodes,
            max_decode_query_len=1,
            groups=tuple(groups),
            prefill=prefill,
            sampled_rows=sampled_rows.long(),
            attended=None if pieces is None else pieces.attended,
        )
        self._set_residuals(batch, slots)
        sampled_seqs = sampled_seqs.long()
        return batch, slots[sampled_seqs], seq_lens[sampled_seqs].long()

    def _set_residuals(self, batch: StepBatch, slots: torch.Tensor) -> None:
        """Where the low-bit formats keep each sequence's newest tokens. Without drafts every token is committed."""
        if self._low_bit:
            new_tokens = batch.query_start.diff()
            context_lens = batch.seq_lens - new_tokens
            batch.residual_slots = slots.int()
            batch.flushed_lens = context_lens - context_lens % self.block_size
            batch.committed_lens = batch.seq_lens
            batch.next_flushed_lens = batch.seq_lens - batch.seq_lens % self.block_size

    def _sample(
        self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, filtered: bool
    ) -> torch.Tensor:
        """Draw a token per row and remember it as its slot's newest."""
        state = self.slots
        tokens = self.ops.sample(
            logits,
            temperature=state.temperature[slots],
            top_k=state.top_k[slots] if filtered else None,
            top_p=state.top_p[slots] if filtered else None,
            min_p=state.min_p[slots] if filtered else None,
            seeds=state.seeds[slots],
            positions=positions,
            filtered=filtered,
        )
        state.last_token.index_copy_(0, slots, tokens)
        return tokens

    def _sample_as_asked(
        self,
        step: Step,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        drawn: torch.Tensor | None,
        start: torch.cuda.Event | None,
    ) -> PendingTokens:
        """Draw a token per row where some requests want filters, adjusted logits or log-probabilities.

        Args:
            drawn: what a graph has drawn without looking at any of that. A draw is a function of seed and position, so
                another one replaces it, and rows that want nothing keep theirs.
        """
        requests, host_positions = sampling_requests(step)
        plan = Plan.of(requests, host_positions, logits.shape[1])
        adjusted = set(plan.rows)
        filtered = any(each.params.has_filters for row, each in enumerate(requests) if row not in adjusted)
        if drawn is None or filtered:
            drawn = self._sample(logits, slots, positions, filtered)
        if plan.is_empty:
            return PendingTokens(drawn, start)
        of_step = self._processor.upload(plan)
        if plan.rows:
            of_slots = slots[of_step.rows]
            rows = self._processor.adjusted(logits, of_step, of_slots)
            filtered = any(requests[row].params.has_filters for row in plan.rows)
            tokens = self._sample(rows, of_slots, positions[of_step.rows], filtered)
            num_penalised = len(plan.penalties)
            self._processor.count(of_slots[:num_penalised], tokens[:num_penalised])
            drawn = drawn.index_copy(0, of_step.rows, tokens)
        logprobs = None
        if plan.logprob_rows:
            rows = of_step.logprob_rows
            logprobs = token_logprobs(logits[rows], drawn[rows], plan.num_top)
        return PendingTokens(drawn, start, logprobs)

    @torch.inference_mode()
    def run_dummy(self, chunks: Many[tuple[int, int]], num_decodes: int = 0, num_samples: int = 1) -> None:
        """Run a step of made-up requests, for measuring and for compiling. What it leaves in the cache is garbage.

        Args:
            chunks: new and cached tokens of each prompt chunk. Each takes pages of its own from 1 on, as many as the
                cache has, and then the same ones again.
            num_decodes: requests that decode their second token.
            num_samples: rows of logits to sample from, as if their requests asked for everything there is: what that
                takes is part of what a step may take.
        """
        step, trash = Step(0), self.slots.trash
        step.shape.decode_contexts = [1] * num_decodes
        step.shape.prefills = list(chunks)
        lengths = [2] * num_decodes + [query + context for query, context in chunks]
        next_block = 0
        for length in lengths:
            tables = []
            for _ in range(self._num_groups):
                pages = -(-length // self.block_size)
                tables.append([1 + (next_block + i) % (self._num_blocks - 1) for i in range(pages)])
                next_block += pages
            dummy = _Dummy([0] * length, trash, tables)
            (step.decode_requests if len(step.decode_requests) < num_decodes else step.prefill_requests).append(dummy)
        host = _pack(step, self.block_size, self._num_groups)
        pieces = self._pieces_for(int(host.query_start[-1]))
        batch, _, _ = self._batch(step, host, pieces)
        hidden = self.decoder.forward(batch, pieces)
        rows = torch.arange(num_samples, device=self.device) % batch.num_tokens
        logits = self.decoder.logits(hidden, rows)
        slots = torch.full_like(rows, trash)
        tokens = self._sample(logits, slots, rows, filtered=True)
        asking = Step(0)
        asking.decode_requests, asking.shape.decode_contexts = [dummy] * num_samples, [1] * num_samples
        self._sample_as_asked(asking, logits, slots, rows, tokens, None)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # uploads take turns in few buffers, for at most two steps in flight

    def warm_up(self, max_num_batched_tokens: int, max_model_len: int) -> None:
        """Run one small step of each kind, so that no request waits for a kernel to be compiled.

        Prompt chunks have kernels for lengths below 64, below 128 and above, with and without a context, and for
        neighbours of about their own length or much shorter ones.
        """
        self._warm_up_sampling()
        for length in (16, 100, 200):
            for context in (0, min(self.block_size, max_model_len // 2)):
                for shorter in (0, 3):
                    chunks = [(length, context)] + [(1, 0)] * shorter
                    self._run_if_it_fits(chunks, shorter, max_num_batched_tokens, max_model_len)

    @torch.inference_mode()
    def _warm_up_sampling(self) -> None:
        """Adjusted logits are float32: other kernels than those for the model's dtype, and others for a single row."""
        vocab_size = self._processor.vocab_size
        for num_rows in (1, 2):
            logits = torch.zeros(num_rows, vocab_size, dtype=torch.float32, device=self.device)
            slots = torch.full((num_rows,), self.slots.trash, device=self.device)
            for filtered in (False, True):
                self._sample(logits, slots, slots, filtered)

    def _run_if_it_fits(
        self, chunks: list[tuple[int, int]], num_decodes: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        num_tokens = num_decodes + sum(query for query, _ in chunks)
        longest = max(query + context for query, context in chunks)
        if num_tokens <= max_num_batched_tokens and longest <= max_model_len:
            self.run_dummy(chunks, num_decodes)

    # ---- CUDA graphs -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, sizes: Many[int], num_tokens: Many[int] = ()) -> None:
        """Capture steps of decodes, the largest first, so that the others find its memory in the pool.

        Args:
            sizes: of decode steps.
            num_tokens: of other steps, of which everything but attention is captured. Sizes that turn out to be slower
                than a larger one are not used.
        """
        gc.collect()
        gc.freeze()  # each capture collects garbage: have it look at little
        pool = torch.cuda.graph_pool_handle()
        weight = self.decoder.weights.lm_head.weight
        # All sizes share it: whoever reads logits does so before the next step.
        self._logits = weight.new_empty(max(sizes), weight.shape[0])
        if num_tokens:
            self._pieces = capture_pieces(self.decoder, num_tokens, self._num_groups, pool)
        for size in sorted(sizes, reverse=True):
            length = _Inputs.length(size, self._num_groups)
            inputs = torch.zeros(length, dtype=torch.int32, device=self.device)
            _Inputs(size, self._num_groups, inputs).slots.fill_(self.slots.trash)
            self._decode(inputs, size)  # compiles kernels and makes decode plans, which a capture must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                slots, seq_lens, logits, tokens = self._decode(inputs, size)
            self.graphs[size] = _Graph(size, graph, inputs, slots, seq_lens, logits, tokens)
        self._graph_for = [min(size for size in sizes if size >= n) for n in range(max(sizes) + 1)]
        gc.unfreeze()
        self._replay_all()
        if self._pieces:
            self._pieces = without_slower(self._pieces)

    def _replay_all(self) -> None:
        """A graph's first launch takes longer: have it now, on padding."""
        for graph in self.graphs.values():
            graph.graph.replay()
        for pieces in self._pieces:
            pieces.replay_all()
        torch.cuda.synchronize()

    def _decode(self, inputs: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
        """Every sequence decodes one token; what is captured."""
        page_size = self.block_size
        given = _Inputs(size, self._num_groups, inputs)
        slots, seq_lens = given.slots.long(), given.seq_lens
        query_start = torch.arange(size + 1, dtype=torch.int32, device=self.device).minimum(given.num_seqs)
        columns = (seq_lens - 1).clamp_(min=0).long() // page_size
        groups, positions = [], None
        for group, table in enumerate(self.slots.block_tables):
            table.index_put_((slots, columns), given.pages[group])
            of_step = table.index_select(0, slots)
            positions, token_slots = self.ops.slot_mapping(of_step, query_start, seq_lens, size, page_size)
            groups.append(GroupBatch(of_step, token_slots))
        batch = StepBatch(
            token_ids=self.slots.last_token[slots],
            positions=positions,
            seq_lens=seq_lens,
            query_start=query_start,
            num_decode_seqs=size,
            num_decode_tokens=size,
            max_decode_query_len=1,
            groups=tuple(groups),
        )
        self._set_residuals(batch, slots)
        logits = self.decoder.logits(self.decoder.forward(batch), out=self._logits[:size])
        tokens = self._sample(logits, slots, seq_lens.long(), filtered=False)
        return slots, seq_lens, logits, tokens

    @torch.inference_mode()
    def _replay(self, graph: _Graph, step: Step, start: torch.cuda.Event | None) -> PendingTokens:
        """A step of decodes only."""
        decodes, contexts = step.decode_requests, step.shape.decode_contexts
        size, count, page_size = graph.size, len(decodes), self.block_size
        inputs = np.zeros(_Inputs.length(size, self._num_groups), np.int32)
        given = _Inputs(size, self._num_groups, inputs)
        given.num_seqs[0] = count
        given.slots[:count] = [sequence.slot for sequence in decodes]
        given.slots[count:] = self.slots.trash
        given.seq_lens[:count] = contexts
        given.seq_lens[:count] += 1
        for group in range(self._num_groups):
            given.pages[group, :count] = [
                sequence.block_tables[group][context // page_size]
                for sequence, context in zip(decodes, contexts, strict=True)
            ]
        if start is not None:
            start.record()
        self._upload.send([inputs], out=graph.inputs)
        graph.graph.replay()
        if any(sequence.params.needs_logits for sequence in decodes):
            slots, positions = graph.slots[:count], graph.seq_lens[:count].long()
            return self._sample_as_asked(step, graph.logits[:count], slots, positions, graph.tokens[:count], start)
        return PendingTokens(graph.tokens[:count], start)


# Of a made-up request: penalties, filters and log-probabilities.
_EVERYTHING = SamplingParams(frequency_penalty=1.0, top_p=0.9, logprobs=MAX_LOGPROBS)


@dataclass
class _Dummy:
    """As much of a request as a step looks at."""

    token_ids: list[int]
    slot: int
    block_tables: list[list[int]]
    params: SamplingParams = _EVERYTHING

    @property
    def num_prefill_tokens(self) -> int:
        return len(self.token_ids)


@dataclass
class _Packed:
    """A step as int32 arrays.

    Attributes:
        slots, seq_lens: [num_seqs]. query_start: [num_seqs + 1].
        decode_pages: [num_groups, num_decodes], the page of each decode's new token.
        prefill_pages: [num_groups, num_prefills, width], the prefills' block tables, 0 behind their ends.
        token_ids: of the prompt chunks. prefill_start, prefill_contexts: as in `PrefillBatch`.
        sampled_rows, sampled_seqs: rows and sequences of which a token is sampled.
        decode_columns: pages of the longest decode.
    """

    slots: np.ndarray
    seq_lens: np.ndarray
    query_start: np.ndarray
    decode_pages: np.ndarray
    prefill_pages: np.ndarray
    token_ids: np.ndarray
    prefill_start: np.ndarray
    prefill_contexts: np.ndarray
    sampled_rows: np.ndarray
    sampled_seqs: np.ndarray
    decode_columns: int


def _pack(step: Step, page_size: int, num_groups: int) -> _Packed:
    """Decodes first, then prompt chunks."""
    decodes, contexts = step.decode_requests, step.shape.decode_contexts
    prefills, chunks = step.prefill_requests, step.shape.prefills
    num_decodes, num_prefills = len(decodes), len(prefills)
    query_lens = [1] * num_decodes + [query for query, _ in chunks]
    query_start = np.zeros(num_decodes + num_prefills + 1, np.int32)
    np.cumsum(query_lens, out=query_start[1:])
    width = max((len(request.block_tables[0]) for request in prefills), default=0)
    prefill_pages = np.zeros((num_groups, num_prefills, width), np.int32)
    for row, request in enumerate(prefills):
        for group in range(num_groups):
            table = request.block_tables[group]
            prefill_pages[group, row, : len(table)] = table
    decode_pages = np.array(
        [
            [r.block_tables[group][context // page_size] for r, context in zip(decodes, contexts, strict=True)]
            for group in range(num_groups)
        ],
        np.int32,
    ).reshape(num_groups, num_decodes)
    tokens = [r.token_ids[context : context + query] for r, (query, context) in zip(prefills, chunks, strict=True)]
    ends = [
        num_decodes + i
        for i, (r, (query, context)) in enumerate(zip(prefills, chunks, strict=True))
        if context + query >= r.num_prefill_tokens
    ]
    sampled_seqs = np.array([*range(num_decodes), *ends], np.int32)
    return _Packed(
        slots=np.array([request.slot for request in (*decodes, *prefills)], np.int32),
        seq_lens=np.array([c + 1 for c in contexts] + [query + context for query, context in chunks], np.int32),
        query_start=query_start,
        decode_pages=decode_pages,
        prefill_pages=prefill_pages,
        token_ids=np.array([token for chunk in tokens for token in chunk], np.int32),
        prefill_start=query_start[num_decodes:] - query_start[num_decodes],
        prefill_contexts=np.array([context for _, context in chunks], np.int32),
        sampled_rows=query_start[sampled_seqs + 1] - 1,
        sampled_seqs=sampled_seqs,
        decode_columns=max((context // page_size + 1 for context in contexts), default=0),
    )
