"""Matrix products of few rows, x [1..16, k] · weight [n, k]ᵀ: the linear layers of decoding a small batch.

Such a product is as fast as its weight can be read, once. What counts is then the same as for `kernels.elementwise`,
some 64 KB in flight per SM from the first moment to the last, and there is little time: at 4.2 TB/s a weight of
4096 × 4096 takes 8 µs, of which a launch is 2 to 3. Two kernels divide the work differently.

    rows    a program multiplies block_n rows of the weight, whole ones, with up to 4 rows of x on the ordinary cores.
            A thread takes runs of 8 elements of k in its rows, so x is loaded once for all of them. The first
            num_stages tiles of the weight wait in registers, and each is loaded anew as soon as it was used.
    tensor  up to 16 rows, on tensor cores. The weight is the tall operand, so that padding is x's: 8 or 16 columns.
            Tiles come through a pipeline of num_stages buffers in shared memory. Where block_n alone would leave warps
            without work they share k instead and add up their sums at the end.

Nobody splits k between programs: one row of k = 4096 is already 8 KB, so block_n can be small enough for an even split
over the GPU, and no partial sums pass through memory.

Chains. With `pdl` a kernel is launched while the one before it still runs (programmatic dependent launch), and asks for
its first tiles of the weight before it waits for that kernel's end, so memory is never idle between two kernels:

    kernel A   |launch| W ... W | W ... W |
    kernel B            |launch| first W  | wait for A | x, W ... W |

Why this is right:

- Before `gdc_wait` a program reads nothing but `weight`. So a weight must not be written by kernels that may still run.
  x, which the previous kernel may have written, and whatever is stored come after it.
- Every program waits, and waits for all of the previous kernel, its stores included. So B's end implies A's end: a
  third kernel that waits for B needs not know of A, and may overwrite what A read.
- Dependents may start as soon as all programs of this kernel have begun (`gdc_launch_dependents`), which harms none:
  a kernel launched with `pdl` waits as above, and any other one is not launched before this one's end.

Which sums are added in which order depends on the configuration only. A row's result is the same to the bit whatever
the other rows hold, and however many there are as long as they use the same configuration: with the default ones, 1 and
2 rows agree, and 3 to 8, and 9 to 16.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels import checks
from kernels.cache import _widen
from kernels.interpreting import INTERPRETING
from kernels.launching import Launcher
from kernels.reference.elementwise import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
NORM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_ROWS = 16
MAX_ROWS_WITHOUT_TENSOR_CORES = 4  # beyond, arithmetic and not memory would be the limit

_USE_ASM = tl.constexpr(not INTERPRETING)


@dataclass(frozen=True)
class SkinnyConfig:
    """How a product is divided.

    Attributes:
        block_n: rows of the weight per program, a power of two; at least 2 for gate and up, which it counts both. With
            tensor cores at least 16.
        block_k: columns of a tile, a power of two.
        num_warps: per program. Without tensor cores they divide block_k, which should be 256 columns for each of them,
            so that x is loaded 16 bytes at a time too; with them, block_n in 16 rows each, then block_k.
        num_stages: tiles of the weight in flight.
        tensor_cores: which of the two kernels.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tensor_cores: bool = False

    @property
    def k_slices(self) -> int:
        """Parts of k that warps of the tensor-core kernel have to themselves."""
        return max(1, self.num_warps // max(1, self.block_n // 16)) if self.tensor_cores else 1


# (most rows, most elements of the weight, configuration): the first that holds both. Found by measurement on an H200;
# the last is for a norm in front.
CONFIGS = (
    (2, 2**25, SkinnyConfig(4, 1024, 4, 2)),
    (2, None, SkinnyConfig(4, 1024, 4, 4)),
    (8, None, SkinnyConfig(32, 512, 4, 4, tensor_cores=True)),
    (16, 2**25, SkinnyConfig(64, 128, 4, 6, tensor_cores=True)),
    (16, None, SkinnyConfig(64, 128, 4, 4, tensor_cores=True)),
    (4, None, SkinnyConfig(4, 1024, 4, 2)),
)


def is_faster(num_rows: int, n: int, k: int) -> bool:
    """Whether x [num_rows, k] · weight [n, k]ᵀ was faster here than in cuBLAS 13 on an H200.

    With 1 or 2 rows all weights were; with up to 8 those whose n is too small for cuBLAS's tiles to fill the GPU.
    """
    return num_rows <= 2 or (num_rows <= 8 and n <= k and n * k <= 2**26)


def config_for(num_rows: int, n: int, k: int, *, with_norm: bool = False) -> SkinnyConfig:
    """The configuration for x of num_rows rows and a weight [n, k]; with_norm excludes tensor cores.

    It is the same for 1 and 2 rows, within 3 to 8 and within 9 to 16; with_norm, within 3 and 4.
    """
    for most_rows, most_elements, config in CONFIGS:
        large_enough = num_rows <= most_rows and (most_elements is None or n * k <= most_elements)
        if large_enough and not (with_norm and config.tensor_cores):
            return config
    most = MAX_ROWS_WITHOUT_TENSOR_CORES if with_norm else MAX_ROWS
    raise ValueError(f"x has {num_rows} rows; it must have 1 to {most}")


# The same for fp8 numbers, always with tensor cores: (most rows, most rows of the weight, most columns, configuration).
# With all of these `skinny_linear_fp8` was faster on an H200 than `torch._scaled_mm`.
FP8_CONFIGS = (
    (8, None, 2048, SkinnyConfig(64, 512, 4, 4, tensor_cores=True)),
    (8, 4096, None, SkinnyConfig(16, 2048, 4, 3, tensor_cores=True)),
    (8, None, None, SkinnyConfig(32, 1024, 4, 3, tensor_cores=True)),
    (16, 8192, None, SkinnyConfig(64, 256, 4, 6, tensor_cores=True)),
    (16, None, None, SkinnyConfig(64, 256, 4, 4, tensor_cores=True)),
)


def config_for_fp8(num_rows: int, n: int, k: int) -> SkinnyConfig:
    """As `config_for`, for `skinny_linear_fp8`: the same within 1 to 8 and within 9 to 16 rows."""
    return next(
        config
        for most_rows, most_n, most_k, config in FP8_CONFIGS
        if num_rows <= most_rows and (most_n is None or n <= most_n) and (most_k is None or k <= most_k)
    )


# ---- what both kernels do ------------------------------------------------------------------------------------------


@triton.jit
def _weight_rows(n, GATE_UP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of the weight that a program reads. Beyond n the last one is read again, so that loads need no mask.

    Those of gate and up alternate, so that the two of a pair are neighbours in the tile.
    """
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATE_UP:
        rows = tl.minimum(i // 2, n // 2 - 1) + (i % 2) * (n // 2)
    else:
        rows = tl.minimum(i, n - 1)
    return rows.to(tl.int64)


@triton.jit
def _store(
    result,
    bias_ptr,
    out_ptr,
    num_rows,
    n,
    out_stride,
    GATE_UP: tl.constexpr,
    GELU_TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What becomes of the sums [BLOCK_N, ROWS]: bias or activation, and the only rounding."""
    if GATE_UP:
        gate, up = tl.split(tl.permute(tl.reshape(result, [BLOCK_N // 2, 2, ROWS]), [0, 2, 1]))
        argument = gate
        if GELU_TANH:
            argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        result = gate / (1.0 + tl.exp(-argument)) * up
        cols = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[:, None]
        width = n // 2
    else:
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        width = n
    if bias_ptr is not None:
        result += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    rows = tl.arange(0, ROWS)[None, :]
    mask = (cols < width) & (rows < num_rows)
    tl.store(out_ptr + rows * out_stride + cols, result.to(out_ptr.dtype.element_ty), mask=mask)


# ---- up to 4 rows --------------------------------------------------------------------------------------------------


@triton.jit
def _weight_tile(weight_ptrs, first, K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr):
    cols = first + tl.arange(0, BLOCK_K)[None, :]
    # Read once in a step that reads more than the L2 holds: leave the L2 to the rest.
    if EVEN:
        tile = tl.load(weight_ptrs + cols, eviction_policy="evict_first")
    else:
        tile = tl.load(weight_ptrs + cols, mask=cols < K, other=0.0, eviction_policy="evict_first")
    return tile


@triton.jit
def _sum_of_8(x, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of 8 neighbouring columns, which one thread holds."""
    return tl.sum(tl.reshape(x, [N, BLOCK_K // 8, 8]), axis=2)


@triton.jit
def _add_products(
    sums,
    squares,
    tile,
    x_ptr,
    norm_ptr,
    first,
    num_rows,
    x_stride,
    K: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """sums (and squares of x) with those of one tile added, a tuple of ROWS each."""
    cols = first + tl.arange(0, BLOCK_K)[None, :]
    mask = cols < K
    if EVEN:
        mask = None
    parts = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(i, num_rows - 1)
        parts += (tl.load(x_ptr + row * x_stride + cols, mask=mask, other=None if EVEN else 0.0),)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + cols, mask=mask, other=None if EVEN else 0.0).to(tl.float32) + WEIGHT_OFFSET
    wide = _widen(tile)
    new_sums, new_squares = (), ()
    for i in tl.static_range(ROWS):
        x = _widen(parts[i])
        if norm_ptr is not None:
            new_squares += (squares[i] + _sum_of_8(x * x, 1, BLOCK_K),)
            x *= norm
        else:
            new_squares += (squares[i],)
        new_sums += (sums[i] + _sum_of_8(wide * x, BLOCK_N, BLOCK_K),)
    return new_sums, new_squares


@triton.jit
def _side_by_side(parts, ROWS: tl.constexpr):
    """1, 2 or 4 tiles [N, COLUMNS] as [N, COLUMNS, ROWS]."""
    if ROWS == 1:
        joined = parts[0][:, :, None]
    elif ROWS == 2:
        joined = tl.join(parts[0], parts[1])
    else:
        pairs = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        joined = tl.reshape(pairs, [pairs.shape[0], pairs.shape[1], 4])
    return joined


@triton.jit(do_not_specialize=["num_rows"])
def rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    out_ptr,
    num_rows,
    n,
    x_stride,
    weight_stride,
    out_stride,
    eps,
    K: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    GATE_UP: tl.constexpr,
    GELU_TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N rows of the weight by ROWS (1, 2 or 4) rows of x; further rows of x repeat the last one, unstored."""
    GROUP: tl.constexpr = NUM_STAGES * BLOCK_K
    LAST: tl.constexpr = (K - 1) // GROUP * GROUP
    EVEN: tl.constexpr = K % GROUP == 0
    weight_ptrs = weight_ptr + _weight_rows(n, GATE_UP, BLOCK_N)[:, None] * weight_stride
    tiles, sums, squares = (), (), ()
    for s in tl.static_range(NUM_STAGES):
        tiles += (_weight_tile(weight_ptrs, s * BLOCK_K, K, BLOCK_K, EVEN),)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for _ in tl.static_range(ROWS):
        sums += (tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32),)
        squares += (tl.zeros([1, BLOCK_K // 8], tl.float32),)
    for group in range(0, LAST, GROUP):
        new_tiles = ()
        for s in tl.static_range(NUM_STAGES):
            first = group + s * BLOCK_K
            sums, squares = _add_products(
                sums, squares, tiles[s], x_ptr, norm_ptr, first, num_rows, x_stride,
                K, WEIGHT_OFFSET, BLOCK_N, BLOCK_K, ROWS, True,
            )  # fmt: skip
            new_tiles += (_weight_tile(weight_ptrs, first + GROUP, K, BLOCK_K, EVEN),)
        tiles = new_tiles
    for s in tl.static_range(NUM_STAGES):
        sums, squares = _add_products(
            sums, squares, tiles[s], x_ptr, norm_ptr, LAST + s * BLOCK_K, num_rows, x_stride,
            K, WEIGHT_OFFSET, BLOCK_N, BLOCK_K, ROWS, EVEN,
        )  # fmt: skip
    result = tl.sum(_side_by_side(sums, ROWS), axis=1)
    if norm_ptr is not None:
        # 1 / rms is the same for all of a row of x, so it can wait until the end.
        result *= tl.rsqrt(tl.sum(_side_by_side(squares, ROWS), axis=1) / K + eps)
    _store(result, bias_ptr, out_ptr, num_rows, n, out_stride, GATE_UP, GELU_TANH, BLOCK_N, ROWS)


# ---- up to 16 rows -------------------------------------------------------------------------------------------------


@triton.jit
def _prefetch(weight_rows, K: tl.constexpr, COLUMNS: tl.constexpr, LINE: tl.constexpr):
    """Ask for the first COLUMNS of these rows, LINE of them in 128 bytes, to be brought to the L2."""
    lines = tl.minimum(tl.arange(0, COLUMNS // LINE) * LINE, K - 1)
    ptrs = (weight_rows[:, None] + lines[None, :]).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], tl.int32, False, 1)


@triton.jit(do_not_specialize=["num_rows"])
def tensor_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    x_scale_ptr,  # of fp8 codes, one number for each row; None for 16-bit numbers
    weight_scale_ptr,
    out_ptr,
    num_rows,
    n,
    x_stride,
    weight_stride,
    out_stride,
    K: tl.constexpr,
    GATE_UP: tl.constexpr,
    GELU_TANH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_SLICES: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N rows of the weight by ROWS (8 or 16) rows of x, of which those from num_rows on are zeros.

    A tile is [K_SLICES, BLOCK_N, BLOCK_K / K_SLICES] where warps share k: a batch of small products.
    """
    weight_row = _weight_rows(n, GATE_UP, BLOCK_N)
    weight_rows = weight_ptr + weight_row * weight_stride
    rows = tl.arange(0, ROWS)
    if PDL:
        # The pipeline's own first loads would stand behind the wait, as those of x must; so the L2 is asked here.
        _prefetch(weight_rows, K, PREFETCH, 64 if weight_scale_ptr is None else 128)
        gdc_launch_dependents()
        gdc_wait()
    if K_SLICES > 1:
        SLICE: tl.constexpr = BLOCK_K // K_SLICES
        cols = tl.arange(0, K_SLICES)[:, None, None] * SLICE
        weight_cols = cols + tl.arange(0, SLICE)[None, None, :]
        x_cols = cols + tl.arange(0, SLICE)[None, :, None]
        weight_ptrs = weight_rows[None, :, None] + weight_cols
        x_ptrs = x_ptr + rows[None, None, :] * x_stride + x_cols
        row_mask = rows[None, None, :] < num_rows
        sums = tl.zeros([K_SLICES, BLOCK_N, ROWS], tl.float32)
    else:
        weight_cols = tl.arange(0, BLOCK_K)[None, :]
        x_cols = tl.arange(0, BLOCK_K)[:, None]
        weight_ptrs = weight_rows[:, None] + weight_cols
        x_ptrs = x_ptr + rows[None, :] * x_stride + x_cols
        row_mask = rows[None, :] < num_rows
        sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        if K % BLOCK_K == 0:
            tile = tl.load(weight_ptrs + first, eviction_policy="evict_first")
            x = tl.load(x_ptrs + first, mask=row_mask, other=0.0)
        else:
            mask = first + weight_cols < K
            tile = tl.load(weight_ptrs + first, mask=mask, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptrs + first, mask=row_mask & (first + x_cols < K), other=0.0)
        sums = tl.dot(tile, x, sums)
    if K_SLICES > 1:
        sums = tl.sum(sums, axis=0)
    if weight_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + rows, mask=rows < num_rows, other=0.0)
        sums *= tl.load(weight_scale_ptr + weight_row)[:, None] * x_scale[None, :]
    _store(sums, bias_ptr, out_ptr, num_rows, n, out_stride, GATE_UP, GELU_TANH, BLOCK_N, ROWS)


_rows_launcher, _tensor_launcher = Launcher(rows_kernel), Launcher(tensor_kernel)


# ---- launchers -----------------------------------------------------------------------------------------------------


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float, float] | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
    config: SkinnyConfig | None = None,
    check: bool = True,
) -> torch.Tensor:
    """x · weightᵀ + bias for 1 to 16 rows of x, reading the weight once.

    Args:
        x: bf16 or fp16 [num_rows, k]; rows may stand apart.
        weight: [n, k] of the same dtype; rows may stand apart. Full speed needs 16-byte aligned rows whose stride is a
            multiple of 16 elements.
        bias: [n] of the same dtype, or None; added in float32.
        norm: (weight [k], eps, weight_offset) of an RMSNorm that x goes through first, for at most 4 rows, or None. Its
            result is not rounded to 16 bits. The residual stream must be up to date already: all programs read x.
        out: [num_rows, n] of the same dtype, not x's memory, or None for a new tensor.
        pdl: launch while the previous kernel of the stream still runs; see the module. The weight must be older than
            that kernel, and the GPU a Hopper or newer.
        config: how to divide the work; chosen by the shape if None. Same configuration, same bits for a row of x,
            whatever the other rows.
        check: look at the arguments first.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or stride, or a configuration that does not fit.
    """
    if check:
        _check("n", x, weight, norm, out, weight.shape[0] if isinstance(weight, torch.Tensor) else None, config)
        if bias is not None:
            checks.tensor("bias", bias, shape=(weight.shape[0],), dtypes=(x.dtype,), device=x.device)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, norm, out, None, pdl, config)
    return out


def skinny_gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    activation: str = "silu",
    norm: tuple[torch.Tensor, float, float] | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
    config: SkinnyConfig | None = None,
    check: bool = True,
) -> torch.Tensor:
    """activation(x · gateᵀ) · (x · upᵀ) for 1 to 16 rows of x: two products and the activation in one kernel.

    Gate and up are not rounded before the activation, which is more exact than product and `silu_mul` one by one.

    Args:
        x, norm, pdl, config, check: as in `skinny_linear`.
        weight: [2 · intermediate, k] of x's dtype, gate first; rows may stand apart.
        activation: "silu" or "gelu_tanh".
        out: [num_rows, intermediate] of the same dtype, not x's memory, or None for a new tensor.

    Raises:
        ValueError: an unknown activation, an argument of the wrong shape, dtype, device or stride, or a configuration
            that does not fit.
    """
    if check:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        checks.tensors(weight=weight)
        if weight.dim() == 2 and (weight.shape[0] < 2 or weight.shape[0] % 2):
            raise ValueError(f"weight has {weight.shape[0]} rows; it must have an even number, gate and up")
        _check("intermediate", x, weight, norm, out, weight.shape[0] // 2, config, least_block_n=2)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, None, norm, out, activation, pdl, config)
    return out


def skinny_linear_fp8(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
    config: SkinnyConfig | None = None,
    check: bool = True,
) -> torch.Tensor:
    """(codes · weightᵀ) · scale · weight_scaleᵀ + bias for 1 to 16 rows: a product of fp8 numbers (W8A8).

    What `torch._scaled_mm` computes with a scale per row and column, whose tiles are made for many rows.

    Args:
        codes: float8_e4m3fn [num_rows, k], as `kernels.quantise` makes them; rows may stand apart.
        scale: float32 [num_rows], or [num_rows, 1].
        weight: float8_e4m3fn [n, k]; rows may stand apart. Full speed needs 16-byte aligned rows.
        weight_scale: float32 [n].
        dtype: of the result, bf16 or fp16.
        bias: [n] of that dtype, or None; added in float32.
        out: [num_rows, n] of that dtype, or None for a new tensor.
        pdl, check: as in `skinny_linear`; the weight's scale must be as old as the weight.
        config: with tensor cores; chosen by the shape if None.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or stride, or a configuration that does not fit.
    """
    if check:
        _check_fp8(codes, scale, weight, weight_scale, dtype, bias, out, config)
    if out is None:
        out = torch.empty(codes.shape[0], weight.shape[0], dtype=dtype, device=codes.device)
    config = config or config_for_fp8(codes.shape[0], *weight.shape)
    _launch(codes, weight, bias, None, out, None, pdl, config, (scale, weight_scale))
    return out


def _launch(x, weight, bias, norm, out, activation, pdl, config, scales=(None, None)) -> None:
    num_rows, k = x.shape
    n = weight.shape[0]
    if num_rows == 0:
        return
    config = config or config_for(num_rows, n, k, with_norm=norm is not None)
    grid = (triton.cdiv(n, config.block_n),)
    pdl = pdl and not INTERPRETING
    strides = (x.stride(0), weight.stride(0), out.stride(0))
    compile_time = {
        "K": k,
        "GATE_UP": activation is not None,
        "GELU_TANH": activation == "gelu_tanh",
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "NUM_STAGES": config.num_stages,
        "PDL": pdl,
        "num_warps": config.num_warps,
    } | ({"launch_pdl": True} if pdl else {})
    if config.tensor_cores:
        _tensor_launcher[grid](
            x,
            weight,
            bias,
            *scales,
            out,
            num_rows,
            n,
            *strides,
            K_SLICES=config.k_slices,
            PREFETCH=prefetched_columns(config),
            ROWS=8 if num_rows <= 8 else 16,
            **compile_time,
        )
    else:
        norm_weight, eps, weight_offset = norm or (None, 0.0, 0.0)
        _rows_launcher[grid](
            x,
            weight,
            bias,
            norm_weight,
            out,
            num_rows,
            n,
            *strides,
            eps,
            WEIGHT_OFFSET=weight_offset,
            ROWS=triton.next_power_of_2(num_rows),
            **compile_time,
        )


def prefetched_columns(config: SkinnyConfig) -> int:
    """Columns that the tensor-core kernel asks the L2 for: those of the pipeline's first loads, to a power of two."""
    return triton.next_power_of_2(max(64, config.block_k * (config.num_stages - 1)))


def _check(width_name, x, weight, norm, out, width, config, least_block_n=1) -> None:
    checks.tensors(x=x, weight=weight)
    checks.tensor("x", x, shape=(None, None), dtypes=DTYPES, device=x.device)
    num_rows, k = x.shape
    if num_rows > MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows; it must have at most {MAX_ROWS}")
    if k < 1:
        raise ValueError("x has 0 columns; it must have at least 1")
    checks.tensor("weight", weight, shape=(None, k), dtypes=(x.dtype,), device=x.device)
    if weight.shape[0] < 1:
        raise ValueError("weight has 0 rows; it must have at least 1")
    if norm is not None:
        _check_norm(norm, num_rows, k, x.device)
    if out is not None:
        checks.tensor("out", out, shape=(num_rows, width), dtypes=(x.dtype,), device=x.device)
        checks.no_overlap("out", out)
    if config is not None:
        _check_config(config, num_rows, norm is not None, least_block_n)


def _check_fp8(codes, scale, weight, weight_scale, dtype, bias, out, config) -> None:
    checks.tensors(codes=codes, scale=scale, weight=weight, weight_scale=weight_scale)
    device = codes.device
    checks.tensor("codes", codes, shape=(None, None), dtypes=(FP8,), device=device)
    num_rows, k = codes.shape
    if num_rows > MAX_ROWS:
        raise ValueError(f"codes has {num_rows} rows; it must have at most {MAX_ROWS}")
    if k < 1:
        raise ValueError("codes has 0 columns; it must have at least 1")
    shape = (num_rows, 1) if scale.dim() == 2 else (num_rows,)
    checks.tensor("scale", scale, shape=shape, dtypes=(torch.float32,), device=device)
    checks.tensor("weight", weight, shape=(None, k), dtypes=(FP8,), device=device)
    n = weight.shape[0]
    if n < 1:
        raise ValueError("weight has 0 rows; it must have at least 1")
    checks.tensor("weight_scale", weight_scale, shape=(n,), dtypes=(torch.float32,), device=device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be bfloat16 or float16")
    for name, tensor, shape in (("bias", bias, (n,)), ("out", out, (num_rows, n))):
        if tensor is not None:
            checks.tensor(name, tensor, shape=shape, dtypes=(dtype,), device=device)
    if out is not None:
        checks.no_overlap("out", out)
    if config is not None:
        _check_config(config, num_rows, False, 1, least_k=32)
        if not config.tensor_cores:
            raise ValueError("config has no tensor_cores; for fp8 it must")


def _check_norm(norm, num_rows, k, device) -> None:
    if not isinstance(norm, tuple) or len(norm) != 3:
        raise ValueError("norm must be a tuple of weight, eps and weight_offset")
    if num_rows > MAX_ROWS_WITHOUT_TENSOR_CORES:
        raise ValueError(
            f"norm is given for {num_rows} rows; it is for at most {MAX_ROWS_WITHOUT_TENSOR_CORES}, others are "
            "normalised by kernels.elementwise.rms_norm"
        )
    checks.tensor("norm's weight", norm[0], shape=(k,), dtypes=NORM_DTYPES, device=device)
    checks.positive("norm's eps", norm[1])


def _check_config(config, num_rows, has_norm, least_block_n, least_k=16) -> None:
    if not isinstance(config, SkinnyConfig):
        raise ValueError(f"config is {config!r}; it must be a SkinnyConfig")
    least_n = 16 if config.tensor_cores else least_block_n
    least_k = least_k * config.k_slices if config.tensor_cores else 8
    for name, least in (("block_n", least_n), ("block_k", least_k), ("num_warps", 1)):
        value = getattr(config, name)
        checks.integer(f"config's {name}", value, least)
        if value & (value - 1):
            raise ValueError(f"config's {name} is {value}; it must be a power of two")
    checks.integer("config's num_stages", config.num_stages, 1)
    if config.tensor_cores and has_norm:
        raise ValueError("config has tensor_cores, which norm excludes; it must not")
    if not config.tensor_cores and num_rows > MAX_ROWS_WITHOUT_TENSOR_CORES:
        raise ValueError(
            f"config has no tensor_cores for {num_rows} rows; it must beyond {MAX_ROWS_WITHOUT_TENSOR_CORES}"
        )
