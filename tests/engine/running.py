"""Engines on tiny models: run requests to their end, see what every token was sampled from, leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from models_for_tests import VOCAB_SIZE, save_tiny_model

from engine.config import EngineConfig
from engine.core import EngineCore, SequenceUpdate
from engine.models.modules import DecoderWeights
from engine.sampling import sampling_requests
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

# Matrices are tiny here: a second thread costs more than it brings.
torch.set_num_threads(1)

SMALL = {"device": "cpu", "block_size": 32, "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 1024}
# Around the boundaries of blocks of 32 tokens; shorter and longer than the windows of 24, 32 and 40.
LENGTHS = (1, 31, 32, 33, 90, 150)


# Greatest error of the logits as a share of their norm, over all outputs; twice the most it was when written.
BOUNDS = {"fp8": 0.15, "int8": 0.04, "int4": 0.4, "int2": 1.5}


class Models:
    """Tiny models, each saved once: a folder for the engine and the transformers model as the reference."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._saved: dict[str, tuple[Path, transformers.PreTrainedModel]] = {}

    def __call__(self, family: str, **overrides: object) -> tuple[Path, transformers.PreTrainedModel]:
        key = f"{family}{sorted(overrides.items())}"
        if key not in self._saved:
            folder = self._root / str(len(self._saved))
            self._saved[key] = folder, save_tiny_model(family, folder, **overrides)
        return self._saved[key]


def prompts(lengths: Iterable[int] = LENGTHS, *, seed: int = 1, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def engine(folder: Path | str, *, weights: DecoderWeights | None = None, **settings: object) -> Iterator[EngineCore]:
    """An engine that must be empty when it is no longer needed.

    With async_scheduling two steps are in flight here too, as on a GPU.
    """
    core = EngineCore(EngineConfig(model=str(folder), **{**SMALL, **settings}), weights=weights)
    core._depth = 2 if core.config.async_scheduling else 1
    yield core
    assert_idle(core)


def assert_idle(core: EngineCore) -> None:
    """No request, no step in flight, every block free or cached, every slot free."""
    core.check()
    assert not core.has_work
    pool = core.scheduler.kv.pool
    assert pool.num_used == 0
    assert pool.num_free == core.memory.num_blocks == core._cache.num_blocks - 1
    assert core._runner.slots.num_free == core.config.max_num_seqs


def request(core: EngineCore, request_id: object, prompt: list[int], **params: object) -> Sequence:
    """A request for `core`, by default greedy and of 24 tokens whatever they are; not yet added."""
    chosen = SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **params})
    return Sequence(
        request_id,
        prompt,
        chosen,
        max_model_len=core.max_model_len,
        eos_token_ids=core.model_config.eos_token_ids,
        block_size=core.config.block_size,
        hash_blocks=core.config.enable_prefix_caching,
        default_seed=core.config.seed,
    )


def run(
    core: EngineCore, requests: Iterable[Sequence] = (), on_step: Callable[[int], None] | None = None
) -> list[SequenceUpdate]:
    """Add requests and step until there is no work; on_step gets the number of steps so far."""
    for each in requests:
        core.add(each)
    updates, steps = [], 0
    while core.has_work:
        updates += core.step()
        core.check()
        steps += 1
        assert steps < 20_000, "stuck"
        if on_step is not None:
            on_step(steps)
    return updates


def in_two_waves(core: EngineCore) -> list[Sequence]:
    """Prompts of all lengths at once; then some that begin like the longest of them, or like its whole text."""
    first = [request(core, f"first {len(prompt)}", prompt) for prompt in prompts()]
    run(core, first)
    known = first[-1].token_ids
    second = [request(core, f"again {length}", [*known[:length], 7, 8, 9]) for length in (64, 70, 130, 170)]
    run(core, second)
    return first + second


class LogitsLog:
    """The logits from which an engine samples, from now on; it reaches into the runner, for nothing public tells.

    Attributes:
        of: float32 [vocab] on the CPU by (request id, position of the sampled token).
    """

    def __init__(self, core: EngineCore) -> None:
        self.of: dict[tuple[object, int], torch.Tensor] = {}
        runner = core._runner
        self._execute, self._compute, self._runner = runner.execute, runner.decoder.logits, runner
        self._rows: torch.Tensor | None = None
        runner.execute, runner.decoder.logits = self._recording_execute, self._recording_logits

    def _recording_logits(self, hidden, rows=None, out=None):
        self._rows = self._compute(hidden, rows, out)
        return self._rows

    def _recording_execute(self, step):
        self._rows = None
        tokens, graph_size = self._execute(step)
        sampling, lengths = sampling_requests(step)
        if sampling:
            rows = self._rows if graph_size is None else self._runner.graphs[graph_size].logits
            rows = rows[: len(sampling)].to("cpu", torch.float32, copy=True)
            for sequence, length, row in zip(sampling, lengths, rows, strict=True):
                self.of[sequence.request_id, length] = row
        return tokens, graph_size

    def rows(self, sequence: Sequence) -> torch.Tensor:
        """Of all output tokens of a request, [num_output_tokens, vocab]."""
        positions = range(sequence.num_prompt_tokens, len(sequence.token_ids))
        return torch.stack([self.of[sequence.request_id, position] for position in positions])


@torch.no_grad()
def reference_logits(model: transformers.PreTrainedModel, sequence: Sequence) -> torch.Tensor:
    """What transformers would sample each output token from, given those before it: float32, on the CPU."""
    token_ids = torch.tensor([sequence.token_ids], device=model.device)
    return model(token_ids).logits[0, sequence.num_prompt_tokens - 1 : -1].float().cpu()


def relative_error(core: EngineCore, log: LogitsLog, model, requests: list[Sequence]) -> float:
    """Of the logits of all output tokens, given the engine's own text."""
    found = torch.cat([log.rows(each) for each in requests])
    wanted = torch.cat([reference_logits(model, each) for each in requests])
    return float((found - wanted).norm() / wanted.norm())


def assert_same_texts(found: Mapping, wanted: Mapping, logits: Mapping, tolerance: float = 0.0) -> None:
    """Output tokens by request id are the same, up to where two tokens are nearly equally probable.

    Args:
        logits: from which `wanted` was taken, by request id.
        tolerance: 0, or the difference of logits up to which rounding may prefer another token. Behind such a token
            the texts are different texts.
    """
    assert found.keys() == wanted.keys()
    for name, tokens in wanted.items():
        assert len(found[name]) == len(tokens)
        for row, token, other in zip(logits[name], tokens, found[name], strict=True):
            if token != other:
                gap = float(row[token] - row[other])
                assert gap <= tolerance, f"request {name}: {other} instead of {token}, whose logit is {gap} greater"
                break


def adjusted_logits(
    raw: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int], stop_ids: Iterable[int] = ()
) -> torch.Tensor:
    """By definition, for the token behind `output`: float64 [vocab].

    transformers' repetition penalty over prompt and output; OpenAI's formula for the two others, over the output.
    """
    logits = raw.double().clone()
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if len(output) < params.min_tokens:
        logits[list(stop_ids)] = -torch.inf
    repetition = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    logits = repetition(torch.tensor([prompt + output]), logits[None])[0]
    count = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(logits)).double()
    return logits - params.frequency_penalty * count - params.presence_penalty * (count > 0)


def adjusted_rows(rows: torch.Tensor, each: Sequence) -> torch.Tensor:
    """What each output token of a request must have been drawn from, given those before it and the model's logits."""
    output = each.output_token_ids
    return torch.stack(
        [
            adjusted_logits(rows[i], each.params, each.prompt_token_ids, output[:i], each.stop_ids)
            for i in range(len(output))
        ]
    )
