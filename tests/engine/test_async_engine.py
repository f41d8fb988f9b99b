"""The engine in a process of its own: a real one with a tiny model, and a core without a model in a thread."""

import asyncio
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from driven import CONFIG, INFO, Core, Script, over, read, step_message, tokens_of, until
from fake_core import EOS, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import UserError
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.server.async_engine import AsyncEngine, EngineDead, QueueFull
from engine.server.messages import Add, Channel, Commands, Died, EngineStats, Failed, StepMessage, channel_pair
from engine.server.worker import serve

TINY = EngineConfig(
    model="tiny",
    load_format="dummy",
    device="cpu",
    num_gpu_blocks_override=24,
    max_model_len=256,
    block_size=32,
    max_num_seqs=8,
    max_num_batched_tokens=64,
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def process():
    """A loop and an engine with a process of its own. After the tests every block is free, and the process ends."""
    with asyncio.Runner() as runner:
        engine = runner.run(AsyncEngine.start(TINY))
        yield runner, engine
        runner.run(until(lambda: is_empty(engine)))
        assert engine.is_alive
        runner.run(engine.close(timeout_s=0))
        assert not engine.is_alive and engine._runs.exitcode == 0


def is_empty(engine: AsyncEngine) -> bool:
    stats = engine.stats
    return (stats.num_running, stats.num_waiting, stats.kv_cache_usage, engine.num_requests) == (0, 0, 0.0, 0)


def greedy(max_tokens: int, **params: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **params})


# ---- a process -----------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_llm(process):
    runner, engine = process
    prompts = [[256, *range(length)] for length in (1, 31, 32, 33, 100, 250, 5)]
    params = [
        SamplingParams(temperature=0, max_tokens=20, logprobs=3),
        SamplingParams(seed=1, max_tokens=30),
        SamplingParams(seed=2, max_tokens=30, ignore_eos=True, top_p=0.9, top_k=20),
        SamplingParams(seed=3, max_tokens=30, presence_penalty=1.0, repetition_penalty=1.3, logprobs=0),
        SamplingParams(seed=4, max_tokens=25, logit_bias={65: 30.0}, min_tokens=5),
        SamplingParams(seed=5, max_tokens=None, ignore_eos=True),
        SamplingParams(seed=6, logit_bias={257: 100.0}),
    ]

    async def all_events():
        return await asyncio.gather(*map(read, map(engine.submit, prompts, params)))

    found = runner.run(all_events())
    expected = LLM.from_core(EngineCore(TINY)).generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    for events, output, each in zip(found, expected, params, strict=True):
        [completion] = output.outputs
        assert tokens_of(events) == completion.token_ids
        assert events[-1].finish_reason == completion.finish_reason
        if each.logprobs is None:
            assert all(event.logprobs is None for event in events)
        else:
            logprobs = [logprob for event in events for logprob in event.logprobs]
            assert [(one.token_id, one.rank) for one in logprobs] == [
                (one.token_id, one.rank) for one in completion.logprobs
            ]
            assert [one.logprob for one in logprobs] == pytest.approx(
                [one.logprob for one in completion.logprobs], abs=1e-4
            )
    assert len(tokens_of(found[5])) == 5  # all the room that max_model_len leaves
    assert (tokens_of(found[6]), found[6][-1].finish_reason) == ([257], "stop")


def test_what_runs_is_described(process):
    info = process[1].info
    assert (info.max_model_len, info.vocab_size, info.num_blocks) == (256, 259, 24)
    assert (info.block_size, info.max_num_seqs, info.device, info.dtype) == (32, 8, "cpu", "float32")
    assert 257 in info.eos_token_ids and any("KV cache" in line for line in info.memory_lines)


def test_a_request_has_its_times_and_counts(process):
    runner, engine = process
    prompt = [256, *range(100, 200)]

    async def run():
        before = time.perf_counter()
        first = engine.submit(prompt, greedy(4))
        await read(first)
        again = engine.submit(prompt, greedy(1))
        await read(again)
        for stream in (first, again):
            assert before <= stream.arrival_s <= stream.first_scheduled_s <= stream.first_token_s
            assert stream.first_token_s <= stream.last_token_s <= time.perf_counter()
        assert (first.num_prompt_tokens, first.num_output_tokens, first.num_cached_tokens) == (101, 4, 0)
        assert (again.num_output_tokens, again.num_cached_tokens, again.num_preemptions) == (1, 96, 0)
        assert again.request_id == first.request_id + 1

    hits = engine.stats.prefix_cache_hits
    runner.run(run())
    assert engine.stats.prefix_cache_hits == hits + 96


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "the prompt is empty"),
        ([1] * 256, "the prompt has 256 tokens; at most 255 leave room .* max_model_len 256"),
        ([1, 259], "the prompt has token id 259; the model's are 0 to 258"),
    ],
)
def test_a_bad_prompt_is_refused_without_a_round_trip(process, prompt, sentence):
    runner, engine = process

    async def run():
        with pytest.raises(UserError, match=sentence):
            engine.submit(prompt, greedy(1))
        assert engine.num_requests == 0

    runner.run(run())


def test_abort_frees_blocks_while_others_go_on(process):
    runner, engine = process

    async def run():
        other = asyncio.create_task(read(engine.submit([256, 1], greedy(60))))
        stream = engine.submit([256, *range(150)], greedy(100))
        event = await anext(stream)
        assert len(event.token_ids) >= 1 and event.finish_reason is None and engine.stats.num_running == 2
        stream.abort()
        stream.abort()
        assert (await read(stream))[-1].finish_reason == "abort"
        await until(lambda: engine.stats.num_running == 1 and engine.stats.kv_cache_usage <= 3 / 24)
        assert len(tokens_of(await other)) == 60
        stream.abort()

    runner.run(run())


def test_random_load_over_a_process(process):
    """More than fits at once, so that requests wait and are preempted; aborts, and readers that sleep."""
    runner, engine = process
    choose = random.Random(5)

    async def one(index: int) -> str:
        await asyncio.sleep(choose.random() * 0.5)
        length, wanted = choose.randint(1, 120), choose.randint(1, 60)
        stream = engine.submit([index % 256] * length, greedy(wanted))
        aborts_after = choose.choice([None, None, 0, 3])
        found = 0
        async for event in stream:
            found += len(event.token_ids)
            last = event
            if aborts_after is not None and found >= aborts_after:
                stream.abort()
            if choose.random() < 0.1:
                await asyncio.sleep(choose.random() * 0.02)
        assert found == wanted if last.finish_reason == "length" else found <= wanted
        return last.finish_reason

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(one, range(150)))

    reasons = runner.run(all_of_them())
    assert set(reasons) == {"length", "abort"}
    runner.run(until(lambda: is_empty(engine)))


def test_the_worker_leaves_signals_to_the_server(process):
    runner, engine = process

    async def run():
        stream = engine.submit([256, 3], greedy(30))
        await anext(stream)
        os.kill(engine._runs.pid, signal.SIGINT)
        os.kill(engine._runs.pid, signal.SIGTERM)
        assert (await read(stream))[-1].finish_reason == "length"
        assert len(tokens_of(await read(engine.submit([256, 4], greedy(5))))) == 5

    runner.run(run())


def test_a_killed_worker_fails_its_requests_and_no_more_are_taken():
    async def run():
        engine = await AsyncEngine.start(TINY)
        streams = [engine.submit([256, index], greedy(200)) for index in range(12)]
        await anext(streams[0])
        os.kill(engine._runs.pid, signal.SIGKILL)
        for events, stream in zip(await asyncio.gather(*map(read, streams)), streams, strict=True):
            assert events[-1].finish_reason == "error"
            assert stream.error == "the engine's process was killed by SIGKILL"
        assert await engine.wait_dead() == streams[0].error
        assert not engine.is_alive and is_empty(engine)
        with pytest.raises(EngineDead, match="killed by SIGKILL"):
            engine.submit([1], greedy(1))
        streams[0].abort()
        await engine.close(timeout_s=10)
        await engine.close(timeout_s=10)

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_refused_in_the_same_sentence(tmp_path):
    config = replace(TINY, model=str(tmp_path), load_format="auto")
    with pytest.raises(UserError) as expected:
        EngineCore(config)
    with pytest.raises(UserError) as found:
        asyncio.run(AsyncEngine.start(config))
    assert str(found.value) == str(expected.value)


def test_a_start_that_is_given_up_leaves_no_process():
    async def run():
        before = multiprocessing.active_children()
        start = asyncio.create_task(AsyncEngine.start(TINY))
        await until(lambda: len(multiprocessing.active_children()) > len(before))
        [child] = set(multiprocessing.active_children()) - set(before)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert not is_running(child.pid)

    asyncio.run(run())


def test_the_worker_does_not_survive_the_server(tmp_path):
    script = (
        "import asyncio, os\n"
        "from engine.config import EngineConfig\n"
        "from engine.sampling_params import SamplingParams\n"
        "from engine.server.async_engine import AsyncEngine\n"
        "async def main():\n"
        "    config = EngineConfig('tiny', load_format='dummy', device='cpu', num_gpu_blocks_override=24,\n"
        "                          max_model_len=256)\n"
        "    engine = await AsyncEngine.start(config)\n"
        "    stream = engine.submit([1], SamplingParams(max_tokens=200, ignore_eos=True))\n"
        "    await anext(stream)\n"
        "    print(engine._runs.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    path = tmp_path / "server.py"
    path.write_text(script)
    ended = subprocess.run(
        [sys.executable, path], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    asyncio.run(until(lambda: not is_running(int(ended.stdout))))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- a thread ------------------------------------------------------------------------------------------------------


def expected_tokens(prompt: list[int], params: SamplingParams, limit: int) -> list[int]:
    """What the core without a model says to a prompt, alone in the world."""
    tokens = list(prompt)
    for _ in range(limit):
        tokens.append(next_token(tokens))
        if tokens[-1] in params.stop_token_ids or (tokens[-1] == EOS and not params.ignore_eos):
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_once_with_its_own_tokens(seed, depth):
    choose = random.Random(seed)
    core = Core(depth=depth)
    ended = []

    async def one(engine: AsyncEngine) -> None:
        for _ in range(choose.randint(0, 30)):
            await asyncio.sleep(0)
        prompt = [choose.randrange(256) for _ in range(choose.randint(1, 40))]
        params = greedy(choose.randint(1, 30), ignore_eos=choose.random() < 0.5)
        stream = engine.submit(prompt, params)
        aborts_after, sleeps = choose.choice([None, None, None, 0, 1, 5]), choose.random() < 0.3
        if aborts_after == 0:
            stream.abort()
        events = []
        async for event in stream:
            events.append(event)
            if aborts_after is not None and len(tokens_of(events)) >= aborts_after:
                stream.abort("stop")
            if sleeps:
                await asyncio.sleep(choose.random() * 0.003)
        expected = expected_tokens(prompt, params, min(params.max_tokens, core.max_model_len - len(prompt)))
        found = tokens_of(events)
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert len(found) == stream.num_output_tokens
        if aborts_after is None:
            assert found == expected
            assert stream.finish_reason == ("stop" if EOS in expected and not params.ignore_eos else "length")
        else:
            assert found == expected[: len(found)]
        ended.append(stream.request_id)

    async def run() -> None:
        engine = await over(core)
        await asyncio.gather(*(one(engine) for _ in range(150)))
        await until(lambda: is_empty(engine))
        await engine.close(timeout_s=0)

    asyncio.run(run())
    assert sorted(ended) == list(range(150))
    core.drain()


def test_a_slow_reader_gets_one_event_with_all_tokens():
    core = Core()

    async def run():
        engine = await over(core)
        streams = [engine.submit([index], greedy(40)) for index in range(3)]
        await until(lambda: is_empty(engine))
        for index, stream in enumerate(streams):
            [event] = await read(stream)
            assert event.token_ids == expected_tokens([index], stream.params, 40)
        await engine.close(timeout_s=0)

    asyncio.run(run())


def test_too_many_requests_are_refused_with_the_numbers():
    core = Core()
    goes_on = threading.Event()
    core.on_step = goes_on.wait

    async def run():
        engine = await over(core, max_queue=2)
        streams = [engine.submit([1], greedy(3)) for _ in range(6)]
        with pytest.raises(QueueFull, match="6 requests are running or waiting, and no more than 6 may"):
            engine.submit([1], greedy(3))
        streams[5].abort()
        streams[5] = engine.submit([1], greedy(3))
        goes_on.set()
        for stream in streams:
            assert (await read(stream))[-1].finish_reason == "length"
        await engine.close(timeout_s=0)

    asyncio.run(run())


def test_requests_without_a_seed_have_those_of_llm():
    core = Core(replace(CONFIG, seed=7))
    add, seeds = core.add, []
    core.add = lambda sequence: (add(sequence), seeds.append(sequence.seed))
    params = [SamplingParams(), SamplingParams(seed=3), SamplingParams()]

    async def run():
        engine = await over(core)
        await asyncio.gather(*(read(engine.submit([1], each)) for each in params))
        await engine.close(timeout_s=0)

    asyncio.run(run())
    offline = [Sequence(str(i), [1], each, max_model_len=64, default_seed=7) for i, each in enumerate(params)]
    assert seeds == [sequence.seed for sequence in offline] and len(set(seeds)) == 3


def test_a_prompt_that_cannot_be_chunked_is_refused():
    core = Core(replace(CONFIG, enable_chunked_prefill=False))

    async def run():
        engine = await over(core)
        with pytest.raises(UserError, match="17 tokens, more than max_num_batched_tokens 16, and chunked"):
            engine.submit([1] * 17, greedy(1))
        await engine.close(timeout_s=0)

    asyncio.run(run())


def test_a_request_that_the_core_refuses_ends_alone():
    core = Core()
    add = core.add

    def refuse(sequence) -> None:
        if sequence.token_ids[0] == 1:
            raise UserError("this core takes no 1")
        if sequence.token_ids[0] == 2:
            raise KeyError("two")
        add(sequence)

    core.add = refuse

    async def run():
        engine = await over(core)
        streams = [engine.submit([first], greedy(5)) for first in range(4)]
        events = await asyncio.gather(*map(read, streams))
        assert [each[-1].finish_reason for each in events] == ["length", "error", "error", "length"]
        assert [stream.error for stream in streams] == [None, "this core takes no 1", "KeyError: 'two'", None]
        assert engine.is_alive
        await engine.close(timeout_s=0)

    asyncio.run(run())
    core.drain()


def test_a_failing_step_fails_all_requests(capfd):
    core = Core()
    steps = iter(range(10))

    def fail() -> None:
        if next(steps) == 9:
            raise ZeroDivisionError("a kernel\nfailed")

    core.on_step = fail

    async def run():
        engine = await over(core)
        streams = [engine.submit([1], greedy(50)) for _ in range(6)]
        for index, stream in enumerate(streams):
            events = await read(stream)
            assert events[-1].finish_reason == "error"
            assert bool(tokens_of(events)) == (index < 4)
            assert stream.error == "a step of the engine failed: ZeroDivisionError: a kernel failed"
        assert await engine.wait_dead() == stream.error
        assert not engine.is_alive and is_empty(engine)
        with pytest.raises(EngineDead, match="a step of the engine failed"):
            engine.submit([1], greedy(1))
        await engine.close(timeout_s=1)

    asyncio.run(run())
    assert "Traceback" in capfd.readouterr().err


def test_close_lets_requests_finish():
    core = Core()

    async def run():
        engine = await over(core)
        streams = [engine.submit([1], greedy(40)) for _ in range(10)]
        closing = asyncio.create_task(engine.close(timeout_s=60))
        await asyncio.sleep(0)
        with pytest.raises(EngineDead, match="shutting down"):
            engine.submit([1], greedy(1))
        for stream in streams:
            assert (await read(stream))[-1].finish_reason == "length"
        await closing
        assert not engine.is_alive and is_empty(engine)

    asyncio.run(run())
    core.drain()


def test_close_aborts_what_does_not_end_in_time():
    core = Core()
    core.on_step = lambda: time.sleep(0.01)

    async def run():
        engine = await over(core)
        short, *long = [engine.submit([1], greedy(count)) for count in (1, 60, 60, 60)]
        waiting = [engine.submit([1], greedy(60)) for _ in range(5)]
        late = asyncio.create_task(engine.close(timeout_s=1000))
        await until(lambda: short.finish_reason is not None)
        await engine.close(timeout_s=0)
        await late
        assert (await read(short))[-1].finish_reason == "length"
        for stream in (*long, *waiting):
            assert (await read(stream))[-1].finish_reason == "abort"
        assert not engine.is_alive and is_empty(engine)

    asyncio.run(run())
    core.drain()


def test_a_worker_that_ignores_the_end_does_not_hold_up_close(monkeypatch):
    monkeypatch.setattr("engine.server.async_engine._JOIN_S", 0.2)

    async def run():
        engine = await AsyncEngine.start(TINY)
        os.kill(engine._runs.pid, signal.SIGSTOP)
        stream = engine.submit([1], greedy(10))
        await engine.close(timeout_s=0)
        assert (await read(stream))[-1].finish_reason == "abort"
        assert engine._runs.exitcode == -signal.SIGKILL

    asyncio.run(run())


def test_a_reader_that_is_cancelled_may_come_back():
    script = Script()

    async def run():
        engine = await script.start()
        stream = engine.submit([1], greedy(2))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        await script.step(engine, tokens=[(0, [7])])
        assert (await anext(stream)).token_ids == [7]
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another reader"):
            await anext(stream)
        stream.abort()
        assert (await reader).finish_reason == "abort"
        await engine.close(timeout_s=0)

    asyncio.run(run())


# ---- message by message --------------------------------------------------------------------------------------------


def test_late_news_of_an_aborted_request_is_dropped():
    script = Script()

    async def run():
        engine = await script.start()
        gone, other = engine.submit([1], greedy(5)), engine.submit([1], greedy(5))
        await until(lambda: bool(script.received))
        gone.abort()
        await script.step(
            engine,
            tokens=[(0, [7]), (1, [8]), (99, [9])],
            logprobs={0: [(7, -1.0, 1, ())]},
            started=[(0, 1.0, 0), (1, 1.0, 0)],
            ended=[(0, "length", 0), (1, "length", 0), (99, "stop", 0)],
            refused=[(0, "too late")],
        )
        assert [tokens_of(await read(stream)) for stream in (gone, other)] == [[], [8]]
        assert (gone.finish_reason, other.finish_reason) == ("abort", "length")
        await engine.close(timeout_s=0)

    asyncio.run(run())
    assert [commands.aborts for commands in script.received] == [[], [0], []]


@pytest.mark.parametrize(
    ("stop", "does", "reasons"),
    [
        ((), lambda stream: None, ["length"]),
        (("x",), lambda stream: stream.abort("stop"), ["stop"]),
        (("x",), lambda stream: stream.abort(), ["length"]),
        (("x",), lambda stream: None, ["length"]),
    ],
)
def test_a_stop_string_in_the_last_tokens_counts_as_stop(stop, does, reasons):
    """Text is the reader's: it finds a stop string when the engine has already gone on to the last token."""
    script, told = Script(), []

    async def run():
        engine = await script.start()
        engine.observer = SimpleNamespace(
            on_step=lambda *figures: None, on_end=lambda stream: told.append(stream.finish_reason)
        )
        stream = engine.submit([1], greedy(2, stop=stop))
        await script.step(engine, tokens=[(0, [7, 8])], ended=[(0, "length", 0)])
        await until(lambda: engine.num_requests == 0)
        assert told == ([] if stop else reasons)
        event = await anext(stream)
        assert (event.token_ids, event.finish_reason) == ([7, 8], "length")
        does(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        stream.abort()
        await engine.close(timeout_s=0)

    asyncio.run(run())
    assert told == reasons
    assert [commands.aborts for commands in script.received] == [[], []]  # it has nothing to abort


def test_requests_of_one_moment_are_one_message():
    script = Script()

    async def run():
        engine = await script.start()
        for index in range(3):
            stream = engine.submit([index], greedy(5))
        stream.abort()
        await until(lambda: bool(script.received))
        await engine.close(timeout_s=0)

    asyncio.run(run())
    first, *_ = script.received
    assert [add.prompt_token_ids for add in first.adds] == [[0], [1], [2]] and first.aborts == [2]


def test_first_tokens_are_read_first():
    script = Script()
    order = []

    async def reading(stream) -> None:
        while stream.finish_reason is None:
            await anext(stream)
            order.append(stream.request_id)

    async def run():
        engine = await script.start()
        tasks = [asyncio.create_task(reading(engine.submit([1], greedy(5)))) for _ in range(4)]
        await script.step(engine, tokens=[(0, [7]), (1, [7])])
        await until(lambda: len(order) == 2)
        await script.step(engine, tokens=[(0, [7]), (1, [7]), (2, [7]), (3, [7])])
        await until(lambda: len(order) == 6)
        await engine.close(timeout_s=0)
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert order[2:6] == [2, 3, 0, 1]


def test_several_tokens_of_a_step_and_their_logprobs():
    script = Script()

    async def run():
        engine = await script.start()
        one, two = engine.submit([1], greedy(5, logprobs=1)), engine.submit([1], greedy(5))
        said = [(7, -1.5, 1, ((7, -1.5),)), (8, -2.5, 3, ((5, -0.5),))]
        await script.step(engine, tokens=[(0, [7, 8]), (1, [9])], logprobs={0: said}, token_s=3.0)
        event = await anext(one)
        assert event.token_ids == [7, 8] and event.finish_reason is None
        assert [(each.token_id, each.logprob, each.rank, each.top) for each in event.logprobs] == said
        event = await anext(two)
        assert (event.token_ids, event.logprobs) == ([9], None)
        assert (one.first_token_s, one.last_token_s, one.num_output_tokens) == (3.0, 3.0, 2)
        await engine.close(timeout_s=0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("message", "error", "sentence"),
    [
        (Failed("no such model", True), UserError, "^no such model$"),
        (Failed("Traceback: KeyError", False), RuntimeError, "KeyError"),
        (None, RuntimeError, "closed its connection while it started"),
    ],
)
def test_a_start_that_fails_says_why(message, error, sentence):
    def drive(channel: Channel) -> None:
        if message is not None:
            channel.send(message)

    with pytest.raises(error, match=sentence):
        asyncio.run(AsyncEngine.start(CONFIG, drive=drive))


def test_the_last_words_of_a_worker():
    script = Script()

    async def run():
        engine = await script.start()
        stream = engine.submit([1], greedy(5))
        engine.stats = EngineStats(num_running=1, kv_cache_usage=0.5, num_preemptions=3)
        script.send(step_message(tokens=[(0, [7])]))
        script.send(Died("it fell"))
        script.send(step_message(tokens=[(0, [8])]))
        events = await read(stream)
        assert tokens_of(events) == [7] and stream.error == "it fell"
        assert engine.stats == EngineStats(num_preemptions=3)
        assert await engine.wait_dead() == "it fell"
        await engine.close(timeout_s=0)

    asyncio.run(run())


def test_the_loop_does_not_wait_for_a_worker_that_does_not_read():
    """A prompt of megabytes while the worker is in a long step."""
    prompt = [index % 97 for index in range(2_000_000)]
    reads = threading.Event()
    received = []

    def drive(channel: Channel) -> None:
        script = Script(replace(INFO, max_model_len=10_000_000))
        script.received = received
        receive = channel.receive
        channel.receive = lambda wait: reads.wait() and receive(wait)
        script._drive(channel)

    async def run():
        engine = await AsyncEngine.start(CONFIG, drive=drive)
        stream = engine.submit(prompt, greedy(5))
        await asyncio.sleep(0.01)  # comes back, though the socket is full
        assert engine._channel.has_backlog
        stream.abort()
        reads.set()
        await until(lambda: len(received) == 2)
        await engine.close(timeout_s=0)

    asyncio.run(run())
    assert received[0].adds[0].prompt_token_ids == prompt and received[1].aborts == [0]


def test_steps_go_on_while_the_server_does_not_read():
    core = Core()
    ours, sock = channel_pair()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs = Channel(sock)
    worker = threading.Thread(target=serve, args=(theirs, core), daemon=True)
    worker.start()
    num_requests, num_tokens = 40, 50
    ours.send(Commands([Add(index, [1], greedy(num_tokens), 0.5) for index in range(num_requests)], [], False))
    asyncio.run(until(lambda: core.scheduler.num_steps >= num_requests // 4 * num_tokens))
    assert theirs.has_backlog
    messages = []
    while sum(len(message.ended) for message in messages) < num_requests:
        messages += [message for message in ours.receive(wait=True) if isinstance(message, StepMessage)]
    counts = Counter(request_id for message in messages for request_id in message.request_ids)
    assert counts == dict.fromkeys(range(num_requests), num_tokens)
    ours.close()
    worker.join(timeout=30)
    assert not worker.is_alive()
    core.drain()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 300), st.just(200_000)), max_size=20), st.randoms())
def test_messages_arrive_whole_and_in_order(sizes, choose):
    """Whoever reads, and when: small and large messages, sent while nobody reads, in part or at the end."""
    ours, sock = channel_pair()
    theirs = Channel(sock)
    sent, received = [], []
    for index, size in enumerate(sizes):
        sent.append(Commands([Add(index, [1] * size, greedy(1), 0.5)], [], False))
        ours.send(sent[-1])
        if choose.random() < 0.5:
            received += theirs.receive()
    while ours.has_backlog:
        received += theirs.receive()
        ours.flush()
    ours.close()
    with pytest.raises(EOFError):
        while True:
            received += theirs.receive(wait=True)
    theirs.close()
    assert received == sent


def test_what_is_sent_to_nobody_is_lost_without_an_error():
    ours, sock = channel_pair()
    assert isinstance(sock, socket.socket)
    sock.close()
    ours.send("lost")
    assert not ours.has_backlog
    ours.close(timeout_s=1)
