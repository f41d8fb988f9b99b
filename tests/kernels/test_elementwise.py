"""RMSNorm, per-head norm with RoPE, and gated activation, against float64."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import elementwise
from kernels.aot import Compiled
from kernels.reference import elementwise as plain

# The FlashAttention rule in this file: the kernel may err by twice what the plain 16-bit steps of torch err, plus the
# rounding of the result.


def assert_close(out: torch.Tensor, exact: torch.Tensor, plain_out: torch.Tensor) -> None:
    exact = exact.double()
    rounding = torch.finfo(out.dtype).eps * exact.abs().max() / 2
    allowed = 2 * (plain_out.double() - exact).abs().max() + rounding
    assert (out.double() - exact).abs().max() <= allowed


def strided(shape: tuple[int, ...], gap: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random numbers whose rows stand `gap` elements apart, with NaN in the gaps: nobody may read those."""
    buffer = torch.full((*shape[:-1], shape[-1] + gap), float("nan"), dtype=dtype, device=device)
    view = buffer[..., : shape[-1]]
    view.copy_(torch.randn(shape, device=device))
    return view


# ---- RMSNorm -------------------------------------------------------------------------------------------------------


def rms_norm_in_16_bits(x, weight, eps, residual, weight_offset):
    if residual is not None:
        x = x + residual
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * scale * (weight + weight_offset), x


def check_rms_norm(num_tokens, hidden, gap, with_residual, weight_offset, device, dtype):
    torch.manual_seed(num_tokens * hidden)
    x = strided((num_tokens, hidden), gap, dtype, device)
    weight = torch.randn(hidden, device=device).to(dtype)
    residual = strided((num_tokens, hidden), gap, dtype, device) if with_residual else None
    plain_out, plain_sum = rms_norm_in_16_bits(x, weight, 1e-6, residual, weight_offset)
    exact_sum = None if residual is None else residual.double()
    exact = plain.rms_norm(x.double(), weight.double(), 1e-6, residual=exact_sum, weight_offset=weight_offset)
    buffer = torch.full((num_tokens, hidden + gap), 7.0, dtype=dtype, device=device)
    out = elementwise.rms_norm(x, weight, 1e-6, residual=residual, weight_offset=weight_offset, out=buffer[:, :hidden])
    assert_close(out, exact, plain_out)
    assert (buffer[:, hidden:] == 7).all()
    if with_residual:
        # One addition, rounded once: there is only one right answer.
        torch.testing.assert_close(residual, plain_sum, rtol=0, atol=0)


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 9),
    hidden=st.one_of(st.integers(1, 300), st.sampled_from([896, 2880, 3072, 5120])),
    gap=st.sampled_from([0, 5, 16]),
    with_residual=st.booleans(),
    weight_offset=st.sampled_from([0.0, 1.0]),
)
def test_rms_norm(num_tokens, hidden, gap, with_residual, weight_offset, device, dtype):
    check_rms_norm(num_tokens, hidden, gap, with_residual, weight_offset, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1024, 1536, 2048, 2880, 3072, 3584, 4096, 5120, 7168, 8192, 14336, 16384, 65536])
@pytest.mark.parametrize("num_tokens", [1, 7, 1000])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_of_real_sizes(hidden, num_tokens, with_residual, device, dtype):
    check_rms_norm(num_tokens, hidden, 0, with_residual, 0.0, device, dtype)


@pytest.mark.gpu
def test_rms_norm_beyond_2_31_elements(device, dtype):
    num_tokens, hidden = 2**31 // 4096 + 8, 4096
    x = torch.zeros(num_tokens, hidden, dtype=dtype, device=device)
    x[-1] = torch.randn(hidden, device=device)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    last = elementwise.rms_norm(x[-1:], weight, 1e-6)
    assert torch.equal(elementwise.rms_norm(x, weight, 1e-6, out=x)[-1:], last)


def test_rms_norm_in_place_and_empty(device, dtype):
    x = torch.randn(3, 96, device=device).to(dtype)
    weight = torch.randn(96, device=device).to(dtype)
    expected = elementwise.rms_norm(x, weight, 1e-5)
    assert elementwise.rms_norm(x, weight, 1e-5, out=x) is x
    assert torch.equal(x, expected)
    assert elementwise.rms_norm(x[:0], weight, 1e-5).shape == (0, 96)


@pytest.mark.parametrize("hidden", [1, 100, 896, 2880, 3072, 4096, 5120, 7168, 14336, 16384, 65536])
def test_rms_norm_tiles_cover_a_row_and_waste_little(hidden):
    chunk, num_chunks, rows, num_warps = elementwise.rms_norm_tile(hidden)
    assert hidden <= chunk * num_chunks <= max(128, 1.07 * hidden)
    assert rows * chunk >= 256 * num_warps or num_warps == 16  # 8 elements of 16 bits per thread are one access


# ---- RoPE ----------------------------------------------------------------------------------------------------------


def rope_tables(max_position: int, half: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** -(torch.arange(half, device=device) / half)
    angles = torch.arange(max_position, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rope_in_16_bits(x, cos, sin, positions, norm, weight_offset):
    if norm is not None:
        x, _ = rms_norm_in_16_bits(x, norm, 1e-6, None, weight_offset)
    half = cos.shape[1]
    cos, sin = (table[positions.long()].to(x.dtype)[:, None] for table in (cos, sin))
    low, high = x[..., :half], x[..., half : 2 * half]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, x[..., 2 * half :]], dim=-1)


def check_rope(num_tokens, num_q_heads, num_kv_heads, head_dim, half, with_norm, weight_offset, device, dtype):
    torch.manual_seed(num_tokens + head_dim)
    num_heads = num_q_heads + num_kv_heads
    # A fused projection: query, key and value heads of a token are neighbours. The value must stay as it is.
    fused = torch.randn(num_tokens, (num_heads + max(num_kv_heads, 1)) * head_dim, device=device).to(dtype)
    before = fused.clone()
    heads = fused.unflatten(1, (-1, head_dim))
    query, key = heads[:, :num_q_heads], heads[:, num_q_heads:num_heads] if num_kv_heads else None
    cos, sin = rope_tables(50, half, device)
    index_dtype = torch.int32 if num_tokens % 2 else torch.int64
    positions = torch.randint(0, 50, (num_tokens,), device=device).to(index_dtype)
    norms = [torch.randn(head_dim, device=device).to(dtype) if with_norm else None for _ in range(2)]
    exact, rounded = before.double().unflatten(1, (-1, head_dim)), before.unflatten(1, (-1, head_dim))
    exact_query, exact_key = exact[:, :num_q_heads], exact[:, num_q_heads:num_heads]
    plain.qk_norm_rope(
        exact_query,
        exact_key,
        cos,
        sin,
        positions,
        query_norm=norms[0],
        key_norm=norms[1],
        weight_offset=weight_offset,
    )
    elementwise.qk_norm_rope(
        query,
        key,
        cos,
        sin,
        positions,
        query_norm=norms[0],
        key_norm=norms[1] if num_kv_heads else None,
        weight_offset=weight_offset,
    )
    for part, norm in ((slice(0, num_q_heads), norms[0]), (slice(num_q_heads, num_heads), norms[1])):
        if part.start < part.stop:
            assert_close(
                heads[:, part],
                exact[:, part],
                rope_in_16_bits(rounded[:, part], cos, sin, positions, norm, weight_offset),
            )
    assert torch.equal(heads[:, num_heads:], rounded[:, num_heads:])
    if not with_norm:
        assert torch.equal(heads[..., 2 * half :], rounded[..., 2 * half :])


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 5),
    num_q_heads=st.integers(1, 9),
    num_kv_heads=st.integers(0, 3),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    share=st.sampled_from([1.0, 0.75, 0.5, 0.25]),
    with_norm=st.booleans(),
    weight_offset=st.sampled_from([0.0, 1.0]),
)
def test_qk_norm_rope(num_tokens, num_q_heads, num_kv_heads, head_dim, share, with_norm, weight_offset, device, dtype):
    half = int(head_dim * share) // 2
    check_rope(num_tokens, num_q_heads, num_kv_heads, head_dim, half, with_norm, weight_offset, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "head_dim", "half"),
    [
        ((32, 8), 128, 64),
        ((14, 2), 64, 32),
        ((40, 8), 128, 64),
        ((24, 8), 128, 48),
        ((32, 32), 96, 48),
        ((32, 32), 80, 16),
        ((16, 8), 256, 128),
        ((128, 8), 128, 64),
        ((1, 1), 128, 64),
    ],
)
@pytest.mark.parametrize("with_norm", [False, True])
def test_qk_norm_rope_of_real_models(heads, head_dim, half, with_norm, device, dtype):
    check_rope(513, *heads, head_dim, half, with_norm, 0.0, device, dtype)


def test_rope_turns_a_pair_by_its_angle(device):
    """By hand: channel 0 pairs with channel 2 (not 1), a quarter turn takes (a, b) to (−b, a)."""
    query = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], device=device)
    cos, sin = (
        torch.tensor([[1.0, 1.0], [0.0, 1.0]], device=device),
        torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=device),
    )
    elementwise.qk_norm_rope(query, None, cos, sin, torch.tensor([1], device=device))
    assert query.flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]


@pytest.mark.parametrize("num_heads", [1, 5, 10, 16, 32, 36, 40, 48, 72, 136])
@pytest.mark.parametrize("half", [8, 32, 48, 64, 128])
def test_rope_tiles_cover_the_heads_and_waste_little(num_heads, half):
    tile, passes, groups, num_warps = elementwise.rope_tile(num_heads, half)
    smallest = max(1, 256 // (1 << (half - 1).bit_length()))  # heads in a warp
    assert num_heads <= tile * passes * groups < num_heads + max(smallest, 0.2 * num_heads)
    assert 1 <= num_warps <= 8 and passes <= 6


# ---- gated activation ----------------------------------------------------------------------------------------------


def check_silu_mul(num_tokens, width, gap, activation, device, dtype):
    torch.manual_seed(width)
    gate_up = strided((num_tokens, 2 * width), gap, dtype, device)
    exact = plain.silu_mul(gate_up.double(), activation=activation)
    gate, up = gate_up.chunk(2, dim=1)
    functional = torch.nn.functional
    activated = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    buffer = torch.full((num_tokens, width + gap), 7.0, dtype=dtype, device=device)
    out = elementwise.silu_mul(gate_up, activation=activation, out=buffer[:, :width])
    assert_close(out, exact, activated * up)
    assert (buffer[:, width:] == 7).all()


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 9),
    width=st.one_of(st.integers(1, 300), st.sampled_from([768, 2048, 4864])),
    gap=st.sampled_from([0, 3, 16]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
)
def test_silu_mul(num_tokens, width, gap, activation, device, dtype):
    check_silu_mul(num_tokens, width, gap, activation, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 4864, 8960, 11008, 14336, 18944, 25600, 27648])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_silu_mul_of_real_sizes(width, activation, device, dtype):
    check_silu_mul(1001, width, 0, activation, device, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_silu_mul_at_the_ends(activation, device):
    """Far from zero the gate is open or shut; nothing overflows into NaN."""
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device)
    out = elementwise.silu_mul(torch.cat([gate, torch.full_like(gate, 2.0)], dim=1), activation=activation)
    assert out.flatten().tolist() == [0.0, 0.0, 0.0, 200.0, 2e4]


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named(device, dtype):
    x, weight = torch.zeros(2, 64, device=device, dtype=dtype), torch.ones(64, device=device, dtype=dtype)
    query = torch.zeros(2, 4, 64, device=device, dtype=dtype)
    cos = sin = torch.zeros(10, 32, device=device)
    positions = torch.tensor([0, 9], device=device)

    def rope(query=query, key=None, cos=cos, sin=sin, positions=positions, **more):
        elementwise.qk_norm_rope(query, key, cos, sin, positions, **more)

    for message, call in [
        (r"x has shape \[2, 1, 64\]", lambda: elementwise.rms_norm(x[:, None], weight, 1e-6)),
        ("x is int32", lambda: elementwise.rms_norm(x.int(), weight, 1e-6)),
        (r"x has stride 2 in its last", lambda: elementwise.rms_norm(x[:, ::2], weight[:32], 1e-6)),
        ("x has 0 channels", lambda: elementwise.rms_norm(x[:, :0], weight, 1e-6)),
        (r"weight has shape \[32\]", lambda: elementwise.rms_norm(x, weight[:32], 1e-6)),
        (r"residual has shape \[1, 64\]", lambda: elementwise.rms_norm(x, weight, 1e-6, residual=x[:1])),
        ("out is float64", lambda: elementwise.rms_norm(x, weight, 1e-6, out=x.double())),
        ("x is a NoneType", lambda: elementwise.rms_norm(None, weight, 1e-6)),
        ("eps is None", lambda: elementwise.rms_norm(x, weight, None)),
        ("eps is -100", lambda: elementwise.rms_norm(x, weight, -100)),
        (
            "residual has strides .* must not overlap",
            lambda: elementwise.rms_norm(x, weight, 1e-6, residual=x[:1].expand(2, -1)),
        ),
        ("out has strides .* must not overlap", lambda: elementwise.rms_norm(x, weight, 1e-6, out=x[:1].expand(2, -1))),
        (
            "out has strides .* must not overlap",
            lambda: elementwise.rms_norm(x, weight, 1e-6, out=x.flatten().as_strided((2, 64), (63, 1))),
        ),
        ("query is a NoneType", lambda: rope(query=None)),
        ("key is a int", lambda: rope(key=3)),
        ("eps is -1.0", lambda: rope(eps=-1.0)),
        ("query has strides .* must not overlap", lambda: rope(query=query[:, :1].expand(-1, 4, -1))),
        ("key has strides .* must not overlap", lambda: rope(key=query[:1].expand(2, -1, -1))),
        (r"query has shape \[2, 256\]", lambda: rope(query.flatten(1))),
        (r"key has shape \[2, 4, 32\]", lambda: rope(key=query[..., :32])),
        ("key is float64", lambda: rope(key=query.double())),
        ("cos is float64", lambda: rope(cos=cos.double())),
        (
            "cos has 48 columns",
            lambda: rope(cos=torch.zeros(10, 48, device=device), sin=torch.zeros(10, 48, device=device)),
        ),
        (r"sin has shape \[9, 32\]", lambda: rope(sin=sin[:9])),
        ("positions reach from 0 to 10", lambda: rope(positions=torch.tensor([0, 10], device=device))),
        ("positions reach from -1 to 0", lambda: rope(positions=torch.tensor([0, -1], device=device))),
        ("positions is float32", lambda: rope(positions=positions.float())),
        (r"query_norm has shape \[32\]", lambda: rope(query_norm=weight[:32])),
        ("query_norm and key_norm must both", lambda: rope(key=query, query_norm=weight)),
        ("activation is 'relu'", lambda: elementwise.silu_mul(x, activation="relu")),
        ("gate_up has 63 columns", lambda: elementwise.silu_mul(x[:, :63])),
        (r"out has shape \[2, 64\]", lambda: elementwise.silu_mul(x, out=x)),
        ("gate_up is a NoneType", lambda: elementwise.silu_mul(None)),
        (
            "out has strides .* must not overlap",
            lambda: elementwise.silu_mul(x, out=x[:1, :32].expand(2, -1)),
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# ---- machine code --------------------------------------------------------------------------------------------------


def wide_accesses(compiled: Compiled) -> tuple[int, int]:
    """How many 16-byte loads and stores there are."""
    return len(re.findall(r"LDG\.E\S*\.128", compiled.sass)), len(re.findall(r"STG\.E\S*\.128", compiled.sass))


def _specimen_rms_norm() -> Compiled:
    from kernels.aot import compile_for_hopper

    chunk, num_chunks, rows, num_warps = elementwise.rms_norm_tile(5120)
    return compile_for_hopper(
        elementwise.rms_norm_kernel,
        dict.fromkeys(("x_ptr", "weight_ptr", "residual_ptr", "out_ptr"), "*bf16")
        | dict.fromkeys(("num_tokens", "x_stride", "residual_stride", "out_stride"), "i32")
        | {"eps": "fp32"},
        {"HIDDEN": 5120, "CHUNK": chunk, "NUM_CHUNKS": num_chunks, "ROWS": rows, "WEIGHT_OFFSET": 0.0},
        num_warps=num_warps,
        divisible_by_16=("x_stride", "residual_stride", "out_stride"),
    )


def _specimen_qk_norm_rope() -> Compiled:
    from kernels.aot import compile_for_hopper

    tile, passes, _, num_warps = elementwise.rope_tile(40, 64)
    strides = [f"{who}_{what}_stride" for who in ("query", "key") for what in ("token", "head")]
    return compile_for_hopper(
        elementwise.qk_norm_rope_kernel,
        dict.fromkeys(("query_ptr", "key_ptr", "query_norm_ptr", "key_norm_ptr"), "*bf16")
        | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64", "eps": "fp32"}
        | dict.fromkeys(strides, "i32"),
        {
            "NUM_Q_HEADS": 32,
            "NUM_HEADS": 40,
            "HEAD_DIM": 128,
            "HALF": 64,
            "HALF_TILE": 64,
            "REST_TILE": 0,
            "HEAD_TILE": tile,
            "PASSES": passes,
            "WEIGHT_OFFSET": 0.0,
        },
        num_warps=num_warps,
        divisible_by_16=tuple(strides),
    )


def _specimen_silu_mul() -> Compiled:
    from kernels.aot import compile_for_hopper

    return compile_for_hopper(
        elementwise.silu_mul_kernel,
        {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"}
        | dict.fromkeys(("num_tokens", "gate_up_stride", "out_stride"), "i32"),
        {"WIDTH": 11008, "GELU_TANH": False, "BLOCK": elementwise.SILU_BLOCK},
        num_warps=4,
        divisible_by_16=("gate_up_stride", "out_stride"),
    )


@pytest.mark.parametrize(
    ("specimen", "registers", "loads", "stores"),
    [
        # 5 chunks of x, residual and weight; 5 of residual and result.
        (_specimen_rms_norm, 96, 15, 10),
        # 5 tiles of both halves; their weights, read once for tiles of query heads only and again for the mixed ones.
        (_specimen_qk_norm_rope, 128, 16, 10),
        # 16 elements per thread of gate and up.
        (_specimen_silu_mul, 40, 4, 2),
    ],
)
def test_machine_code_moves_16_bytes_at_a_time(specimen, registers, loads, stores, compile_for_hopper):
    compiled = compile_for_hopper(specimen)
    assert compiled.stack_bytes == 0
    assert compiled.registers <= registers
    assert wide_accesses(compiled) == (loads, stores)
    # The first store stands behind the last load.
    order = re.findall(r"\b(LDG|STG)\.E", compiled.sass)
    assert "STG" not in order[: len(order) - stores]
