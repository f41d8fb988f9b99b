"""The server's endpoints over an engine that says what a script has: framing, shapes, refusals, ends."""

import asyncio
import codecs
import json
import socket
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_fakes import EOS, FakeEngine, events, make_app, post, request, running
from transformers import AutoTokenizer

from engine.errors import UserError
from engine.server.chat import ChatTemplate, encode_chat, read_template
from engine.server.errors import ApiError
from engine.server.logprobs import TokenTexts, longest_token
from engine.server.protocol import ChatMessage
from engine.tokenizer import ByteTokenizer, HFTokenizer, NumberTokenizer

MINIATURE = Path(__file__).parent.parent / "models" / "miniature" / "target"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def miniature():
    return HFTokenizer(MINIATURE)


# ---- answers in one piece ------------------------------------------------------------------------------------------


def test_a_completion():
    engine = FakeEngine("abc")
    answer = post(make_app(engine), COMPLETIONS, {"model": "m", "prompt": "Hi", "max_tokens": 5}).json()
    assert answer.pop("id").startswith("cmpl-")
    assert abs(answer.pop("created") - time.time()) < 60
    assert answer == {
        "object": "text_completion",
        "model": "m",
        "choices": [
            {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None},
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert engine.streams[0].prompt_token_ids == ByteTokenizer().encode("Hi")


def test_a_chat():
    engine = FakeEngine("abc")
    answer = post(make_app(engine), CHAT, {**HELLO, "max_completion_tokens": 4}).json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "m")
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "abca", "refusal": None}
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 4)
    assert engine.streams[0].prompt_token_ids == ByteTokenizer().encode("user:Hi\n>")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A", [[256, 65]]),
        (["A", "B"], [[256, 65], [256, 66]]),
        ([65, 66], [[65, 66]]),
        ([[65], [66, 67]], [[65], [66, 67]]),
    ],
)
def test_forms_of_prompts(prompt, expected):
    engine = FakeEngine()
    answer = post(make_app(engine), COMPLETIONS, {"prompt": prompt, "n": 2, "seed": 7}).json()
    assert [stream.prompt_token_ids for stream in engine.streams] == [tokens for tokens in expected for _ in range(2)]
    assert [stream.params.seed for stream in engine.streams] == [7, 8] * len(expected)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 16 * 2 * len(expected)


def test_default_lengths():
    engine = FakeEngine(max_model_len=64)
    app = make_app(engine)
    for path, body in ((COMPLETIONS, {"prompt": "Hi"}), (COMPLETIONS, {"prompt": "x" * 58}), (CHAT, HELLO)):
        assert post(app, path, body).status_code == 200
    assert [stream.params.max_tokens for stream in engine.streams] == [16, 64 - 59, 64 - len("user:Hi\n>") - 1]


def test_sampling_parameters_reach_the_engine():
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "stop_token_ids": [9],
        "max_tokens": 8,
        "min_tokens": 2,
        "ignore_eos": True,
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "include_stop_str_in_output": True,
    }
    engine = FakeEngine()
    body = {**HELLO, **given, "stop": "xyz", "logit_bias": {"65": 5}, "logprobs": True, "top_logprobs": 3}
    assert post(make_app(engine), CHAT, body).status_code == 200
    params = engine.streams[0].params
    assert {name: getattr(params, name) for name in given} == {**given, "stop_token_ids": (9,)}
    assert (params.stop, dict(params.logit_bias), params.logprobs) == (("xyz",), {65: 5}, 3)


@pytest.mark.parametrize("value", [5, "x", [[1]], ["x"], {"a": 1}, True, 1.5, [5]])
def test_fields_of_other_requests_are_unknown_fields(value):
    engine = FakeEngine()
    app = make_app(engine)
    fields = {"messages": value, "max_completion_tokens": value, "tokens": value, "top_logprobs": value}
    assert post(app, COMPLETIONS, {"prompt": "x", "max_tokens": 7, **fields}).status_code == 200
    assert engine.streams[0].params.max_tokens == 7
    message = {"role": "user", "content": "Hi", "messages": value, "max_tokens": value}
    body = {"messages": [message], "max_tokens": 1, "prompt": value, "tokens": value, "best_of": 1}
    assert post(app, CHAT, body).status_code == 200
    assert post(app, "/detokenize", {"tokens": [65], "messages": value, "n": value}).status_code == 200


def test_seeds_have_a_sign_in_requests():
    engine = FakeEngine()
    app = make_app(engine)
    for seed in (-1, -2, -(2**63), 2**63 - 1, 0):
        assert post(app, COMPLETIONS, {"prompt": "x", "seed": seed, "n": 2}).status_code == 200
    seeds = [stream.params.seed for stream in engine.streams]
    assert seeds == [None, None, 2**63 - 2, 2**63 - 1, 0, 1, 2**63 - 1, 0, 0, 1]


def test_large_tables_of_one_text():
    engine = FakeEngine(max_model_len=10**6)
    body = {"prompt": "x", "stop": ["a" * 100_000], "stop_token_ids": [7] * 100_000}
    assert post(make_app(engine), COMPLETIONS, body).status_code == 200


def test_null_and_unknown_fields_count_as_left_out():
    engine = FakeEngine()
    app = make_app(engine)
    names = ["temperature", "top_p", "n", "stop", "seed", "max_tokens", "logprobs", "logit_bias", "stream", "tools"]
    assert post(app, CHAT, {**HELLO, **dict.fromkeys(names), "something": {"else": 1}, "user": "u"}).status_code == 200
    assert post(app, CHAT, HELLO).status_code == 200
    assert engine.streams[0].params == engine.streams[1].params


# ---- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("body", "text", "reason", "stop_reason", "num_tokens"),
    [
        ({"stop": "d"}, "abc", "stop", "d", 4),
        ({"stop": ["zz", "cd"], "include_stop_str_in_output": True}, "abcd", "stop", "cd", 4),
        ({"stop_token_ids": [ord("c")]}, "ab", "stop", ord("c"), 3),
        ({"max_tokens": 3}, "abc", "length", None, 3),
        ({"stop": "abX", "max_tokens": 2}, "ab", "length", None, 2),
    ],
)
def test_ends(body, text, reason, stop_reason, num_tokens, is_stream):
    engine = FakeEngine("abcdefgh")
    body = {"prompt": "Hi", **body, "stream": is_stream}
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    response = post(make_app(engine), COMPLETIONS, body)
    if is_stream:
        *chunks, last, usage, done = events(response)
        assert done == "[DONE]"
        shown = "".join(chunk["choices"][0]["text"] for chunk in [*chunks, last])
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(chunks)
        choice, usage = last["choices"][0], usage["usage"]
    else:
        choice, usage = response.json()["choices"][0], response.json()["usage"]
        shown = choice["text"]
    assert (shown, choice["finish_reason"], choice["stop_reason"]) == (text, reason, stop_reason)
    assert usage["completion_tokens"] == num_tokens
    assert engine.streams[0].finish_reason == reason  # which the metrics count


def test_end_of_text():
    engine = FakeEngine([*b"ab", EOS])
    choice = post(make_app(engine), COMPLETIONS, {"prompt": "Hi"}).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", None)


# ---- streams -------------------------------------------------------------------------------------------------------


def test_bytes_of_a_stream():
    response = post(make_app(FakeEngine('a"\n')), COMPLETIONS, {"prompt": "Hi", "max_tokens": 3, "stream": True})
    answer = events(response)[0]
    head = f'"id":"{answer["id"]}","object":"text_completion","created":{answer["created"]},"model":"m"'
    choice = '"logprobs":null,"finish_reason":null'
    assert response.content.decode() == (
        f'data: {{{head},"choices":[{{"index":0,"text":"a",{choice}}}]}}\n\n'
        f'data: {{{head},"choices":[{{"index":0,"text":"\\"",{choice}}}]}}\n\n'
        f'data: {{{head},"choices":[{{"index":0,"text":"\\n","logprobs":null,"finish_reason":"length",'
        '"stop_reason":null}]}\n\n'
        "data: [DONE]\n\n"
    )
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers


def test_a_stream_of_a_chat():
    body = {**HELLO, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    first, *middle, last, usage, done = events(post(make_app(FakeEngine("abc")), CHAT, body))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [{"content": "a"}, {"content": "b"}]
    assert last["choices"][0] == {
        "index": 0,
        "delta": {"content": "c"},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 3, "[DONE]")
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


def test_a_stream_without_text_has_its_two_ends():
    first, last, done = events(post(make_app(FakeEngine([EOS])), CHAT, {**HELLO, "stream": True}))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"], done) == ({}, "stop", "[DONE]")


@given(text=st.text(min_size=1, max_size=12), stops=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_no_empty_pieces_and_no_half_characters(text, stops):
    script = text.encode("utf-8", errors="replace")
    body = {"prompt": "Hi", "max_tokens": len(script), "stop": stops}
    app = make_app(FakeEngine(script))
    whole = post(app, COMPLETIONS, body).json()["choices"][0]
    *chunks, last, _ = events(post(app, COMPLETIONS, {**body, "stream": True}))
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert all(pieces)
    assert "".join(pieces) + last["choices"][0]["text"] == whole["text"]
    assert last["choices"][0]["finish_reason"] == whole["finish_reason"]
    expected = script.decode()
    found = [place for stop in stops if (place := expected.find(stop)) >= 0]
    assert whole["finish_reason"] == ("stop" if found else "length")
    assert expected.startswith(whole["text"])


def test_several_continuations_in_one_stream():
    body = {"prompt": ["A", "B"], "n": 2, "max_tokens": 4, "stream": True}
    *chunks, done = events(post(make_app(FakeEngine("abcd")), COMPLETIONS, body))
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order == [0, 1, 2, 3] * 4  # and not one after the other
    for index in range(4):
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index) == "abcd"
    assert done == "[DONE]"


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def test_logprobs_of_a_completion():
    app = make_app(FakeEngine("é!"))
    body = {"prompt": "Hi", "max_tokens": 3, "logprobs": 2}
    found = post(app, COMPLETIONS, body).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["\ufffd", "\ufffd", "!"]
    assert found["token_logprobs"] == [-0.5] * 3
    assert found["top_logprobs"][2] == {"!": -0.5, '"': -1.5}
    assert found["text_offset"] == [0, 0, 1]
    # What a chunk holds back, its log-probabilities wait for too; together they are the same.
    chunks = [chunk["choices"][0] for chunk in events(post(app, COMPLETIONS, {**body, "stream": True}))[:-1]]
    assert [chunk["text"] for chunk in chunks] == ["é", "!"]
    assert [len(chunk["logprobs"]["tokens"]) for chunk in chunks] == [2, 1]
    for name in found:
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == found[name]


@given(text=st.text(min_size=1, max_size=8), data=st.data())
def test_offsets_point_at_tokens(text, data):
    """Of any split of any bytes into pieces, in whole answers and chunks."""
    script = text.encode("utf-8", errors="replace") + data.draw(st.binary(max_size=4))
    engine = FakeEngine(script)
    body = {"prompt": "Hi", "max_tokens": len(script), "logprobs": 0}
    choice = post(make_app(engine), COMPLETIONS, body).json()["choices"][0]
    expected = []
    for place in range(len(script)):
        # The characters that end before this byte: those that are the same whatever comes behind.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        expected.append(len(decoder.decode(script[:place])))
    assert choice["logprobs"]["text_offset"] == expected
    *chunks, _ = events(post(make_app(engine), COMPLETIONS, {**body, "stream": True}))
    assert [offset for c in chunks for offset in c["choices"][0]["logprobs"]["text_offset"]] == expected


def test_offsets_of_tokens_without_text(miniature):
    special, word = 0, miniature.encode("def")
    script = [special, *word, special, *word]
    engine = FakeEngine(script)
    engine.info = replace(engine.info, vocab_size=1984)
    choice = post(
        make_app(engine, miniature), COMPLETIONS, {"prompt": [5], "max_tokens": len(script), "logprobs": 1}
    ).json()["choices"][0]
    assert choice["text"] == "defdef"
    assert choice["logprobs"]["tokens"][0] == "<|endoftext|>"
    places = dict(zip(range(len(script)), choice["logprobs"]["text_offset"], strict=True))
    assert (places[0], places[1], places[1 + len(word)], places[2 + len(word)]) == (0, 0, 3, 3)


def test_logprobs_of_a_chat():
    app = make_app(FakeEngine("é!"))
    body = {**HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    found = post(app, CHAT, body).json()["choices"][0]["logprobs"]
    assert found.pop("refusal") is None
    found = found.pop("content")
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == "é!"
    assert found[2] == {
        "token": "!",
        "logprob": -0.5,
        "bytes": [33],
        "top_logprobs": [{"token": "!", "logprob": -0.5, "bytes": [33]}],
    }
    chunks = events(post(app, CHAT, {**body, "stream": True}))[1:-1]
    assert [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]] == found
    plain = post(app, CHAT, {**HELLO, "max_tokens": 1, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


def test_logprobs_end_where_a_stop_string_does():
    body = {"prompt": "Hi", "stop": "bc", "logprobs": 0}
    choice = post(make_app(FakeEngine("abcd")), COMPLETIONS, body).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("a", ["a", "b", "c"])


@given(st.text(max_size=40))
def test_bytes_of_tokens_are_those_of_the_text(miniature, text):
    text = text.encode("utf-8", errors="replace").decode()
    texts = TokenTexts(miniature)
    assert b"".join(texts(token)[1] for token in miniature.encode(text)).decode() == text


@given(st.text(max_size=40))
def test_no_token_is_longer_than_the_longest(miniature, text):
    text = text.encode("utf-8", errors="replace").decode()
    for tokenizer in (miniature, ByteTokenizer()):
        assert len(text) <= len(tokenizer.encode(text)) * longest_token(tokenizer)


def test_texts_of_special_and_unknown_tokens(miniature):
    assert TokenTexts(miniature)(0) == ("<|endoftext|>", b"<|endoftext|>")
    assert TokenTexts(miniature)(10**6) == ("", b"")
    assert TokenTexts(ByteTokenizer())(300) == ("<300>", b"<300>")
    assert TokenTexts(NumberTokenizer())(7) == ("7 ", b"7 ")


# ---- chats ---------------------------------------------------------------------------------------------------------


def test_chat_prompts_are_those_of_transformers(miniature):
    messages = [
        {"role": "system", "content": "Be <|endoftext|> brief."},
        {"role": "user", "content": "def f("},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "é\n"},
    ]
    reference = AutoTokenizer.from_pretrained(miniature.tokenizer.name_or_path)
    for with_prompt in (True, False):
        rendered = ChatTemplate(miniature).render(
            [ChatMessage(**message) for message in messages], add_generation_prompt=with_prompt
        )
        expected = reference.apply_chat_template(messages, add_generation_prompt=with_prompt, return_dict=False)
        assert encode_chat(miniature, rendered) == expected


def test_parts_of_content():
    engine = FakeEngine()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = {
        "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": parts}],
        "add_generation_prompt": False,
        "max_tokens": 1,
    }
    assert post(make_app(engine), CHAT, body).status_code == 200
    assert bytes(engine.streams[0].prompt_token_ids[1:]).decode() == "system:S\nuser:one\ntwo\n"


def test_variables_of_a_template():
    engine = FakeEngine()
    app = make_app(engine, chat_template="{{ mood }}{{ messages[0].name }}")
    message = {"role": "user", "content": "Hi", "name": "Ada"}
    body = {"messages": [message], "chat_template_kwargs": {"mood": "calm"}}
    assert post(app, CHAT, body).status_code == 200
    assert bytes(engine.streams[0].prompt_token_ids[1:]).decode() == "calmAda"


def test_template_files(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert "m.content" in read_template(path)
    path.write_text("{% for %}")
    with pytest.raises(UserError, match="line 1"):
        read_template(path)
    path.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        read_template(path)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        read_template(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_template(tmp_path / "none")


def test_what_a_template_refuses():
    for template in ("{{ raise_exception('no system role') }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}"):
        with pytest.raises(ApiError) as caught:
            ChatTemplate(ByteTokenizer(), template).render([ChatMessage(role="user", content="Hi")])
        assert (caught.value.status_code, caught.value.param) == (400, "messages")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param", "code", "words"),
    [
        (COMPLETIONS, {}, "prompt", None, "prompt is missing"),
        (COMPLETIONS, {"prompt": 5}, "prompt", None, "must be text"),
        (COMPLETIONS, {"prompt": []}, "prompt", None, "not empty"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt", None, "must be text"),
        (COMPLETIONS, {"prompt": [True]}, "prompt", None, "must be text"),
        (COMPLETIONS, {"prompt": ""}, "prompt", None, "at least 1 token"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt[1]", None, "at least 1 token"),
        (COMPLETIONS, {"prompt": "\ud800"}, "prompt", None, "surrogate"),
        (COMPLETIONS, {"prompt": "x" * 63}, "prompt", "context_length_exceeded", "64 tokens; at most 63"),
        (COMPLETIONS, {"prompt": "x" * 65}, "prompt", "context_length_exceeded", "65 characters"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 63}, "max_tokens", "context_length_exceeded", "has 64, so ask"),
        (CHAT, {**HELLO, "max_completion_tokens": 99}, "max_completion_tokens", "context_length_exceeded", "109"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature", None, "greater than or equal to 0"),
        (COMPLETIONS, {"prompt": "x", "temperature": "1"}, "temperature", None, "valid number"),
        (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p", None, "greater than 0"),
        (COMPLETIONS, {"prompt": "x", "n": 129}, "n", None, "128"),
        (COMPLETIONS, {"prompt": "x", "n": 1.5}, "n", None, "integer"),
        (COMPLETIONS, {"prompt": ["x"] * 9, "n": 128}, "n", None, "1152 texts"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens", None, "greater than or equal to 1"),
        (COMPLETIONS, {"prompt": "x", "min_tokens": 17}, "min_tokens", None, "at most max_tokens, 16"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs", None, "20"),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, "stop[0]", None, "''; it must have at least 1 character"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 65}, "stop", None, "...; it must have at most 64 items"),
        (COMPLETIONS, {"prompt": "x", "seed": -(2**63) - 1}, "seed", None, "greater than or equal to -9223372036854"),
        (COMPLETIONS, {"prompt": "x", "n": 128, "stop": "a" * 2049}, None, None, "must be at most 262144"),
        (COMPLETIONS, {"prompt": ["x"] * 9, "stop_token_ids": [1] * 30_000}, None, None, "9 texts with 30000 entries"),
        (
            CHAT,
            {**HELLO, "n": 9, "logit_bias": dict.fromkeys(map(str, range(30_000)), 1)},
            None,
            None,
            "at most 262144",
        ),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", None, "token ids"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", None, "-100 to 100"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"259": 1}}, "logit_bias", None, "0 to 258"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, "stream_options", None, "stream to be true"),
        (COMPLETIONS, {"prompt": "x", "echo": True}, "echo", "unsupported_parameter", "not supported"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter", "not supported"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of", "unsupported_parameter", "n, or left out"),
        (CHAT, {**HELLO, "tools": [{}]}, "tools", "unsupported_parameter", "not supported"),
        (CHAT, {**HELLO, "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", ""),
        (CHAT, {**HELLO, "top_logprobs": 2}, "top_logprobs", None, "needs logprobs"),
        (CHAT, {"messages": []}, "messages", None, "messages is []; it must have at least 1 item"),
        (CHAT, {"messages": [{"role": "king", "content": ""}]}, "messages[0].role", None, "'developer', 'system'"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", None, "text or a list"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            None,
            "reads text only",
        ),
        (CHAT, {**HELLO, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", None, "must not have"),
        (CHAT, {"messages": [{"role": "user", "content": "\udfff"}]}, "messages", None, "surrogate"),
        ("/tokenize", {}, "prompt", None, "either prompt or messages"),
        ("/detokenize", {"tokens": [259]}, "tokens", None, "0 to 258"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", None, "greater than or equal to 0"),
    ],
)
def test_bad_values(path, body, param, code, words):
    engine = FakeEngine()
    response = post(
        make_app(engine), path, None, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not engine.streams


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"\xff",
        b'{"prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000,
    ],
)
def test_bodies_that_are_no_request(content):
    headers = {"content-type": "application/json"}
    response = request(make_app(), "POST", COMPLETIONS, content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_that_is_not_sent_as_json():
    response = request(make_app(), "POST", COMPLETIONS, content=b'{"prompt": "x"}', headers={"content-type": "a/b"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_models_and_paths_that_there_are_not():
    app = make_app(model_names=("a/b", "c"))
    cards = request(app, "GET", "/v1/models").json()
    assert [card["id"] for card in cards["data"]] == ["a/b", "c"]
    assert request(app, "GET", "/v1/models/a/b").json() == cards["data"][0]
    strange = request(
        app,
        "POST",
        COMPLETIONS,
        content=b'{"model": "\\ud800", "prompt": "x"}',
        headers={"content-type": "application/json"},
    )
    for response in (strange, post(app, CHAT, {"model": "z", **HELLO}), request(app, "GET", "/v1/models/z")):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    missing = request(app, "GET", "/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong = request(app, "GET", COMPLETIONS)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "use POST" in wrong.json()["error"]["message"]
    assert post(app, COMPLETIONS, {"model": "c", "prompt": "x"}).json()["model"] == "c"


def test_keys():
    app = make_app(api_keys=("one", "zwölf"))

    def status(path, key):
        headers = {} if key is None else {"authorization": key}
        response = request(app, "GET", path, headers=headers)
        if response.status_code == 401:
            assert response.json()["error"]["code"] == "invalid_api_key"
        return response.status_code

    for key in ("Bearer one", "bearer  one", "Bearer zwölf".encode()):
        assert status("/v1/models", key) == 200
    for key in (None, "", "one", "Bearer", "Bearer on", "Bearer onee", "Basic one", b"Bearer \xff"):
        assert status("/v1/models", key) == 401
        assert status("/openapi.json", key) == 401
        assert (status("/health", key), status("/metrics", key)) == (200, 200)


def test_large_bodies():
    app = make_app(max_body_bytes=1000)
    body = json.dumps({"prompt": "x", "user": "u" * 900}).encode()
    headers = {"content-type": "application/json"}

    async def chunks(data):
        for start in range(0, len(data), 100):
            yield data[start : start + 100]

    def status(data, is_chunked):
        content = chunks(data) if is_chunked else data
        response = request(app, "POST", COMPLETIONS, content=content, headers=headers)
        if response.status_code == 413:
            assert response.json()["error"]["code"] == "request_too_large"
            assert response.headers["connection"] == "close"
        return response.status_code

    for is_chunked in (False, True):
        assert status(body, is_chunked) == 200
        assert status(body + b" " * 1000, is_chunked) == 413


def test_large_bodies_over_a_socket():
    """The answer must reach clients that are still sending."""
    engine = FakeEngine()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    bodies = {
        "length": f"{head}Content-Length: 3000000\r\n\r\n".encode() + b" " * 3_000_000,
        "chunks": f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 3000 + b"0\r\n\r\n",
        "expect": f"{head}Content-Length: 3000000\r\nExpect: 100-continue\r\n\r\n".encode(),
    }
    with running(make_app(engine, max_body_bytes=5000)) as address:
        for data in bodies.values():
            with socket.create_connection(address, timeout=20) as client:
                client.sendall(data)
                answer = bytearray()
                while piece := client.recv(1 << 16):  # to the end: the connection is closed
                    answer += piece
                assert answer.startswith(b"HTTP/1.1 413 ")
                assert b"request_too_large" in answer
        url = f"http://{address[0]}:{address[1]}{COMPLETIONS}"
        assert httpx.post(url, json={"prompt": "x"}).status_code == 200


# ---- an engine that is full, ends, or dies -------------------------------------------------------------------------


def test_a_full_queue():
    engine = FakeEngine(max_requests=1)
    response = post(make_app(engine), COMPLETIONS, {"prompt": ["a", "b"]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "engine_overloaded"
    assert [stream.finish_reason for stream in engine.streams] == ["abort"]


def test_an_engine_that_dies():
    engine = FakeEngine("abcd")
    engine.dies_after = 2
    app = make_app(engine)
    response = post(app, COMPLETIONS, {"prompt": "Hi"})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    *chunks, last = events(post(app, COMPLETIONS, {"prompt": "Hi", "stream": True, "n": 2}))
    assert len(chunks) == 4
    assert last["error"]["code"] == "engine_error"
    assert "it broke" in last["error"]["message"]
    assert not engine.live
    engine.is_alive = False
    assert request(app, "GET", "/health").status_code == 503
    assert post(app, COMPLETIONS, {"prompt": "Hi"}).json()["error"]["code"] == "engine_dead"
    assert request(app, "GET", "/metrics").status_code == 200


def test_a_server_that_ends():
    engine = FakeEngine("abcd")
    app = make_app(engine)
    assert request(app, "GET", "/health").status_code == 200
    app.state.service.is_closing = True
    assert request(app, "GET", "/health").json()["error"]["code"] == "shutting_down"
    response = post(app, COMPLETIONS, {"prompt": "Hi"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert not engine.streams


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_that_the_engine_aborts_at_the_end(is_stream):
    engine = FakeEngine("abcd")
    app = make_app(engine)

    async def run():
        engine.gate = asyncio.Event()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "Hi", "stream": is_stream}))
            while not engine.streams:
                await asyncio.sleep(0)
            engine.streams[0].abort()
            return await answer

    response = asyncio.run(run())
    error = events(response)[-1] if is_stream else response.json()
    assert error["error"]["code"] == "shutting_down"


def test_a_defect_is_an_error_of_the_same_shape(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("engine.server.app.OutputText", lambda *arguments: 1 / 0)
    response = post(make_app(engine), COMPLETIONS, {"prompt": "Hi", "n": 2})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert response.headers["connection"] == "close"  # as uvicorn does then, while clients would send more
    assert [stream.finish_reason for stream in engine.streams] == ["abort"] * 2


def test_a_defect_within_a_stream(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("engine.server.answers.CompletionAnswer.event", lambda *arguments: 1 / 0)
    *_, last = events(post(make_app(engine), COMPLETIONS, {"prompt": "Hi", "stream": True, "n": 2}))
    assert last["error"]["code"] == "internal_error"
    assert not engine.live


# ---- clients that leave, or do not read ----------------------------------------------------------------------------


def raw_request(body: dict) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def ends_properly(client: socket.socket) -> bool:
    """Whether the answer that is still to be read has an end."""
    read = bytearray()
    try:
        while data := client.recv(1 << 20):
            read += data
    except ConnectionResetError:
        return False
    return read.endswith(b"0\r\n\r\n")


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("is_stream", [False, True])
def test_who_leaves_is_aborted(is_stream):
    engine = FakeEngine("abcd", max_model_len=10**9)
    engine.gate = asyncio.Event()
    with running(make_app(engine)) as address, socket.create_connection(address) as client:
        client.sendall(raw_request({"prompt": "Hi", "n": 2, "max_tokens": 10**8, "stream": is_stream}))
        wait_until(lambda: len(engine.live) == 2)
        client.close()
        wait_until(lambda: not engine.live)
    assert [stream.finish_reason for stream in engine.streams] == ["abort"] * 2


def test_who_does_not_read_is_dropped_and_others_are_served():
    engine = FakeEngine("a" * 64, max_model_len=10**9)
    app = make_app(engine, write_timeout_s=0.4)
    with running(app) as address, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(raw_request({"prompt": "Hi", "max_tokens": 10**8, "stream": True}))
        wait_until(lambda: engine.streams)
        url = f"http://{address[0]}:{address[1]}{COMPLETIONS}"
        assert httpx.post(url, json={"prompt": "Hi"}, timeout=20).status_code == 200
        wait_until(lambda: not engine.live)
        client.settimeout(20)
        assert not ends_properly(client)
    assert engine.streams[0].finish_reason == "abort"


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_tokens_and_back(miniature):
    engine = FakeEngine(max_model_len=77)
    engine.info = replace(engine.info, vocab_size=1984)
    app = make_app(engine, miniature, chat_template=None)
    found = post(app, "/tokenize", {"prompt": "def f(x):"}).json()
    assert found == {"count": len(found["tokens"]), "max_model_len": 77, "tokens": miniature.encode("def f(x):")}
    assert post(app, "/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "def f(x):"}
    chat = post(app, "/tokenize", HELLO).json()["tokens"]
    assert miniature.decode(chat) == "# user: Hi\n# assistant:\n"


def test_no_template():
    app = make_app(chat_template=None)
    response = post(app, CHAT, HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")
    assert "--chat-template" in response.json()["error"]["message"]


def test_version_and_metrics():
    app = make_app()
    assert set(request(app, "GET", "/version").json()) == {"version"}
    assert request(app, "GET", "/metrics").text == "nothing 0\n"
