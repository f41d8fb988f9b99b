"""What is measured: the suites with their shapes, the figures to reach, and rows about how other rows change."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kernels.bench import works
from kernels.bench.results import OURS, Row, Target
from kernels.bench.works import HEAD_DIM, KV_HEADS, Q_HEADS, Bench, Work
from kernels.skinny import MAX_ROWS, is_faster

QUANTISED = ("fp8", "int8", "int4", "int2")


@dataclass(frozen=True)
class Case:
    """A row to be. `build` allocates on the device and returns what to run."""

    suite: str
    name: str
    shape: dict[str, Any]
    build: Callable[[Bench], Work]
    targets: tuple[Target, ...] = ()
    note: str = ""


def cases(suite: str, quick: bool = False) -> list[Case]:
    """The cases of a suite. `quick` keeps those at the heart of it."""
    return _SUITES[suite](quick)


# ---- limits ----------------------------------------------------------------------------------------------------------


def _limits(quick: bool) -> list[Case]:
    gib = 1 << 30
    return [
        Case("limits", "copy, read + written", {"limit": "copy", "bytes": 4 * gib}, partial(works.copy_work, 2 * gib)),
        Case("limits", "sum, read", {"limit": "read", "bytes": 4 * gib}, partial(works.sum_work, 4 * gib)),
        *(
            Case("limits", f"matmul {n}³", {"limit": "matmul", "n": n}, partial(works.matmul_work, n))
            for n in ((8192,) if quick else (8192, 4096))
        ),
    ]


# ---- prefill ---------------------------------------------------------------------------------------------------------

PREFILL_TOKENS = 16_384
# head_dim, query heads, KV heads, lengths
PREFILL = (
    (128, 32, 8, (512, 1024, 2048, 4096, 8192, 16_384)),
    (128, 32, 32, (512, 2048, 8192, 16_384)),
    (64, 32, 8, (512, 2048, 8192, 16_384)),
    (256, 16, 8, (2048, 8192)),
)
FLEX_LENGTH = 4096


def _prefill(quick: bool) -> list[Case]:
    found = []
    for head_dim, q_heads, kv_heads, lengths in PREFILL:
        for length in lengths:
            main = (head_dim, q_heads, kv_heads) == (HEAD_DIM, Q_HEADS, KV_HEADS)
            if quick and not (main and length in (2048, 16_384)):
                continue
            shape = {"head_dim": head_dim, "q_heads": q_heads, "kv_heads": kv_heads, "length": length}
            name = f"prefill hd {head_dim}, {q_heads}/{kv_heads} heads, s {length:,}"
            flex = main and length == FLEX_LENGTH
            build = partial(works.prefill_work, batch=PREFILL_TOKENS // length, flex=flex, **shape)
            targets = (Target("speedup", 1.3, "fa2"), Target("speedup", 0.75, "cudnn"))
            found.append(Case("prefill", name, shape, build, targets if main and length >= 2048 else ()))
    return found


# ---- decode ----------------------------------------------------------------------------------------------------------

MIXED = (131_072, 65_536, 32_768, 16_384, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 1)
DECODE = (
    ("1 × 131,072", (131_072,)),
    ("16 × 8,192", (8192,) * 16),
    ("64 × 4,096", (4096,) * 64),
    ("256 × 2,048", (2048,) * 256),
    ("16 of 1 to 131,072", MIXED),
)
# FlashAttention-3 over pages of 64, measured on an H200 by itself (anchors): seconds.
DECODE_SMALL = (
    ("1 × 8,192", (8192,), 20.9e-6),
    ("8 × 1,024", (1024,) * 8, 21.3e-6),
    ("32 × 1,024", (1024,) * 32, 46.2e-6),
)
LOW_BIT_SPEEDUP = {"fp8": 1.8, "int8": 1.8, "int4": 2.7, "int2": 3.5}
# The same number of tokens, in ever longer contexts.
LADDER = tuple((f"{131_072 // n} × {n:,}", (n,) * (131_072 // n)) for n in (8192, 16_384, 32_768, 65_536, 131_072))
VERIFY_LENGTH = 4
HALF_PAGE = 32


def _decode(quick: bool) -> list[Case]:
    targets = (Target("share", 0.9, "copy"), Target("speedup", 1.0, "cudnn"))
    note = "of mixed lengths the peers know nothing: they are called sequence by sequence, one after the other"
    return [
        _decode_case("decode", name, lengths, targets, note if len(set(lengths)) > 1 else "")
        for name, lengths in DECODE
        if not quick or name in ("16 × 8,192", "16 of 1 to 131,072")
    ]


def _decode_small(quick: bool) -> list[Case]:
    plan = Case(
        "decode-small",
        "plan of 256 sequences",
        {"batch": 256},
        works.plan_work,
        note="the plan is made once per step, for all layers",
    )
    return [
        *(
            _decode_case("decode-small", name, lengths, (Target("seconds", anchor, at_most=True),))
            for name, lengths, anchor in DECODE_SMALL
        ),
        plan,
    ]


def _decode_case(suite: str, name: str, lengths: tuple[int, ...], targets: tuple[Target, ...], note: str = "") -> Case:
    shape = _decode_shape(lengths, "bfloat16")
    return Case(suite, f"decode bfloat16 {name}", shape, partial(works.decode_work, lengths=lengths), targets, note)


def _decode_shape(lengths: tuple[int, ...], kv_dtype: str, query_len: int = 1) -> dict[str, Any]:
    return {
        "kv_dtype": kv_dtype,
        "batch": len(lengths),
        "context": max(lengths),
        "kv_tokens": sum(lengths),
        "query_len": query_len,
        "q_heads": Q_HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
    }


def _part_page(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Half a page less: so many tokens wait in the residual window on average."""
    return tuple(n - HALF_PAGE if n > HALF_PAGE else n for n in lengths)


def _low_bit(quick: bool) -> list[Case]:
    found = []
    for kv_dtype in ("fp8", "int4") if quick else QUANTISED:
        shapes = dict(DECODE) | (dict(LADDER) if kv_dtype == "int4" else {})
        for name, whole_pages in shapes.items():
            if quick and name not in ("16 × 8,192", "1 × 131,072"):
                continue
            lengths = _part_page(whole_pages)
            found.append(
                Case(
                    "low-bit",
                    f"decode {kv_dtype} {name}",
                    _decode_shape(lengths, kv_dtype),
                    partial(works.low_bit_work, kv_dtype=kv_dtype, lengths=lengths),
                    (Target("speedup", LOW_BIT_SPEEDUP[kv_dtype], "bfloat16"),),
                    "contexts are half a page short, so that as much waits in the residual window as on average",
                )
            )
    return found


def _verify(quick: bool) -> list[Case]:
    name, lengths = "16 × 8,192", _part_page((8192,) * 16)
    return [
        Case(
            "verify",
            f"verify {kv_dtype} {name}, q {VERIFY_LENGTH}",
            _decode_shape(lengths, kv_dtype, VERIFY_LENGTH),
            partial(works.verify_work, kv_dtype=kv_dtype, lengths=lengths, query_len=VERIFY_LENGTH),
            (Target("slowdown", 1.05, "q 1", at_most=True),),
        )
        for kv_dtype in ("bfloat16", *QUANTISED)
        if not quick or kv_dtype in ("bfloat16", "int4")
    ]


# ---- cache -----------------------------------------------------------------------------------------------------------

WRITE_LENGTHS = (2048,) * 16


def _cache(quick: bool) -> list[Case]:
    formats = ("bfloat16", "int4") if quick else ("bfloat16", *QUANTISED)
    builders = {"write": partial(works.write_work, rope=False), "RoPE + write": partial(works.write_work, rope=True)}
    found = [
        Case(
            "cache",
            f"{name} {kv_dtype}, {sum(WRITE_LENGTHS):,} tokens",
            {"kv_dtype": kv_dtype, "tokens": sum(WRITE_LENGTHS), "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
            partial(build, kv_dtype=kv_dtype, lengths=WRITE_LENGTHS),
            (Target("share", 0.85, "copy"),),
        )
        for name, build in builders.items()
        for kv_dtype in formats
    ]
    for kv_dtype in formats[1:]:
        shape = {"kv_dtype": kv_dtype, "tokens": sum(WRITE_LENGTHS)}
        build = partial(works.dequantise_work, kv_dtype=kv_dtype, lengths=WRITE_LENGTHS)
        found.append(Case("cache", f"dequantise {kv_dtype}, {sum(WRITE_LENGTHS):,} tokens", shape, build))
    return found


# ---- elementwise -----------------------------------------------------------------------------------------------------

ELEMENTWISE_TOKENS, HIDDEN, INTERMEDIATE = 16_384, 4096, 14_336


def _elementwise(quick: bool) -> list[Case]:
    builders = {
        "RMSNorm": partial(works.rms_norm_work, residual=False, hidden=HIDDEN),
        "RMSNorm + residual": partial(works.rms_norm_work, residual=True, hidden=HIDDEN),
        "SiLU·mul": partial(works.silu_mul_work, intermediate=INTERMEDIATE),
        "RoPE": partial(works.rope_work, norm=False),
        "QK-norm + RoPE": partial(works.rope_work, norm=True),
    }
    return [
        Case(
            "elementwise",
            f"{name}, {ELEMENTWISE_TOKENS:,} tokens",
            {"tokens": ELEMENTWISE_TOKENS, "hidden": HIDDEN, "intermediate": INTERMEDIATE},
            partial(build, tokens=ELEMENTWISE_TOKENS),
            (Target("share", 0.85, "copy"),),
        )
        for name, build in builders.items()
    ]


# ---- linear and fp8 --------------------------------------------------------------------------------------------------

# n, k of a weight: QKV, attention's output, gate and up, down, the vocabulary of Llama-3.1-8B.
GATE_UP, DOWN = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
LINEAR = ((6144, HIDDEN), (HIDDEN, HIDDEN), GATE_UP, DOWN, (128_256, HIDDEN))
LINEAR_ROWS = (1, 2, 4, 8, 16)


def _linear(quick: bool) -> list[Case]:
    rows = (1, 16) if quick else LINEAR_ROWS
    weights = (GATE_UP, DOWN) if quick else LINEAR
    return [
        *(_linear_case("linear", works.linear_work, "cublas", m, *weight) for weight in weights for m in rows),
        *(_linear_case("gate and up", works.gate_up_work, "cublas + SiLU·mul", m, *GATE_UP) for m in rows),
    ]


def _linear_case(name: str, build: Callable[..., Work], peer: str, rows: int, n: int, k: int) -> Case:
    """Where the engine takes ours for the faster one, that is a figure to reach."""
    is_ours = is_faster(rows, n, k)
    return Case(
        "linear",
        f"{name} {n:,} × {k:,}, {rows} row{'s' if rows > 1 else ''}",
        {"rows": rows, "n": n, "k": k, "engine": OURS if is_ours else peer},
        partial(build, rows=rows, n=n, k=k),
        (Target("speedup", 1.0, peer),) if is_ours else (),
        "the floor is the weight at the read limit; ours is launched while the call before it still runs, as in the "
        "engine; `engine` names what the engine calls at such a size, and where that is ours it has to be the faster",
    )


FP8_ROWS = (8192, 1, 4, 8, 16, 256)


def _fp8(quick: bool) -> list[Case]:
    tokens = ELEMENTWISE_TOKENS
    activations = (
        ("quantise", HIDDEN, partial(works.quantise_work, hidden=HIDDEN)),
        ("RMSNorm + residual, quantise", HIDDEN, partial(works.rms_norm_fp8_work, hidden=HIDDEN)),
        ("SiLU·mul, quantise", INTERMEDIATE, partial(works.silu_mul_fp8_work, intermediate=INTERMEDIATE)),
    )
    note = (
        "a product takes activations that are quantised already; up to 16 rows ours is kernels.skinny and has to be "
        "faster than torch._scaled_mm, beyond it is torch._scaled_mm, as the engine calls them; few rows are counted "
        "by the weight's bytes, whose floor is the read limit"
    )
    return [
        *(
            Case(
                "fp8",
                f"{name}, {tokens:,} tokens",
                {"tokens": tokens, "width": width},
                partial(build, tokens=tokens),
            )
            for name, width, build in activations
        ),
        *(
            Case(
                "fp8",
                f"fp8 product {n:,} × {k:,}, {rows:,} row{'s' if rows > 1 else ''}",
                {"rows": rows, "n": n, "k": k},
                partial(works.product_fp8_work, rows=rows, n=n, k=k),
                (Target("speedup", 1.0, "scaled_mm"),) if rows <= MAX_ROWS else (),
                note,
            )
            for n, k in ((GATE_UP,) if quick else (*LINEAR[:2], GATE_UP, DOWN))
            for rows in FP8_ROWS
        ),
    ]


# ---- sampling --------------------------------------------------------------------------------------------------------

SAMPLING_BATCH, VERIFY_BATCH, VOCAB = 256, 64, 128_256
# Temperature, top-k, top-p, standard deviation of the logits.
SAMPLING = {
    "greedy": (0.0, None, None, 4.0),
    "temperature": (1.0, None, None, 4.0),
    "top-k 50, top-p 0.95": (1.0, 50, 0.95, 4.0),
    "top-p 0.95": (1.0, None, 0.95, 4.0),
    "top-p 0.95, flat logits": (1.0, None, 0.95, 1.0),
}


def _sampling(quick: bool) -> list[Case]:
    shape = {"batch": SAMPLING_BATCH, "vocab": VOCAB}
    found = [
        Case("sampling", f"sample {name}", shape, partial(works.sample_work, *settings, **shape))
        for name, settings in SAMPLING.items()
        if not quick or name in ("greedy", "top-k 50, top-p 0.95")
    ]
    shape = {"batch": VERIFY_BATCH, "vocab": VOCAB, "num_drafts": VERIFY_LENGTH - 1}
    found.append(
        Case("sampling", f"verify {VERIFY_LENGTH - 1} drafts", shape, partial(works.verify_drafts_work, **shape))
    )
    return found


# ---- accuracy and memory ---------------------------------------------------------------------------------------------

ACCURACY_LENGTHS = (1, 100, 1000, 4096)


def _accuracy(quick: bool) -> list[Case]:
    note = (
        "relative error that the format puts into attention's output, for Gaussian K and with four outlier channels; "
        "then the kernel's largest error on dequantised pages over that of the same math in plain 16-bit arithmetic"
    )
    return [
        Case(
            "accuracy",
            f"accuracy {kv_dtype}",
            {"kv_dtype": kv_dtype, "head_dim": HEAD_DIM},
            partial(works.accuracy_work, kv_dtype=kv_dtype, lengths=ACCURACY_LENGTHS),
            (Target("value", 2.0, "kernel over plain", at_most=True),),
            note,
        )
        for kv_dtype in (("bfloat16", "int4") if quick else ("bfloat16", *QUANTISED))
    ]


MEMORY_LENGTHS = tuple(1024 * 2**i for i in range(8))


def _memory(quick: bool) -> list[Case]:
    return [
        Case(
            "memory",
            f"prefill memory, s {n:,}",
            {"length": n, "q_heads": Q_HEADS},
            partial(works.memory_work, length=n),
        )
        for n in MEMORY_LENGTHS
        if not quick or n in (MEMORY_LENGTHS[0], MEMORY_LENGTHS[-1])
    ]


# ---- across rows -----------------------------------------------------------------------------------------------------


def trends(suite: str, rows: Sequence[Row]) -> list[Row]:
    """Rows about how other rows change with length; none where those were not measured."""
    if suite == "low-bit":
        return _int4_trend([row for row in rows if row.shape.get("kv_dtype") == "int4" and row.suite == suite])
    if suite == "memory":
        return _memory_trend([row for row in rows if row.suite == suite and "ours_bytes" in row.values])
    return []


def _int4_trend(rows: Sequence[Row]) -> list[Row]:
    """The least speed-up over bfloat16 of the ladder, as a share of that at the shortest context."""
    names = {f"decode int4 {name}" for name, _ in LADDER}
    by_context = {r.shape["context"]: r.speedups()["bfloat16"] for r in rows if r.name in names and r.speedups()}
    if len(by_context) < 2 or min(by_context) == max(by_context):
        return []
    shortest = by_context[min(by_context)]
    values = {"least over first speed-up": min(by_context.values()) / shortest}
    # A twentieth is what two runs of one shape may differ by.
    target = Target("value", 0.95, "least over first speed-up")
    name = f"decode int4, context {min(by_context):,} to {max(by_context):,}"
    return [Row("low-bit", name, {"kv_dtype": "int4"}, values=values, targets=(target,))]


def _memory_trend(rows: Sequence[Row]) -> list[Row]:
    """p in bytes ∝ s^p between the ends: 1 is linear, 2 is the naive matrix."""
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    growth = math.log(last.shape["length"] / first.shape["length"])
    exponent = math.log(last.values["ours_bytes"] / first.values["ours_bytes"]) / growth
    name = f"prefill memory, s {first.shape['length']:,} to {last.shape['length']:,}"
    return [
        Row("memory", name, values={"exponent": exponent}, targets=(Target("value", 1.02, "exponent", at_most=True),))
    ]


_SUITES: dict[str, Callable[[bool], list[Case]]] = {
    "limits": _limits,
    "prefill": _prefill,
    "decode": _decode,
    "decode-small": _decode_small,
    "low-bit": _low_bit,
    "verify": _verify,
    "cache": _cache,
    "elementwise": _elementwise,
    "linear": _linear,
    "fp8": _fp8,
    "sampling": _sampling,
    "memory": _memory,
    "accuracy": _accuracy,
}
