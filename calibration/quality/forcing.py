"""An engine that samples what it is told, so that every variant reads the same text the way it would write it.

Prompts are prefilled. From then on each step decodes one token per sequence, reading keys and values as the cache holds
them; what the step samples is replaced by the text's own next token before the next step looks for its input::

    prompt            | t0 ... t31 |
    step              prefill       decode    decode    decode
    logits of         t32           t33       t34       t35
    next input        t32           t33       t34       ...

It reaches into the engine's runner, for nothing public tells logits or takes tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.core import EngineCore
from engine.sampling import sampling_requests
from engine.sampling_params import SamplingParams
from engine.scheduling import Step
from engine.sequence import Sequence as EngineSequence
from engine.transfer import PendingTokens

# Rows of texts, which of their forced tokens comes next (both int64 [n]), the logits it is foreseen from [n, vocab],
# and the token (int64 [n]).
Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Text:
    """Tokens that are prefilled, and tokens that are then decoded one by one."""

    prompt: list[int]
    forced: list[int]


class ForcedDecoding:
    """Runs texts through an engine and shows the logits of each forced token."""

    def __init__(self, core: EngineCore) -> None:
        self._core, self._runner = core, core._runner
        self._execute, self._compute = self._runner.execute, self._runner.decoder.logits
        self._rows: torch.Tensor | None = None
        self._kept: tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def run(self, texts: Sequence[Text], observe: Observer) -> None:
        """Read all texts to their ends.

        Args:
            texts: as many as there may be; the engine runs as many at a time as it has room for.
            observe: called once a step. The logits are valid until it returns.
        """
        device, longest = self._core.device, max(len(text.forced) for text in texts)
        padded = [[*text.forced, *[0] * (longest - len(text.forced))] for text in texts]
        self._forced = torch.tensor(padded, device=device)
        self._done = torch.zeros(len(texts), dtype=torch.int64, device=device)
        self._observe, self._kept = observe, None
        self._runner.execute, self._runner.decoder.logits = self._forcing_execute, self._recording_logits
        try:
            for row, text in enumerate(texts):
                self._core.add(self._request(row, text))
            while self._core.has_work:
                self._core.step()
        finally:
            self._runner.execute, self._runner.decoder.logits = self._execute, self._compute
        if self._done.tolist() != [len(text.forced) for text in texts]:
            raise RuntimeError("a request was preempted, and some of its tokens were seen twice")

    def _request(self, row: int, text: Text) -> EngineSequence:
        core = self._core
        return EngineSequence(
            row,
            text.prompt,
            SamplingParams(temperature=0, max_tokens=len(text.forced), ignore_eos=True),
            max_model_len=core.max_model_len,
            block_size=core.config.block_size,
        )

    def _recording_logits(self, hidden, rows=None, out=None):
        self._rows = self._compute(hidden, rows, out)
        return self._rows

    def _forcing_execute(self, step: Step) -> tuple[PendingTokens, int | None]:
        self._rows = None
        tokens, graph_size = self._execute(step)
        sampling, _ = sampling_requests(step)
        if not sampling:
            return tokens, graph_size
        logits = self._rows if graph_size is None else self._runner.graphs[graph_size].logits
        rows, slots = self._where([(sequence.request_id, sequence.slot) for sequence in sampling])
        at = self._done[rows]
        wanted = self._forced[rows, at]
        self._observe(rows, at, logits[: len(sampling)], wanted)
        self._runner.slots.last_token.index_copy_(0, slots, wanted)
        self._done.index_put_((rows,), at + 1)
        return PendingTokens(wanted), graph_size

    def _where(self, places: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and slots on the device; they change only when a text begins or ends."""
        if self._kept is None or self._kept[0] != places:
            rows, slots = torch.tensor(places, device=self._core.device).T
            self._kept = (places, rows.contiguous(), slots.contiguous())
        return self._kept[1:]
