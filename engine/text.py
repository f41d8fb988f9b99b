"""The text of a growing output, as far as it may be shown. Plain Python: a server needs no torch for it."""

from __future__ import annotations

from collections.abc import Sequence

from engine.sampling_params import SamplingParams
from engine.tokenizer import Detokenizer, Tokenizer


class OutputText:
    """The text of a growing output: detokenised, held back where it may be the beginning of a stop string, cut at one.

    The output ends at the first character that completes a stop string; of several that it completes, at the longest.
    That does not depend on how tokens come together. What has been shown is never taken back::

        | t h i s   i s   s h o w n | \\n \\n U s | e r :
        |<--------- text ---------->|<- held ->|           stop = ("\\n\\nUser:",)

    Attributes:
        text: all text so far that may be shown.
        token_ids: all output tokens so far, up to and including the one that completed a stop string.
        stop_reason: the stop string, or the one of `stop_token_ids`, once either has ended the output; None for the
            model's own end of text.
        finished: a stop string was found. The caller aborts the request and reports "stop"; later tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """
        Args:
            tokenizer: whose text it is.
            prompt_token_ids: what stands before the output.
            params: `stop`, `include_stop_str_in_output`, `min_tokens`, `stop_token_ids` and `detokenize` count.
        """
        self.text = ""
        self.token_ids: list[int] = []
        self.stop_reason: str | int | None = None
        self.finished = False
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids) if params.detokenize else None
        self._searches = [_Search(string) for string in params.stop]
        self._held = ""

    def append(self, token_ids: Sequence[int], finish_reason: str | None) -> str:
        """Take new tokens.

        Args:
            finish_reason: of the request, if these were its last tokens. With "stop" the last of them is a stop token,
                whose text is left out.

        Returns:
            The text that may be shown now, behind all that was returned before; possibly none.
        """
        if self.finished:
            return ""
        before = len(self.text)
        visible = len(token_ids) - (finish_reason == "stop" and len(token_ids) > 0)
        self._read(token_ids[:visible])
        if finish_reason is not None and not self.finished:
            self._end(token_ids[visible:])
        return self.text[before:]

    def _read(self, token_ids: Sequence[int]) -> None:
        if not self._searches:
            self.token_ids.extend(token_ids)
            if self._detokenizer is not None and token_ids:
                self.text += self._detokenizer.append(token_ids)
            return
        for token in token_ids:  # one by one, to know which of them completes a stop string
            self.token_ids.append(token)
            self._show(self._detokenizer.append([token]))
            if self.finished:
                return

    def _end(self, stop_tokens: Sequence[int]) -> None:
        """Nothing comes behind what has come and these: what was held back is text."""
        if self._detokenizer is not None:
            self._show(self._detokenizer.flush())
        if self.finished:
            return
        self.text += self._held
        self._held = ""
        self.token_ids.extend(stop_tokens)
        if stop_tokens and stop_tokens[-1] in self._params.stop_token_ids:
            self.stop_reason = stop_tokens[-1]

    def _show(self, piece: str) -> None:
        """Search new text, and show all of it that cannot become part of a stop string."""
        known = self._held + piece
        found = [(end, search) for search in self._searches if (end := search.read(piece)) is not None]
        if found and len(self.token_ids) > self._params.min_tokens:
            end, search = min(found, key=lambda each: (each[0], -len(each[1].string)))
            end += len(self._held)
            self.finished, self.stop_reason, self._held = True, search.string, ""
            self.text += known[: end if self._params.include_stop_str_in_output else end - len(search.string)]
            return
        num_held = max((search.num_matched for search in self._searches), default=0)
        self.text += known[: len(known) - num_held]
        self._held = known[len(known) - num_held :]


class _Search:
    """Knuth, Morris and Pratt's: looks at every character once, however long the string.

    Attributes:
        num_matched: characters of the string, fewer than all, that the text so far ends with; the most there are.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0
        # Behind i + 1 matched characters: how many are still matched if the next one does not follow.
        self._fallback = [0] * len(string)
        matched = 0
        for i in range(1, len(string)):
            matched = self._step(string[i], matched)
            self._fallback[i] = matched

    def read(self, piece: str) -> int | None:
        """Go on by a piece of text; where in it the string is first complete, as the index behind."""
        first_end = None
        if not self.num_matched and self.string[0] not in piece:
            return None
        for end, character in enumerate(piece, 1):
            self.num_matched = self._step(character, self.num_matched)
            if self.num_matched == len(self.string):
                self.num_matched = self._fallback[-1]
                first_end = first_end or end
        return first_end

    def _step(self, character: str, matched: int) -> int:
        while matched and self.string[matched] != character:
            matched = self._fallback[matched - 1]
        return matched + (self.string[matched] == character)
