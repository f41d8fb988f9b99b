"""The operations of a decoder against float64 arithmetic, and the kernels' against PyTorch's on a GPU."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.models.modules import Linear
from engine.ops import Ops, TorchOps, TritonOps, ops_for
from kernels.reference import pages
from kernels.reference.attention import start_of

E4M3_MAX = 448.0
EPS = 1e-5
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def dense_linear(
    outputs: int, inputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Linear:
    weight = normal(outputs, inputs, seed=1, dtype=dtype, device=device) / inputs**0.5
    return Linear(weight, bias=normal(outputs, seed=2, dtype=dtype, device=device) if bias else None)


def fp8_linear(linear: Linear) -> Linear:
    """The same layer with a float8 weight: one scale per output channel, absmax / 448."""
    scale = linear.weight.float().abs().amax(1).clamp(min=1e-12) / E4M3_MAX
    return Linear((linear.weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale, linear.bias)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * (weight.double() + offset)


def exact_linear(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    weight = linear.weight.double() if linear.scale is None else linear.weight.double() * linear.scale.double()[:, None]
    out = x.double() @ weight.T
    return out if linear.bias is None else out + linear.bias.double()


def rounded_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """x as a float8 layer sees it: float64 of the rounded values, one scale per token."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_fp8_result(found: torch.Tensor, x: torch.Tensor, linear: Linear) -> None:
    """Near the product of x rounded to float8, and about as far from that of x itself as rounding to e4m3 puts it.

    A value on the edge between two codes may fall on either side, which costs 1/16 of one of a few hundred summands;
    rounding all of them costs 2^-4 / √3 = 3.6 % where they are largest in their binade, and less elsewhere.
    """
    assert relative_error(found, exact_linear(rounded_to_fp8(x), linear)) < 0.004
    assert 0.005 < relative_error(found, exact_linear(x, linear)) < 0.036


# ---- composites, on a CPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_linear(bias, offset, with_residual):
    x, weight, linear = normal(5, 96), normal(96, seed=3), dense_linear(48, 96, bias=bias)
    residual = normal(5, 96, seed=4) if with_residual else None
    total = x + residual if with_residual else x
    before = x.clone()
    found = ops_for(CPU).norm_linear(x, weight, linear, EPS, residual=residual, weight_offset=offset)
    assert relative_error(found, exact_linear(exact_norm(total, weight, offset), linear)) < 1e-6
    assert x.equal(before)
    if with_residual:
        assert residual.equal(total)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_linear_fp8(bias, with_residual):
    x, weight, linear = normal(7, 256), normal(256, seed=3), fp8_linear(dense_linear(64, 256, bias=bias))
    residual = normal(7, 256, seed=4) if with_residual else None
    total = x + residual if with_residual else x
    found = ops_for(CPU).norm_linear(x, weight, linear, EPS, residual=residual, weight_offset=1.0)
    assert found.dtype == x.dtype
    assert_fp8_result(found, exact_norm(total, weight, 1.0), linear)
    if with_residual:
        assert residual.equal(total)


@pytest.mark.parametrize(
    ("activation", "exact"),
    [("silu", torch.nn.functional.silu), ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"))],
)
def test_activation_linear(activation, exact):
    gate_up, linear = normal(6, 2 * 256), dense_linear(64, 256, bias=True)
    gate, up = gate_up.double().chunk(2, dim=1)
    inner = exact(gate) * up
    ops = ops_for(CPU)
    assert relative_error(ops.activation_linear(gate_up, linear, activation), exact_linear(inner, linear)) < 1e-6
    quantised = fp8_linear(linear)
    assert_fp8_result(ops.activation_linear(gate_up, quantised, activation), inner, quantised)


@settings(max_examples=30)
@given(
    num_tokens=st.integers(1, 20),
    inputs=st.sampled_from([16, 48, 512]),
    outputs=st.sampled_from([16, 80]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    bias=st.booleans(),
)
def test_linear_fp8_is_the_product_of_rounded_numbers(num_tokens, inputs, outputs, magnitude, bias):
    x, linear = magnitude * normal(num_tokens, inputs), fp8_linear(dense_linear(outputs, inputs, bias=bias))
    found = ops_for(CPU).linear(x, linear)
    assert relative_error(found, exact_linear(rounded_to_fp8(x), linear)) < 1e-3


def test_fp8_tokens_do_not_depend_on_their_neighbours():
    x, linear = normal(9, 64), fp8_linear(dense_linear(32, 64))
    x[3] *= 1e6
    ops = ops_for(CPU)
    together = ops.linear(x, linear)
    alone = torch.cat([ops.linear(row[None], linear) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5 * float(alone[0].abs().max()))


def test_fp8_of_a_row_of_zeros():
    linear = fp8_linear(dense_linear(32, 64, bias=True))
    assert ops_for(CPU).linear(torch.zeros(2, 64), linear).equal(linear.bias.expand(2, -1))


def test_embed():
    table, token_ids = normal(11, 8, dtype=torch.bfloat16), torch.tensor([3, 0, 10, 3])
    before = table.clone()
    ops = ops_for(CPU)
    assert ops.embed(token_ids, table).equal(table[token_ids])
    # Transformers multiplies by a tensor of the model's dtype.
    scale = torch.tensor(8**0.5, dtype=torch.bfloat16)
    assert ops.embed(token_ids, table, float(scale)).equal(table[token_ids] * scale)
    assert table.equal(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_cap(dtype):
    logits = 40 * normal(4, 33, dtype=dtype)
    wanted = (30 * torch.tanh(logits.double() / 30)).to(dtype)
    found = ops_for(CPU).soft_cap(logits, 30.0)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted)


# ---- sampling ------------------------------------------------------------------------------------------------------


def sampling_arguments(num_rows: int, device: torch.device = CPU) -> dict[str, torch.Tensor]:
    return {
        "temperature": torch.linspace(0, 1.5, num_rows, device=device),
        "top_k": torch.zeros(num_rows, dtype=torch.int32, device=device),
        "top_p": torch.ones(num_rows, device=device),
        "min_p": torch.zeros(num_rows, device=device),
        "seeds": torch.arange(num_rows, device=device) * 7919 - 3,
        "positions": torch.arange(num_rows, device=device) + 2**33,
    }


def test_sample_without_filters_is_sample_with_idle_ones():
    logits, arguments = 3 * normal(24, 100), sampling_arguments(24)
    ops = ops_for(CPU)
    tokens = ops.sample(logits, **arguments)
    assert tokens.dtype == torch.int64
    assert tokens[0] == logits[0].argmax()
    assert tokens.equal(ops.sample(logits, **arguments, filtered=False))
    assert len(tokens.unique()) > 5


def test_sample_filters():
    logits, arguments = normal(200, 64)[:1].expand(200, -1).contiguous(), sampling_arguments(200)
    arguments["temperature"] = torch.ones(200)
    arguments["top_k"] = torch.full((200,), 3, dtype=torch.int32)
    tokens = ops_for(CPU).sample(logits, **arguments)
    assert set(tokens.tolist()) == set(logits[0].topk(3).indices.tolist())


def test_sample_is_the_same_alone_and_in_a_crowd():
    logits, arguments = 3 * normal(12, 100), sampling_arguments(12)
    ops = ops_for(CPU)
    crowd = ops.sample(logits, **arguments)
    alone = [ops.sample(logits[i : i + 1], **{k: v[i : i + 1] for k, v in arguments.items()}) for i in range(12)]
    assert crowd.equal(torch.cat(alone))


# ---- slots ---------------------------------------------------------------------------------------------------------


def slot_arguments(device: torch.device) -> tuple:
    """Three sequences with 1, 0 and 4 new tokens, in pages of 32, then two rows of padding."""
    tables = torch.tensor([[7, 3, 0], [1, 2, 0], [5, 9, 4]], dtype=torch.int32, device=device)
    query_start = torch.tensor([0, 1, 1, 5], dtype=torch.int32, device=device)
    return tables, query_start, torch.tensor([33, 40, 66], dtype=torch.int32, device=device), 7, 32


SLOTS = ([32, 62, 63, 64, 65, 0, 0], [96, 318, 319, 128, 129, -1, -1])


def test_slot_mapping():
    positions, slots = ops_for(CPU).slot_mapping(*slot_arguments(CPU))
    assert (positions.tolist(), slots.tolist()) == SLOTS


@given(
    new_and_old=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=6),
    padding=st.integers(0, 3),
)
def test_slot_mapping_is_the_reference(new_and_old, padding):
    new, old = torch.tensor(new_and_old, dtype=torch.int32).T
    tables = torch.randperm(len(new) * 4, generator=torch.Generator().manual_seed(0)).int().view(-1, 4)
    arguments = (tables, start_of(new), old + new, int(new.sum()) + padding, 32)
    for found, wanted in zip(ops_for(CPU).slot_mapping(*arguments), pages.slot_mapping(*arguments), strict=True):
        assert found.equal(wanted)


@pytest.mark.gpu
def test_slot_mapping_kernel():
    positions, slots = ops_for(CUDA).slot_mapping(*slot_arguments(CUDA))
    assert (positions.tolist(), slots.tolist()) == SLOTS


# ---- which device, which code --------------------------------------------------------------------------------------


def test_ops_for():
    assert isinstance(ops_for(CPU), TorchOps)
    assert isinstance(ops_for("cpu"), TorchOps)
    with pytest.raises(UserError, match="device is meta; the engine runs on cuda or cpu"):
        ops_for(torch.device("meta"))


def test_cpu_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from engine.models.modules import Linear
from engine.ops import ops_for
ops = ops_for(torch.device("cpu"))
x, weight = torch.randn(2, 16), torch.randn(16, 16)
for linear in (Linear(weight), Linear(weight.to(torch.float8_e4m3fn), torch.ones(16))):
    x = ops.norm_linear(x, torch.ones(16), linear, 1e-6)
    x = ops.activation_linear(torch.cat([x, x], 1), linear)
    x = ops.linear(x, linear)
ones = torch.ones(2)
ops.sample(x, temperature=ones, seeds=ones.long(), positions=ones.long())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


class SkinnyLog:
    """Stands for kernels.skinny, and keeps what was called."""

    def __init__(self):
        self.calls = []

    def is_faster(self, num_rows, n, k):
        return num_rows <= 3

    def skinny_linear(self, x, weight, *, bias=None, out=None, pdl, check):
        assert pdl and not check
        self.calls.append(("linear", x.shape[0]))
        result = torch.nn.functional.linear(x, weight, bias)
        return result if out is None else out.copy_(result)

    def skinny_gate_up(self, x, weight, *, activation, pdl, check):
        assert pdl and not check
        self.calls.append(("gate_up", x.shape[0]))
        return TorchOps().silu_mul(torch.nn.functional.linear(x, weight), activation=activation)


@pytest.fixture
def triton_ops_on_cpu() -> TritonOps:
    """What TritonOps decides on the host, with references in place of kernels."""
    ops = TritonOps()
    reference = TorchOps()
    unchecked = {
        name: lambda *args, check, name=name, **kwargs: getattr(reference.elementwise, name)(*args, **kwargs)
        for name in ("rms_norm", "silu_mul")
    }
    ops.elementwise = SimpleNamespace(**unchecked)
    ops.skinny = SkinnyLog()
    return ops


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_products_into_given_memory(bias, fp8):
    ops, linear, x = ops_for(CPU), dense_linear(48, 32, bias=bias), normal(5, 32)
    linear = fp8_linear(linear) if fp8 else linear
    out = torch.full((5, 48), torch.nan)
    assert ops.norm_linear(x, torch.ones(32), linear, EPS, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, ops.norm_linear(x, torch.ones(32), linear, EPS))


def test_skinny_products(triton_ops_on_cpu):
    ops, calls = triton_ops_on_cpu, triton_ops_on_cpu.skinny.calls
    linear = dense_linear(48, 32, bias=True, dtype=torch.bfloat16)
    few, many = normal(3, 32, dtype=torch.bfloat16), normal(4, 32, dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(few, linear.weight, linear.bias)
    assert ops.linear(few, linear).equal(wanted)
    assert calls == []
    ops.use_skinny = True
    assert ops.linear(few, linear).equal(wanted)
    assert calls == [("linear", 3)]
    ops.linear(many, linear)
    ops.linear(few.float(), dense_linear(48, 32))
    assert calls == [("linear", 3)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 5])
def test_skinny_mlp(triton_ops_on_cpu, num_tokens, bias):
    """The fused half is used where it can be, and gives what the composites give."""
    ops, calls = triton_ops_on_cpu, triton_ops_on_cpu.skinny.calls
    gate_up = dense_linear(96, 32, bias=bias, dtype=torch.bfloat16)
    down = dense_linear(32, 48, dtype=torch.bfloat16)
    x, norm = normal(num_tokens, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    wanted = TorchOps().gated_mlp(x, norm, gate_up, down, EPS, activation="gelu_tanh")
    ops.use_skinny = True
    assert ops.gated_mlp(x, norm, gate_up, down, EPS, activation="gelu_tanh").equal(wanted)
    few = [("linear", 2), ("linear", 2)] if bias else [("gate_up", 2), ("linear", 2)]
    assert calls == (few if num_tokens == 2 else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_mm_is_called_as_it_wants(triton_ops_on_cpu, dtype, bias):
    """torch's CPU version takes the same arguments; its result is rounded to bfloat16."""
    x, linear = normal(5, 64, dtype=dtype), fp8_linear(dense_linear(48, 64, bias=bias, dtype=dtype))
    quantised = TorchOps().quantise.quantise_tokens_fp8(x)
    found = triton_ops_on_cpu.product_fp8(quantised, linear, dtype)
    assert found.dtype == dtype
    assert relative_error(found, exact_linear(rounded_to_fp8(x), linear)) < 2.0**-8


# ---- kernels against PyTorch, on a GPU -----------------------------------------------------------------------------


def composites(ops: Ops, dtype: torch.dtype, device: torch.device, num_tokens: int, fp8: bool) -> dict:
    """Every operation on the same numbers, whatever the device: name -> result."""
    hidden, inner = 256, 512
    made = {"dtype": dtype, "device": device}
    layers = {
        name: dense_linear(outputs, inputs, bias=bias, dtype=dtype)
        for name, outputs, inputs, bias in (
            ("qkv", 384, hidden, True),
            ("gate_up", 2 * inner, hidden, False),
            ("down", hidden, inner, False),
        )
    }
    for name, layer in layers.items():
        layer = fp8_linear(layer) if fp8 else layer
        tensors = (layer.weight, layer.scale, layer.bias)
        layers[name] = Linear(*(None if tensor is None else tensor.to(device) for tensor in tensors))
    x, residual = normal(num_tokens, hidden, seed=5, **made), normal(num_tokens, hidden, seed=6, **made)
    weight = normal(hidden, seed=7, **made)
    results = {"norm_linear": ops.norm_linear(x, weight, layers["qkv"], EPS)}
    heads = results["norm_linear"].clone().view(num_tokens, 6, 64)
    query, key, value = heads.split([4, 1, 1], dim=1)
    angles = torch.outer(torch.arange(num_tokens).float(), 10_000 ** (-torch.arange(32) / 32)).to(device)
    norms = {"query_norm": normal(64, seed=8, **made), "key_norm": normal(64, seed=9, **made)}
    positions = torch.arange(num_tokens, device=device)
    ops.qk_norm_rope(query, key, angles.cos(), angles.sin(), positions, **norms, eps=EPS, weight_offset=1.0)
    results |= {"query": query, "key": key, "value": value}
    results["linear"] = ops.linear(x, layers["gate_up"])
    results["gate_up"] = ops.norm_linear(x, weight, layers["gate_up"], EPS, residual=residual, weight_offset=1.0)
    results["residual"] = residual
    results["down"] = ops.activation_linear(results["gate_up"], layers["down"], "gelu_tanh")
    results["norm"] = ops.rms_norm(results["down"], weight, EPS)
    results["soft_cap"] = ops.soft_cap(results["gate_up"].clone(), 5.0)
    results["embedded"] = ops.embed(positions % 4, x, 3.0)
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("use_skinny", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16, 75])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_are_as_exact_as_pytorch(dtype, num_tokens, use_skinny, fp8):
    """Error against float32 at most twice that of plain PyTorch in the same dtype; float8 products come in bfloat16."""
    exact = composites(TorchOps(), torch.float32, CPU, num_tokens, fp8)
    plain = composites(TorchOps(), torch.bfloat16 if fp8 else dtype, CPU, num_tokens, fp8)
    found = composites(TritonOps(use_skinny=use_skinny), dtype, CUDA, num_tokens, fp8)
    for name, wanted in exact.items():
        assert found[name].dtype == dtype
        allowed = 2 * relative_error(plain[name], wanted.double()) + 1e-5
        assert relative_error(found[name].cpu(), wanted.double()) <= allowed, name


@pytest.mark.gpu
def test_sample_kernel_draws_the_reference_tokens():
    logits, arguments = 3 * normal(64, 1000), sampling_arguments(64)
    arguments["top_k"][::3] = 20
    arguments["min_p"][::5] = 0.05
    wanted = TorchOps().sample(logits, **arguments)
    on_gpu = {name: values.cuda() for name, values in arguments.items()}
    assert TritonOps().sample(logits.cuda(), **on_gpu).cpu().equal(wanted)
