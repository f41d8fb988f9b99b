"""What is kept of each forced token: how probable it was, and how far the probabilities are from the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from calibration.quality.forcing import ForcedDecoding, Text


@dataclass(frozen=True)
class Scores:
    """Of the forced tokens of each text, [num_texts, num_forced]; zeros behind a text's end.

    Attributes:
        nll: float32, minus the log-probability of the text's own token, nats.
        is_top: bool, whether that was the most probable token.
        kl: float32, KL(reference || this), nats; None for what had no reference.
        agrees: bool, whether both have the same most probable token; None likewise.
    """

    nll: np.ndarray
    is_top: np.ndarray
    kl: np.ndarray | None = None
    agrees: np.ndarray | None = None


class Reference:
    """The logits of every forced token, on the device and in the dtype in which they were computed.

    Args:
        num_texts, num_forced, vocab_size: how many there will be.
    """

    def __init__(
        self, num_texts: int, num_forced: int, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.logits = torch.empty(num_texts, num_forced, vocab_size, dtype=dtype, device=device)


def reference_bytes(num_texts: int, num_forced: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes of a `Reference`."""
    return num_texts * num_forced * vocab_size * dtype.itemsize


def score(
    decoding: ForcedDecoding,
    texts: Sequence[Text],
    *,
    device: torch.device,
    keep: Reference | None = None,
    compare: Reference | None = None,
) -> Scores:
    """Read texts, and score each forced token from its logits in float32.

    Args:
        keep: takes the logits.
        compare: has those to compare with, of the same texts.
    """
    shape = (len(texts), max(len(text.forced) for text in texts))
    nll, kl = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
    is_top, agrees = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))

    def observe(rows: torch.Tensor, at: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor) -> None:
        if keep is not None:
            keep.logits[rows, at] = logits
        own, top = logits.float().log_softmax(-1), logits.argmax(-1)
        nll[rows, at] = -own.gather(1, wanted[:, None])[:, 0]
        is_top[rows, at] = top == wanted
        if compare is not None:
            other = compare.logits[rows, at]
            logs = other.float().log_softmax(-1)
            kl[rows, at] = (logs.exp() * (logs - own)).sum(-1)
            agrees[rows, at] = other.argmax(-1) == top

    decoding.run(texts, observe)
    found = Scores(nll.cpu().numpy(), is_top.cpu().numpy())
    if compare is None:
        return found
    return Scores(found.nll, found.is_top, kl.cpu().numpy(), agrees.cpu().numpy())
