"""The text of a growing output: pieces, what is held back, and where a stop string cuts it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.text import OutputText
from engine.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


class Syllables:
    """Tokens of several characters, so that one token may complete several stop strings, or go on behind one."""

    notice = None
    words = ("", "a", "b", "ab", "ba", "aab", "abba", "é", "\n")

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, token_ids) -> str:
        return "".join(self.words[token] for token in token_ids)


def cut_naively(
    decoded: list[str], stops: tuple[str, ...], includes_stop: bool, min_tokens: int
) -> tuple[str, int, str | None]:
    """By definition: the text up to the shortest prefix that ends with a stop string.

    Args:
        decoded: the text of the first i tokens, for all i.

    Returns:
        The text that is left, the number of tokens it took, and the stop string.
    """
    for end in range(len(decoded[-1]) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            num_tokens = next(i for i, text in enumerate(decoded) if len(text) >= end)
            if decoded[-1][:end].endswith(stop) and num_tokens > min_tokens:
                return decoded[-1][: end if includes_stop else end - len(stop)], num_tokens, stop
    return decoded[-1], len(decoded) - 1, None


def chunked(token_ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, sizes = [], iter(sizes)
    while token_ids:
        size = next(sizes, 1)
        chunks.append(token_ids[:size])
        token_ids = token_ids[size:]
    return chunks


@given(
    st.lists(st.integers(0, len(Syllables.words) - 1), max_size=30),
    st.lists(st.text("abé\n", min_size=1, max_size=6), max_size=4),
    st.lists(st.integers(0, 5), max_size=30),
    st.booleans(),
    st.integers(0, 12),
)
def test_pieces_are_the_text_up_to_the_first_stop_string(token_ids, stops, sizes, includes_stop, min_tokens):
    params = SamplingParams(
        max_tokens=None, stop=stops, include_stop_str_in_output=includes_stop, min_tokens=min_tokens
    )
    decoded = [Syllables().decode(token_ids[:i]) for i in range(len(token_ids) + 1)]
    text, num_tokens, stop = cut_naively(decoded, params.stop, includes_stop, min_tokens)
    output, shown = OutputText(Syllables(), [], params), ""
    for chunk in chunked(token_ids, sizes):
        shown += output.append(chunk, None)
        assert output.text == shown
        assert text.startswith(shown)  # so that nothing is ever taken back
        assert output.finished == (stop is not None and len(output.token_ids) == num_tokens)
    shown += output.append([], "length")
    assert (shown, output.text) == (text, text)
    assert (output.finished, output.stop_reason) == (stop is not None, stop)
    assert output.token_ids == token_ids[:num_tokens]
    if stop is not None:
        assert output.append(token_ids, None) == ""  # what was still in flight
        assert output.token_ids == token_ids[:num_tokens]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_bytes_of_any_text(text, stops, data):
    """Characters of several tokens, which the detokenizer holds back as well."""
    token_ids = TOKENIZER.encode(text)[1:]
    text = TOKENIZER.decode(token_ids)
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))]
    output = OutputText(TOKENIZER, TOKENIZER.encode("prompt"), SamplingParams(max_tokens=None, stop=stops))
    sizes = data.draw(st.lists(st.integers(1, 7), max_size=9))
    shown = "".join(output.append(chunk, None) for chunk in chunked(token_ids, sizes)) + output.append([], "length")
    assert output.finished == bool(ends)
    if ends:
        assert output.stop_reason == max((s for s in stops if text[: ends[0]].endswith(s)), key=len)
        assert shown == text[: ends[0] - len(output.stop_reason)]
        assert TOKENIZER.decode(output.token_ids) == text[: ends[0]]
    else:
        assert shown == text


def test_what_may_become_a_stop_string_is_held_back():
    output = OutputText(TOKENIZER, [], SamplingParams(stop=("</s>", "\n\n")))
    pieces = [output.append([byte], None) for byte in b"a<b</i\n</s>x"]
    assert pieces == ["a", "", "<b", "", "", "</i", "", "\n", "", "", "", ""]
    assert (output.text, output.finished, output.stop_reason) == ("a<b</i\n", True, "</s>")
    assert output.token_ids == [*b"a<b</i\n</s>"]


@pytest.mark.parametrize("reason", ["length", "abort"])
def test_the_end_shows_what_was_held_back(reason):
    output = OutputText(TOKENIZER, [], SamplingParams(stop="</s>"))
    assert output.append([*b"text</", 0xC3], None) == "text"
    assert output.append([], reason) == "</\N{REPLACEMENT CHARACTER}"
    assert (output.finished, output.stop_reason) == (False, None)


@pytest.mark.parametrize(("stop_token", "stop_reason"), [(65, 65), (257, None)])
def test_a_stop_token_has_no_text(stop_token, stop_reason):
    params = SamplingParams(stop_token_ids=[65], stop="long", include_stop_str_in_output=True)
    output = OutputText(TOKENIZER, [], params)
    assert output.append([*b"text lo", stop_token], "stop") == "text lo"
    assert output.token_ids == [*b"text lo", stop_token]
    assert (output.finished, output.stop_reason) == (False, stop_reason)


def test_a_stop_string_wins_over_the_reason_the_engine_had():
    output = OutputText(TOKENIZER, [], SamplingParams(stop="end"))
    assert output.append([*b"the end"], "length") == "the "
    assert (output.finished, output.stop_reason) == (True, "end")


def test_without_detokenising_tokens_are_kept():
    output = OutputText(TOKENIZER, [], SamplingParams(detokenize=False, stop_token_ids=[7]))
    assert output.append([5, 6], None) == output.append([7], "stop") == output.text == ""
    assert (output.token_ids, output.stop_reason) == ([5, 6, 7], 7)


def test_a_long_stop_string_that_nearly_matches_costs_no_more_than_the_text():
    """A search that began anew at every character would look at 10^10 of them."""
    output = OutputText(TOKENIZER, [], SamplingParams(stop="a" * 100_000 + "b"))
    assert output.append([97] * 20_000, None) == ""
    assert output.append([98], None) == "a" * 20_000 + "b"
