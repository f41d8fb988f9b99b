"""Attention over the KV cache: both backends against `kernels.reference.attention` on plain tensors.

A `World` plays a runner: it hands out pages from one pool, in random order, to every group, takes back those behind
sliding windows, builds each step's batch and compares every layer's output with attention over what the format is to
hold, computed from the keys and values that went in. So a wrong page, slot, length or window shows.

The Triton backend runs in bfloat16 on a GPU, and else in float16 under Triton's interpreter.
"""

import random
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch

from engine.batch import GroupBatch, PrefillBatch, StepBatch
from engine.errors import UserError
from engine.kv.attention import attention_for
from engine.kv.cache import KVCache, layer_layouts, scratch_bytes
from engine.kv.groups import kv_groups
from engine.kv.torch_attention import TorchAttention
from engine.kv.triton_attention import TritonAttention, _first_page_step, _fitting
from engine.models.config import ModelConfig
from kernels.pages import PageLayout
from kernels.reference.attention import attention
from kernels.reference.pages import quantise_channels, quantise_tokens, rotate

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
HALF = torch.bfloat16 if HAS_CUDA else torch.float16
PAGE, HEAD_DIM, NULL_BLOCK = 32, 64, 0
QUANTISED = ("fp8", "int8", "int4", "int2")


def config_of(layer_windows=(None,), heads=(4, 2), soft_cap=None) -> ModelConfig:
    return ModelConfig(
        family="test",
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_layers=len(layer_windows),
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        softmax_scale=0.2,
        layer_windows=tuple(layer_windows),
        ropes=(),
        layer_ropes=(),
        attention_soft_cap=soft_cap,
    )


@dataclass
class Sequence:
    """What the world knows of one: `stored` is, by layer, the rotated keys and the values of all its tokens."""

    slot: int
    tables: list[list[int]]
    stored: list[tuple[torch.Tensor, torch.Tensor]]
    length: int = 0
    flushed: int = 0


@dataclass
class New:
    """A sequence's part of a step. `committed`: how many of its tokens stay, all of them by default."""

    name: str
    tokens: int
    committed: int | None = None


@dataclass
class World:
    config: ModelConfig
    kv_dtype: str = "auto"
    skip_layers: tuple[int, ...] = ()
    triton: bool = False
    rope_channels: int = HEAD_DIM
    max_model_len: int = 512
    num_blocks: int = 64
    seed: int = 0
    sequences: dict[str, Sequence] = field(default_factory=dict)

    def __post_init__(self):
        self.dtype = HALF if self.triton else torch.float32
        self.device = DEVICE if self.triton else torch.device("cpu")
        self.layouts = layer_layouts(self.config, self.kv_dtype, self.skip_layers, PAGE, self.dtype)
        self.groups = kv_groups(self.config.layer_windows)
        self.cache = KVCache.allocate(
            self.config, self.layouts, self.groups, self.num_blocks, 9, self.device, self.dtype
        )
        if self.triton:
            self.backend = TritonAttention(
                self.config, self.cache, dtype=self.dtype, max_model_len=self.max_model_len, check=True
            )
        else:
            self.backend = TorchAttention(self.config, self.cache)
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.free = list(range(1, self.num_blocks))
        self.random.shuffle(self.free)
        self.rope = None
        if self.rope_channels:
            rates = 10000.0 ** (-torch.arange(0, self.rope_channels, 2) / self.rope_channels)
            angles = torch.arange(self.max_model_len)[:, None] * rates
            self.rope = (angles.cos().to(self.device), angles.sin().to(self.device))

    # ---- the runner's part -------------------------------------------------------------------------------------------

    def step(self, decodes: list[New] = (), prefills: list[New] = (), num_padding: int = 0) -> list[torch.Tensor]:
        """Run all layers; compares their outputs and returns them. `num_padding`: of sequences and rows."""
        work = [*decodes, *prefills]
        for new in work:
            self._take_pages(new)
        batch = self.batch(decodes, prefills, num_padding)
        self.backend.begin_step(batch)
        outs = []
        for layer in range(self.config.num_layers):
            query, key, value = self.random_qkv(batch.num_tokens)
            expected, plain = self._expect(layer, work, len(decodes), query, key, value, batch)
            self.backend.write(layer, query, key, value, batch.places, self.rope, keeps_key=bool(prefills))
            out = self.backend.attend(layer, query, key, value, batch)
            assert out.shape == query.shape
            assert out.isfinite().all()  # padding too
            self._compare(out[: len(expected)], expected, plain, layer)
            outs.append(out.clone())
        for new in work:
            self._finish(new)
        return outs

    def random_qkv(self, num_tokens: int) -> list[torch.Tensor]:
        """Views of a fused projection."""
        counts = [self.config.num_q_heads, self.config.num_kv_heads, self.config.num_kv_heads]
        fused = torch.randn(num_tokens, sum(counts) * HEAD_DIM, generator=self.generator)
        parts = fused.to(self.device, self.dtype).split([count * HEAD_DIM for count in counts], 1)
        return [part.unflatten(1, (-1, HEAD_DIM)) for part in parts]

    def _take_pages(self, new: New) -> None:
        seq = self.sequences.get(new.name)
        if seq is None:
            nothing = torch.zeros(0, self.config.num_kv_heads, HEAD_DIM, dtype=self.dtype, device=self.device)
            stored = [(nothing, nothing)] * self.config.num_layers
            slot = min(set(range(8)) - {s.slot for s in self.sequences.values()})
            seq = self.sequences[new.name] = Sequence(slot, [[] for _ in self.groups.windows], stored)
        for table in seq.tables:
            while len(table) * PAGE < seq.length + new.tokens:
                table.append(self.free.pop())

    def _finish(self, new: New) -> None:
        seq = self.sequences[new.name]
        seq.length = self._committed(new)
        seq.flushed = seq.length // PAGE * PAGE
        seq.stored = [(key[: seq.length], value[: seq.length]) for key, value in seq.stored]
        for window, table in zip(self.groups.windows, seq.tables, strict=True):
            if window is not None:
                for page in range(max(seq.length - window + 1, 0) // PAGE):
                    self._give_back(table, page)

    def _give_back(self, table: list[int], page: int) -> None:
        if table[page] != NULL_BLOCK:
            self.free.append(table[page])
            table[page] = NULL_BLOCK

    def finish(self, name: str) -> None:
        for table in self.sequences.pop(name).tables:
            for page in range(len(table)):
                self._give_back(table, page)
        self.random.shuffle(self.free)

    def _committed(self, new: New) -> int:
        return self.sequences[new.name].length + (new.tokens if new.committed is None else new.committed)

    def ints(self, values, dtype=torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def batch(self, decodes: list[New], prefills: list[New], num_padding: int) -> StepBatch:
        work = [*decodes, *prefills]
        seqs = [self.sequences[new.name] for new in work]
        query_lens = [new.tokens for new in work] + [0] * num_padding
        contexts = [seq.length for seq in seqs] + [0] * num_padding
        num_tokens = sum(query_lens) + num_padding
        positions = [context + i for context, n in zip(contexts, query_lens, strict=True) for i in range(n)]
        groups = []
        for g in range(len(self.groups.windows)):
            tables = [seq.tables[g] for seq in seqs] + [[]] * num_padding
            width = max(map(len, tables)) + 2
            slots = [
                table[p // PAGE] * PAGE + p % PAGE
                for table, context, n in zip(tables, contexts, query_lens, strict=True)
                for p in range(context, context + n)
            ]
            padded = [table + [10**6] * (width - len(table)) for table in tables]
            groups.append(GroupBatch(self.ints(padded), self.ints(slots + [-1] * num_padding, torch.int64)))
        prefill = None
        if prefills:
            first = len(decodes)
            host_contexts, host_queries = contexts[first:], query_lens[first:]
            prefill = PrefillBatch(
                first_seq=first,
                first_token=sum(query_lens[:first]),
                query_start=self.ints([0, *accumulate(host_queries)]),
                context_lens=self.ints(host_contexts),
                max_query_len=max(host_queries),
                max_context_len=max(host_contexts),
                host_context_lens=host_contexts,
                host_query_lens=host_queries,
            )
        committed = self.ints([self._committed(new) for new in work] + [0] * num_padding)
        low_bit = self.cache.has_low_bit_layers
        return StepBatch(
            token_ids=self.ints([0] * num_tokens, torch.int64),
            positions=self.ints(positions + [0] * num_padding, torch.int64),
            seq_lens=self.ints([a + b for a, b in zip(contexts, query_lens, strict=True)]),
            query_start=self.ints([0, *accumulate(query_lens)]),
            num_decode_seqs=len(decodes) + num_padding,
            num_decode_tokens=sum(new.tokens for new in decodes) + num_padding,
            max_decode_query_len=max((new.tokens for new in decodes), default=1),
            groups=tuple(groups),
            prefill=prefill,
            residual_slots=self.ints([seq.slot for seq in seqs] + [8] * num_padding) if low_bit else None,
            flushed_lens=self.ints([seq.flushed for seq in seqs] + [0] * num_padding) if low_bit else None,
            committed_lens=committed if low_bit else None,
            next_flushed_lens=committed // PAGE * PAGE if low_bit else None,
        )

    # ---- what is right -----------------------------------------------------------------------------------------------

    def _expect(self, layer, work, num_decodes, query, key, value, batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of all sequences, in float64 and by the same math in the model's dtype; keeps the new keys."""
        if self.rope is not None:
            query, key = (rotate(x, *self.rope, batch.positions) for x in (query, key))
        pairs, row = [], 0
        layout = self.layouts[layer]
        for i, new in enumerate(work):
            seq, rows = self.sequences[new.name], slice(row, row + new.tokens)
            row += new.tokens
            seq.stored[layer] = tuple(
                torch.cat([old, x[rows]]) for old, x in zip(seq.stored[layer], (key, value), strict=True)
            )
            flushed = self._committed(new) // PAGE * PAGE
            seen = as_stored(*seq.stored[layer], layout, flushed)
            if i >= num_decodes and not layout.is_float:
                seen = [
                    torch.cat([x[: seq.length], own[rows].float()]) for x, own in zip(seen, (key, value), strict=True)
                ]
            options = {
                "query_start": torch.tensor([0, new.tokens]),
                "key_start": torch.tensor([0, seq.length + new.tokens]),
                "softmax_scale": self.config.softmax_scale,
                "window": self.config.layer_windows[layer],
                "soft_cap": self.config.attention_soft_cap,
            }
            pairs.append([attention(query[rows], *seen, **options, dtype=d)[0] for d in (torch.float64, self.dtype)])
        return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))

    def _compare(self, out, expected, plain, layer) -> None:
        """FlashAttention's rule: at most twice the error of the same math in this precision, plus rounding."""
        error = (out.double() - expected).abs().max()
        rounding = 2 * (expected.to(self.dtype).double() - expected).abs().max()
        allowed = 2 * (plain.double() - expected).abs().max() + rounding
        if not self.triton:
            allowed += 1e-6
        assert error <= allowed, f"layer {layer}: error {error:.3g}, allowed {allowed:.3g}"


def as_stored(key: torch.Tensor, value: torch.Tensor, layout: PageLayout, flushed: int) -> list[torch.Tensor]:
    """Key and value [num_tokens, num_kv_heads, head_dim] as a cache of this format gives them back, float32."""
    if layout.is_float:
        return [x.to(layout.word_dtype).float() for x in (key, value)]
    if layout.is_low_bit:
        # K by channel over each page, V by token; what is not flushed as it came.
        pages = key[:flushed].unflatten(0, (-1, PAGE)).transpose(1, 2) if flushed else key[:0, :, None]
        codes, scale, minimum = quantise_channels(pages, layout.kv_dtype)
        keys = codes * scale.float()[..., None, :] + minimum.float()[..., None, :]
        keys = keys.transpose(1, 2).flatten(0, 1) if flushed else key[:0].float()
        codes, scale, minimum = quantise_tokens(value[:flushed], layout.kv_dtype)
        values = codes * scale.float()[..., None] + minimum.float()[..., None]
        return [torch.cat([keys, key[flushed:].float()]), torch.cat([values, value[flushed:].float()])]
    parts = []
    for x in (key, value):
        codes, scale, _ = quantise_tokens(x, layout.kv_dtype)
        numbers = codes.view(torch.float8_e4m3fn).float() if layout.kv_dtype == "fp8" else codes.float() - 128
        parts.append(numbers * scale.float()[..., None])
    return parts


def play(world: World) -> None:
    """Prompts whole and in chunks, decodes alone and beside them, across page boundaries, and an end."""
    world.step(prefills=[New("a", 30), New("b", 5)])
    world.step(decodes=[New("a", 1), New("b", 1)], prefills=[New("c", 40)])
    world.step(decodes=[New("b", 1)], prefills=[New("c", 31), New("d", 3)])
    world.step(decodes=[New("a", 1), New("c", 1), New("d", 1)], num_padding=2)
    world.finish("c")
    world.step(decodes=[New("d", 1)], prefills=[New("b", 60), New("e", 66)])
    world.step(decodes=[New(name, 1) for name in "badeb"[:4]])


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "float16", *QUANTISED])
@pytest.mark.parametrize(
    ("layer_windows", "heads", "soft_cap", "skip_layers"),
    [
        ((None,), (4, 2), None, ()),
        ((None, 40, 40), (2, 2), None, ()),
        ((20, None, 20, 20, None), (8, 1), 5.0, (1, 2)),
    ],
)
def test_torch(kv_dtype, layer_windows, heads, soft_cap, skip_layers):
    play(World(config_of(layer_windows, heads, soft_cap), kv_dtype, skip_layers))


@pytest.mark.parametrize("kv_dtype", ["auto", *QUANTISED])
def test_torch_long_random_play(kv_dtype):
    play_at_random(World(config_of((None, 48)), kv_dtype, seed=3, num_blocks=80), num_steps=60)


def play_at_random(world: World, num_steps: int) -> None:
    """Prompts of up to three pages in chunks, decodes, drafts of which some are rejected, ends."""
    rng, prompts, count = random.Random(world.seed), {}, 0
    for _ in range(num_steps):
        if len(world.sequences) < 5 and rng.random() < 0.4:
            prompts[f"s{count}"] = rng.randint(1, 96)
            count += 1
        if world.sequences and rng.random() < 0.1:
            name = rng.choice(sorted(world.sequences))
            world.finish(name)
            prompts.pop(name, None)
        decodes, prefills = [], []
        for name in sorted({*world.sequences, *prompts}):
            if name in prompts:
                tokens = rng.randint(1, prompts[name])
                prefills.append(New(name, tokens))
                prompts[name] -= tokens
                if not prompts[name]:
                    del prompts[name]
            elif world.sequences[name].length < 150:
                tokens = rng.choice([1, 1, 1, 4])
                decodes.append(New(name, tokens, committed=rng.randint(1, tokens)))
        if decodes or prefills:
            rng.shuffle(decodes)
            world.step(decodes, prefills, num_padding=0 if prefills else rng.randint(0, 2))


def test_torch_without_rope_and_with_partial_rope():
    for channels in (0, 32):
        for kv_dtype in ("auto", "int8", "int4"):
            play(World(config_of(), kv_dtype, rope_channels=channels))


def test_long_prompts_are_attended_in_blocks(monkeypatch):
    monkeypatch.setattr("engine.kv.torch_attention.MAX_LOGITS", 4 * 70 * 9)
    world = World(config_of((None, 40)))
    world.step(prefills=[New("a", 70)])
    world.step(prefills=[New("a", 37), New("b", 70)])


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_wrong_pages_show(triton):
    """The cache is what is read: other pages, other output."""
    world = World(config_of(), triton=triton)
    world.step(prefills=[New("a", 70), New("b", 70)])
    tables = world.sequences["a"].tables[0], world.sequences["b"].tables[0]
    tables[0][0], tables[1][0] = tables[1][0], tables[0][0]
    with pytest.raises(AssertionError, match="layer 0: error"):
        world.step(decodes=[New("a", 1)])


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_padding_writes_nothing(triton, kv_dtype):
    world = World(config_of(), kv_dtype, triton=triton)
    world.step(prefills=[New("a", 30)])
    pages = world.cache.layers[0].pages
    before = pages.clone()
    world.step(decodes=[New("a", 1)], num_padding=3)
    mine = world.sequences["a"].tables[0][0]
    others = [block for block in range(world.num_blocks) if block != mine]
    assert torch.equal(pages[others], before[others])
    if kv_dtype == "int4":
        assert world.cache.layers[0].residual[1:].count_nonzero() == 0


# ---- Triton ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["auto", *QUANTISED])
def test_triton(kv_dtype):
    world = World(config_of((None, 40), heads=(2, 1)), kv_dtype, triton=True)
    world.step(prefills=[New("a", 31), New("b", 40)])
    world.step(decodes=[New("a", 1)], prefills=[New("b", 27), New("c", 2)])
    world.step(decodes=[New("b", 1), New("a", 1)], num_padding=1)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["auto", *QUANTISED])
def test_triton_whole_play(kv_dtype):
    play(World(config_of((None, 40), heads=(2, 1)), kv_dtype, triton=True))


def test_triton_groups_of_several_layers_soft_cap_and_skipped_layers():
    world = World(config_of((20, None, 20), heads=(2, 1), soft_cap=5.0), "int4", (1,), triton=True)
    world.step(prefills=[New("a", 35)])
    world.step(decodes=[New("a", 1)], prefills=[New("b", 40)])
    world.step(prefills=[New("b", 3)])


@pytest.mark.parametrize("rope_channels", [0, 32])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_triton_without_rope_and_with_partial_rope(kv_dtype, rope_channels):
    world = World(config_of(heads=(1, 1)), kv_dtype, triton=True, rope_channels=rope_channels)
    world.step(prefills=[New("a", 34)])
    world.step(decodes=[New("a", 1)])


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_contexts_in_several_runs(kv_dtype):
    """A scratch cache of four pages, contexts of three, two, none and two, the last behind a window only."""
    world = World(config_of((None, 20), heads=(1, 1)), kv_dtype, triton=True, max_model_len=4 * PAGE)
    world.step(prefills=[New("a", 90), New("b", 40), New("d", 64)])
    world.step(prefills=[New("a", 3), New("b", 33), New("c", 2), New("d", 1)])


@pytest.mark.parametrize("kv_dtype", ["fp8", "int2"])
def test_long_contexts_behind_a_window(kv_dtype):
    """So long that pages are left out of the copy, at other places for each sequence."""
    world = World(config_of((20,), heads=(1, 1)), kv_dtype, triton=True, num_blocks=32)
    world.step(prefills=[New("a", 150), New("b", 215)])
    world.step(prefills=[New("a", 5), New("b", 2)])


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int4"])
def test_triton_drafts(kv_dtype):
    """Queries of several tokens, of which some are rejected and written again."""
    world = World(config_of(heads=(2, 1)), kv_dtype, triton=True)
    world.step(prefills=[New("a", 31), New("b", 64)])
    world.step(decodes=[New("a", 4, committed=2), New("b", 3, committed=1)])
    world.step(decodes=[New("b", 1), New("a", 4)])


def test_plans_are_kept_and_share_their_buffers():
    world = World(config_of((None, 40), heads=(1, 1)), triton=True)
    world.step(prefills=[New("a", 3), New("b", 3)])
    world.step(decodes=[New("a", 1), New("b", 1)])
    first = dict(world.backend._plans)
    world.step(decodes=[New("a", 1)])
    world.step(decodes=[New("b", 1), New("a", 1)])
    plans = world.backend._plans
    assert len(first) == 2
    assert len(plans) == 4
    assert all(plans[key] is plan for key, plan in first.items())
    assert len({plan.partial_out.data_ptr() for plan in plans.values()}) == 1
    assert len({plan.table.data_ptr() for plan in plans.values()}) == 2  # one for each window


def test_scratch_bytes():
    config = config_of((None, 40))
    formats = {kv: layer_layouts(config, kv, (0,), PAGE, torch.bfloat16) for kv in ("auto", "int4")}
    assert scratch_bytes(config, formats["auto"], 100, torch.bfloat16) == 0
    assert scratch_bytes(config, formats["int4"], 100, torch.bfloat16) == 4 * PAGE * 2 * 2 * HEAD_DIM * 2
    assert scratch_bytes(config, formats["int4"], 96, torch.bfloat16) == 3 * PAGE * 2 * 2 * HEAD_DIM * 2


def test_runs_fit_the_scratch_and_miss_nobody():
    assert list(_fitting([3, 2, 0, 2], 4)) == [slice(0, 1), slice(1, 4)]
    assert list(_fitting([0, 0], 4)) == [slice(0, 2)]
    rng = random.Random(0)
    for _ in range(200):
        pages = [rng.randint(0, 8) for _ in range(rng.randint(1, 12))]
        runs = list(_fitting(pages, 8))
        assert [seq for run in runs for seq in range(run.start, run.stop)] == list(range(len(pages)))
        assert all(run.start < run.stop and sum(pages[run]) <= 8 for run in runs)


def test_shifted_positions_keep_their_row_of_the_residual_window():
    for kv_dtype in ("fp8", "int4"):
        for page_size in (32, 64, 128):
            layout = PageLayout(kv_dtype, HEAD_DIM, page_size)
            assert _first_page_step(layout) * page_size % (layout.residual_size or 1) == 0


def test_the_backend_for_a_device():
    config = config_of()
    layouts = layer_layouts(config, "auto", (), PAGE, torch.float32)
    cache = KVCache.allocate(config, layouts, kv_groups(config.layer_windows), 2, 1, "cpu", torch.float32)
    assert isinstance(attention_for(config, cache, dtype=torch.float32, max_model_len=64), TorchAttention)
    with pytest.raises(UserError, match="dtype is float32; on a GPU it must be bfloat16 or float16"):
        TritonAttention(config, cache, dtype=torch.float32, max_model_len=64)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["auto", *QUANTISED])
def test_triton_long_random_play(kv_dtype):
    config = config_of((None, 48, 48), heads=(8, 2))
    play_at_random(World(config, kv_dtype, triton=True, seed=3, num_blocks=120), num_steps=40)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["auto", *QUANTISED])
def test_a_captured_step_is_the_eager_one(kv_dtype):
    """Captured with two sequences and one of padding, replayed with other lengths, tables, pages and queries."""
    world = World(config_of((None, 40)), kv_dtype, triton=True)
    backend, work = world.backend, [New("a", 1), New("b", 1)]
    world.step(prefills=[New("a", 29), New("b", 70)])
    world.step(decodes=work, num_padding=1)  # makes the plans

    def next_batch() -> StepBatch:
        for new in work:
            world._take_pages(new)
        return world.batch(work, [], 1)

    def layers() -> list[torch.Tensor]:
        backend.begin_step(batch)
        outs = []
        for i, qkv in enumerate(inputs):
            backend.write(i, *qkv, batch.places, world.rope, keeps_key=False)
            outs.append(backend.attend(i, *qkv, batch).clone())
        return outs

    def restore(state) -> None:
        for tensor, content in state:
            tensor.copy_(content)

    batch, inputs = next_batch(), [world.random_qkv(3) for _ in range(2)]
    backend._check = False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    world.step(decodes=work, num_padding=1)
    world.step(decodes=work, num_padding=1)
    for name, new in vars(next_batch()).items():
        if isinstance(new, torch.Tensor):
            getattr(batch, name).copy_(new)
        elif name == "groups":
            for group, fresh in zip(batch.groups, new, strict=True):
                group.block_tables.copy_(fresh.block_tables)
                group.slots.copy_(fresh.slots)
    written = [t for layer in world.cache.layers for t in (layer.pages, layer.residual) if t is not None]
    written += [x for qkv in inputs for x in qkv]  # rotated in place
    state = [
        (tensor, torch.randn_like(tensor) if tensor.dim() == 3 and tensor.is_floating_point() else tensor.clone())
        for tensor in written
    ]
    restore(state)
    graph.replay()
    replayed = [out.clone() for out in captured]
    restore(state)
    for out, eager in zip(replayed, layers(), strict=True):
        assert torch.equal(out, eager)
        assert out[2].count_nonzero() == 0
