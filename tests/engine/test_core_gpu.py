"""The engine on a GPU: Triton kernels, CUDA graphs and 16-bit models against transformers in float32."""

import gc
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from models_for_tests import FAMILIES, VOCAB_SIZE
from running import (
    BOUNDS,
    LogitsLog,
    Models,
    assert_same_texts,
    engine,
    in_two_waves,
    prompts,
    reference_logits,
    relative_error,
    request,
    run,
)

from engine import pieces
from engine.bench.step_log import read_step_log
from engine.commands.bench import bench
from engine.commands.generate import generate
from engine.errors import UserError
from engine.sampling import LogitsProcessor, Plan
from engine.sequence import Sequence
from kernels.reference.sampling import sample

pytestmark = pytest.mark.gpu

# Graphs of 1, 2, 4 and 8 sequences; few blocks, so that checks are quick.
GPU = {"device": "cuda", "block_size": 64, "num_gpu_blocks_override": 96}
# Logits have a standard deviation of 2 to 3 and go up to 12, where bfloat16's numbers are 1/16 apart. Steps of other
# sizes take other kernels, whose rounding may prefer another token only where two logits are nearly equal.
NEARLY_EQUAL = 0.3


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def freed_memory():
    """Engines are in reference cycles with their graphs and logs."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def references(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """transformers on the GPU in float32 and in bfloat16, with the same weights, which are bfloat16 numbers."""
    exact, plain = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").cuda()
        for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return exact.eval(), plain.eval()


def assert_as_exact_as(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """FlashAttention's rule: at most twice the error of transformers in bfloat16, plus that of rounding the result."""
    error, plain_error = (float((x - exact).norm()) for x in (found, plain))
    rounding = float((exact.bfloat16().float() - exact).norm())
    assert error <= 2 * plain_error + rounding, f"{error} where transformers has {plain_error}"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_texts(family, models):
    """Logits of prompts and decodes, with chunks and prefix hits; then the same text without graphs and overlap."""
    folder, _ = models(family)
    exact_model, plain_model = references(folder)
    shared = {**GPU, "max_num_batched_tokens": 100}
    with engine(folder, **shared) as core:
        log = LogitsLog(core)
        core.step_log = []
        requests = in_two_waves(core)
        assert any(each.num_cached_tokens for each in requests)
        # Steps of decodes only run as graphs, others do not.
        for record in core.step_log:
            decodes = len(record.shape.decode_contexts)
            assert record.gpu_s > 0
            assert record.graph_size == (
                None if record.shape.prefills else min(n for n in (1, 2, 4, 8) if n >= decodes)
            )
        assert {record.graph_size for record in core.step_log} >= {None, 8}
        rows = [(log.rows(each), *(reference_logits(m, each) for m in (plain_model, exact_model))) for each in requests]
        for part in (slice(0, 1), slice(1, None)):  # sampled behind the prompt, and behind a decode
            assert_as_exact_as(*(torch.cat([logits[part] for logits in kind]) for kind in zip(*rows, strict=True)))
        texts = {each.request_id: each.output_token_ids for each in requests}
        logits = {each.request_id: found for each, (found, _, _) in zip(requests, rows, strict=True)}
        for each in requests:
            taken = logits[each.request_id].gather(1, torch.tensor(each.output_token_ids)[:, None])
            assert torch.equal(taken[:, 0], logits[each.request_id].amax(-1))
        weights = core.weights

    for settings in ({"enforce_eager": True}, {"async_scheduling": False}):
        with engine(folder, weights=weights, **shared, **settings) as core:
            core.step_log = []
            again = {each.request_id: each.output_token_ids for each in in_two_waves(core)}
            if "enforce_eager" in settings:
                assert {record.graph_size for record in core.step_log} == {None}
        assert_same_texts(again, texts, logits, NEARLY_EQUAL)


@pytest.mark.parametrize(
    ("family", "kv_cache_dtype", "skipped"),
    [
        ("llama", "bfloat16", ()),
        ("llama", "fp8", (0,)),
        ("llama", "int8", ()),
        ("llama", "int4", (1,)),
        ("llama", "int2", ()),
        ("gemma2", "int4", ()),
    ],
)
def test_every_cache_survives_graphs_hits_chunks_and_preemption(family, kv_cache_dtype, skipped, models):
    folder, model = models(family)
    # One more than a sequence of 256 tokens may need: 8 pages, and for windows of 24 tokens and steps of 40 three.
    blocks = {"llama": 9, "gemma2": 12}[family]
    settings = {**GPU, "block_size": 32, "num_gpu_blocks_override": blocks, "max_num_batched_tokens": 40}
    with engine(folder, **settings, kv_cache_dtype=kv_cache_dtype, kv_cache_dtype_skip_layers=skipped) as core:
        log = LogitsLog(core)
        core.step_log = []
        requests = in_two_waves(core)
        assert core.scheduler.num_preemptions > 0
        assert any(each.num_cached_tokens for each in requests)
        assert any(record.graph_size for record in core.step_log)
        assert relative_error(core, log, model, requests) < BOUNDS.get(kv_cache_dtype, 0) + 0.03  # of bfloat16


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int4"])
def test_neighbours_that_leave(kv_cache_dtype, models):
    """Whose slots and pages are used again at once."""
    folder, _ = models("llama")
    shared = {**GPU, "kv_cache_dtype": kv_cache_dtype, "enable_prefix_caching": False}
    with engine(folder, **shared) as core:
        log = LogitsLog(core)
        asked = [request(core, i, prompt) for i, prompt in enumerate(prompts())]
        run(core, asked)
        texts = {each.request_id: each.output_token_ids for each in asked}
        logits = {each.request_id: log.rows(each) for each in asked}
    with engine(folder, **shared, max_num_seqs=4, weights=core.weights) as core:
        asked = [request(core, i, prompt) for i, prompt in enumerate(prompts())]
        neighbours = [
            request(core, f"neighbour {i}", prompt) for i, prompt in enumerate(prompts(range(3, 150, 25), seed=5))
        ]
        doomed = iter(neighbours)

        def abort_one(steps: int) -> None:
            each = next(doomed, None) if steps % 3 == 0 else None
            assert each is None or core.abort(each) or each.finish_reason == "length"

        run(core, [each for pair in zip(asked, neighbours, strict=True) for each in pair], abort_one)
        again = {each.request_id: each.output_token_ids for each in asked}
    assert_same_texts(again, texts, logits, NEARLY_EQUAL)


def test_tokens_are_the_references_draws_of_the_same_logits(models):
    """Sampled in graphs and outside, with filters and without, beside greedy neighbours; each by its own seed."""
    folder, _ = models("llama")
    choices = (
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05},
        {},  # greedy
        {"temperature": 1.5, "seed": 2**63 - 1},
    )
    with engine(folder, **GPU) as core:
        log = LogitsLog(core)
        for wave in (choices, choices[:1] + choices[4:]):  # the second without filters
            requests = [
                request(core, f"{len(wave)} {i}", prompts([20 + i])[0], max_tokens=30 + i, **params)
                for i, params in enumerate(wave)
            ]
            run(core, requests)
            wrong = 0
            for each in requests:
                rows, params = len(each.output_token_ids), each.params
                tokens = sample(
                    log.rows(each),
                    temperature=torch.full((rows,), params.temperature),
                    top_k=torch.full((rows,), params.top_k, dtype=torch.int32),
                    top_p=torch.full((rows,), params.top_p),
                    min_p=torch.full((rows,), params.min_p),
                    seeds=torch.full((rows,), each.seed),
                    positions=torch.arange(each.num_prompt_tokens, len(each.token_ids)),
                )
                wrong += sum(a != b for a, b in zip(tokens.tolist(), each.output_token_ids, strict=True))
            assert wrong <= 1  # float32 may tip a race or a threshold, once in many thousand draws


def test_adjusted_logits_and_logprobs_are_those_of_the_cpus_path(models):
    """Behind graphs of bfloat16 logits and outside of them, as are the tokens of neighbours that ask for nothing."""
    folder, _ = models("llama")
    asked = (
        {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": -0.4, "logprobs": 5},
        {"temperature": 1.0, "frequency_penalty": 1.5, "top_p": 0.9},
        {"temperature": 0.8, "logit_bias": {7: 6.0, 9: -100.0}, "min_tokens": 8, "stop_token_ids": [7]},
        {"temperature": 1.2, "logprobs": 20},
    )
    plain = ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 20})
    with engine(folder, **GPU) as core:
        log = LogitsLog(core)
        requests = [request(core, i, prompts([50 + i])[0], max_tokens=30 + i, **each) for i, each in enumerate(asked)]
        crowd = [request(core, f"crowd {i}", prompts([20 + i])[0], **each) for i, each in enumerate(plain)]
        updates = run(core, [*requests[:2], *crowd, *requests[2:]])
        rows = {each: log.rows(each) for each in [*requests, *crowd]}
    wrong = 0
    for each in [*requests, *crowd]:
        processor = LogitsProcessor(VOCAB_SIZE, 8, torch.device("cpu"))
        for at, token in enumerate(each.output_token_ids):
            sofar = Sequence("so far", each.prompt_token_ids, each.params, max_model_len=256)
            sofar.append(each.output_token_ids[:at])
            sofar.slot = 0
            processor.admit([sofar])
            plan = Plan.of([sofar], [len(sofar.token_ids)], VOCAB_SIZE)
            row = rows[each][at : at + 1]
            adjusted = processor.adjusted(row, processor.upload(plan), torch.tensor([0])) if plan.rows else row
            (drawn,) = sample(
                adjusted,
                temperature=torch.tensor([each.params.temperature]),
                top_k=torch.tensor([each.params.top_k], dtype=torch.int32),
                top_p=torch.tensor([each.params.top_p]),
                seeds=torch.tensor([each.seed]),
                positions=torch.tensor([len(sofar.token_ids)]),
            ).tolist()
            wrong += drawn != token
    assert wrong <= 1  # float32 may tip a race or a threshold, once in many thousand draws
    for each in (requests[0], requests[3]):
        found = [one for update in updates if update.sequence is each for one in update.logprobs]
        exact = rows[each].double().log_softmax(1)
        assert [one.token_id for one in found] == each.output_token_ids
        for row, one in zip(exact, found, strict=True):
            assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
            assert one.rank == int((row > row[one.token_id] + 1e-9).sum()) + 1
            best = row.sort(descending=True).values[: each.params.logprobs].tolist()
            assert [logprob for _, logprob in one.top] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_fp8_weights(family, models):
    """Near the exact logits, and as near as on the CPU, where codes are multiplied exactly."""
    folder, model = models(family)
    errors = []
    for device in ("cuda", "cpu"):
        with engine(folder, **GPU | {"device": device}, quantization="fp8") as core:
            log = LogitsLog(core)
            requests = in_two_waves(core)
            errors.append(relative_error(core, log, model, requests))
    assert 0.01 < errors[0] < 0.25
    assert errors[0] < 1.3 * errors[1] + 0.02


# ---- memory --------------------------------------------------------------------------------------------------------


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype": "int4", "quantization": "fp8"}], ids=str)
def test_memory_is_filled_and_not_exceeded(settings, models):
    """Up to the share that was asked for, graphs beside; and the largest step takes no more than was set aside."""
    folder, _ = models("llama")
    total = torch.cuda.mem_get_info()[1]
    share = used_bytes() / total + 0.03  # of the GPU: a few GiB more than are taken now
    sized = {**GPU, "num_gpu_blocks_override": None, "gpu_memory_utilization": share, "max_num_batched_tokens": 2048}
    with engine(folder, **sized, **settings, max_num_seqs=16) as core:
        memory = core.memory
        assert memory.total_bytes == total
        assert memory.kv_bytes == memory.num_blocks * memory.block_bytes
        pages = {layer.pages.data_ptr(): layer.pages for layer in core._cache.layers}.values()
        assert sum(page.numel() for page in pages) == memory.kv_bytes + memory.block_bytes
        # All but less than a block of the share is spoken for.
        taken = memory.weights_bytes + memory.activation_bytes + memory.other_bytes + memory.residual_bytes
        assert taken + memory.kv_bytes <= share * total
        assert memory.kv_bytes > 0.5 * 0.03 * total
        slack = 256 << 20  # what allocators and libraries round up
        assert used_bytes() <= share * total + memory.graph_bytes + slack

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        asked = {"max_tokens": 2, "frequency_penalty": 1.0, "temperature": 1.0, "top_p": 0.9, "logprobs": 20}
        requests = [request(core, i, prompt, **asked) for i, prompt in enumerate(prompts([150] * 14))]
        run(core, requests)
        assert torch.cuda.max_memory_allocated() - before <= memory.activation_bytes + (32 << 20)


def test_captured_sizes_are_timed_and_the_slower_ones_left_out(models, monkeypatch):
    timed, real = [], pieces.seconds_on_gpu
    monkeypatch.setattr(
        pieces, "seconds_on_gpu", lambda captured: timed.append((captured, real(captured))) or timed[-1][1]
    )
    with engine(models("llama")[0], **GPU, max_num_seqs=8, max_num_batched_tokens=2048) as core:
        ((captured, seconds),) = timed
        by_size = {each.size: taken for each, taken in zip(captured, seconds, strict=True)}
        assert list(by_size) == pieces.piece_sizes(core.weights, 2048)
        assert all(1e-6 < taken < 1 for taken in seconds)
        assert core.piece_sizes[-1] == 2048
        assert set(core.piece_sizes) <= set(by_size)
        for size, taken in by_size.items():
            assert by_size[core._runner._pieces_for(size).size] <= taken
        for length in (10, 100, 200):  # in whatever is left
            run(core, [request(core, length, prompts((length,))[0], max_tokens=3)])


def test_a_context_that_does_not_fit_on_the_gpu(models):
    folder, _ = models("llama")
    settings = {**GPU, "num_gpu_blocks_override": None, "gpu_memory_utilization": 1e-4}
    remedies = "--kv-cache-dtype fp8.*--gpu-memory-utilization 0.95"
    with (
        pytest.raises(UserError, match=f"are available: no context fits.*{remedies}"),
        engine(folder, **settings),
    ):
        pass


def test_generate_reports_bandwidth(capsys):
    """The built-in tiny model: text on stdout, and on stderr the bytes read beside those of a copy."""
    arguments = ["tiny", "--load-format", "dummy", "--prompt", "Hello", "--max-tokens", "24", "--ignore-eos"]
    assert generate([*arguments, "--num-gpu-blocks-override", "200"]) == 0
    report = capsys.readouterr().err
    assert re.search(r"decoding read [\d,.]+ GB/s of weights and KV cache, \d+% of the [\d,]+ GB/s of a copy", report)


SUITES = {
    "decode": ["--shapes", "1x64,4x100", "--kv-cache-dtype", "bfloat16,int4", "--output-tokens", "12"],
    "prefill": ["--prompt-tokens", "64,300", "--repetitions", "2"],
    "offline": ["--num-prompts", "8", "--input-len", "10:100", "--output-len", "4:20", "--repeat", "1"],
    "kv-cache": ["--context", "64,128", "--output-tokens", "8", "--recomputed-tokens", "3"],
}


@pytest.mark.parametrize("suite", SUITES)
def test_benchmarks_run_and_record(suite, tmp_path):
    record = tmp_path / "record.json"
    arguments = [suite, "tiny", "--load-format", "dummy", *SUITES[suite], "--commit", "x", "--output", str(record)]
    assert bench([*arguments, "--num-gpu-blocks-override", "600", "--max-num-seqs", "8"]) == 0
    written = json.loads(record.read_text())
    assert written["commit"] == "x"
    assert "H200" in str(written) or torch.cuda.get_device_name() in str(written)


def test_serve_benchmark_with_a_step_log(tmp_path):
    workload, record, log = tmp_path / "w.jsonl", tmp_path / "serve.json", tmp_path / "steps.jsonl.gz"
    lengths = ["--input-len", "20:200", "--output-len", "4:20"]
    made = ["make-workload", "--num-prompts", "20", "--request-rate", "50", "--seed", "0", *lengths]
    assert bench([*made, "--output", str(workload)]) == 0
    served = ["serve", "tiny", "--load-format", "dummy", "--workload", str(workload), "--repeat", "2"]
    paths = ["--step-log", str(log), "--output", str(record), "--commit", "x"]
    assert bench([*served, *paths, "--num-gpu-blocks-override", "2000"]) == 0
    for run_number in (1, 2):
        steps = read_step_log(tmp_path / f"steps.{run_number}.jsonl.gz")
        assert sum(step.shape.num_sampled for step in steps) > 20
        assert all(step.end_s >= step.start_s for step in steps)
