"""Tokenizers, and text that comes token by token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.errors import UserError
from engine.tokenizer import ByteTokenizer, Detokenizer, HFTokenizer, NumberTokenizer, load_tokenizer

SENTENCES = [
    "The memory wall is where decoding stands still.",
    "Ein Zug fährt über die Brücke, größer als 9,75 €.",
    "日本語のテキスト、そして 🙂🙃 絵文字 👩‍👩‍👧‍👦.",
    "def f(x):\n    return x + 1\t# three 🚂🚂🚂",
]
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory):
    """A byte-level BPE tokenizer as Llama 3, Qwen and GPT have one."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"])
    raw.train_from_iterator(SENTENCES, trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level(byte_level_folder):
    return HFTokenizer(byte_level_folder)


@pytest.fixture(scope="module")
def sentence_piece():
    """Words with a leading "▁", and bytes for what is no word, as Llama 2 and Mistral have them."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Paris",
        "▁is",
        "▁a",
        "city",
        "é",
    ]
    raw = RawTokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer = HFTokenizer.__new__(HFTokenizer)
    tokenizer.tokenizer = fast
    return tokenizer, {word: i for i, word in enumerate(words)}


def pieces(tokenizer, token_ids, prompt=()) -> list[str]:
    stream = Detokenizer(tokenizer, prompt)
    return [*(stream.append([token]) for token in token_ids), stream.flush()]


# ---- token by token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SENTENCES)
def test_text_streams_in_whole_characters(byte_level, text):
    token_ids = byte_level.encode(text)
    streamed = pieces(byte_level, token_ids)
    assert "".join(streamed) == byte_level.decode(token_ids) == text
    assert streamed[-1] == ""
    assert not any(REPLACEMENT in piece for piece in streamed)


@given(st.lists(st.integers(0, 399), max_size=60))
def test_random_tokens_stream_to_their_whole_text(byte_level, token_ids):
    """Most of these are no valid UTF-8."""
    assert "".join(pieces(byte_level, token_ids)) == byte_level.decode(token_ids)


@given(st.lists(st.sampled_from([0xF0, 0x9F, 0x99, 0x82, 0xE2, 0x82, 0xAC, 0xFF, 0x41]), max_size=120))
def test_broken_bytes_stream_to_their_whole_text(data):
    """Halves of 🙂 and €, and long runs that no byte completes."""
    assert "".join(pieces(ByteTokenizer(), data)) == bytes(data).decode(errors="replace")


@pytest.mark.parametrize("byte", [0x80, 0xF0, 0xFF])
def test_endless_invalid_bytes_are_not_held_back_for_ever(byte):
    stream = Detokenizer(ByteTokenizer())
    shown = "".join(stream.append([byte]) for _ in range(1000))
    assert len(shown) > 950
    assert shown + stream.append([*"€".encode()]) + stream.flush() == REPLACEMENT * 1000 + "€"


@given(st.lists(st.lists(st.integers(0, 399), max_size=6), max_size=15))
def test_pieces_of_any_size(byte_level, chunks):
    stream = Detokenizer(byte_level)
    text = "".join(stream.append(chunk) for chunk in chunks) + stream.flush()
    assert text == byte_level.decode([token for chunk in chunks for token in chunk])


@given(st.text(max_size=30), st.text(max_size=30))
def test_text_behind_a_prompt(byte_level, prompt, text):
    token_ids = byte_level.encode(text)
    assert "".join(pieces(byte_level, token_ids, byte_level.encode(prompt))) == text


def test_space_at_the_beginning_is_kept_behind_a_prompt(sentence_piece):
    tokenizer, ids = sentence_piece
    prompt = [ids["<s>"], ids["▁a"], ids["city"]]
    output = [ids[word] for word in ("▁Paris", "▁is", "▁a", "city")]
    assert "".join(pieces(tokenizer, output)) == tokenizer.decode(output) == "Paris is acity"
    assert "".join(pieces(tokenizer, output, prompt)) == " Paris is acity"
    assert "".join(pieces(tokenizer, output, [ids["<s>"]])) == "Paris is acity"


def test_characters_from_byte_tokens(sentence_piece):
    tokenizer, ids = sentence_piece
    output = [ids["▁is"], *(ids[f"<0x{byte:02X}>"] for byte in "€🙂".encode()), ids["▁Paris"]]
    streamed = pieces(tokenizer, output)
    assert streamed == ["is", "", "", "€", "", "", "", "🙂", " Paris", ""]


def test_a_prompt_that_ends_within_a_character():
    smile = [*"🙂".encode()]
    assert "".join(pieces(ByteTokenizer(), [*smile[2:], 65], smile[:2])) == REPLACEMENT * 2 + "A"


def test_special_tokens_have_no_text(byte_level):
    hello = byte_level.encode("Hello world")
    assert "".join(pieces(byte_level, [0, *hello, 1, *hello, 1])) == "Hello worldHello world"
    assert byte_level.decode([0, *hello, 1]) == "Hello world"


def test_spaces_before_punctuation_are_not_cleaned_up(byte_level):
    text = "one , two . don 't"
    assert byte_level.decode(byte_level.encode(text)) == text


# ---- without files -------------------------------------------------------------------------------------------------


@given(st.text())
def test_byte_tokenizer_reads_what_it_writes(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text)[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_shows_other_tokens_as_numbers():
    tokens = [72, 105, 300, 301, 257, 33, 0xF0, 400]
    assert ByteTokenizer().decode(tokens) == f"Hi<300><301>!{REPLACEMENT}<400>"
    assert "".join(pieces(ByteTokenizer(), tokens)) == ByteTokenizer().decode(tokens)


def test_number_tokenizer():
    tokenizer = NumberTokenizer()
    assert "".join(pieces(tokenizer, [5, 17])).split() == ["5", "17"]
    with pytest.raises(UserError, match="prompt_token_ids"):
        tokenizer.encode("text")


# ---- folders -------------------------------------------------------------------------------------------------------


def test_which_tokenizer(byte_level_folder, tmp_path):
    assert isinstance(load_tokenizer(str(byte_level_folder), 400), HFTokenizer)
    assert isinstance(load_tokenizer(str(byte_level_folder / "tokenizer.json"), 400), HFTokenizer)
    (tmp_path / "config.json").write_text("{}")
    for model in (str(tmp_path), str(tmp_path / "config.json"), "tiny"):
        assert isinstance(load_tokenizer(model, 259), ByteTokenizer)
        assert isinstance(load_tokenizer(model, 258), NumberTokenizer)
    assert load_tokenizer(str(byte_level_folder), 400).notice is None
    assert "no tokenizer" in load_tokenizer("tiny", 259).notice


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}', json.dumps({"version": "1.0", "model": None})])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path), 400)
    assert str(tmp_path) in str(caught.value)
    assert "tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_the_folder_is_not_run(tmp_path):
    (tmp_path / "tokenization.py").write_text("raise SystemExit('run')")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path), 400)
