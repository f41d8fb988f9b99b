"""The command that trains a pair, on a toy corpus, and the miniature pair that it left in the repository."""

import errno
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from calibration import train_pair as command
from calibration.training import pair
from calibration.training.corpus import SEPARATOR, Corpus, Document, Limits, Root, installed_roots, read_corpus
from calibration.training.evaluation import evaluate
from calibration.training.llama import Llama, Shape
from calibration.training.loop import Batches, Schedule, train
from calibration.training.tokenizer import token_stream, train_tokenizer
from engine.errors import UserError
from engine.llm import LLM
from engine.sampling_params import SamplingParams

torch.set_num_threads(1)

CPU = torch.device("cpu")
MINIATURE = Path(__file__).resolve().parent.parent / "models" / "miniature"
MANY = Limits(total_bytes=10**9, package_bytes=10**9, held_out_share=0.2)
TOY = Shape(32, 64, 2, 2, 1, 64, vocab_size=300, context=16)


def toy_source(number: int) -> str:
    verbs, nouns = ("read", "write", "count", "sort"), ("lines", "words", "files", "numbers", "keys")
    verb, noun = verbs[number % 4], nouns[number // 4 % 5]
    return "".join(
        f'def {verb}_{noun}_{index}(self, {noun}):\n    """{verb.title()} the {noun}, {number}."""\n'
        f"    for item in {noun}:\n        self.{verb}(item + {index * number})\n    return {noun}\n\n\n"
        for index in range(4)
    )


def write_toy_corpus(folder: Path, numbers=range(80)) -> Path:
    for number in numbers:
        file = folder / f"package{number % 3}" / f"module{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(toy_source(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory) -> Path:
    return write_toy_corpus(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def toy_corpus(toy_folder) -> Corpus:
    return read_corpus([Root(toy_folder)], MANY)


@pytest.fixture(scope="module")
def toy_tokenizer(toy_corpus):
    return train_tokenizer((document.text for document in toy_corpus.train), 300)


def run_toy(corpus: Path, output: Path, *options: str) -> dict:
    """Train a toy pair through the command; returns its record."""
    sizes = "--vocab-size 300 --context 128 --batch 2"
    sizes += " --target-hidden 32 --target-layers 2 --draft-hidden 16 --draft-layers 1"
    steps = "--target-steps 20 --draft-steps 20"
    where = ["--corpus-dir", str(corpus), "--output", str(output), "--size", "miniature", "--device", "cpu"]
    assert command.main([*where, *sizes.split(), *steps.split(), *options]) == 0
    return json.loads((output / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def toy_pair(toy_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("pair") / "toy"
    run_toy(toy_folder, output, "--commit", "abc", "--target-steps", "200", "--draft-steps", "150")
    return output


def weights_of(pair_folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(pair_folder.rglob("*.safetensors"))]


# ---- corpus --------------------------------------------------------------------------------------------------------


def test_corpus_does_not_depend_on_the_place(toy_corpus, tmp_path):
    """Nor on the order in which files were created, nor on whether a package root was split in two."""
    moved = write_toy_corpus(tmp_path / "else" / "where", reversed(range(80)))
    assert read_corpus([Root(moved)], MANY).digest == toy_corpus.digest
    (tmp_path / "more").mkdir()
    (moved / "package2").rename(tmp_path / "more" / "package2")
    assert read_corpus([Root(tmp_path / "more"), Root(moved)], MANY).digest == toy_corpus.digest


def test_corpus_split(toy_corpus, tmp_path):
    paths = [{document.path for document in documents} for documents in (toy_corpus.train, toy_corpus.held_out)]
    assert len(paths[0] | paths[1]) == 80
    assert not paths[0] & paths[1]
    assert 4 <= len(paths[1]) <= 32  # 20 % of 80 is 16; within 4 standard deviations
    # A file's side is its own: it stays where other files are added or removed.
    part = read_corpus([Root(write_toy_corpus(tmp_path, range(30, 90)))], MANY)
    assert {document.path for document in part.train if document.path in paths[0] | paths[1]} <= paths[0]
    assert {document.path for document in part.held_out if document.path in paths[0] | paths[1]} <= paths[1]


def test_corpus_changes_its_digest_with_any_text(toy_corpus, tmp_path):
    folder = write_toy_corpus(tmp_path)
    file = folder / "package1" / "module1.py"
    file.write_text(file.read_text().replace("item", "thing", 1))
    assert read_corpus([Root(folder)], MANY).digest != toy_corpus.digest


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.py", b"x = 1\n", "unreadable, tiny or huge"),
        ("a.py", toy_source(1).encode() * 1000, "unreadable, tiny or huge"),
        ("a.py", toy_source(1).encode() + b"# \xff\xfe", "not UTF-8"),
        ("a.py", toy_source(1).encode() + b"\0", "not text"),
        ("a.py", toy_source(1).encode() + SEPARATOR.encode(), "contains the separator"),
        ("a.py", b"# Automatically generated by build.py.\n" + toy_source(1).encode(), "generated"),
        ("a.txt", b"some words " * 100, "long lines"),
        ("a.txt", b"0.12, 3.45, 6.78\n" * 100, "few letters"),
        ("b.py", toy_source(0).encode(), "seen before"),
        ("a.json", toy_source(1).encode(), None),
        ("a.dist-info/LICENSE.txt", toy_source(1).encode(), None),
        ("__pycache__/a.py", toy_source(1).encode(), None),
        ("tests/a.py", toy_source(1).encode(), None),
        ("encodings/cp1.py", toy_source(1).encode(), None),
        ("test_a.py", toy_source(1).encode(), None),
        ("a_test.py", toy_source(1).encode(), None),
        ("conftest.py", toy_source(1).encode(), None),
    ],
)
def test_files_that_are_left_out(tmp_path, name, data, reason):
    file = tmp_path / "package" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    (tmp_path / "package" / "a-0.py").write_text(toy_source(0))
    corpus = read_corpus([Root(tmp_path)], replace(MANY, held_out_share=0.0))
    assert len(corpus.train) == 1
    assert corpus.skipped == ({} if reason is None else {reason: 1})


def test_names_that_only_sound_like_tests(tmp_path):
    names = ("testing/a.py", "latest.py", "contest.py", "encoding.py")
    for number, name in enumerate(names):
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(toy_source(number))
    corpus = read_corpus([Root(tmp_path)], replace(MANY, held_out_share=0.0))
    assert {document.path for document in corpus.train} == {f"package/{name}" for name in names}


def test_limits(toy_folder):
    total = read_corpus([Root(toy_folder)], replace(MANY, total_bytes=20_000))
    assert 20_000 <= sum(document.num_bytes for document in total.train + total.held_out) < 22_000
    each = read_corpus([Root(toy_folder)], replace(MANY, package_bytes=5_000))
    for package in ("package0", "package1", "package2"):
        documents = [document for document in each.train + each.held_out if document.package == package]
        assert 5_000 <= sum(document.num_bytes for document in documents) < 7_000
    assert each.skipped["package is large"] > 0


def test_links_are_not_followed(tmp_path, toy_folder):
    (tmp_path / "folder").symlink_to(toy_folder, target_is_directory=True)
    (tmp_path / "file.py").symlink_to(toy_folder / "package0" / "module0.py")
    assert read_corpus([Root(tmp_path)], MANY).train == []


def test_installed_packages_are_found():
    roots = installed_roots()
    assert (roots[0].folder / "json" / "decoder.py").is_file()
    assert any((root.folder / "torch" / "nn").is_dir() for root in roots[1:])


# ---- tokenizer -----------------------------------------------------------------------------------------------------


@given(text=st.text())
def test_tokenizer_round_trip(toy_tokenizer, text):
    token_ids = toy_tokenizer.encode(text, add_special_tokens=False)
    assert toy_tokenizer.decode(token_ids, clean_up_tokenization_spaces=False) == text
    assert all(0 <= token < 300 for token in token_ids)


def test_token_stream(toy_tokenizer):
    documents = [Document("p", "a.py", "def read"), Document("p", "b.py", ""), Document("p", "c.py", "é\r\n")]
    stream = token_stream(toy_tokenizer, documents)
    assert stream.dtype == np.int32
    assert toy_tokenizer.decode(stream.tolist()) == f"{SEPARATOR}def read{SEPARATOR}{SEPARATOR}é\r\n"
    assert len(token_stream(toy_tokenizer, [])) == 0


def test_tokenizer_needs_text():
    with pytest.raises(UserError, match=r"too small: it gives \d+ tokens, not 1,000"):
        train_tokenizer(["few words"], 1000)
    with pytest.raises(UserError, match="more than 256"):
        train_tokenizer(["few words"], 256)


# ---- model and loop ------------------------------------------------------------------------------------------------


def test_model_is_transformers_llama():
    ours = Llama(replace(TOY, num_heads=4, num_kv_heads=2), seed=3)
    theirs = LlamaForCausalLM(ours.shape.hf_config(0)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    token_ids = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(token_ids), theirs(token_ids).logits, rtol=1e-4, atol=1e-5)
    assert ours.num_parameters == theirs.num_parameters()
    assert ours.num_parameters == pair._num_parameters(ours.shape)


@given(
    context=st.integers(1, 9), batch_size=st.integers(1, 5), extra=st.integers(0, 40), seed=st.integers(0, 2**32 - 1)
)
def test_batches(context, batch_size, extra, seed):
    """Windows of the stream, each at most once an epoch, and the same for the same seed and step."""
    stream = np.arange(Batches.min_tokens(context, batch_size) + extra, dtype=np.int32)
    batches = Batches(stream, context, batch_size, seed, CPU)
    again = Batches(stream, context, batch_size, seed, CPU)
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            token_ids, nexts = batches.at(step)
            assert token_ids.shape == nexts.shape == (batch_size, context)
            assert (nexts == token_ids + 1).all()
            assert (token_ids.diff(dim=1) == 1).all()
            seen += token_ids.flatten().tolist()
        assert len(set(seen)) == len(seen)
    last = 2 * batches.steps_per_epoch - 1
    assert torch.equal(again.at(last)[0], batches.at(last)[0])


def test_schedule():
    schedule = Schedule(matrices=1.0, others=1.0, warmup_steps=10, decay_share=0.5)
    shares = [schedule.share(step, 100) for step in range(100)]
    assert shares[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert shares[10:51] == [1.0] * 41
    assert shares[51:] == [pytest.approx((100 - step) / 50) for step in range(51, 100)]
    # What is taken before it falls does not depend on how many steps there will be.
    assert [schedule.share(step, math.inf) for step in range(50)] == shares[:50]
    assert [schedule.is_falling(step, 100) for step in (0, 49, 50, 99)] == [False, False, True, True]
    assert not schedule.is_falling(10**9, math.inf)


def test_steps_are_planned_for_the_time_and_can_be_repeated():
    """Half a second a step: 30 s are 60 steps. The same number given takes the same steps."""
    stream = np.random.default_rng(0).integers(0, 300, 2000).astype(np.int32)
    weights = []
    for options in ({"seconds": 30.0}, {"steps": 60}):
        model = Llama(TOY, seed=1)
        ticks = iter(range(10**6))
        calls = {"steps": 0}

        def loss_of(token_ids, nexts, model=model, calls=calls):
            calls["steps"] += 1
            return torch.nn.functional.cross_entropy(model(token_ids).flatten(0, 1), nexts.flatten())

        run = train(
            model,
            loss_of,
            Batches(stream, 16, 2, 0, CPU),
            Schedule(1e-3, 1e-3),
            clock=lambda calls=calls, ticks=ticks: calls["steps"] / 2,
            **options,
        )
        assert run.steps == 60
        assert run.tokens == run.steps * 32
        weights.append((run.steps, [weight.detach().clone() for weight in model.parameters()]))
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(one, other) for one, other in zip(weights[0][1], weights[1][1], strict=True))


def test_evaluation_is_what_reading_token_by_token_gives(toy_tokenizer, toy_corpus):
    """Losses, agreement and overlap of two random models, by a loop over tokens in double precision."""
    models = [Llama(replace(TOY, num_layers=1), seed).double() for seed in (1, 2)]
    for model in models:
        model.model.embed_tokens.weight.data *= 20  # predictions that differ from token to token
    documents = [replace(document, text=document.text[:150]) for document in toy_corpus.held_out[:3]]
    found = evaluate(
        *models, toy_tokenizer, documents, context=16, commonest=5, device=CPU, max_tokens=10**6, batch_size=3
    )
    rows: list[tuple[torch.Tensor, torch.Tensor, int]] = []
    for document in documents:
        token_ids = [0, *toy_tokenizer.encode(document.text)]
        for place in range(len(token_ids) - 1):
            window = torch.tensor([token_ids[place - place % 16 : place + 1]])
            with torch.no_grad():
                target, draft = (model(window)[0, -1].softmax(-1) for model in models)
            rows.append((target, draft, token_ids[place + 1]))
    assert found["tokens"] == len(rows)
    for index, name in enumerate(("target", "draft")):
        loss = -sum(math.log(row[index][row[2]]) for row in rows) / len(rows)
        assert found[name]["loss"] == pytest.approx(loss, abs=1e-3)
        assert found[name]["top1"] == pytest.approx(sum(int(row[index].argmax()) == row[2] for row in rows) / len(rows))
    agreement = sum(int(target.argmax()) == int(draft.argmax()) for target, draft, _ in rows) / len(rows)
    assert found["agreement"] == pytest.approx(agreement, abs=1e-4)
    overlap = sum(float(torch.minimum(target, draft).sum()) for target, draft, _ in rows) / len(rows)
    assert found["overlap"] == pytest.approx(overlap, abs=1e-3)
    unigram = sum(int(target.argmax()) == 5 for target, _, _ in rows) / len(rows)
    assert found["chance"]["unigram"] == pytest.approx(unigram, abs=1e-4)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_training_learns(toy_pair, toy_folder, toy_corpus):
    record = json.loads((toy_pair / "training.json").read_text())
    assert record["commit"] == "abc"
    assert str(toy_folder.parent) not in json.dumps(record)
    assert record["corpus"]["train"]["files"] + record["corpus"]["held_out"]["files"] == 80
    tokenizer = AutoTokenizer.from_pretrained(toy_pair / "target", local_files_only=True)
    counts = np.bincount(token_stream(tokenizer, toy_corpus.train), minlength=300)
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    held_out = record["evaluation"]["held_out"]
    # Better than knowing how often each token comes, for the target by far.
    assert held_out["target"]["loss"] < 0.5 * entropy
    assert held_out["draft"]["loss"] < entropy
    assert held_out["agreement"] > 2 * max(held_out["chance"].values())
    curve = record["target"]["loss_curve"]
    assert curve[-1][1] < 0.5 * curve[0][1]
    assert curve[-1][0] == record["target"]["steps"] == 200
    assert record["target"]["tokens"] == 200 * 2 * 128


def test_folders_are_complete(toy_pair):
    assert sorted(entry.name for entry in toy_pair.iterdir()) == ["draft", "heldout.jsonl", "target", "training.json"]
    for name in ("target", "draft"):
        config = json.loads((toy_pair / name / "config.json").read_text())
        assert (config["model_type"], config["eos_token_id"], config["head_dim"]) == ("llama", 0, 64)
        assert json.loads((toy_pair / name / "generation_config.json").read_text())["eos_token_id"] == 0
        tokenizer = AutoTokenizer.from_pretrained(toy_pair / name, local_files_only=True)
        assert (len(tokenizer), tokenizer.eos_token) == (300, SEPARATOR)
    assert pair.read_held_out(toy_pair / "heldout.jsonl")[0].path.startswith("package")


def test_same_seed_same_weights(toy_folder, tmp_path):
    for name, seed in (("one", "7"), ("again", "7"), ("other", "8")):
        run_toy(toy_folder, tmp_path / name, "--seed", seed)
    assert weights_of(tmp_path / "again") == weights_of(tmp_path / "one")
    assert weights_of(tmp_path / "other") != weights_of(tmp_path / "one")


def test_overwrite_leaves_other_files(toy_folder, tmp_path):
    output = tmp_path / "pair"
    (output / "target").mkdir(parents=True)
    (output / "target" / "old.safetensors").touch()
    (output / "notes.txt").write_text("mine")
    run_toy(toy_folder, output, "--target-steps", "2", "--draft-steps", "2", "--overwrite")
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "target" / "old.safetensors").exists()


def test_documents_that_name_folders_are_not_shown():
    size = replace(pair.SIZES["miniature"], held_out_bytes=1000, held_out_packages=("stdlib",))
    documents = [
        Document("stdlib", "a.py", "see /ho" + "me/ada"),
        Document("torch", "b.py", "x"),
        Document("stdlib", "c.py", "x" * 2000),
        Document("stdlib", "d.py", "y"),
    ]
    assert [document.path for document in pair._documents_to_show(documents, size)] == ["d.py"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "needs --output"),
        ("--output {tmp}/full", "is not empty; name another folder, or add --overwrite"),
        ("--output {tmp}/full/file", "is a file; it must be a folder"),
        ("--output {tmp}/full/file/new", "cannot write to"),
        ("--output {tmp}/new --corpus-dir {tmp}/none", "there is no folder"),
        ("--output {tmp}/new --corpus-dir {tmp}/full", "the corpus is too small"),
        ("--output {tmp}/new --corpus-dir {toy} --vocab-size 5000", "the corpus is too small"),
        ("--output {tmp}/new --corpus-dir {toy} --vocab-size 300 --batch 5000", "a batch needs 2,560,513"),
        ("--output {tmp}/new --corpus-dir {toy} --vocab-size 20", "more than 256"),
        ("--output {tmp}/new --context 8", "--context is 8; it must be at least 128"),
        ("--output {tmp}/new --target-hidden 33", "is no multiple of the model's 4 heads"),
        ("--output {tmp}/new --batch 0", "--batch is 0; it must be above 0"),
        ("--output {tmp}/new --minutes -1", "--minutes is -1.0; it must be above 0"),
        ("--output {tmp}/new --minutes soon", "it must be a number"),
        ("--output {tmp}/new --seed -1", "--seed is -1; it must be 0 or above"),
        ("--output {tmp}/new --size huge", "invalid choice"),
        ("--output {tmp}/new --device tpu", "must be auto, cuda or cpu"),
        ("--output {tmp}/new --device cpu --size full", "use --size miniature --device cpu"),
        ("--output {tmp}/new --device cuda:99", "there is no such GPU"),
        ("--output {tmp}/new --overwritten", "did you mean --overwrite?"),
    ],
)
def test_bad_input(options, message, tmp_path, toy_folder, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    arguments = options.format(tmp=tmp_path, toy=toy_folder).split()
    if "--size" not in arguments:
        arguments += ["--size", "miniature"]
    if "--device" not in arguments:
        arguments += ["--device", "cpu"]
    assert command.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m calibration.train_pair: ")
    assert message in error
    assert not (tmp_path / "new" / "target").exists()


def test_full_disk(toy_folder, tmp_path, monkeypatch, capsys):
    arguments = ["--output", str(tmp_path / "new"), "--size", "miniature", "--device", "cpu"]
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert command.main(arguments) == 2
    assert "is full: 0 MiB are free, and 71 MiB may be written" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pair, "_save", full)
    monkeypatch.setattr(pair, "_train_both", lambda *_: ([], []))
    toy = ["--corpus-dir", str(toy_folder), "--vocab-size", "300", "--context", "128"]
    assert command.main([*arguments, *toy]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "new").iterdir()) == []


def test_help(capsys):
    assert command.main(["--help"]) == 0
    assert "--target-steps" in capsys.readouterr().out


# ---- the miniature -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((MINIATURE / "training.json").read_text(encoding="utf-8"))


def test_miniature_is_small():
    sizes = {file.name: file.stat().st_size for file in MINIATURE.rglob("*") if file.is_file()}
    assert max(sizes.values()) <= 2**20, sizes
    assert sum(file.stat().st_size for file in MINIATURE.rglob("*") if file.is_file()) <= 8 * 10**6


def test_miniature_reproduces_its_record(recorded):
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE / "target", local_files_only=True)
    models = pair.load_models(MINIATURE, CPU)
    found = evaluate(
        *(lambda token_ids, model=model: model(token_ids).logits for model in models),
        tokenizer,
        pair.read_held_out(MINIATURE / "heldout.jsonl"),
        context=recorded["target"]["shape"]["context"],
        commonest=recorded["unigram_token"],
        device=CPU,
        max_tokens=10**6,
    )
    expected = recorded["evaluation"]["heldout_jsonl"]
    assert (found["tokens"], found["bytes"]) == (expected["tokens"], expected["bytes"])
    for name in ("target", "draft"):
        assert found[name]["loss"] == pytest.approx(expected[name]["loss"], abs=2e-3)
    assert found["agreement"] == pytest.approx(expected["agreement"], abs=2e-3)
    assert found["overlap"] == pytest.approx(expected["overlap"], abs=2e-3)
    # What makes it a pair: the draft knows what the target will say.
    assert found["agreement"] > 3 * max(found["chance"].values())
    assert found["agreement"] > 0.4


@given(text=st.text())
def test_miniature_tokenizer_round_trip(miniature_tokenizer, text):
    token_ids = miniature_tokenizer.encode(text)
    assert miniature_tokenizer.decode(token_ids, clean_up_tokenization_spaces=False) == text


@pytest.fixture(scope="module")
def miniature_tokenizer():
    return AutoTokenizer.from_pretrained(MINIATURE / "draft", local_files_only=True)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_engine_writes_what_transformers_writes(name, miniature_tokenizer):
    llm = LLM(model=str(MINIATURE / name), device="cpu", max_model_len=128, max_num_seqs=1)
    (output,) = llm.generate([pair.PROMPT], SamplingParams(temperature=0.0, max_tokens=32), use_tqdm=False)
    model = pair.load_models(MINIATURE, CPU)[("target", "draft").index(name)]
    token_ids = torch.tensor([miniature_tokenizer.encode(pair.PROMPT)])
    expected = model.generate(token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=32, do_sample=False)
    assert output.outputs[0].token_ids == expected[0, token_ids.shape[1] :].tolist()


def test_chat_template(miniature_tokenizer):
    messages = [{"role": "user", "content": "read a file"}]
    text = miniature_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "# user: read a file\n# assistant:\n"
