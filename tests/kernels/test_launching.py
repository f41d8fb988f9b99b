"""A launcher finds the kernel that Triton would have found."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import launching
from kernels.launching import Launcher


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
