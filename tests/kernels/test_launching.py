"""A launcher finds the kernel that Triton would have found."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import cache, elementwise, launching, quantise, skinny
from kernels.launching import Launcher
from kernels.pages import PageLayout


class Kernel:
    """Stands for a Triton kernel: notes what it was asked to compile, and what was launched with what."""

    arg_names = ("x_ptr", "scale", "n", "BLOCK", "c")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **more):
            constants = tuple(more[name] for name in self.arg_names[len(arguments) :])
            self.compiled.append((grid, arguments, more))
            self.launched.append((grid, (*arguments, *constants)))
            return self.binary(len(self.compiled))

        return run

    def binary(self, number):
        launched = self.launched

        class Binary:
            def __getitem__(self, grid):
                return lambda *arguments: launched.append((grid, arguments, number))

        return Binary()


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_the_second_launch_does_not_ask_triton():
    kernel, shape = Kernel(), object()
    launcher = Launcher(kernel, by_identity=("c",))
    x, y = torch.zeros(64), torch.ones(32)
    launcher[(3,)](x, 0.5, 7, BLOCK=16, c=shape, num_warps=4)
    launcher[(5, 2)](y, 0.5, 7, BLOCK=16, c=shape, num_warps=4)
    assert len(kernel.compiled) == 1
    grid, arguments, number = kernel.launched[1]
    assert (grid, number) == ((5, 2, 1), 1)
    assert arguments[0] is y and arguments[1:] == (0.5, 7, 16, shape)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(65)[1:]},  # another alignment
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"x": None},
        {"scale": 0.25},
        {"n": 1},
        {"n": 16},
        {"BLOCK": 32},
        {"c": object()},
        {"num_warps": 8},
        {"num_stages": 4, "num_warps": None},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_is_compiled_anew(other):
    kernel = Kernel()
    launcher = Launcher(kernel, by_identity=("c",))
    first = {"x": torch.zeros(64), "scale": 0.5, "n": 7, "BLOCK": 16, "c": object(), "num_warps": 4}
    for given_ in (first, first | other, first, first | other):
        x, scale, n = (given_[name] for name in ("x", "scale", "n"))
        more = {name: value for name, value in given_.items() if name not in ("x", "scale", "n") and value is not None}
        launcher[(1,)](x, scale, n, **more)
    assert len(kernel.compiled) == 2
    assert [launch[2] for launch in kernel.launched[2:]] == [1, 2]


def test_descriptors_differ_by_box_and_layout():
    kernel, layout = Kernel(), object()
    launcher = Launcher(kernel)

    def descriptor(box, layout=layout, dtype=torch.bfloat16):
        return SimpleNamespace(base=torch.zeros(8, dtype=dtype), block_shape=box, layout=layout)

    kinds = [
        descriptor([1, 64]),
        descriptor([1, 128]),
        descriptor([1, 64], object()),
        descriptor([1, 64], dtype=torch.half),
    ]
    for each in (*kinds, *kinds, descriptor([1, 64])):
        launcher[(1,)](each, 0.5, 7, BLOCK=16, c=1)
    assert len(kernel.compiled) == 4


class Unspecialised(Kernel):
    do_not_specialize = ("n",)


@given(sizes=st.lists(st.integers(-(2**33), 2**33), min_size=1, max_size=30))
def test_numbers_that_no_kernel_is_made_for_are_only_handed_on(sizes):
    kernel = Unspecialised()
    launcher = Launcher(kernel)
    for n in sizes:
        launcher[(1,)](None, 0.5, n, BLOCK=16, c=1)
    assert [arguments[2] for _, arguments, *_ in kernel.launched] == sizes
    # Triton takes 64 bits where it must.
    assert len(kernel.compiled) <= 1 + len({n for n in sizes if not -(2**31) < n < 2**31})
    launcher[(1,)](None, 0.25, sizes[0], BLOCK=16, c=1)
    assert kernel.launched[-1][1][1] == 0.25


@given(sizes=st.lists(st.integers(1, 500), max_size=300))
def test_memory_is_bounded(sizes):
    kernel = Kernel()
    launcher = Launcher(kernel)
    for n in sizes:
        launcher[(1,)](None, 0.5, n, BLOCK=16, c=1)
    assert len(launcher._remembered) <= launching._MAX_REMEMBERED
    assert [arguments[2] for _, arguments, *_ in kernel.launched] == sizes


def test_the_interpreter_is_left_alone(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETING", True)
    kernel = Kernel()
    for _ in range(2):
        Launcher(kernel)[(1,)](None, 0.5, 7, BLOCK=16, c=1)
    assert len(kernel.compiled) == 2


class Signature(Kernel):
    """Of a real kernel: every parameter must be given once, those that change at run time by position."""

    def __init__(self, kernel):
        super().__init__()
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def run(*arguments, **more):
            constants = self.arg_names[len(arguments) :]
            assert all(name.isupper() for name in constants)
            assert not any(name.isupper() for name in self.arg_names[: len(arguments)])
            assert set(constants) <= set(more)
            assert {name for name in more if name not in constants} <= OPTIONS
            return Kernel.__getitem__(self, grid)(*arguments, **more)

        return run


OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl"}


def calls():
    """Every launch of a layer but attention: the module, its launcher, and a call with so many tokens."""
    half, fp8 = torch.float16, torch.float8_e4m3fn
    weight, norm = torch.zeros(32, 64, dtype=half), torch.ones(64, dtype=half)
    rope = {"cos": torch.zeros(100, 32), "sin": torch.zeros(100, 32)}

    def rows(count, width=64, dtype=half):
        return torch.zeros(count, width).to(dtype)

    def write(count, kv_dtype):
        layout = PageLayout(kv_dtype, 64, 32)
        heads = torch.zeros(count, 8, 64, dtype=half)
        places = torch.zeros(count, dtype=torch.int64)
        ones = torch.ones(1, dtype=torch.int32)
        more = {"slots": places, "positions": places, "query": heads[:, :4], "rotated_key": heads[:, 4:6], **rope}
        if layout.is_low_bit:
            names = ("seq_lens", "residual_slots", "flushed_lens", "committed_lens")
            more |= dict.fromkeys(names, ones) | {"block_tables": ones[None], "query_start": torch.zeros(2).int()}
            more["residual"] = layout.empty_residual(1, 2, half)
        cache.write_kv(heads[:, 4:6], heads[:, 6:], layout.empty_cache(4, 2), layout, **more, check=False)

    def dequantise(count, kv_dtype):
        layout, plain = PageLayout(kv_dtype, 64, 32), PageLayout("float16", 64, 32)
        tables, lens = torch.zeros(count, 3, dtype=torch.int32), torch.ones(count, dtype=torch.int32)
        ring = {}
        if layout.is_low_bit:
            ring = {"residual": layout.empty_residual(1, 2, half), "residual_slots": lens, "flushed_lens": lens}
        pages = layout.empty_cache(4, 2), layout, tables, lens, plain.empty_cache(4, 2), plain, tables
        cache.dequantise_pages(*pages, max_context_len=40, **ring, check=False)

    def mapping(count):
        lens = torch.tensor([0, count], dtype=torch.int32)
        cache.slot_mapping(lens[None], lens, lens[1:], count, 32, check=False)

    def skinny_fp8(count):
        scale = torch.ones(count)
        skinny.skinny_linear_fp8(rows(count, 64, fp8), scale, weight.to(fp8), torch.ones(32), check=False)

    yield cache, "_slot_mapping_launcher", mapping
    for kv_dtype in ("float16", "fp8", "int8"):
        yield cache, "_write_tokens_launcher", partial(write, kv_dtype=kv_dtype)
    for kv_dtype in ("int4", "int2"):
        yield cache, "_write_pages_launcher", partial(write, kv_dtype=kv_dtype)
    for kv_dtype in ("fp8", "int8", "int4", "int2"):
        yield cache, "_dequantise_launcher", partial(dequantise, kv_dtype=kv_dtype)
    for residual in (False, True):
        yield (
            *(elementwise, "_rms_norm_launcher"),
            lambda n, r=residual: elementwise.rms_norm(rows(n), norm, 1e-5, residual=rows(n) if r else None),
        )
        yield (
            *(quantise, "_rms_norm_fp8_launcher"),
            lambda n, r=residual: quantise.rms_norm_fp8(rows(n), norm, 1e-5, residual=rows(n) if r else None),
        )
    yield elementwise, "_silu_mul_launcher", lambda n: elementwise.silu_mul(rows(n))
    yield quantise, "_silu_mul_fp8_launcher", lambda n: quantise.silu_mul_fp8(rows(n))
    yield quantise, "_quantise_tokens_launcher", lambda n: quantise.quantise_tokens_fp8(rows(n))
    for key in (None, torch.zeros(7, 2, 64, dtype=half)):
        heads = torch.zeros(7, 4, 64, dtype=half)
        norms = {} if key is None else {"query_norm": norm, "key_norm": norm}
        yield (
            *(elementwise, "_qk_norm_rope_launcher"),
            lambda n, k=key, q=heads, norms=norms: elementwise.qk_norm_rope(
                q[:n], k if k is None else k[:n], *rope.values(), torch.zeros(n).long(), **norms
            ),
        )
    yield skinny, "_rows_launcher", lambda n: skinny.skinny_linear(rows(n)[:2], weight, norm=(norm, 1e-5, 0.0))
    yield skinny, "_tensor_launcher", lambda n: skinny.skinny_gate_up(rows(n), weight)
    yield skinny, "_tensor_launcher", lambda n: skinny.skinny_linear(rows(n), weight, bias=norm[:32])
    yield skinny, "_tensor_launcher", skinny_fp8


@pytest.mark.parametrize(("module", "name", "call"), list(calls()))
def test_what_is_remembered_is_launched_with_all_that_triton_was_given(monkeypatch, module, name, call):
    """The first launch goes by names, the others by position."""
    real = getattr(module, name)._kernel
    kernel = Signature(real)
    monkeypatch.setattr(module, name, Launcher(kernel))
    for count in (7, 7, 5, 7):
        call(count)
    assert len(kernel.launched) == 4
    assert [len(launch) for launch in kernel.launched].count(3) >= 2  # remembered ones
    first, second, _, last = kernel.launched
    for other in (second, last):
        assert other[0] == (*first[0], 1, 1)[:3]
        assert len(other[1]) == len(first[1]) == len(real.arg_names)
        for one, another in zip(first[1], other[1], strict=True):
            if isinstance(one, torch.Tensor):
                assert (one.shape, one.dtype, one.stride()) == (another.shape, another.dtype, another.stride())
            else:
                assert (one, type(one)) == (another, type(another))


@pytest.mark.gpu
def test_a_real_kernel_is_compiled_once_for_layers_that_differ_in_addresses():
    from kernels import prefill_hopper
    from kernels.prefill import prefill_attention

    if not prefill_hopper.is_hopper(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(0)
    start = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
    before = len(prefill_hopper._launcher._remembered)
    results = []
    for _ in range(3):
        q, k, v = (torch.randn(100, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
        out = prefill_attention(q, k, v, query_start=start, max_query_len=100, check=False)
        wide = (x.double().transpose(0, 1) for x in (q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)))
        exact = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(0, 1)
        results.append((out.double() - exact).abs().max().item())
    assert len(prefill_hopper._launcher._remembered) == before + 1
    assert max(results) < 0.03


@pytest.mark.gpu
def test_batches_of_all_sizes_share_a_kernel():
    launcher = elementwise._rms_norm_launcher
    launcher._remembered.clear()
    weight = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    for count in (7, 1, 16, 300, 7):
        x = torch.randn(count, 512, device="cuda", dtype=torch.bfloat16)
        wanted = torch.nn.functional.rms_norm(x.double(), (512,), weight.double(), 1e-5)
        result = elementwise.rms_norm(x, weight, 1e-5, check=False)
        torch.testing.assert_close(result.double(), wanted, rtol=0.01, atol=0.01)
    assert len(launcher._remembered) == 1
