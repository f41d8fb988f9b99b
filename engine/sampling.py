"""What requests ask of their logits beyond temperature, top_k, top_p and min_p: penalties, bias, min_tokens, logprobs.

CUDA graphs draw every row from the logits as they are. Behind the graph, rows whose requests ask for more are drawn
again, and only they: a draw is a function of seed and position, so the neighbours' tokens are what they were.

    logits ─┬─> log-softmax of the rows that want logprobs ─────────────────────────────────────> to the host
            └─> rows to adjust, in float32 ─> + bias, − inf for delayed stop tokens ─> penalties ─> draw ─> counts + 1

Penalties count tokens, and the host does not know the newest ones when it launches a step. So the counts stay on the
device, one row per slot; the host writes a row when a request gets its slot, at its first admission and behind a
preemption. At both moments no step in flight is sampling a token of it, so what the host knows is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.outputs import TokenLogprobs
from engine.transfer import Upload

if TYPE_CHECKING:
    from engine.scheduling import Step
    from engine.sequence import Sequence

# Rows that are worked on at once: 64 of 128,256 tokens are 33 MB in float32, and there are a few copies of them.
_ROWS = 64
# A token's word in the counts: how often the output has it, and a bit that says that the prompt does.
_IN_PROMPT = 1 << 30
_COUNT = _IN_PROMPT - 1


def sampling_requests(step: Step) -> tuple[list[Sequence], list[int]]:
    """The requests of which a step samples a token, in the runner's order, and where in its text each will stand.

    Decodes come first, then those prompt chunks that end their prompt.
    """
    requests = list(step.decode_requests)
    positions = [context + 1 for context in step.shape.decode_contexts]
    for request, (query, context) in zip(step.prefill_requests, step.shape.prefills, strict=True):
        if context + query >= request.num_prefill_tokens:
            requests.append(request)
            positions.append(context + query)
    return requests, positions


@dataclass
class Plan:
    """What the rows of one step ask of their logits.

    Attributes:
        rows: of the sampled rows, those to be adjusted and drawn again; the penalised ones first.
        penalties: repetition, frequency and presence penalty of each penalised row.
        edits: (place in `rows`, token id, what is added to its logit).
        logprob_rows: of the sampled rows, those that want log-probabilities.
        num_top: the most that one of them wants besides that of the drawn token.
    """

    rows: list[int]
    penalties: list[tuple[float, float, float]]
    edits: list[tuple[int, int, float]]
    logprob_rows: list[int]
    num_top: int

    @classmethod
    def of(cls, requests: Many[Sequence], positions: Many[int], vocab_size: int) -> Plan:
        """
        Args:
            requests: of the sampled rows.
            positions: where in its text each row's token will stand.
        """
        penalised, edited, additions = [], [], {}
        logprob_rows, num_top = [], 0
        for row, (request, position) in enumerate(zip(requests, positions, strict=True)):
            params = request.params
            if not params.needs_logits:
                continue
            added = list((params.logit_bias or {}).items())
            if params.delays_stop_tokens and position - request.num_prompt_tokens < params.min_tokens:
                added += [(token, -np.inf) for token in request.stop_ids if token < vocab_size]
            if added:
                additions[row] = added
            if params.has_penalties:
                penalised.append(row)
            elif added:
                edited.append(row)
            if params.logprobs is not None:
                logprob_rows.append(row)
                num_top = max(num_top, params.logprobs)
        rows = penalised + edited
        params = [requests[row].params for row in penalised]
        return cls(
            rows,
            [(each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in params],
            [(i, token, value) for i, row in enumerate(rows) for token, value in additions.get(row, ())],
            logprob_rows,
            min(num_top, vocab_size),
        )

    @property
    def is_empty(self) -> bool:
        return not self.rows and not self.logprob_rows


@dataclass
class PlanTensors:
    """A plan on the device. rows, edit_rows, edit_tokens, logprob_rows: int64; the rest float32, as in `Plan`."""

    rows: torch.Tensor
    penalties: torch.Tensor
    edit_rows: torch.Tensor
    edit_tokens: torch.Tensor
    edit_values: torch.Tensor
    logprob_rows: torch.Tensor


class LogitsProcessor:
    """Adjusts logits and takes log-probabilities, with the token counts of penalised requests.

    Attributes:
        counts: int32 [max_num_seqs + 1, vocab], row i of slot i: see _IN_PROMPT. Made at the first use: on a GPU
            by the dummy steps at the start, on a CPU for the first penalised request.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._num_slots = max_num_seqs + 1  # the last one is nobody's
        self._upload = Upload(device)  # its own: a step makes at most two copies through it

    @torch.inference_mode()
    def admit(self, sequences: Many[Sequence]) -> None:
        """Count the tokens of requests that have just been given their slots."""
        penalised = [sequence for sequence in sequences if sequence.params.has_penalties]
        if not penalised:
            return
        parts = ([], [])
        for sequence in penalised:
            for part, token_ids in zip(parts, (sequence.prompt_token_ids, sequence.output_token_ids), strict=True):
                part.append(np.array([np.full(len(token_ids), sequence.slot), token_ids], np.int32))
        prompts, outputs = (np.concatenate(part, axis=1) for part in parts)
        slots = np.array([sequence.slot for sequence in penalised], np.int32)
        slots, prompts, outputs = self._upload.send([slots, prompts, outputs])
        self.counts.index_fill_(0, slots.long(), 0)
        flat = self.counts.view(-1)
        flat.index_fill_(0, self._places(*prompts), _IN_PROMPT)
        self._count(self._places(*outputs))

    @cached_property
    def counts(self) -> torch.Tensor:
        return torch.zeros(self._num_slots, self.vocab_size, dtype=torch.int32, device=self.device)

    def _places(self, slots: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return slots.long() * self.vocab_size + token_ids

    def _count(self, places: torch.Tensor) -> None:
        self.counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def upload(self, plan: Plan) -> PlanTensors:
        """Copy a plan to the device."""
        edits = list(zip(*plan.edits, strict=True)) or [(), (), ()]
        penalties = np.array(plan.penalties, np.float32).reshape(-1, 3)
        arrays = [np.array(numbers, np.int32) for numbers in (plan.rows, edits[0], edits[1], plan.logprob_rows)]
        arrays += [penalties.view(np.int32), np.array(edits[2], np.float32).view(np.int32)]
        rows, edit_rows, edit_tokens, logprob_rows, penalties, values = self._upload.send(arrays)
        return PlanTensors(
            rows.long(),
            penalties.view(torch.float32),
            edit_rows.long(),
            edit_tokens.long(),
            values.view(torch.float32),
            logprob_rows.long(),
        )

    @torch.inference_mode()
    def adjusted(self, logits: torch.Tensor, plan: PlanTensors, slots: torch.Tensor) -> torch.Tensor:
        """The rows that a plan adjusts, in a new tensor: float32 [len(plan.rows), vocab].

        Args:
            logits: [num_samples, vocab] as the model gave them.
            slots: int64 [len(plan.rows)].
        """
        adjusted = logits.index_select(0, plan.rows).float()
        if plan.edit_rows.numel():
            # Added, not written: a token may have a bias and be delayed, and both in any order make it −inf.
            places = plan.edit_rows * self.vocab_size + plan.edit_tokens
            adjusted.view(-1).index_add_(0, places, plan.edit_values)
        for start in range(0, len(plan.penalties), _ROWS):
            chosen = slice(start, min(start + _ROWS, len(plan.penalties)))
            penalise_(adjusted[chosen], self.counts.index_select(0, slots[chosen]), plan.penalties[chosen])
        return adjusted

    @torch.inference_mode()
    def count(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Remember the newest tokens of penalised requests; both int64 [num_penalised]."""
        if slots.numel():
            self._count(self._places(slots, tokens))


def penalise_(logits: torch.Tensor, counts: torch.Tensor, penalties: torch.Tensor) -> None:
    """Penalise the tokens of prompts and outputs, in place.

    Args:
        logits: float32 [num_rows, vocab]. counts: int32, likewise: see `LogitsProcessor`.
        penalties: float32 [num_rows, 3]: repetition, frequency, presence, applied in that order.
    """
    repetition, frequency, presence = (penalties[:, i, None] for i in range(3))
    factor = torch.where(counts != 0, repetition, 1.0)
    torch.where(logits > 0, logits / factor, logits * factor, out=logits)
    in_output = counts & _COUNT
    logits -= frequency * in_output
    logits -= presence * (in_output > 0)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """Log-probabilities of one step, packed for one copy to the host: int32 [num_rows, 2 + 2 · num_top].

        logprob of the token | its rank | ids of the most probable tokens | their logprobs

    Args:
        logits: [num_rows, vocab], as the model gave them.
        tokens: int64 [num_rows], what was drawn.
    """
    packed = []
    for some, drawn in zip(logits.split(_ROWS), tokens.split(_ROWS), strict=True):
        logprobs = some.float().log_softmax(1)
        chosen = logprobs.gather(1, drawn[:, None])
        rank = 1 + (logprobs > chosen).sum(1, keepdim=True)
        top = logprobs.topk(num_top, dim=1)
        parts = (chosen.view(torch.int32), rank.int(), top.indices.int(), top.values.view(torch.int32))
        packed.append(torch.cat(parts, 1))
    return torch.cat(packed)


def read_logprobs(packed: np.ndarray, token_ids: Many[int], counts: Many[int]) -> list[TokenLogprobs]:
    """What `token_logprobs` packed.

    Args:
        packed: int32 [num_rows, 2 + 2 · num_top].
        token_ids: what was drawn.
        counts: how many of the most probable tokens each row wants, at most num_top.
    """
    num_top = (packed.shape[1] - 2) // 2
    logprobs, integers = packed.view(np.float32).tolist(), packed.tolist()
    return [
        TokenLogprobs(
            token, floats[0], words[1], tuple(zip(words[2 : 2 + count], floats[2 + num_top :][:count], strict=True))
        )
        for token, count, floats, words in zip(token_ids, counts, logprobs, integers, strict=True)
    ]
