"""From a configuration to a model that can run steps: load, measure, size the KV cache, capture graphs."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.errors import UserError
from engine.kv.attention import attention_for
from engine.kv.cache import KVCache, block_bytes, layer_layouts, residual_bytes, scratch_bytes
from engine.kv.groups import KVGroups, kv_groups
from engine.memory import GIB, MemoryReport
from engine.models.builtin import builtin_config
from engine.models.decoder import Decoder
from engine.models.hf import model_config, read_config, read_json
from engine.models.loading import load_weights
from engine.ops import ops_for
from engine.padding import graph_sizes
from engine.pieces import piece_sizes
from engine.runner import ModelRunner
from engine.scheduling import KVCacheConfig

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.models.config import ModelConfig
    from engine.models.modules import DecoderWeights
    from kernels.pages import PageLayout

# KV cache of an engine on a CPU, where "all free memory" would be a bad neighbour.
_CPU_KV_BYTES = 1 << 30
# A CUDA graph of a handful of kernels, as the driver keeps it.
_GRAPH_BYTES = 1 << 19


@dataclass(frozen=True)
class Engine:
    """A model that can run steps, and what it cost."""

    model_config: ModelConfig
    weights: DecoderWeights
    memory: MemoryReport
    device: torch.device
    dtype: torch.dtype
    cache: KVCache
    runner: ModelRunner


def build(config: EngineConfig, weights: DecoderWeights | None = None) -> Engine:
    """Load, measure, allocate, capture.

    Args:
        weights: already loaded, of the same model, dtype and quantization.

    Raises:
        UserError: a model that cannot be loaded or run here, or a context that does not fit.
    """
    device = choose_device(config.device)
    described = describe_model(config)
    dtype = choose_dtype(config.dtype, described, device)
    max_model_len = _max_model_len(config, described)
    layouts = layer_layouts(
        described, config.kv_cache_dtype, config.kv_cache_dtype_skip_layers, config.block_size, dtype
    )
    groups = kv_groups(described.layer_windows)
    started = time.perf_counter()
    if weights is None:
        if device.type == "cpu":
            _check_fits_host(num_parameters(described) * dtype.itemsize, "the weights")
        with _sentence_for_lack_of_memory(device, "the weights", "--quantization fp8 halves them"):
            weights = load_weights(
                Path(config.model),
                described,
                dtype=dtype,
                device=device,
                load_format=config.load_format,
                quantization=config.quantization,
                seed=config.seed,
            )
    load_s = time.perf_counter() - started
    remedy = "lower --gpu-memory-utilization, --max-num-batched-tokens or --num-gpu-blocks-override"
    with _sentence_for_lack_of_memory(device, "activations and KV cache beside the weights", remedy):
        return _Builder(config, described, weights, device, dtype, max_model_len, layouts, groups).build(load_s)


@contextmanager
def _sentence_for_lack_of_memory(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = (_shown(size) for size in torch.cuda.mem_get_info(device))
        raise UserError(f"{what} do not fit: of the GPU's {total} only {free} are left; {remedy}") from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"{what} do not fit into this machine's memory; {remedy}") from None


def _check_fits_host(needed: int, what: str) -> None:
    """Where Linux would end the process rather than refuse memory.

    Raises:
        UserError: more bytes than the machine has left.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return
    if needed > available:
        raise UserError(
            f"{what} take {_shown(needed)} and this machine has {_shown(available)} of memory left; use a GPU, a "
            "smaller model or, for half the bytes, --dtype bfloat16"
        )


def describe_model(config: EngineConfig) -> ModelConfig:
    """The model's configuration: of a folder, of a config.json, or, for dummy weights, built in.

    Raises:
        UserError: there is none, or it cannot be run.
    """
    builtin = builtin_config(config.model)
    if builtin is not None:
        if config.load_format != "dummy":
            raise UserError(f"{config.model} is a built-in configuration without weights; add --load-format dummy")
        return model_config(builtin, config.model)
    path = Path(config.model)
    if path.is_file() and path.suffix == ".json":
        if config.load_format != "dummy":
            raise UserError(f"{path} is a configuration without weights; name its folder, or add --load-format dummy")
        return model_config(read_json(path), str(path))
    return read_config(path)


def choose_device(name: str) -> torch.device:
    """The device that "auto", "cuda" or "cpu" means here.

    Raises:
        UserError: "cuda" without a CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device is cuda, and no CUDA device was found; use --device cpu")
    return torch.device("cuda", torch.cuda.current_device()) if available and name != "cpu" else torch.device("cpu")


def choose_dtype(name: str, described: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations; "auto" is the checkpoint's on a GPU and float32 on a CPU.

    Raises:
        UserError: a dtype that the device's kernels do not take.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if described.dtype == "float16" else torch.bfloat16
    if name == "float32" and device.type == "cuda":
        raise UserError("dtype is float32; on a GPU it must be bfloat16 or float16, which the attention kernels take")
    return getattr(torch, name)


def _max_model_len(config: EngineConfig, described: ModelConfig) -> int:
    limit = described.max_position_embeddings
    asked = config.max_model_len
    if asked is not None and asked > limit:
        raise UserError(
            f"max_model_len is {asked}, more than the model's max_position_embeddings of {limit}; ask for {limit} "
            "tokens at most"
        )
    return asked or limit


@dataclass
class _Builder:
    """What the pieces of an engine are made from."""

    config: EngineConfig
    model_config: ModelConfig
    weights: DecoderWeights
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    layouts: tuple[PageLayout, ...]
    groups: KVGroups

    def build(self, load_s: float) -> Engine:
        config = self.config
        sizes = KVCacheConfig(num_blocks=2, block_size=config.block_size, windows=self.groups.windows)
        per_sequence = sizes.max_pages(self.max_model_len, config.max_num_batched_tokens)
        memory = self._measure(per_sequence, load_s)
        runner, cache = self._runner(memory.num_blocks + 1, config.max_num_seqs)
        if self.device.type == "cuda":
            runner.warm_up(config.max_num_batched_tokens, self.max_model_len)
        if self.device.type == "cuda" and not config.enforce_eager:
            started, free = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0]
            runner.capture(graph_sizes(config.max_num_seqs), piece_sizes(self.weights, config.max_num_batched_tokens))
            graph_bytes = max(free - torch.cuda.mem_get_info(self.device)[0], 0)
            memory = replace(memory, graph_bytes=graph_bytes, graph_s=time.perf_counter() - started)
        if self.device.type == "cuda":
            # Graphs emptied the allocator's pool. The largest step takes its memory now, not when a request waits.
            runner.run_dummy(self._largest_step(), num_samples=config.max_num_seqs)
        return Engine(self.model_config, self.weights, memory, self.device, self.dtype, cache, runner)

    def _runner(self, num_blocks: int, num_slots: int) -> tuple[ModelRunner, KVCache]:
        cache = KVCache.allocate(
            self.model_config, self.layouts, self.groups, num_blocks, num_slots + 1, self.device, self.dtype
        )
        attention = attention_for(self.model_config, cache, dtype=self.dtype, max_model_len=self.max_model_len)
        ops = ops_for(self.device)
        decoder = Decoder(
            self.model_config,
            self.weights,
            num_positions=self.max_model_len,
            attention=attention,
            ops=ops,
            dtype=self.dtype,
        )
        runner = ModelRunner(
            decoder, ops, cache, max_num_seqs=num_slots, max_model_len=self.max_model_len, device=self.device
        )
        return runner, cache

    def _measure(self, per_sequence: int, load_s: float) -> MemoryReport:
        """How many blocks there is room for.

        Raises:
            UserError: fewer than one sequence of max_model_len needs.
        """
        config = self.config
        a_block = block_bytes(self.model_config, self.layouts, self.groups)
        weights_bytes = _bytes_of(self.weights)
        fixed = residual_bytes(self.model_config, self.layouts, config.max_num_seqs + 1, self.dtype)
        total = activation = other = None
        if self.device.type == "cuda":
            fixed += scratch_bytes(self.model_config, self.layouts, self.max_model_len, self.dtype)
            fixed += self._tables_and_graphs_bytes()
            activation = self._peak_of_largest_step()
            free, total = torch.cuda.mem_get_info(self.device)
            other = max(total - free - torch.cuda.memory_reserved(self.device), 0)
            allowed = total * config.gpu_memory_utilization
            available = int(allowed - torch.cuda.memory_allocated(self.device) - activation - other - fixed)
        else:
            # No more than all running requests could ever use.
            available = min(_CPU_KV_BYTES, (config.max_num_seqs * per_sequence + 1) * a_block)
        # The null block is one of those that the memory holds.
        num_blocks = config.num_gpu_blocks_override or available // a_block - 1
        report = MemoryReport(
            total_bytes=total,
            utilization=config.gpu_memory_utilization,
            weights_bytes=weights_bytes,
            activation_bytes=activation,
            other_bytes=other,
            residual_bytes=fixed,
            block_bytes=a_block,
            num_blocks=num_blocks,
            block_size=config.block_size,
            num_groups=len(self.groups.windows),
            max_model_len=self.max_model_len,
            blocks_per_sequence=per_sequence,
            load_s=load_s,
        )
        if num_blocks < per_sequence:
            raise UserError(self._does_not_fit(report))
        return report

    def _tables_and_graphs_bytes(self) -> int:
        """What is allocated behind the KV cache: tables of RoPE, blocks and token counts, and, roughly, CUDA graphs and
        their buffers."""
        config, model = self.config, self.model_config
        pages = -(-self.max_model_len // config.block_size)
        tables = 4 * (config.max_num_seqs + 1) * (pages * len(self.groups.windows) + model.vocab_size)
        tables += sum(4 * self.max_model_len * rope.rotary_dim for rope in model.ropes)
        if config.enforce_eager:
            return tables
        tokens = piece_sizes(self.weights, config.max_num_batched_tokens)
        num_graphs = len(tokens) * (model.num_layers + 1) + len(graph_sizes(config.max_num_seqs))
        heads = (2 * model.num_q_heads + 2 * model.num_kv_heads) * model.head_dim
        widths = heads + 4 * model.hidden_size + 3 * model.intermediate_size  # buffers, and what a piece works with
        elements = config.max_num_seqs * model.vocab_size + max(tokens, default=0) * widths
        return tables + elements * self.dtype.itemsize + num_graphs * _GRAPH_BYTES

    def _largest_step(self) -> list[tuple[int, int]]:
        """Prompt chunks, without context, that fill the token budget of a step."""
        left, chunks = self.config.max_num_batched_tokens, []
        while left > 0:
            chunks.append((min(self.max_model_len, left), 0))
            left -= chunks[-1][0]
        return chunks

    def _peak_of_largest_step(self) -> int:
        """Bytes that the largest step needs beyond weights and cache: run it on a small cache, and look."""
        config = self.config
        chunks = self._largest_step()
        pages = sum(-(-length // config.block_size) for length, _ in chunks)
        runner, cache = self._runner(pages * len(self.groups.windows) + 1, config.max_num_seqs)
        runner.run_dummy(chunks, num_samples=config.max_num_seqs)  # compiles, and has libraries take what they keep
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        runner.run_dummy(chunks, num_samples=config.max_num_seqs)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del runner, cache
        gc.collect()
        torch.cuda.empty_cache()
        return peak

    def _does_not_fit(self, report: MemoryReport) -> str:
        """What is needed, what there is, the longest context that fits, and remedies in order of what they cost."""
        config = self.config
        available = _shown(max(report.num_blocks, 0) * report.block_bytes)
        needed = _shown(report.blocks_per_sequence * report.block_bytes)
        fits = self._longest_that_fits(report.num_blocks)
        remedies = []
        if fits:
            remedies.append(f"--max-model-len {fits}")
        if config.num_gpu_blocks_override:
            remedies.append("a larger --num-gpu-blocks-override, or none")
        elif all(layout.is_float for layout in self.layouts):
            share = "half" if self.dtype.itemsize == 2 else "a quarter of"
            remedies.append(f"--kv-cache-dtype fp8 ({share} the bytes) or int4 (half of fp8's)")
        if not config.num_gpu_blocks_override and self.device.type == "cuda" and config.gpu_memory_utilization < 0.95:
            remedies.append("--gpu-memory-utilization 0.95")
        if config.quantization is None and self.device.type == "cuda":
            remedies.append("--quantization fp8 (half the bytes of the weights)")
        if len(self.groups.windows) > 1 or self.groups.windows[0] is not None:
            remedies.append("a smaller --max-num-batched-tokens")
        if self.device.type == "cuda":
            remedies.append("a GPU with more memory")
        elif not config.num_gpu_blocks_override:
            remedies.append(f"--num-gpu-blocks-override {report.blocks_per_sequence} (of this machine's memory)")
        longest = f"the longest context that fits is {fits} tokens" if fits else "no context fits"
        return (
            f"one sequence of max_model_len {report.max_model_len} tokens needs {needed} of KV cache and "
            f"{available} are available: {longest}. In this order: {'; '.join(remedies[:3])}"
        )

    def _longest_that_fits(self, num_blocks: int) -> int:
        """Tokens of the longest sequence that a pool of this size holds, 0 if none."""
        sizes = KVCacheConfig(num_blocks=2, block_size=self.config.block_size, windows=self.groups.windows)
        low, high = 0, self.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            if sizes.max_pages(middle, self.config.max_num_batched_tokens) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def num_parameters(config: ModelConfig) -> int:
    """Numbers in the matrices of a model, a tied embedding counted once."""
    heads = 2 * config.num_q_heads + 2 * config.num_kv_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_layers * layer + tables * config.vocab_size * config.hidden_size


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB // 10 else f"{num_bytes / (1 << 20):.2f} MiB"


def _bytes_of(weights: DecoderWeights) -> int:
    """Bytes of all weights, a tied embedding counted once."""
    total = weights.num_bytes_per_step
    if weights.lm_head.weight.data_ptr() != weights.embedding.data_ptr():
        total += weights.embedding.numel() * weights.embedding.itemsize
    return total
