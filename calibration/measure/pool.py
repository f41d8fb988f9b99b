"""The KV cache as a busy engine has it: numbers of the model in every page, and free pages in no order.

Zeros would cost less power, and so less time, than what a model writes; and pages of one request that lie side by side
are not what a served one has.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.bench.replay import make_sequence
from engine.scheduling.block_pool import NULL_BLOCK

if TYPE_CHECKING:
    from engine.core import EngineCore

_PROMPT_TOKENS = 8192
_COPY_BYTES = 64 << 20  # at a time


def shuffle_pool(core: EngineCore, seed: int) -> None:
    """Put the free blocks of an engine without requests and prefix cache in random order."""
    pool = core.scheduler.kv.pool
    blocks = pool.take(pool.num_free)
    random.Random(seed).shuffle(blocks)
    pool.release(blocks)


def fill_pool(core: EngineCore, seed: int) -> int:
    """Compute a random prompt, and copy its full pages over all others. The engine must have no requests.

    Returns:
        How many pages were copied from.
    """
    generator = np.random.default_rng(seed)
    written = _written_pages(core, generator)
    layers = core._cache.layers
    for layer in layers:
        if layer.residual is not None:
            layer.residual.normal_()
    if not written:
        return 0
    others = np.setdiff1d(np.arange(1, layers[0].pages.shape[0]), written)
    sources = torch.from_numpy(generator.choice(np.array(written), len(others))).to(core.device)
    targets = torch.from_numpy(others).to(core.device)
    # Layers of several groups share a storage tensor.
    for pages in {layer.pages.data_ptr(): layer.pages for layer in layers}.values():
        words = pages.view(torch.int64)  # pages are multiples of 32 bytes
        at_a_time = max(_COPY_BYTES // (words[0].numel() * words.itemsize), 1)
        for some, into in zip(sources.split(at_a_time), targets.split(at_a_time), strict=True):
            words.index_copy_(0, into, words.index_select(0, some))
    return len(written)


def _written_pages(core: EngineCore, generator: np.random.Generator) -> list[int]:
    """Run the prompt; the blocks of its full pages."""
    size = core.config.block_size
    room = core.memory.num_blocks * size // len(core.scheduler.kv.windows) // 2
    length = min(_PROMPT_TOKENS, core.max_model_len - 1, room)
    tokens = generator.integers(0, core.model_config.vocab_size, length).tolist()
    sequence = make_sequence(core, "fill", tokens, 1, 1.0)
    sequence.max_output_tokens = 2  # it stays, with its pages, when the prompt is computed
    core.adopt([sequence])
    while sequence.num_computed_tokens < length:
        core.step()
        core.settle()
    written = [block for table in sequence.block_tables for block in table[: length // size] if block != NULL_BLOCK]
    core.abort(sequence)
    return sorted(written)
