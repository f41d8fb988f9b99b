"""Matrix products of few rows against float64, by FlashAttention's rule: twice the error of torch's, plus rounding."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import skinny
from kernels.aot import Compiled
from kernels.reference import elementwise, linear, quantise
from kernels.skinny import SkinnyConfig, skinny_gate_up, skinny_linear, skinny_linear_fp8

ROW_CONFIGS = [SkinnyConfig(1, 256, 1, 1), SkinnyConfig(4, 128, 1, 2), SkinnyConfig(8, 64, 4, 3)]
TENSOR_CONFIGS = [
    SkinnyConfig(16, 64, 1, 2, tensor_cores=True),
    SkinnyConfig(16, 128, 4, 3, tensor_cores=True),
    SkinnyConfig(32, 64, 4, 4, tensor_cores=True),
    SkinnyConfig(64, 64, 4, 2, tensor_cores=True),
]


def strided(rows: int, cols: int, gap: int, scale: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random rows `gap` elements apart, with NaN in the gaps: nobody may read those."""
    buffer = torch.full((rows, cols + gap), float("nan"), dtype=dtype, device=device)
    view = buffer[:, :cols]
    view.copy_(scale * torch.randn(rows, cols, device=device))
    return view


def assert_close(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    rounding = torch.finfo(out.dtype).eps * exact.abs().max() / 2
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + rounding


def check(num_rows, n, k, gap, config, device, dtype, *, activation=None, with_bias=False, norm_offset=None):
    """One product, plain or gate and up, into a buffer whose gaps must stay as they are."""
    torch.manual_seed(num_rows + n * k)
    x = strided(num_rows, k, gap, 1.0, dtype, device)
    weight = strided(n, k, gap, k**-0.5, dtype, device)
    bias = torch.randn(n, device=device).to(dtype) if with_bias else None
    norm, plain_x = None, x
    if norm_offset is not None:
        norm = (torch.randn(k, device=device).to(dtype), 1e-5, norm_offset)
        plain_x = elementwise.rms_norm(x, norm[0], norm[1], weight_offset=norm_offset)
    plain = torch.nn.functional.linear(plain_x, weight, bias)
    width = n if activation is None else n // 2
    buffer = torch.full((num_rows, width + gap), 7.0, dtype=dtype, device=device)
    arguments = {"norm": norm, "out": buffer[:, :width]}
    if activation is None:
        exact = linear.skinny_linear(x.double(), weight, bias=bias, norm=norm)
        out = skinny_linear(x, weight, bias=bias, config=config, **arguments)
    else:
        exact = linear.skinny_gate_up(x.double(), weight, activation=activation, norm=norm)
        plain = elementwise.silu_mul(plain, activation=activation)
        out = skinny_gate_up(x, weight, activation=activation, config=config, **arguments)
    assert_close(out, exact, plain)
    assert (buffer[:, width:] == 7).all()


depths = st.one_of(st.integers(1, 300), st.sampled_from([256, 512, 768]))
shapes = {"n": st.integers(1, 70), "k": depths, "gap": st.sampled_from([0, 3, 16]), "with_bias": st.booleans()}


@settings(max_examples=30)
@given(num_rows=st.integers(1, 4), config=st.sampled_from(ROW_CONFIGS), **shapes)
def test_up_to_4_rows(num_rows, n, k, gap, config, with_bias, device, dtype):
    check(num_rows, n, k, gap, config, device, dtype, with_bias=with_bias)


@settings(max_examples=30)
@given(num_rows=st.integers(1, 16), config=st.sampled_from(TENSOR_CONFIGS), **shapes)
def test_up_to_16_rows(num_rows, n, k, gap, config, with_bias, device, dtype):
    check(num_rows, n, k, gap, config, device, dtype, with_bias=with_bias)


@settings(max_examples=30)
@given(
    num_rows=st.integers(1, 4),
    intermediate=st.integers(1, 40),
    k=depths,
    config=st.sampled_from([*ROW_CONFIGS[1:], *TENSOR_CONFIGS]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
)
@example(num_rows=16, intermediate=33, k=200, config=TENSOR_CONFIGS[1], activation="silu")
def test_gate_up(num_rows, intermediate, k, config, activation, device, dtype):
    check(num_rows, 2 * intermediate, k, 3, config, device, dtype, activation=activation)


@settings(max_examples=20)
@given(
    num_rows=st.integers(1, 4),
    k=depths,
    config=st.sampled_from(ROW_CONFIGS[1:]),
    norm_offset=st.sampled_from([0.0, 1.0]),
    activation=st.sampled_from([None, "silu"]),
)
def test_norm_of_x(num_rows, k, config, norm_offset, activation, device, dtype):
    check(num_rows, 24, k, 3, config, device, dtype, activation=activation, norm_offset=norm_offset)


@pytest.mark.parametrize("num_rows", range(1, 17))
def test_default_configurations(num_rows, device, dtype):
    check(num_rows, 50, 96, 0, None, device, dtype)
    check(num_rows, 50, 96, 0, None, device, dtype, activation="silu")


def fp8_numbers(rows: int, cols: int, gap: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with rows `gap` elements apart and NaN in between, and their scales."""
    quantised = quantise.quantise_tokens_fp8(torch.randn(rows, cols, device=device).bfloat16())
    buffer = torch.full((rows, cols + gap), float("nan"), device=device).to(torch.float8_e4m3fn)
    view = buffer[:, :cols]
    view.copy_(quantised[0])
    return view, quantised[1]


def check_fp8(num_rows, n, k, gap, config, device, dtype, with_bias=False):
    torch.manual_seed(num_rows + n * k)
    codes, scale = fp8_numbers(num_rows, k, gap, device)
    weight, weight_scale = fp8_numbers(n, k, gap, device)
    weight_scale = weight_scale.reshape(-1)
    bias = torch.randn(n, device=device).to(dtype) if with_bias else None
    buffer = torch.full((num_rows, n + gap), 7.0, dtype=dtype, device=device)
    out = buffer[:, :n]
    skinny_linear_fp8(codes, scale, weight, weight_scale, dtype=dtype, bias=bias, out=out, config=config)
    exact = linear.skinny_linear_fp8(codes, scale, weight, weight_scale, dtype=torch.float64, bias=bias)
    # Products are exact; their sum is float32's at best, and on tensor cores of fp8 has 14 bits. With more than 8 rows
    # the sum is what Hopper's wgmma keeps over all of k, which adds up: there a peer says what to expect.
    terms = linear.skinny_linear_fp8(
        codes.float().abs().to(codes.dtype), scale, weight.float().abs().to(weight.dtype), weight_scale,
        dtype=torch.float64,
    )  # fmt: skip
    error, bound = (out.double() - exact).abs(), torch.finfo(dtype).eps * exact.abs() + 2**-13 * terms + 1e-6
    if device.type == "cuda" and num_rows > 8 and k % 16 == n % 16 == gap == 0:
        # Without the bias, which cuBLAS does not take with every shape.
        peer = torch._scaled_mm(
            codes, weight.t(), scale_a=scale.reshape(-1, 1), scale_b=weight_scale[None], out_dtype=dtype,
            use_fast_accum=True,
        )  # fmt: skip
        product = linear.skinny_linear_fp8(codes, scale, weight, weight_scale, dtype=torch.float64)
        theirs = (peer.double() - product).abs()
        # The largest error of one is a draw: it may be half as large again as the other's.
        assert error.max() <= 1.5 * theirs.max() and error.mean() <= 1.1 * theirs.mean()
    else:
        assert (error <= bound).all()
    assert (buffer[:, n:] == 7).all()


@settings(max_examples=30)
@given(
    num_rows=st.integers(1, 16),
    config=st.sampled_from([None, *(config for config in TENSOR_CONFIGS if config.block_k >= 32 * config.k_slices)]),
    **shapes,
)
def test_fp8(num_rows, n, k, gap, config, with_bias, device, dtype):
    check_fp8(num_rows, n, k, gap, config, device, dtype, with_bias=with_bias)


def test_norm_does_not_overflow(device):
    """Products of x and the norm's weight may exceed what fp16 holds, their norm does not."""
    x = torch.full((1, 32), 6e4, dtype=torch.float16, device=device)
    weight = torch.full((16, 32), 1 / 32, dtype=torch.float16, device=device)
    norm = (torch.full((32,), 8.0, device=device), 1e-5, 0.0)
    assert torch.equal(skinny_linear(x, weight, norm=norm), torch.full((1, 16), 8.0, dtype=x.dtype, device=device))


def test_rows_do_not_mix(device, dtype):
    """NaN in one row of x stays there, also in those rows of x that are repeated or padded."""
    weight = torch.randn(20, 64, device=device).to(dtype)
    for num_rows, config in [(3, ROW_CONFIGS[1]), (5, TENSOR_CONFIGS[0]), (11, TENSOR_CONFIGS[1])]:
        x = torch.randn(num_rows, 64, device=device).to(dtype)
        expected = skinny_linear(x, weight, config=config)
        x[1] = float("nan")
        out = skinny_linear(x, weight, config=config)
        assert out[1].isnan().all()
        assert torch.equal(out[2:], expected[2:]) and torch.equal(out[0], expected[0])


def test_no_rows(device, dtype):
    weight = torch.randn(20, 64, device=device).to(dtype)
    assert skinny_linear(weight[:0], weight).shape == (0, 20)
    assert skinny_gate_up(weight[:0], weight).shape == (0, 10)


@pytest.mark.parametrize("rows", [range(1, 3), range(3, 9), range(9, 17)])
def test_one_configuration_for_rows_that_must_agree(rows):
    for n, k in [(4096, 4096), (4096, 14336), (28672, 4096), (128256, 4096)]:
        assert len({skinny.config_for(num_rows, n, k) for num_rows in rows}) == 1
        with_norm = {skinny.config_for(num_rows, n, k, with_norm=True) for num_rows in rows if num_rows <= 4}
        assert len(with_norm) <= 1


def test_where_it_is_used():
    """The sides of the measured border: all weights for 2 rows, few and long rows for 8, none for 9."""
    assert skinny.is_faster(1, 128256, 4096)
    assert skinny.is_faster(2, 28672, 4096)
    assert skinny.is_faster(8, 4096, 14336)
    assert not skinny.is_faster(3, 28672, 4096)
    assert not skinny.is_faster(9, 4096, 4096)


def test_tensor_core_warps_have_work():
    for n in (1024, 4096, 128256):
        for num_rows in range(1, 17):
            config = skinny.config_for(num_rows, n, 4096)
            skinny._check_config(config, num_rows, False, 2)
            if config.tensor_cores:
                assert config.block_n // 16 * config.k_slices >= config.num_warps
                assert config.block_k >= 16 * config.k_slices


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (28672, 4096), (1000, 3584), (128256, 4096)])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 8, 9, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_sizes(num_rows, n, k, dtype, device):
    check(num_rows, n, k, 0, None, device, dtype, with_bias=True)
    if n == 28672:
        check(num_rows, n, k, 0, None, device, dtype, activation="silu", norm_offset=0.0 if num_rows <= 4 else None)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (28672, 4096), (1008, 3584)])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 16])
def test_real_sizes_fp8(num_rows, n, k, device):
    check_fp8(num_rows, n, k, 0, None, device, torch.bfloat16, with_bias=True)


@pytest.mark.gpu
def test_fp8_rows_have_the_same_bits_beside_any_others(device):
    codes, scale = fp8_numbers(16, 4096, 0, device)
    weight, weight_scale = fp8_numbers(6144, 4096, 0, device)
    for rows in (range(1, 9), range(9, 17)):
        whole = skinny_linear_fp8(codes[: rows[-1]], scale[: rows[-1]], weight, weight_scale.reshape(-1))
        for num_rows in rows:
            part = skinny_linear_fp8(codes[:num_rows], scale[:num_rows], weight, weight_scale.reshape(-1))
            assert torch.equal(part, whole[:num_rows])


@pytest.mark.gpu
def test_a_row_has_the_same_bits_beside_any_others(device, dtype):
    x, weight = torch.randn(16, 4096, device=device).to(dtype), torch.randn(6144, 4096, device=device).to(dtype)
    norm = (torch.randn(4096, device=device), 1e-5, 0.0)
    plain, normed = (range(1, 3), range(3, 9), range(9, 17)), (range(1, 3), range(3, 5))
    for rows, more in [*((rows, {}) for rows in plain), *((rows, {"norm": norm}) for rows in normed)]:
        for product in (skinny_linear, skinny_gate_up):
            expected = product(x[: rows[-1]], weight, **more)
            for num_rows in rows:
                assert torch.equal(product(x[:num_rows], weight, **more), expected[:num_rows])
                assert torch.equal(product(x[:num_rows].flip(0), weight, **more).flip(0), expected[:num_rows])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 4, 8, 16])
@pytest.mark.parametrize("captured", [False, True])
def test_a_chain_of_overlapping_launches(num_rows, captured, device, dtype):
    """Products that read each other's results, in two buffers that are overwritten in turn, small enough to overlap."""
    torch.manual_seed(num_rows)
    weights = [(torch.randn(2048, 2048, device=device) / 45).to(dtype) for _ in range(40)]
    first = torch.randn(num_rows, 2048, device=device).to(dtype)
    buffers = [torch.empty_like(first) for _ in range(2)]

    def chain(pdl):
        buffers[1].copy_(first)
        for i, weight in enumerate(weights):
            skinny_linear(buffers[(i + 1) % 2], weight, out=buffers[i % 2], pdl=pdl)

    chain(False)
    expected = buffers[1].clone()
    chain(True)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain(True)
        for _ in range(5):
            buffers[1].zero_()
            graph.replay()
    assert torch.equal(buffers[1], expected)


@pytest.mark.gpu
def test_weights_beyond_2_31_elements(device, dtype):
    weight = torch.zeros(2**31 // 4096 + 64, 4096, dtype=dtype, device=device)
    weight[-1] = 1
    for num_rows in (1, 8):
        x = torch.ones(num_rows, 4096, dtype=dtype, device=device)
        assert skinny_linear(x, weight)[:, -2:].tolist() == [[0.0, 4096.0]] * num_rows


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named(device, dtype):
    x, weight = torch.zeros(2, 64, device=device, dtype=dtype), torch.zeros(32, 64, device=device, dtype=dtype)
    norm_weight = torch.ones(64, device=device)
    small = SkinnyConfig(4, 128, 1, 2)
    codes, scale = fp8_numbers(2, 64, 0, device)
    w8, w8_scale = fp8_numbers(32, 64, 0, device)
    w8_scale = w8_scale.reshape(-1)
    for message, call in [
        ("codes is a list", lambda: skinny_linear_fp8([1], scale, w8, w8_scale)),
        ("codes is ", lambda: skinny_linear_fp8(x, scale, w8, w8_scale)),
        ("codes has 32 rows; it must have at most 16", lambda: skinny_linear_fp8(w8, w8_scale, w8, w8_scale)),
        ("codes has 0 columns", lambda: skinny_linear_fp8(codes[:, :0], scale, w8[:, :0], w8_scale)),
        (r"scale has shape \[1\]", lambda: skinny_linear_fp8(codes, w8_scale[:1], w8, w8_scale)),
        (r"weight has shape \[32, 32\]", lambda: skinny_linear_fp8(codes, scale, w8[:, :32], w8_scale)),
        ("weight has 0 rows", lambda: skinny_linear_fp8(codes, scale, w8[:0], w8_scale[:0])),
        (r"weight_scale has shape \[2\]", lambda: skinny_linear_fp8(codes, scale, w8, w8_scale[:2])),
        ("dtype is torch.float32", lambda: skinny_linear_fp8(codes, scale, w8, w8_scale, dtype=torch.float32)),
        (r"bias has shape \[2\]", lambda: skinny_linear_fp8(codes, scale, w8, w8_scale, bias=x[0, :2].bfloat16())),
        ("config has no tensor_cores; for fp8", lambda: skinny_linear_fp8(codes, scale, w8, w8_scale, config=small)),
        (
            "config's block_k is 16",
            lambda: skinny_linear_fp8(codes, scale, w8, w8_scale, config=SkinnyConfig(16, 16, 1, 1, True)),
        ),
        ("x is a NoneType", lambda: skinny_linear(None, weight)),
        ("weight is a list", lambda: skinny_linear(x, [1])),
        ("weight is a list", lambda: skinny_gate_up(x, [1])),
        (r"x has shape \[64\]", lambda: skinny_linear(x[0], weight)),
        ("x is float32", lambda: skinny_linear(x.float(), weight.float())),
        ("x has 32 rows; it must have at most 16", lambda: skinny_linear(weight, weight)),
        ("x has stride 2 in its last", lambda: skinny_linear(x[:, ::2], weight[:, :32])),
        ("x has 0 columns", lambda: skinny_linear(x[:, :0], weight[:, :0])),
        (r"weight has shape \[32, 32\]", lambda: skinny_linear(x, weight[:, :32])),
        ("weight is float32", lambda: skinny_linear(x, weight.float())),
        ("weight has 0 rows", lambda: skinny_linear(x, weight[:0])),
        ("weight has 31 rows", lambda: skinny_gate_up(x, weight[:31])),
        (r"bias has shape \[64\]", lambda: skinny_linear(x, weight, bias=weight[0])),
        (r"out has shape \[2, 64\]", lambda: skinny_linear(x, weight, out=x.clone())),
        (r"out has shape \[2, 32\]", lambda: skinny_gate_up(x, weight, out=x[:, :32].clone())),
        ("out has strides", lambda: skinny_linear(x, weight, out=x[:1, :32].expand(2, -1))),
        ("activation is 'relu'", lambda: skinny_gate_up(x, weight, activation="relu")),
        ("norm must be a tuple", lambda: skinny_linear(x, weight, norm=norm_weight)),
        ("norm's eps is 0", lambda: skinny_linear(x, weight, norm=(norm_weight, 0, 0.0))),
        (r"norm's weight has shape \[32\]", lambda: skinny_linear(x, weight, norm=(norm_weight[:32], 1e-5, 0.0))),
        ("norm is given for 8 rows", lambda: skinny_linear(weight[:8], weight, norm=(norm_weight, 1e-5, 0.0))),
        ("config is 3", lambda: skinny_linear(x, weight, config=3)),
        (
            "config's block_n is 3; it must be a power",
            lambda: skinny_linear(x, weight, config=SkinnyConfig(3, 128, 1, 1)),
        ),
        ("config's block_k is 4", lambda: skinny_linear(x, weight, config=SkinnyConfig(4, 4, 1, 1))),
        ("config's num_stages is 0", lambda: skinny_linear(x, weight, config=SkinnyConfig(4, 128, 1, 0))),
        ("config's block_n is 1", lambda: skinny_gate_up(x, weight, config=SkinnyConfig(1, 128, 1, 1))),
        ("config's block_n is 8", lambda: skinny_linear(x, weight, config=SkinnyConfig(8, 128, 1, 1, True))),
        ("config's block_k is 32", lambda: skinny_linear(x, weight, config=SkinnyConfig(16, 32, 4, 1, True))),
        ("config has no tensor_cores for 5 rows", lambda: skinny_linear(weight[:5], weight, config=small)),
        (
            "config has tensor_cores, which norm excludes",
            lambda: skinny_linear(x, weight, norm=(norm_weight, 1e-5, 0.0), config=TENSOR_CONFIGS[0]),
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- machine code --------------------------------------------------------------------------------------------------


def _compile(config: SkinnyConfig, rows: int, **changed) -> Compiled:
    from kernels.aot import compile_for_hopper

    integers = ("num_rows", "n", "x_stride", "weight_stride", "out_stride")
    signature = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), "*bf16") | dict.fromkeys(integers, "i32")
    constants = {"bias_ptr": None, "K": 4096, "GATE_UP": False, "GELU_TANH": False, "ROWS": rows, "PDL": True}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "NUM_STAGES": config.num_stages}
    if config.tensor_cores:
        kernel = skinny.tensor_kernel
        constants |= {"K_SLICES": config.k_slices, "PREFETCH": skinny.prefetched_columns(config)}
        constants |= {"x_scale_ptr": None, "weight_scale_ptr": None}
    else:
        kernel = skinny.rows_kernel
        signature["eps"] = "fp32"
        constants |= {"norm_ptr": None, "WEIGHT_OFFSET": 0.0}
    return compile_for_hopper(
        kernel,
        signature,
        constants | changed,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=integers[1:],
    )


def _specimen_1_row() -> Compiled:
    return _compile(SkinnyConfig(4, 1024, 4, 2), 1)


def _specimen_4_rows_of_long_k() -> Compiled:
    return _compile(SkinnyConfig(4, 1024, 4, 2), 4, K=14336, GATE_UP=True)


def _specimen_8_rows() -> Compiled:
    return _compile(SkinnyConfig(16, 512, 4, 4, tensor_cores=True), 8)


def _specimen_16_rows() -> Compiled:
    return _compile(SkinnyConfig(64, 128, 4, 4, tensor_cores=True), 16, GATE_UP=True)


@pytest.mark.parametrize(("specimen", "registers"), [(_specimen_1_row, 80), (_specimen_4_rows_of_long_k, 128)])
def test_rows_kernel_has_weights_on_the_way_before_it_waits(specimen, registers, compile_for_hopper):
    compiled = compile_for_hopper(specimen)
    assert compiled.stack_bytes == 0
    assert compiled.registers <= registers
    before, after = compiled.sass.split("ACQBULK", 1)
    # Tiles of 4 rows by 8 columns a thread, two of them; of x nothing yet.
    assert re.findall(r"LDG\S*", before) == ["LDG.E.EF.128"] * 8
    assert set(re.findall(r"LDG\S*", after)) == {"LDG.E.EF.128", "LDG.E.128"}
    assert after.index("LDG.E.128") < after.index("LDG.E.EF.128")


@pytest.mark.parametrize(("specimen", "opcode"), [(_specimen_8_rows, "HMMA"), (_specimen_16_rows, "HGMMA")])
def test_tensor_kernel_is_a_pipeline_behind_a_prefetch(specimen, opcode, compile_for_hopper):
    compiled = compile_for_hopper(specimen)
    assert compiled.stack_bytes == 0
    assert compiled.registers <= 128
    before, after = compiled.sass.split("ACQBULK", 1)
    assert "CCTL.E.PF2" in before and "LDG" not in before
    assert set(re.findall(r"LDGSTS\S*", after)) == {"LDGSTS.E.BYPASS.128"} and "LDG.E" not in after
    assert compiled.opcodes()[opcode] >= 8
