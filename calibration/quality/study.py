"""The whole study: the reference reads the text and its logits are kept, then each variant reads it and is compared.

An engine stands alone on the device at a time; all share the weights. The reference is read twice, once to keep its
logits and once as a variant of its own, so that what differs from run to run would show.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoTokenizer

from calibration.quality.forcing import ForcedDecoding, Text
from calibration.quality.intervals import RESAMPLES, Bootstrap, interval, wilson
from calibration.quality.newest_quantised import quantise_newest
from calibration.quality.outliers import attention_errors
from calibration.quality.scores import Reference, Scores, reference_bytes, score
from calibration.quality.text import Trial, Window, distances_for, held_out_documents, read_trials, read_windows
from calibration.quality.variants import REFERENCE, VARIANTS, Variant
from engine.bench.record import environment, rounded
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import UserError
from engine.models.hf import read_config
from engine.setup import choose_device, num_parameters

if TYPE_CHECKING:
    from engine.models.config import ModelConfig
    from engine.models.modules import DecoderWeights

VERSION = 1
SUITE = "kv_quality"
EMULATION = (
    "no-window variants are an emulation: the engine runs as it is, and what attention reads of the residual window "
    "has been quantised and dequantised, with scales from the tokens that wait so far"
)
_BUCKETS = (0, 128, 256, 512, 1024, 2048)  # tokens of context; doubled further for longer windows
_BATCHED_TOKENS = 8192
_BLOCKS_MARGIN = 2


@dataclass(frozen=True)
class Job:
    """One run of the command.

    Attributes:
        pair: folder of `calibration.train_pair`; its target is read with.
        windows: of held-out text, most. context: tokens of each. prefill: of these, as a prompt.
        trials: planted lines of each distance; 0 for none.
        max_num_seqs: sequences that are decoded at a time.
        attention: sequences and context for `attention_errors`.
        record: what the record begins with: command, commit.
    """

    pair: Path
    variants: tuple[Variant, ...]
    device: str = "auto"
    windows: int = 128
    context: int | None = None
    prefill: int = 32
    trials: int = 48
    max_num_seqs: int = 128
    attention: tuple[int, int] = (8, 4096)
    seed: int = 0
    record: dict[str, Any] = field(default_factory=dict)


def run_study(job: Job) -> dict[str, Any]:
    """Measure every variant of `job`.

    Returns:
        The record.

    Raises:
        UserError: no pair, too little held-out text, or a device without the memory.
    """
    started = time.perf_counter()
    documents = held_out_documents(job.pair)
    device, target = choose_device(job.device), job.pair / "target"
    described = read_config(target)
    context = _context(job, described.max_position_embeddings)
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    windows = read_windows(tokenizer, documents, job.windows, context)
    distances = distances_for(context) if job.trials else ()
    trials = read_trials(tokenizer, documents, distances, job.trials, job.seed) if distances else []
    study = _Study(job, described, device, context, windows, trials)
    _say(
        f"{len(windows)} windows of {context} tokens of {len({window.document for window in windows})} documents, "
        f"{len(trials)} planted lines, {len(job.variants)} variants"
    )
    study.read_reference()
    results = [study.measure(variant) for variant in job.variants]
    study.close()
    sequences, length = job.attention
    errors = attention_errors(device, num_seqs=sequences, context=length, seed=job.seed)
    return {
        "version": VERSION,
        "suite": SUITE,
        **job.record,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "model": study.model_facts,
        "settings": study.settings() | {"attention": {"num_seqs": sequences, "context": length}},
        "emulation": EMULATION,
        "reference": REFERENCE,
        "variants": results,
        "retrieval_chance": study.chance,
        "attention": errors,
        "seconds": rounded(time.perf_counter() - started, 4),
    }


class _Study:
    """What all variants share: texts, weights, the reference's logits."""

    def __init__(
        self,
        job: Job,
        described: ModelConfig,
        device: torch.device,
        context: int,
        windows: list[Window],
        trials: list[Trial],
    ) -> None:
        self._job, self._described, self._device, self._context = job, described, device, context
        self._windows, self._trials = windows, trials
        self._texts = [Text(w.tokens[: job.prefill], w.tokens[job.prefill :]) for w in windows]
        self._bootstrap = Bootstrap([window.document for window in windows], job.seed)
        self._weights: DecoderWeights | None = None
        self._kept: Reference | None = None
        self._of_reference: Scores | None = None
        self.model_facts: dict[str, Any] = {}
        self.chance: list[dict[str, Any]] = []

    # ---- engines -----------------------------------------------------------------------------------------------------

    def read_reference(self) -> None:
        """Read all texts with the reference, and the prompts without their plants."""
        core = self._engine(VARIANTS[REFERENCE])
        self.model_facts = _model_facts(core, self._job.pair / "target")
        shape = (len(self._texts), self._context - self._job.prefill, core.model_config.vocab_size)
        self._check_memory(reference_bytes(*shape, core.dtype))
        self._kept = Reference(*shape, core.dtype, self._device)
        decoding = ForcedDecoding(core)
        self._of_reference = score(decoding, self._texts, device=self._device, keep=self._kept)
        if self._trials:
            found = score(decoding, [trial.control for trial in self._trials], device=self._device)
            self.chance = self._retrieval(found)

    def measure(self, variant: Variant) -> dict[str, Any]:
        """Everything about one variant."""
        started = time.perf_counter()
        core = self._engine(variant)
        decoding = ForcedDecoding(core)
        built = time.perf_counter()
        scores = score(decoding, self._texts, device=self._device, compare=self._kept)
        found = score(decoding, [t.text for t in self._trials], device=self._device) if self._trials else None
        skips = variant.skip_layers(self._described.num_layers)
        result = {
            "name": variant.name,
            "kv_cache_dtype": variant.kv_cache_dtype,
            "block_size": variant.block_size,
            "residual_window": variant.has_window,
            "emulated": variant.no_window,
            "skip_layers": list(skips),
            "bytes_per_token": rounded(core.memory.block_bytes / variant.block_size),
            **self._quality(scores),
            "retrieval": self._retrieval(found) if found else [],
            "seconds": {
                "engine": rounded(built - started, 3),
                "reading": rounded(time.perf_counter() - built, 3),
            },
        }
        _say(
            f"{variant.name}: KL {result['kl']['mean']:.3g}, perplexity × {result['perplexity_ratio']['value']:.5f}, "
            f"{result['seconds']['engine']:.0f} + {result['seconds']['reading']:.0f} s"
        )
        return result

    def close(self) -> None:
        """Give back the device's memory."""
        self._weights = self._kept = None
        self._release()

    def _engine(self, variant: Variant) -> EngineCore:
        """An engine with one CUDA graph of decodes, which any number of sequences runs in, and no other."""
        self._release()
        job = self._job
        seqs = min(job.max_num_seqs, max(len(self._texts), len(self._trials)))
        pages = -(-self._context // variant.block_size)
        config = EngineConfig(
            model=str(job.pair / "target"),
            kv_cache_dtype=variant.kv_cache_dtype,
            kv_cache_dtype_skip_layers=variant.skip_layers(self._described.num_layers),
            max_model_len=self._context,
            max_num_seqs=seqs,
            max_num_batched_tokens=max(_BATCHED_TOKENS, seqs),
            block_size=variant.block_size,
            num_gpu_blocks_override=seqs * pages + _BLOCKS_MARGIN,
            enable_prefix_caching=False,
            enforce_eager=True,
            device=job.device,
        )
        core = EngineCore(config, weights=self._weights)
        self._weights = core.weights
        if variant.no_window:
            quantise_newest(core)
        if core.device.type == "cuda":
            core._runner.capture([seqs])
        return core

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_memory(self, needed: int) -> None:
        """
        Raises:
            UserError: the device has no room for so many bytes.
        """
        if self._device.type != "cuda":
            return
        free = torch.cuda.mem_get_info(self._device)[0]
        if needed > free:
            raise UserError(
                f"the reference's logits take {needed / 2**30:.1f} GiB and the GPU has {free / 2**30:.1f} GiB left; "
                "lower --windows or --context"
            )

    # ---- figures -----------------------------------------------------------------------------------------------------

    def _quality(self, scores: Scores) -> dict[str, Any]:
        """Of decoded tokens: the first forced token is foreseen by the prefill, and left out."""
        return self._figures(scores, slice(1, None)) | {
            "by_context": [
                {"from": low, "to": high, **self._figures(scores, part, raw=False)}
                for low, high, part in self._buckets()
            ]
        }

    def _figures(self, scores: Scores, part: slice, raw: bool = True) -> dict[str, Any]:
        kl, nll = scores.kl[:, part].astype(np.float64), scores.nll[:, part].astype(np.float64)
        agrees = scores.agrees[:, part]
        of_reference = self._of_reference.nll[:, part].astype(np.float64)
        figures = {
            "tokens": int(kl.size),
            "kl": self._mean(kl.mean(1)) | {"p99": rounded(float(np.percentile(kl, 99)))},
            "perplexity": self._mean(nll.mean(1), np.exp),
            "perplexity_ratio": self._mean((nll - of_reference).mean(1), np.exp, digits=7),
            "top1_agreement": self._mean(agrees.mean(1)),
        }
        figures["kl"] = {"mean": figures["kl"].pop("value"), **figures["kl"]}
        if raw:
            figures["of_windows"] = {
                "kl": [rounded(value, 4) for value in kl.mean(1).tolist()],
                "nll": [rounded(value, 6) for value in nll.mean(1).tolist()],
                "agreeing_tokens": agrees.sum(1).tolist(),
            }
        return figures

    def _mean(self, of_windows: np.ndarray, transform: Any = None, digits: int = 5) -> dict[str, Any]:
        transform = transform or (lambda value: value)
        low, high = interval(transform(self._bootstrap.means(of_windows)))
        value = float(transform(of_windows.mean()))
        return {"value": rounded(value, digits), "interval": [rounded(low, digits), rounded(high, digits)]}

    def _buckets(self) -> list[tuple[int, int, slice]]:
        """Lengths of context, and which forced tokens are foreseen from so many tokens."""
        edges = [*_BUCKETS]
        while edges[-1] < self._context:
            edges.append(2 * edges[-1])
        prefill, found = self._job.prefill, []
        for low, high in pairwise(edges):
            # Token number p is foreseen from p tokens. The first that a decode foresees is number prefill + 1.
            first, last = max(low, prefill + 1), min(high, self._context)
            if first < last:
                found.append((first, last, slice(first - prefill, last - prefill)))
        return found

    def _retrieval(self, scores: Scores) -> list[dict[str, Any]]:
        of_distance: dict[int, list[tuple[bool, float]]] = {}
        for row, trial in enumerate(self._trials):
            nll, is_top = scores.nll[row, trial.value], scores.is_top[row, trial.value]
            of_distance.setdefault(trial.distance, []).append((bool(is_top.all()), -float(nll.mean())))
        found = []
        for distance, outcomes in of_distance.items():
            exact, log_probs = [outcome[0] for outcome in outcomes], np.array([outcome[1] for outcome in outcomes])
            means = Bootstrap(range(len(outcomes)), self._job.seed).means(log_probs)
            found.append(
                {
                    "distance": distance,
                    "trials": len(outcomes),
                    "exact": sum(exact),
                    "exact_interval": [rounded(value, 4) for value in wilson(sum(exact), len(exact))],
                    "log_prob": rounded(float(log_probs.mean())),
                    "log_prob_interval": [rounded(value) for value in interval(means)],
                    "exact_of_trials": "".join("01"[is_exact] for is_exact in exact),
                }
            )
        return found

    # ---- what the numbers rest on ------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Of the study."""
        job = self._job
        return {
            "windows": len(self._windows),
            "documents": len({window.document for window in self._windows}),
            "document_of_window": [window.document for window in self._windows],
            "text_digest": _digest(str(window.tokens).encode() for window in self._windows),
            "context": self._context,
            "prefill": job.prefill,
            "trials_per_distance": job.trials,
            "max_num_seqs": job.max_num_seqs,
            "bootstrap_resamples": RESAMPLES,
            "seed": job.seed,
        }


def _context(job: Job, longest: int) -> int:
    context = min(job.context or longest, longest)
    if job.context is not None and job.context > longest:
        raise UserError(f"--context is {job.context}; the target reads {longest} tokens at most")
    if context < job.prefill + 2:
        raise UserError(
            f"--context is {context}; it must be at least {job.prefill + 2}, the prefill and two tokens more"
        )
    return context


def _model_facts(core: EngineCore, folder: Path) -> dict[str, Any]:
    described = core.model_config
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    return {
        "digest": _digest(file.read_bytes() for file in files),
        "parameters": num_parameters(described),
        "num_layers": described.num_layers,
        "hidden_size": described.hidden_size,
        "num_q_heads": described.num_q_heads,
        "num_kv_heads": described.num_kv_heads,
        "head_dim": described.head_dim,
        "vocab_size": described.vocab_size,
        "max_position_embeddings": described.max_position_embeddings,
        "dtype": str(core.dtype).removeprefix("torch."),
    }


def _digest(parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.blake2b(part, digest_size=16).digest())
    return digest.hexdigest()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
