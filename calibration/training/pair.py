"""Train the pair and leave it in a folder:

    target/, draft/   Hugging Face folders: config.json, generation_config.json, safetensors, tokenizer
    heldout.jsonl     some held-out documents, a line each: package, path, text
    training.json     the record: command, corpus, shapes, loss curves, evaluation, samples

First the target learns from the text. The draft then learns to give the target's probabilities (its loss is the KL
divergence from them), since that, and not the text, is what a draft is for.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.utils.logging import disable_progress_bar

from calibration.training.corpus import Corpus, Document, Limits, Root, read_corpus
from calibration.training.evaluation import evaluate
from calibration.training.llama import Llama, Shape
from calibration.training.loop import Batches, Run, Schedule, train
from calibration.training.tokenizer import token_stream, train_tokenizer
from engine.bench.record import dumps, environment, write_text
from engine.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VERSION = 1
RECORD, HELD_OUT = "training.json", "heldout.jsonl"
MODELS = ("target", "draft")
_PART = ".part"  # folder of what is not finished
PROMPT = '''class Reader:
    """Reads lines from a file."""

    def __init__(self, path):
        self.path = path
'''

_SAMPLE_TOKENS = 96
_TEMPERATURE, _TOP_P = 0.8, 0.95
_TARGET_SHARE = 0.7  # of the time for training
_SPARE_DISK_BYTES = 64 * 2**20
# A line that names somebody's folder; a held-out document with one stays out of heldout.jsonl, which may be committed.
_FOLDERS = re.compile(r"/(?:work|tmp|mnt|home|Users|root)/|\\Users\\")


@dataclass(frozen=True)
class Size:
    """What is trained, and how.

    Attributes:
        minutes: for everything, from the first file read to the record.
        closing_s: of these, kept for saving, evaluation and samples.
        target, draft: shapes; both have the same vocabulary and context.
        batch_size: windows of `context` tokens in a step.
        schedules: learning rates of the target and of the draft.
        tokenizer_bytes: of the corpus, at most, that the tokenizer learns from.
        evaluation_tokens: held-out tokens that are read, at most.
        held_out_bytes: of heldout.jsonl, at most; None for `held_out_packages` means any.
        file_bytes: of a shard of weights, at most.
    """

    minutes: float
    closing_s: float
    limits: Limits
    target: Shape
    draft: Shape
    batch_size: int
    schedules: tuple[Schedule, Schedule]
    tokenizer_bytes: int
    evaluation_tokens: int
    held_out_bytes: int
    held_out_packages: tuple[str, ...] | None
    file_bytes: int


SIZES = {
    "full": Size(
        minutes=5.5,
        closing_s=30,
        limits=Limits(total_bytes=200_000_000, package_bytes=24_000_000),
        target=Shape(640, 1792, 8, 8, 2, 128, vocab_size=8192, context=2048),
        draft=Shape(192, 512, 4, 3, 1, 64, vocab_size=8192, context=2048),
        batch_size=32,
        schedules=(Schedule(matrices=3e-3, others=2e-3), Schedule(matrices=5e-3, others=4e-3)),
        tokenizer_bytes=48_000_000,
        evaluation_tokens=500_000,
        held_out_bytes=4_000_000,  # all of it: `calibration.kv_quality` reads it
        held_out_packages=None,
        file_bytes=2 * 10**9,
    ),
    # To be committed: no file above 1 MiB, so that the embedding stays just below, and text of Python's own licence.
    "miniature": Size(
        minutes=12,
        closing_s=30,
        limits=Limits(total_bytes=24_000_000, package_bytes=3_000_000, held_out_share=0.08),
        target=Shape(256, 512, 4, 4, 2, 64, vocab_size=1984, context=512),
        draft=Shape(128, 256, 2, 2, 1, 64, vocab_size=1984, context=512),
        batch_size=4,
        schedules=(Schedule(matrices=4e-3, others=3e-3), Schedule(matrices=6e-3, others=4e-3)),
        tokenizer_bytes=24_000_000,
        evaluation_tokens=60_000,
        held_out_bytes=96_000,
        held_out_packages=("stdlib",),
        file_bytes=1_040_000,
    ),
}


@dataclass(frozen=True)
class Job:
    """One run of the command.

    Attributes:
        output: the folder to leave the pair in.
        roots: where the text is.
        steps: of target and draft; None to plan them for `size.minutes`.
        do_compile: compile the layers, which pays on a GPU.
        record: what the record begins with: command, commit, name of the size.
    """

    output: Path
    size: Size
    roots: list[Root]
    seed: int
    device: torch.device
    steps: tuple[int | None, int | None] = (None, None)
    do_compile: bool = False
    overwrite: bool = False
    record: dict[str, Any] = field(default_factory=dict)


def train_pair(job: Job) -> dict[str, Any]:
    """Train, save and evaluate both models.

    Returns:
        The record, as written.

    Raises:
        UserError: the folder cannot be written to, the corpus is too small, or memory runs out.
    """
    size, clock = job.size, _Clock()
    disable_progress_bar()
    _check_output(job)
    corpus = read_corpus(job.roots, size.limits)
    _say(f"corpus: {len(corpus.train):,} files, {sum(document.num_bytes for document in corpus.train):,} bytes")
    if not corpus.train or not corpus.held_out:
        raise UserError(
            f"the corpus is too small: {len(corpus.train)} files to train on and {len(corpus.held_out)} held out"
        )
    clock.lap("corpus")
    tokenizer = train_tokenizer(_head(corpus.train, size.tokenizer_bytes), size.target.vocab_size)
    clock.lap("tokenizer")
    stream = token_stream(tokenizer, corpus.train)
    clock.lap("encoding")
    _say(f"tokenizer: {len(tokenizer):,} tokens; corpus: {len(stream):,} tokens")
    shortest = Batches.min_tokens(size.target.context, size.batch_size)
    if len(stream) < shortest:
        raise UserError(f"the corpus is too small: {len(stream):,} tokens, and a batch needs {shortest:,}")
    models, runs = _train_both(job, stream, clock)
    with _part_folder(job.output) as folder:
        record = _save(job, folder, models, tokenizer, corpus)
        clock.lap("saving")
        record["tokenizer"] = {
            "vocab_size": len(tokenizer),
            "train_tokens": len(stream),
            "bytes_per_token": round(sum(document.num_bytes for document in corpus.train) / len(stream), 3),
        }
        for name, run, schedule in zip(MODELS, runs, size.schedules, strict=True):
            record[name] |= {"schedule": asdict(schedule), "batch_tokens": run.tokens // run.steps, **run.facts()}
        record["unigram_token"] = int(np.bincount(stream).argmax())
        record |= _look(job, folder, tokenizer, corpus, record["unigram_token"])
        clock.lap("evaluation")
        record["steps"] = [run.steps for run in runs]
        record["seconds"] = clock.laps | {"total": round(clock.total_s, 1)}
        write_text(folder / RECORD, dumps(record) + "\n")
        _publish(folder, job.output)
    return record


# ---- training ------------------------------------------------------------------------------------------------------


def _train_both(job: Job, stream: np.ndarray, clock: _Clock) -> tuple[list[Llama], list[Run]]:
    size = job.size
    seeds = np.random.SeedSequence(job.seed).generate_state(4).tolist()
    left_s = max(1.0, size.minutes * 60 - size.closing_s - clock.total_s)
    target_s = left_s * _TARGET_SHARE
    models = [Llama(shape, seed).to(job.device) for shape, seed in zip((size.target, size.draft), seeds, strict=False)]
    if job.do_compile:
        for model in models:
            model.compile_layers()
    target, draft = models
    losses = (_text_loss(target, job), _distillation_loss(draft, target, job))
    runs = []
    for name, model, loss, schedule, steps, seed in zip(
        MODELS, models, losses, size.schedules, job.steps, seeds[2:], strict=True
    ):
        _say(f"{name}: {model.num_parameters:,} parameters")
        batches = Batches(stream, size.target.context, size.batch_size, seed, job.device)
        # Where a busy machine held up the target, the draft takes half of its own share all the same.
        seconds = max((left_s - target_s) / 2, left_s - runs[0].seconds) if runs else target_s
        try:
            run = train(
                model,
                loss,
                batches,
                schedule,
                seconds=seconds,
                steps=steps,
                say=lambda text, name=name: _say(f"{name}: {text}"),
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"{job.device} is out of memory with --batch {size.batch_size}; a smaller one may do"
            ) from None
        if not math.isfinite(run.curve[-1][1]):
            raise UserError(f"training the {name} failed: its loss is {run.curve[-1][1]}; try another --seed")
        model.requires_grad_(False)
        runs.append(run)
        clock.lap(name)
    return models, runs


def _autocast(job: Job) -> torch.autocast:
    return torch.autocast(job.device.type, torch.bfloat16)


def _text_loss(model: Llama, job: Job) -> Any:
    """Cross-entropy of the next token."""
    cross_entropy = torch.compile(_cross_entropy, dynamic=False) if job.do_compile else _cross_entropy

    def loss(token_ids: Tensor, nexts: Tensor) -> Tensor:
        with _autocast(job):
            logits = model(token_ids)
        return cross_entropy(logits, nexts)

    return loss


def _distillation_loss(draft: Llama, target: Llama, job: Job) -> Any:
    """KL divergence of the draft's probabilities from the target's."""
    divergence = torch.compile(_divergence, dynamic=False) if job.do_compile else _divergence

    def loss(token_ids: Tensor, _: Tensor) -> Tensor:
        with _autocast(job):
            with torch.no_grad():
                wanted = target(token_ids)
            logits = draft(token_ids)
        return divergence(logits, wanted)

    return loss


def _cross_entropy(logits: Tensor, nexts: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), nexts.flatten())


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    wanted_log, given_log = (rows.flatten(0, 1).float().log_softmax(-1) for rows in (wanted, logits))
    return (wanted_log.exp() * (wanted_log - given_log)).sum(-1).mean()


# ---- saving and looking at what was saved --------------------------------------------------------------------------


def _save(
    job: Job, folder: Path, models: list[Llama], tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> dict[str, Any]:
    """Write all but the record; returns its beginning."""
    from transformers import GenerationConfig, LlamaForCausalLM

    record = {
        "version": VERSION,
        **job.record,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(job.device) | {"tokenizers": _version("tokenizers")},
        "seed": job.seed,
        "corpus": corpus.facts(),
    }
    separator_id = tokenizer.eos_token_id
    tokenizer.model_max_length = job.size.target.context
    for name, model in zip(MODELS, models, strict=True):
        saved = LlamaForCausalLM(model.shape.hf_config(separator_id))
        weights = {key: weight.detach().cpu() for key, weight in model.state_dict().items()}
        missing = saved.load_state_dict(weights, strict=False)
        if missing.unexpected_keys or missing.missing_keys not in ([], ["lm_head.weight"]):
            raise RuntimeError(f"transformers' Llama has other tensors than ours: {missing}")
        saved.tie_weights()
        saved = saved.to(torch.bfloat16)
        saved.generation_config = GenerationConfig(bos_token_id=separator_id, eos_token_id=separator_id)
        saved.save_pretrained(folder / name, max_shard_size=job.size.file_bytes)
        tokenizer.save_pretrained(folder / name)
        for file in (folder / name).iterdir():
            file.chmod(0o644)  # safetensors writes files that nobody else may read
        record[name] = {"parameters": model.num_parameters, "shape": model.shape.facts()}
    documents = _documents_to_show(corpus.held_out, job.size)
    lines = [
        json.dumps({"package": document.package, "path": document.path, "text": document.text}, ensure_ascii=False)
        for document in documents
    ]
    write_text(folder / HELD_OUT, "".join(line + "\n" for line in lines))
    return record


def _documents_to_show(held_out: list[Document], size: Size) -> list[Document]:
    """Held-out documents, in order, that fit into heldout.jsonl."""
    chosen, num_bytes = [], 0
    for document in held_out:
        is_wanted = size.held_out_packages is None or document.package in size.held_out_packages
        if not is_wanted or _FOLDERS.search(document.text):
            continue
        line_bytes = len(json.dumps(document.text, ensure_ascii=False).encode("utf-8")) + 256
        if num_bytes + line_bytes <= size.held_out_bytes:
            chosen.append(document)
            num_bytes += line_bytes
    return chosen or held_out[:1]


def read_held_out(file: Path) -> list[Document]:
    """The documents of a heldout.jsonl.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            return [Document(**json.loads(line)) for line in lines]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} holds no held-out documents ({error})") from None


def load_models(folder: Path, device: torch.device) -> list[LlamaForCausalLM]:
    """Target and draft of a saved pair, in float32."""
    from transformers import AutoModelForCausalLM

    return [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, local_files_only=True)
        .to(device)
        .eval()
        for name in MODELS
    ]


def _look(
    job: Job, folder: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, unigram_token: int
) -> dict[str, Any]:
    """Evaluate what was saved, as it was saved, and let the target write."""
    models = load_models(folder, job.device)
    logits = [lambda token_ids, model=model: model(token_ids, use_cache=False).logits for model in models]
    sets = {"heldout_jsonl": read_held_out(folder / HELD_OUT), "held_out": corpus.held_out}
    evaluation = {
        name: evaluate(
            *logits,
            tokenizer,
            documents,
            context=job.size.target.context,
            commonest=unigram_token,
            device=job.device,
            max_tokens=job.size.evaluation_tokens,
        )
        for name, documents in sets.items()
    }
    return {"evaluation": evaluation, "samples": _samples(models[0], tokenizer, job)}


def _samples(target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, job: Job) -> list[dict[str, Any]]:
    """What the target writes: its most likely text, and one drawn at random."""
    encoded = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt").to(job.device)
    room = min(_SAMPLE_TOKENS, job.size.target.context - encoded["input_ids"].shape[1])
    samples = []
    for settings in ({"do_sample": False}, {"do_sample": True, "temperature": _TEMPERATURE, "top_p": _TOP_P}):
        torch.manual_seed(job.seed)
        written = target.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=room,
            pad_token_id=tokenizer.eos_token_id,
            **settings,
        )
        text = tokenizer.decode(written[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        samples.append({"prompt": PROMPT, **settings, "text": text})
    return samples


# ---- the folder ----------------------------------------------------------------------------------------------------


def _check_output(job: Job) -> None:
    """Say now what would stop the saving after minutes of training."""
    output = job.output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; it must be a folder")
    found = [entry for entry in output.iterdir() if entry.name != _PART] if output.is_dir() else []
    if found and not job.overwrite:
        raise UserError(f"--output {output} is not empty; name another folder, or add --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with _part_folder(output) as folder:
            (folder / RECORD).touch()
        free = shutil.disk_usage(output).free
    except OSError as error:
        raise UserError(f"cannot write to --output {output}: {error.strerror or error}") from None
    shapes = (job.size.target, job.size.draft)
    num_bytes = _SPARE_DISK_BYTES + 2 * sum(_num_parameters(shape) for shape in shapes)
    if free < num_bytes:
        raise UserError(
            f"the disk of --output {output} is full: {free / 2**20:,.0f} MiB are free, "
            f"and {num_bytes / 2**20:,.0f} MiB may be written"
        )


@contextlib.contextmanager
def _part_folder(output: Path) -> Iterator[Path]:
    """A folder within `output` for what is not finished; it is gone afterwards.

    Raises:
        UserError: something in it could not be written.
    """
    folder = output / _PART
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, output: Path) -> None:
    """Give what is in `folder` its place in `output`, which loses the pair that it had and nothing else."""
    for name in (*MODELS, HELD_OUT, RECORD):
        place = output / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        (folder / name).replace(place)


def _num_parameters(shape: Shape) -> int:
    with torch.device("meta"):
        return Llama(shape, 0).num_parameters


# ---- small things --------------------------------------------------------------------------------------------------


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self._start_s = self._lap_s = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now_s = time.perf_counter()
        self.laps[name] = round(now_s - self._lap_s, 1)
        self._lap_s = now_s

    @property
    def total_s(self) -> float:
        return time.perf_counter() - self._start_s


def _head(documents: list[Document], max_bytes: int) -> Iterator[str]:
    """The texts of the first documents, up to so many bytes."""
    for document in documents:
        max_bytes -= document.num_bytes
        if max_bytes < 0:
            return
        yield document.text


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
