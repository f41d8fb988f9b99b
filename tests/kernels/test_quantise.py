"""Per-token fp8: codes and scales against the reference, to the bit, and fused kernels against their two steps."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import elementwise, quantise
from kernels.aot import Compiled
from kernels.reference import quantise as plain

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # all finite, 0 to 448


def strided(shape: tuple[int, int], gap: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers whose rows stand `gap` elements apart, with NaN in the gaps: nobody may read those."""
    buffer = torch.full((shape[0], shape[1] + gap), float("nan"), dtype=dtype, device=device)
    view = buffer[:, : shape[1]]
    view.copy_(torch.randn(shape, device=device) * torch.logspace(-2, 1, shape[0], device=device)[:, None])
    return view


def assert_same(result: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert result[0].dtype == torch.float8_e4m3fn and result[1].dtype == torch.float32
    assert result[1].shape == (len(result[0]), 1)
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[0].view(torch.uint8), expected[0].view(torch.uint8))


widths = st.one_of(st.integers(1, 300), st.sampled_from([896, 2880, 3072, 5120]))


@settings(max_examples=25)
@given(num_tokens=st.integers(1, 9), width=widths, gap=st.sampled_from([0, 5, 16]))
def test_quantise_tokens(num_tokens, width, gap, device, dtype):
    torch.manual_seed(num_tokens * width)
    x = strided((num_tokens, width), gap, dtype, device)
    out = torch.zeros(num_tokens, width + gap, dtype=torch.float8_e4m3fn, device=device)
    result = quantise.quantise_tokens_fp8(x, out=out[:, :width])
    assert result[0].data_ptr() == out.data_ptr()
    assert_same(result, plain.quantise_tokens_fp8(x))
    assert_same(quantise.quantise_tokens_fp8(x), result)
    assert (out[:, width:].float() == 0).all()


def test_every_code_is_the_nearest(device):
    """Against a search among all e4m3 numbers: halfway cases to the even code, nothing beyond 448."""
    between = (E4M3[1:] + E4M3[:-1]) / 2
    x = torch.cat([E4M3, between, between * (1 + 2**-20), between * (1 - 2**-20)]).float()
    x = torch.cat([x, -x])[None].to(device)  # the largest is 448, so the scale is 1
    codes, scale = quantise.quantise_tokens_fp8(x)
    assert scale.item() == 1
    magnitudes = x[0].abs().double().cpu()
    distance = (magnitudes[:, None] - E4M3).abs()
    nearest = distance.min(dim=1).values[:, None] == distance
    even = torch.arange(127) % 2 == 0
    wanted = torch.where(nearest.sum(1) == 2, (nearest & even).int().argmax(1), nearest.int().argmax(1))
    found = codes[0].view(torch.uint8).cpu().int()
    assert torch.equal(found & 127, wanted.int())
    assert torch.equal(found >> 7, (x[0].signbit()).int().cpu())


@pytest.mark.parametrize("factor", [1e-7, 1.0, 6e4])
def test_rows_of_any_size_come_back(factor, device):
    x = (torch.rand(4, 200, device=device) * 2 - 1) * factor
    codes, scale = quantise.quantise_tokens_fp8(x)
    # A normal e4m3 has 3 bits of mantissa, so half a step is 2^-4 of it; below, the step is 2^-9 scales.
    assert ((codes.float() * scale - x).abs() <= 2**-4 * x.abs() * 1.0001 + 2**-10 * scale).all()
    assert (codes.float().abs().amax(dim=1) == 448).all()


def test_zeros_and_nan(device, dtype):
    x = torch.zeros(2, 48, device=device, dtype=dtype)
    x[1, 3] = 2.0
    codes, scale = quantise.quantise_tokens_fp8(x)
    assert (codes[0].float() == 0).all() and 0 < scale[0].item() < 1e-20
    assert codes[1].float().tolist() == [448.0 if i == 3 else 0.0 for i in range(48)]


@pytest.mark.gpu
def test_nan_stays_nan(device, dtype):
    x = torch.ones(1, 48, device=device, dtype=dtype)
    x[0, 3] = float("nan")
    codes, _ = quantise.quantise_tokens_fp8(x)
    assert codes[0].float().isnan().nonzero().tolist() == [[3]]


def check_rms_norm(num_tokens, hidden, gap, with_residual, weight_offset, device, dtype):
    torch.manual_seed(num_tokens * hidden)
    x = strided((num_tokens, hidden), gap, dtype, device)
    weight = torch.randn(hidden, device=device).to(dtype)
    residual = strided((num_tokens, hidden), gap, dtype, device) if with_residual else None
    twin = None if residual is None else residual.clone()
    expected = elementwise.rms_norm(x, weight, 1e-6, residual=twin, weight_offset=weight_offset)
    result = quantise.rms_norm_fp8(x, weight, 1e-6, residual=residual, weight_offset=weight_offset)
    assert_same(result, plain.quantise_tokens_fp8(expected))
    if with_residual:
        assert torch.equal(residual, twin)


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 9),
    hidden=widths,
    gap=st.sampled_from([0, 5, 16]),
    with_residual=st.booleans(),
    weight_offset=st.sampled_from([0.0, 1.0]),
)
def test_rms_norm_has_the_bits_of_two_steps(num_tokens, hidden, gap, with_residual, weight_offset, device, dtype):
    check_rms_norm(num_tokens, hidden, gap, with_residual, weight_offset, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 896, 1536, 2048, 2880, 3584, 4096, 5120, 7168, 8192, 14336, 16384])
@pytest.mark.parametrize("num_tokens", [1, 7, 1000])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_of_real_sizes(hidden, num_tokens, with_residual, device, dtype):
    check_rms_norm(num_tokens, hidden, 0, with_residual, 0.0, device, dtype)


def check_silu_mul(num_tokens, width, gap, activation, device, dtype):
    torch.manual_seed(width)
    gate_up = strided((num_tokens, 2 * width), gap, dtype, device)
    expected = elementwise.silu_mul(gate_up, activation=activation)
    assert_same(quantise.silu_mul_fp8(gate_up, activation=activation), plain.quantise_tokens_fp8(expected))


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 9),
    width=widths,
    gap=st.sampled_from([0, 3, 16]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
)
def test_silu_mul_has_the_bits_of_two_steps(num_tokens, width, gap, activation, device, dtype):
    check_silu_mul(num_tokens, width, gap, activation, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 4864, 8960, 11008, 14336, 18944, 25600, 28672, 53248, 65536])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_silu_mul_of_real_sizes(width, activation, device, dtype):
    check_silu_mul(101, width, 0, activation, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [28673, 65536])
def test_widest_rows(width, device, dtype):
    x = torch.randn(3, width, device=device).to(dtype)
    assert_same(quantise.quantise_tokens_fp8(x), plain.quantise_tokens_fp8(x))
    weight = torch.ones(width, device=device, dtype=dtype)
    codes, scale = quantise.rms_norm_fp8(x, weight, 1e-6)
    expected = plain.rms_norm_fp8(x.double().to(dtype), weight, 1e-6)
    torch.testing.assert_close(scale, expected[1], rtol=2**-7, atol=0)
    assert (codes.float() * scale - expected[0].float() * expected[1]).abs().max() <= 32 * scale.max()


@pytest.mark.gpu
def test_beyond_2_31_elements(device, dtype):
    x = torch.zeros(2**31 // 4096 + 8, 4096, dtype=dtype, device=device)
    x[-1] = torch.randn(4096, device=device)
    codes, scale = quantise.quantise_tokens_fp8(x)
    assert_same((codes[-1:], scale[-1:]), plain.quantise_tokens_fp8(x[-1:]))


def test_references_are_their_two_steps(device):
    """By hand, in numbers that come out even: rms 1, scale 1 / 448."""
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    codes, scale = plain.rms_norm_fp8(x, torch.ones(4), 1e-12)
    assert codes.float().tolist() == [[448.0, -448.0, 448.0, -448.0]]
    torch.testing.assert_close(scale, torch.tensor([[1 / 448]]))
    gate_up = torch.tensor([[1e4, 1e4, 224.0 / 1e4, 448.0 / 1e4]])
    codes, scale = plain.silu_mul_fp8(gate_up)
    assert codes.float().tolist() == [[224.0, 448.0]]
    torch.testing.assert_close(scale, torch.tensor([[1.0]]))


def test_no_tokens(device, dtype):
    x, weight = torch.zeros(0, 64, device=device, dtype=dtype), torch.ones(64, device=device, dtype=dtype)
    for (codes, scale), width in [
        (quantise.quantise_tokens_fp8(x), 64),
        (quantise.rms_norm_fp8(x, weight, 1e-6), 64),
        (quantise.silu_mul_fp8(x), 32),
    ]:
        assert codes.shape == (0, width) and scale.shape == (0, 1)


@pytest.mark.parametrize("width", [1, 100, 896, 2880, 4096, 14336, 28672, 53248, 65536])
def test_tiles_cover_a_row_8_elements_a_thread(width):
    chunk, num_chunks, rows, num_warps = quantise.row_tile(width)
    assert width <= chunk * num_chunks <= max(128, 1.1 * width)
    assert rows * chunk == 256 * num_warps


def test_bad_arguments_are_named(device, dtype):
    x, weight = torch.zeros(2, 64, device=device, dtype=dtype), torch.ones(64, device=device, dtype=dtype)
    for message, call in [
        ("x is a NoneType", lambda: quantise.quantise_tokens_fp8(None)),
        ("x is int32", lambda: quantise.quantise_tokens_fp8(x.int())),
        (r"x has shape \[64\]", lambda: quantise.quantise_tokens_fp8(x[0])),
        ("x has stride 2", lambda: quantise.quantise_tokens_fp8(x[:, ::2])),
        ("x gives rows of 0", lambda: quantise.quantise_tokens_fp8(x[:, :0])),
        ("x gives rows of 65537", lambda: quantise.quantise_tokens_fp8(torch.zeros(1, 65537, device=device))),
        ("out is float16|out is bfloat16", lambda: quantise.quantise_tokens_fp8(x, out=x.clone())),
        (r"weight has shape \[32\]", lambda: quantise.rms_norm_fp8(x, weight[:32], 1e-6)),
        ("eps is 0", lambda: quantise.rms_norm_fp8(x, weight, 0)),
        (r"residual has shape \[1, 64\]", lambda: quantise.rms_norm_fp8(x, weight, 1e-6, residual=x[:1])),
        ("gate_up has 63 columns", lambda: quantise.silu_mul_fp8(x[:, :63])),
        ("gate_up gives rows of 65537", lambda: quantise.silu_mul_fp8(torch.zeros(1, 2 * 65537, device=device))),
        ("activation is 'relu'", lambda: quantise.silu_mul_fp8(x, activation="relu")),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- machine code --------------------------------------------------------------------------------------------------


def _compile(kernel, width: int, tensors: dict[str, str], strides: tuple[str, ...], **constants) -> Compiled:
    from kernels.aot import compile_for_hopper

    chunk, num_chunks, rows, num_warps = quantise.row_tile(width)
    tile = {"WIDTH": width, "CHUNK": chunk, "NUM_CHUNKS": num_chunks, "ROWS": rows}
    return compile_for_hopper(
        kernel,
        tensors | {"out_ptr": "*u8", "scale_ptr": "*fp32"} | dict.fromkeys(("num_tokens", *strides), "i32"),
        tile | constants,
        num_warps=num_warps,
        divisible_by_16=strides,
    )


def _specimen_quantise() -> Compiled:
    return _compile(quantise.quantise_tokens_kernel, 4096, {"x_ptr": "*bf16"}, ("x_stride", "out_stride"))


def _specimen_rms_norm() -> Compiled:
    tensors = dict.fromkeys(("x_ptr", "weight_ptr", "residual_ptr"), "*bf16") | {"eps": "fp32"}
    strides = ("x_stride", "residual_stride", "out_stride")
    return _compile(quantise.rms_norm_fp8_kernel, 5120, tensors, strides, WEIGHT_OFFSET=0.0)


def _specimen_silu_mul() -> Compiled:
    strides = ("gate_up_stride", "out_stride")
    return _compile(quantise.silu_mul_fp8_kernel, 14336, {"gate_up_ptr": "*bf16"}, strides, GELU_TANH=False)


@pytest.mark.parametrize(
    ("specimen", "registers", "loads", "residuals", "codes"),
    [(_specimen_quantise, 64, 4, 0, 4), (_specimen_rms_norm, 96, 15, 5, 5), (_specimen_silu_mul, 80, 14, 0, 7)],
)
def test_machine_code_passes_over_memory_once(specimen, registers, loads, residuals, codes, compile_for_hopper):
    compiled = compile_for_hopper(specimen)
    assert compiled.stack_bytes == 0
    assert compiled.registers <= registers
    assert re.findall(r"LDG\.E\S*", compiled.sass) == ["LDG.E.128"] * loads
    stores = re.findall(r"STG\.E\S*", compiled.sass)
    # 8 codes of a thread are 8 bytes; the scale is the last.
    assert stores == ["STG.E.128"] * residuals + ["STG.E.64"] * codes + ["STG.E"]
    order = re.findall(r"\b(LDG|STG)\.E", compiled.sass)
    assert order == ["LDG"] * loads + ["STG"] * len(stores)
