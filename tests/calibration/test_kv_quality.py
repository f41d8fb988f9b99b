"""The study of KV precisions on the miniature: against transformers, closed forms and attention computed by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from calibration import kv_quality as command
from calibration.quality.forcing import ForcedDecoding, Text
from calibration.quality.intervals import Bootstrap, interval, wilson
from calibration.quality.newest_quantised import (
    TorchAttentionNewestQuantised,
    read_back,
    triton_attention_newest_quantised,
)
from calibration.quality.outliers import attention_errors
from calibration.quality.scores import score
from calibration.quality.text import distances_for, read_trials, read_windows
from calibration.quality.variants import VARIANTS, chosen
from calibration.training.corpus import Document
from calibration.training.pair import read_held_out
from engine.batch import GroupBatch, StepBatch
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import UserError
from engine.kv.cache import KVCache, layer_layouts
from engine.kv.groups import kv_groups
from engine.models.config import ModelConfig
from kernels.pages import PageLayout
from kernels.reference.pages import dequantise, page_of, quantise_channels, quantise_tokens

torch.set_num_threads(1)

CPU = torch.device("cpu")
MINIATURE = Path(__file__).resolve().parent.parent / "models" / "miniature"
CONTEXT, PREFILL, WINDOWS = 160, 32, 4
MEASURED = ("bfloat16", "fp8", "int8", "int4", "int4-no-window", "int2", "int2-skip")
ARGUMENTS = ["--pair", str(MINIATURE), "--device", "cpu", "--quick"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINIATURE / "target", local_files_only=True)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return read_held_out(MINIATURE / "heldout.jsonl")


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    folder = MINIATURE / "target"
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The record of a small study of some variants."""
    file = tmp_path_factory.mktemp("study") / "record.json"
    sizes = ["--windows", str(WINDOWS), "--context", str(CONTEXT), "--trials", "3", "--prefill", str(PREFILL)]
    assert command.main([*ARGUMENTS, *sizes, "--variants", ",".join(MEASURED), "--output", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def record(written) -> dict:
    return json.loads(written.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(record) -> dict[str, dict]:
    return {each["name"]: each for each in record["variants"]}


# ---- against transformers ------------------------------------------------------------------------------------------


class StoredCache(DynamicCache):
    """Gives back keys and values as a format stores them, but those of the first call, a prompt's own, exactly."""

    def __init__(self, store):
        super().__init__()
        self.store = store

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        is_prompt = self.get_seq_length(layer_idx) == 0
        stored = super().update(self.store(key_states), self.store(value_states), layer_idx, *args, **kwargs)
        return (key_states, value_states) if is_prompt and self.store is fp8 else stored


def fp8(x: torch.Tensor) -> torch.Tensor:
    quantised = quantise_tokens(x, "fp8")
    return quantised.codes.view(torch.float8_e4m3fn).float() * quantised.scale.float()[..., None]


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


@torch.no_grad()
def log_probs(target: LlamaForCausalLM, tokens: torch.Tensor, store) -> torch.Tensor:
    """Of what follows each token from the prompt's end on, [windows, context - prefill - 1, vocab]."""
    cache = StoredCache(store)
    target(tokens[:, :PREFILL], past_key_values=cache, use_cache=True)
    positions = torch.arange(PREFILL, tokens.shape[1] - 1)[None]
    out = target(tokens[:, PREFILL:-1], past_key_values=cache, use_cache=True, position_ids=positions)
    return out.logits.log_softmax(-1)


@pytest.fixture(scope="module")
def expected(target, tokenizer, documents) -> SimpleNamespace:
    windows = read_windows(tokenizer, documents, WINDOWS, CONTEXT)
    tokens = torch.tensor([window.tokens for window in windows])
    reference, quantised = (log_probs(target, tokens, store) for store in (bfloat16, fp8))

    def nll(logs):
        return -logs.gather(2, tokens[:, PREFILL + 1 :, None])[..., 0]

    return SimpleNamespace(
        reference=nll(reference),
        fp8=nll(quantised),
        kl=(reference.exp() * (reference - quantised)).sum(-1),
        agrees=reference.argmax(-1) == quantised.argmax(-1),
    )


def test_reference_is_transformers_perplexity(found, expected):
    reference = found["bfloat16"]
    assert reference["tokens"] == expected.reference.numel() == WINDOWS * (CONTEXT - PREFILL - 1)
    assert reference["perplexity"]["value"] == pytest.approx(float(expected.reference.mean().exp()), rel=1e-3)
    assert reference["of_windows"]["nll"] == pytest.approx(expected.reference.mean(1).tolist(), rel=1e-3)


def test_reference_read_again_is_the_same(found):
    reference = found["bfloat16"]
    assert reference["kl"] == {"mean": 0.0, "interval": [0.0, 0.0], "p99": 0.0}
    assert reference["perplexity_ratio"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert reference["top1_agreement"]["value"] == 1.0


def test_fp8_is_a_simulation_with_transformers(found, expected):
    measured = found["fp8"]
    assert measured["kl"]["mean"] == pytest.approx(float(expected.kl.mean()), rel=0.02)
    assert measured["kl"]["p99"] == pytest.approx(float(np.percentile(expected.kl.numpy(), 99)), rel=0.05)
    assert measured["of_windows"]["kl"] == pytest.approx(expected.kl.mean(1).tolist(), rel=0.05)
    ratio = float((expected.fp8 - expected.reference).mean().exp())
    assert measured["perplexity_ratio"]["value"] == pytest.approx(ratio, abs=1e-4)
    assert measured["top1_agreement"]["value"] == pytest.approx(float(expected.agrees.float().mean()), abs=2e-3)


@torch.no_grad()
def test_forcing_in_a_crowd(target, tokenizer, documents):
    """Texts of different lengths, two at a time, prompts in chunks, two steps in flight: each token seen once."""
    (window, *_) = read_windows(tokenizer, documents, 2, CONTEXT)
    lengths = [(5, 9), (90, 3), (40, 20), (1, 1), (70, 12)]
    texts = [Text(window.tokens[:prompt], window.tokens[prompt : prompt + forced]) for prompt, forced in lengths]
    core = EngineCore(
        EngineConfig(
            model=str(MINIATURE / "target"),
            device="cpu",
            max_model_len=CONTEXT,
            max_num_seqs=2,
            max_num_batched_tokens=32,
            enable_prefix_caching=False,
        )
    )
    core._depth = 2  # as on a GPU
    for _ in range(2):  # an engine reads one set of texts after another
        scores = score(ForcedDecoding(core), texts, device=CPU)
        for row, text in enumerate(texts):
            tokens = torch.tensor([[*text.prompt, *text.forced]])
            logs = target(tokens).logits[0, len(text.prompt) - 1 : -1].log_softmax(-1)
            wanted = -logs.gather(1, torch.tensor(text.forced)[:, None])[:, 0]
            assert scores.nll[row, : len(wanted)] == pytest.approx(wanted.numpy(), abs=1e-3)
            assert scores.is_top[row, : len(wanted)].tolist() == (logs.argmax(-1) == torch.tensor(text.forced)).tolist()
            assert not scores.nll[row, len(wanted) :].any()


def test_fewer_bits_cost_more(found):
    kl = {name: each["kl"]["mean"] for name, each in found.items()}
    assert kl["int2"] > kl["int4"] > kl["int8"] > 0
    assert kl["int2"] > kl["int2-skip"] > 0
    assert kl["int4-no-window"] > kl["int4"]
    assert found["int2"]["bytes_per_token"] < found["int2-skip"]["bytes_per_token"]
    assert found["fp8"]["bytes_per_token"] < found["bfloat16"]["bytes_per_token"]


def test_buckets_are_the_whole(found):
    for each in found.values():
        parts = each["by_context"]
        assert [(part["from"], part["to"]) for part in parts] == [(PREFILL + 1, 128), (128, CONTEXT)]
        assert sum(part["tokens"] for part in parts) == each["tokens"]
        mean = sum(part["kl"]["mean"] * part["tokens"] for part in parts) / each["tokens"]
        assert mean == pytest.approx(each["kl"]["mean"], rel=1e-3, abs=1e-12)


def test_record_says_what_it_rests_on(record, written, found):
    assert record["command"].startswith("python -m calibration.kv_quality --pair miniature ")
    trained = json.loads((MINIATURE / "training.json").read_text(encoding="utf-8"))
    # Without the weights of the norms, which no matrix product reads.
    assert record["model"]["parameters"] == pytest.approx(trained["target"]["parameters"], rel=1e-3)
    assert (record["settings"]["windows"], record["settings"]["context"]) == (WINDOWS, CONTEXT)
    assert [each["name"] for each in record["variants"]] == list(MEASURED)
    assert {name for name, each in found.items() if each["emulated"]} == {"int4-no-window"}
    assert "emulation" in record["emulation"]
    assert found["int2-skip"]["skip_layers"] == [0, 3]
    assert {each["residual_window"] for each in (found["fp8"], found["int8"])} == {None}
    assert (found["int4"]["residual_window"], found["int4-no-window"]["residual_window"]) == (True, False)
    assert written.stat().st_size < 300_000 / 4


def test_retrieval_counts(record, found):
    for each in [record["retrieval_chance"], *[each["retrieval"] for each in found.values()]]:
        (distance,) = each
        assert (distance["distance"], distance["trials"]) == (64, 3)
        assert distance["exact"] == distance["exact_of_trials"].count("1")
        assert distance["exact_interval"] == pytest.approx(wilson(distance["exact"], 3), abs=1e-3)


@pytest.mark.gpu
def test_study_on_a_gpu_is_that_of_the_cpu(found, tmp_path):
    """In CUDA graphs and bfloat16, where rounding alone has a KL; pages that fill while they are decoded."""
    file = tmp_path / "record.json"
    sizes = ["--windows", str(WINDOWS), "--context", str(CONTEXT), "--trials", "3", "--prefill", str(PREFILL)]
    pair = ["--pair", str(MINIATURE), "--device", "cuda", "--quick", "--variants", ",".join(MEASURED)]
    assert command.main([*pair, *sizes, "--output", str(file)]) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["model"]["dtype"] == "bfloat16"
    for each in record["variants"]:
        wanted = found[each["name"]]
        assert each["tokens"] == wanted["tokens"]
        assert each["of_windows"]["nll"] == pytest.approx(wanted["of_windows"]["nll"], rel=0.02)
        assert each["kl"]["mean"] == pytest.approx(wanted["kl"]["mean"], rel=0.25, abs=5e-4)
        assert (each["emulated"], each["skip_layers"]) == (wanted["emulated"], wanted["skip_layers"])
    errors = {(e["kv_cache_dtype"], e["outliers"], e["strength"]): e["error_ordinary"] for e in record["attention"]}
    of_cpu = attention_errors(CPU, num_seqs=2, context=512, seed=0)
    for e in of_cpu:
        kind = (e["kv_cache_dtype"], e["outliers"], e["strength"])
        assert errors[kind] == pytest.approx(e["error_ordinary"], rel=0.2, abs=0.02), kind


def test_tables_are_printed(capsys, tmp_path):
    file = tmp_path / "record.json"
    sizes = ["--windows", "2", "--context", "64", "--trials", "0", "--variants", "fp8"]
    assert command.main([*ARGUMENTS, *sizes, "--output", str(file)]) == 0
    text = capsys.readouterr().out
    assert "| fp8 " in text and "top-1 agreement" in text and "found again" not in text
    assert json.loads(file.read_text(encoding="utf-8"))["retrieval_chance"] == []


# ---- the planted line ----------------------------------------------------------------------------------------------


def test_trials_plant_and_ask(tokenizer, documents):
    trials = read_trials(tokenizer, documents, (64, 128), 5, seed=3)
    assert [trial.distance for trial in trials] == [64] * 5 + [128] * 5
    for trial in trials:
        query, value = trial.text.forced[: trial.value.start], trial.text.forced[trial.value]
        name, _, begin = tokenizer.decode(query).partition(" = ")
        assert begin == "'" and name.replace("_", "").isalpha() and value
        planted = tokenizer.decode([*query, *value]) + "'\n"
        prompt = tokenizer.decode(trial.text.prompt)
        before, _, behind = prompt.partition(planted)
        assert before.endswith("\n") and behind.endswith("\n")
        assert len(trial.text.prompt) - len(trial.control.prompt) == len(tokenizer.encode(planted))
        assert tokenizer.decode(trial.control.prompt) == before + behind
        assert trial.control.forced == trial.text.forced
    again = read_trials(tokenizer, documents, (64, 128), 5, seed=3)
    assert again == trials != read_trials(tokenizer, documents, (64, 128), 5, seed=4)


@given(st.integers(1, 5000))
def test_distances_fit(context):
    distances = distances_for(context)
    assert list(distances) == sorted(set(distances))
    assert all(0 < distance < context for distance in distances)
    assert bool(distances) == (context > 96)


def test_windows_take_turns(tokenizer):
    texts = [f"value_{i} = {i}\n" * length for i, length in enumerate((40, 5, 40, 1))]
    documents = [Document("package", f"{i}.py", text) for i, text in enumerate(texts)]
    windows = read_windows(tokenizer, documents, 5, 32)
    assert [window.document for window in windows] == [0, 1, 2, 0, 2]
    assert all(len(window.tokens) == 32 for window in windows)
    of_first = [token for window in windows if window.document == 0 for token in window.tokens]
    whole = [tokenizer.eos_token_id, *tokenizer(texts[0], add_special_tokens=False)["input_ids"]]
    assert of_first == whole[: len(of_first)]


# ---- intervals -----------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_is_normal():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    low, high = interval(Bootstrap(range(2000), resamples=4000).means(values))
    half = 1.96 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_of_two_documents():
    """A resample is one of them twice with probability 1/4 each, and else both."""
    means = Bootstrap([7, 7, 9, 9], resamples=8000).means(np.array([0.0, 2.0, 4.0, 6.0]))
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [1.0, 3.0, 5.0]  # never a window of a document without its other one
    assert counts / 8000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    assert interval(means) == [1.0, 5.0]


def test_wilson_is_textbook():
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert wilson(20, 20) == pytest.approx([0.8389, 1.0], abs=1e-4)


# ---- without the residual window -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_full_page_reads_back_as_the_page_does(kind):
    layout = PageLayout(kind, 64, 32)
    tokens = torch.randn(3, 2, 2, 32, 64)
    shown = read_back(tokens, torch.ones(3, 32, dtype=torch.bool), layout)
    stored = dequantise(page_of(tokens[:, 0], tokens[:, 1], layout), layout)
    assert torch.equal(shown, torch.stack(stored, 1))


@given(st.integers(1, 32), st.sampled_from(["int4", "int2"]))
def test_what_does_not_wait_has_no_effect(count, kind):
    layout = PageLayout(kind, 64, 32)
    tokens = torch.randn(1, 2, 1, 32, 64, generator=torch.Generator().manual_seed(count))
    waiting = torch.arange(32)[None] < count
    shown = read_back(tokens, waiting, layout)[:, :, :, :count]
    tokens[:, :, :, count:] = 1e4
    assert torch.equal(read_back(tokens, waiting, layout)[:, :, :, :count], shown)
    assert torch.allclose(shown[0, 0, 0], by_hand(tokens[0, 0, 0, :count], kind, channels=True))
    assert torch.allclose(shown[0, 1, 0], by_hand(tokens[0, 1, 0, :count], kind, channels=False))


def by_hand(x: torch.Tensor, kind: str, channels: bool) -> torch.Tensor:
    """Tokens [n, head_dim] as their formats keep them."""
    q = quantise_channels(x, kind) if channels else quantise_tokens(x, kind)
    scale, minimum = (part.float()[None, :] if channels else part.float()[:, None] for part in (q.scale, q.minimum))
    return q.codes.float() * scale + minimum


PAGE, HEADS, SLOTS = 32, (4, 2), (2, 0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_decodes_read_all_tokens_quantised(backend, kind):
    """Every step of two sequences, against attention over what each page's tokens so far become."""
    described = ModelConfig(
        family="test",
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_layers=1,
        num_q_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=64,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        softmax_scale=0.2,
        layer_windows=(None,),
        ropes=(),
        layer_ropes=(),
    )
    is_cuda = backend == "triton" and torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    dtype = {"torch": torch.float32, "triton": torch.bfloat16 if is_cuda else torch.float16}[backend]
    groups = kv_groups((None,))
    cache = KVCache.allocate(described, layer_layouts(described, kind, (), PAGE, dtype), groups, 9, 3, device, dtype)
    if backend == "torch":
        attention = TorchAttentionNewestQuantised(described, cache)
    else:
        attention = triton_attention_newest_quantised()(described, cache, dtype=dtype, max_model_len=128, check=True)
    torch.manual_seed(5)
    steps = 36
    query, key, value = (torch.randn(steps, 2, heads, 64).to(device, dtype) for heads in (HEADS[0], *[HEADS[1]] * 2))
    tables = torch.tensor([[4, 2], [7, 1]], dtype=torch.int32, device=device)
    first = 0 if backend == "torch" else PAGE - 2  # the interpreter is slow: what came before is put into the window
    for seq, slot in enumerate(SLOTS):
        window = cache.layers[0].residual[slot]
        window[:, 0, :first], window[:, 1, :first] = (
            key[:first, seq].transpose(0, 1),
            value[:first, seq].transpose(0, 1),
        )
    for step in range(first, steps):
        out = attend(attention, step, query, key, value, tables)
        for seq in range(2):
            wanted = attended(query[step, seq], key[: step + 1, seq], value[: step + 1, seq], kind)
            error = (out[seq].cpu().float() - wanted).norm() / wanted.norm()
            assert error < (1e-5 if backend == "torch" else 0.02), (step, seq)


def attend(attention, step: int, query, key, value, tables) -> torch.Tensor:
    """One decode step of both sequences."""
    device = query.device

    def ints(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    slots = tables[:, step // PAGE].long() * PAGE + step % PAGE
    batch = StepBatch(
        token_ids=ints([0, 0], torch.int64),
        positions=ints([step, step], torch.int64),
        seq_lens=ints([step + 1] * 2),
        query_start=ints([0, 1, 2]),
        num_decode_seqs=2,
        num_decode_tokens=2,
        max_decode_query_len=1,
        groups=(GroupBatch(tables, slots),),
        residual_slots=ints(SLOTS),
        flushed_lens=ints([step // PAGE * PAGE] * 2),
        committed_lens=ints([step + 1] * 2),
        next_flushed_lens=ints([(step + 1) // PAGE * PAGE] * 2),
    )
    attention.begin_step(batch)
    new = (query[step].clone(), key[step].clone(), value[step].clone())
    attention.write(0, *new, batch.places, None, keeps_key=False)
    return attention.attend(0, *new, batch).clone()


def attended(query, key, value, kind: str) -> torch.Tensor:
    """Of one query [heads, head_dim] over all tokens [n, KV heads, head_dim], each page quantised on its own."""
    out = []
    for head in range(HEADS[0]):
        kv_head = head // (HEADS[0] // HEADS[1])
        pages = range(0, len(key), PAGE)
        k, v = (
            torch.cat([by_hand(x[at : at + PAGE, kv_head].cpu().float(), kind, channels) for at in pages])
            for x, channels in ((key, True), (value, False))
        )
        out.append(((0.2 * k @ query[head].cpu().float()).softmax(0)) @ v)
    return torch.stack(out)


# ---- outlier channels ----------------------------------------------------------------------------------------------


def test_attention_errors():
    errors = attention_errors(CPU, num_seqs=2, context=256, seed=0)
    again = attention_errors(CPU, num_seqs=2, context=256, seed=0)
    assert errors == again
    of = {(e["kv_cache_dtype"], e["outliers"], e["strength"]): e["error_ordinary"] for e in errors}
    assert len(of) == len(errors) == 5 * 7
    assert all(of["bfloat16", where, s] < 1e-12 for kind, where, s in of if kind == "bfloat16")
    # A scale per token must span the outlier, a scale per channel need not.
    assert of["int8", "k", 30] > 4 * of["int8", "none", 0]
    assert of["int4", "k", 30] == pytest.approx(of["int4", "none", 0], rel=0.15)
    assert of["int4", "v", 30] > 4 * of["int4", "none", 0]
    assert of["int2", "none", 0] > of["int4", "none", 0] > of["int8", "none", 0]


# ---- bad input -----------------------------------------------------------------------------------------------------


def complaint(capsys, *arguments: str) -> str:
    assert command.main([*arguments]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    return sentence


def test_bad_input(capsys, tmp_path):
    output = ["--output", str(tmp_path / "record.json")]
    nowhere = ["--pair", str(tmp_path / "none"), "--device", "cpu"]
    assert "there is no pair in" in complaint(capsys, *nowhere, *output)
    assert "did you mean int4-no-window?" in complaint(capsys, *ARGUMENTS, *output, "--variants", "int4-nowindow")
    assert "--windows is 1; it must be at least 2" in complaint(capsys, *ARGUMENTS, *output, "--windows", "1")
    assert "reads 512 tokens at most" in complaint(capsys, *ARGUMENTS, *output, "--context", "513")
    assert "at least 34" in complaint(capsys, *ARGUMENTS, *output, "--context", "33")
    assert "--device" in complaint(capsys, *nowhere, *output, "--device", "tpu")
    assert "needs --output" in complaint(capsys, *ARGUMENTS)
    if not torch.cuda.is_available():
        assert "no CUDA device" in complaint(capsys, *ARGUMENTS, *output, "--device", "cuda")
    assert not (tmp_path / "record.json").exists()


def test_too_little_held_out_text(capsys, tmp_path):
    (tmp_path / "target").symlink_to(MINIATURE / "target")
    line = {"package": "p", "path": "a.py", "text": "x = 1\n" * 400}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    arguments = ["--pair", str(tmp_path), "--device", "cpu", "--output", str(tmp_path / "record.json")]
    assert "the held-out text is too short: 1 of 1 documents have 512 tokens" in complaint(capsys, *arguments)
    (tmp_path / "heldout.jsonl").write_text("[]\n", encoding="utf-8")
    assert "holds no held-out documents" in complaint(capsys, *arguments)
    (tmp_path / "heldout.jsonl").unlink()
    assert "cannot read" in complaint(capsys, *arguments)


def test_variants():
    assert chosen([]) == tuple(VARIANTS.values())
    assert [variant.name for variant in chosen(["int2", "fp8"])] == ["fp8", "int2"]
    assert {name for name in VARIANTS if "no-window" in name and not name.startswith("int")} == set()
    with pytest.raises(UserError, match="there is no variant 'int3'"):
        chosen(["int3"])


def test_planner_reads_the_record(written, found):
    pytest.importorskip("pydantic", reason="a GPU machine may have the engine's libraries only")
    from planner.memory import KVCacheDtype
    from planner.quality import read_kv_quality

    study = read_kv_quality(written)
    fp8 = study.of(KVCacheDtype.FP8)
    assert fp8.perplexity_increase_percent == pytest.approx(100 * (found["fp8"]["perplexity_ratio"]["value"] - 1))
    assert fp8.kl_nats_per_token == found["fp8"]["kl"]["mean"]
    assert study.of(KVCacheDtype.BFLOAT16).perplexity_increase_interval_percent == (0.0, 0.0)
    assert study.of(KVCacheDtype.INT4).kl_nats_per_token == found["int4"]["kl"]["mean"]
