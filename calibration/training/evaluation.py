"""How good the two models are on text they have not seen, and how often they agree.

A document is read in windows of `context` tokens, each without what came before it but the token that it begins with;
the first token of a document is predicted from the separator::

    separator t0 t1 t2 | t3 t4 t5 | t6        context 3
    [sep t0 t1] -> [t0 t1 t2]    [t2 t3 t4] -> [t3 t4 t5]    [t5] -> [t6]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from calibration.training.corpus import Document
from calibration.training.tokenizer import encode_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Logits = Callable[[Tensor], Tensor]  # token ids [batch, length] to logits [batch, length, vocab]

_NO_TARGET = -100


@torch.inference_mode()
def evaluate(
    target: Logits,
    draft: Logits,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    context: int,
    commonest: int,
    device: torch.device,
    max_tokens: int,
    batch_size: int = 16,
) -> dict[str, object]:
    """Losses and agreement of a target and a draft.

    Args:
        documents: in order; those after `max_tokens` tokens are left out.
        commonest: token of the training text, what a unigram model predicts everywhere.

    Returns:
        documents, tokens, bytes: what was read.
        target, draft: loss in nats per token, perplexity, bits per byte, and top1, the share of tokens foreseen.
        agreement: the share of tokens at which both have the same most likely token.
        overlap: mean of sum(min(p, q)), the share of tokens drawn from the draft that speculative sampling accepts.
        chance: agreement with the target of a unigram model, and of draft predictions at random places (independent).
    """
    texts = _first_tokens(tokenizer, documents, max_tokens)
    losses, foreseen, tops = [0.0, 0.0], [0, 0], [[], []]
    agreed, overlap, num_tokens = 0, 0.0, 0
    for inputs, nexts in _batches([token_ids for _, token_ids in texts], tokenizer.eos_token_id, context, batch_size):
        is_token = torch.from_numpy(nexts != _NO_TARGET).to(device)
        wanted = torch.from_numpy(nexts).to(device)[is_token]
        rows = [model(torch.from_numpy(inputs).to(device))[is_token].float() for model in (target, draft)]
        for index, logits in enumerate(rows):
            losses[index] += F.cross_entropy(logits, wanted, reduction="sum").item()
            tops[index].append(logits.argmax(-1))
            foreseen[index] += int((tops[index][-1] == wanted).sum())
        agreed += int((tops[0][-1] == tops[1][-1]).sum())
        overlap += torch.minimum(rows[0].softmax(-1), rows[1].softmax(-1)).sum().item()
        num_tokens += len(wanted)
    num_bytes = sum(document.num_bytes for document, _ in texts)
    counts = [torch.bincount(torch.cat(top), minlength=len(tokenizer)).double() / num_tokens for top in tops]
    return {
        "documents": len(texts),
        "tokens": num_tokens,
        "bytes": num_bytes,
        **{
            name: {
                "loss": round(loss / num_tokens, 4),
                "perplexity": round(math.exp(loss / num_tokens), 3),
                "bits_per_byte": round(loss / math.log(2) / num_bytes, 4),
                "top1": round(top1 / num_tokens, 4),
            }
            for name, loss, top1 in zip(("target", "draft"), losses, foreseen, strict=True)
        },
        "agreement": round(agreed / num_tokens, 4),
        "overlap": round(overlap / num_tokens, 4),
        "chance": {
            "unigram": round(counts[0][commonest].item(), 4),
            "independent": round((counts[0] * counts[1]).sum().item(), 4),
        },
    }


def _first_tokens(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], max_tokens: int
) -> list[tuple[Document, np.ndarray]]:
    """As many whole documents, in order, as have `max_tokens` tokens together, but at least one."""
    chosen, num_tokens = [], 0
    for document, token_ids in zip(documents, encode_documents(tokenizer, documents), strict=True):
        num_tokens += len(token_ids)
        if chosen and num_tokens > max_tokens:
            break
        chosen.append((document, token_ids))
    return chosen


def _batches(
    texts: Sequence[np.ndarray], separator_id: int, context: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows in batches, filled up on the right, where causal attention does not look: int64 [batch, length]."""
    windows = []
    for token_ids in texts:
        with_separator = np.concatenate([[separator_id], token_ids])
        windows += [with_separator[start : start + context + 1] for start in range(0, len(token_ids), context)]
    windows.sort(key=len)  # little to fill up; the sort is stable
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        length = len(batch[-1]) - 1
        inputs = np.full((len(batch), length), separator_id, dtype=np.int64)
        nexts = np.full((len(batch), length), _NO_TARGET, dtype=np.int64)
        for row, window in enumerate(batch):
            inputs[row, : len(window) - 1] = window[:-1]
            nexts[row, : len(window) - 1] = window[1:]
        yield inputs, nexts
