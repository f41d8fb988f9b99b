"""A served model, seen by the openai client: what any of its users would do, compared with the library."""

import asyncio
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import MINIATURE, Served

from engine.llm import LLM
from engine.sampling_params import SamplingParams

PROMPTS = ["def read(path):\n", "import os\n\n", "class Node:\n    def", "# A test of\n", "for i in range("]
NAME = "miniature"


@pytest.fixture(scope="module")
def served():
    with Served(MINIATURE, "--port", 0, "--served-model-name", NAME, "--api-key", "secret") as server:
        yield server
        assert server.end() == 0


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.base_url, api_key="secret", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def llm():
    return LLM(str(MINIATURE))


def expected(llm, prompt, **params):
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0].outputs


def metrics(served) -> dict[str, float]:
    """By name and labels; of histograms only count and sum."""
    text = httpx.get(f"{served.root_url}/metrics").text
    return {
        " ".join([sample.name, *(value for key, value in sample.labels.items() if key != "model_name")]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def wait_idle(served) -> dict[str, float]:
    end = time.monotonic() + 20
    while True:
        found = metrics(served)
        if found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0:
            return found
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5, "top_p": 0.95}])
def test_a_completion_is_what_the_library_gives(client, llm, params):
    answer = client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=24, **params)
    wanted = expected(llm, PROMPTS[0], max_tokens=24, **params)[0]
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    assert answer.usage.completion_tokens == len(wanted.token_ids)
    assert answer.usage.prompt_tokens == len(llm.tokenizer.encode(PROMPTS[0]))
    stream = client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=24, stream=True, **params)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted.text


def test_a_chat(client, llm):
    messages = [{"role": "user", "content": "def f("}]
    wanted = expected(llm, "# user: def f(\n# assistant:\n", max_tokens=12, temperature=0.0)[0]
    arguments = {"model": NAME, "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**arguments)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", wanted.text)
    *chunks, last = client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
    assert chunks[-1].choices[0].finish_reason == wanted.finish_reason
    assert (last.choices, last.usage) == ([], answer.usage)


def test_stop_strings(client, llm):
    whole = expected(llm, PROMPTS[0], max_tokens=40, temperature=0.0)[0].text
    stop = whole[12:15]
    answer = client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=[stop, "\0"])
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert choice.stop_reason == stop


def test_log_probabilities(client, llm):
    wanted = expected(llm, PROMPTS[1], max_tokens=6, temperature=0.0, logprobs=3)[0]
    decode = llm.tokenizer.decode
    found = client.completions.create(model=NAME, prompt=PROMPTS[1], max_tokens=6, temperature=0, logprobs=3)
    found = found.choices[0].logprobs
    assert found.tokens == [decode([token]) for token in wanted.token_ids]
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in wanted.logprobs], abs=1e-4)
    for tops, entry in zip(found.top_logprobs, wanted.logprobs, strict=True):
        assert tops == pytest.approx({decode([token]): logprob for token, logprob in entry.top}, abs=1e-4)
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    ).choices[0]
    assert "".join(entry.token for entry in chat.logprobs.content) == chat.message.content
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in chat.logprobs.content)


def test_several_continuations(client, llm):
    params = {"max_tokens": 10, "temperature": 1.0, "n": 3, "seed": 11}
    wanted = [output.text for output in expected(llm, PROMPTS[2], **params)]
    answer = client.completions.create(model=NAME, prompt=PROMPTS[2], **params)
    assert [choice.text for choice in answer.choices] == wanted
    assert len(set(wanted)) == 3
    texts = ["", "", ""]
    for chunk in client.completions.create(model=NAME, prompt=PROMPTS[2], stream=True, **params):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


def test_penalties_and_lengths(client, llm):
    params = {"max_tokens": 30, "temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 0.5}
    extra = {"repetition_penalty": 1.3, "min_tokens": 30, "ignore_eos": True}
    wanted = expected(llm, PROMPTS[0], **params, **extra)[0]
    answer = client.completions.create(model=NAME, prompt=PROMPTS[0], **params, extra_body=extra)
    assert answer.choices[0].text == wanted.text
    assert answer.usage.completion_tokens == 30
    banned = wanted.token_ids[0]
    biased = client.completions.create(
        model=NAME, prompt=PROMPTS[0], max_tokens=1, temperature=0, logit_bias={str(banned): -100}
    )
    assert biased.choices[0].text != llm.tokenizer.decode([banned])


def test_concurrent_streams_get_their_own_tokens(served, llm):
    """Each compared with the same request alone."""
    jobs = [(PROMPTS[place % len(PROMPTS)], place) for place in range(40)]

    async def one(client, prompt, seed):
        stream = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=5 + seed, temperature=1.0, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run():
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="secret", timeout=60) as client:
            return await asyncio.gather(*(one(client, *job) for job in jobs))

    params = [SamplingParams(max_tokens=5 + seed, temperature=1.0, seed=seed) for _, seed in jobs]
    wanted = llm.generate([prompt for prompt, _ in jobs], params, use_tqdm=False)
    assert asyncio.run(run()) == [output.outputs[0].text for output in wanted]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors_are_the_exceptions_of_the_client(client, served):
    with pytest.raises(openai.BadRequestError, match="max_tokens 600 that makes 601; the model's context has 512") as e:
        client.completions.create(model=NAME, prompt="x", max_tokens=600)
    assert (e.value.code, e.value.param, e.value.type) == (
        "context_length_exceeded",
        "max_tokens",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError, match="temperature is -1"):
        client.completions.create(model=NAME, prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="0 to 1983"):
        client.completions.create(model=NAME, prompt=[1984])
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    with (
        openai.OpenAI(base_url=served.base_url, api_key="guess", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="API key"),
    ):
        stranger.models.list()
    assert client.completions.create(model=NAME, prompt="x", max_tokens=1).usage.completion_tokens == 1


def test_who_leaves_frees_its_blocks(client, served):
    before = wait_idle(served)["vllm:request_success_total abort"]
    stream = client.completions.create(
        model=NAME, prompt="x", max_tokens=500, stream=True, n=4, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert metrics(served)["vllm:num_requests_running"] == 4
    stream.close()
    wait_idle(served)

    async def leave_while_waiting():
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key="secret", max_retries=0) as leaving:
            answer = asyncio.create_task(
                leaving.completions.create(model=NAME, prompt="x", max_tokens=500, n=4, extra_body={"ignore_eos": True})
            )
            while metrics(served)["vllm:num_requests_running"] < 4:
                await asyncio.sleep(0.01)
            answer.cancel()
            await asyncio.wait([answer])

    asyncio.run(leave_while_waiting())
    after = wait_idle(served)
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["vllm:request_success_total abort"] == before + 8


def test_metrics_agree_with_usage(client, served, llm):
    before = wait_idle(served)
    first = client.completions.create(model=NAME, prompt=PROMPTS[0], max_tokens=7, temperature=0)
    stop = llm.tokenizer.encode(first.choices[0].text)[3]
    cases = [(PROMPTS[1], 20, []), (PROMPTS[0], 40, [stop])]
    answers = [first] + [
        client.completions.create(
            model=NAME, prompt=prompt, max_tokens=length, temperature=0, extra_body={"stop_token_ids": stops}
        )
        for prompt, length, stops in cases
    ]
    reasons = [answer.choices[0].finish_reason for answer in answers]
    after = wait_idle(served)
    gained = {name: after[name] - before[name] for name in before}
    prompt_tokens = sum(answer.usage.prompt_tokens for answer in answers)
    output_tokens = sum(answer.usage.completion_tokens for answer in answers)
    assert gained["vllm:prompt_tokens_total"] == gained["vllm:request_prompt_tokens_sum"] == prompt_tokens
    assert gained["vllm:generation_tokens_total"] == gained["vllm:request_generation_tokens_sum"] == output_tokens
    assert gained["vllm:e2e_request_latency_seconds_count"] == 3
    assert reasons[2] == "stop"
    for reason in ("stop", "length"):
        assert gained[f"vllm:request_success_total {reason}"] == reasons.count(reason)
