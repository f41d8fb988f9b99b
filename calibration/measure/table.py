"""A profile in a few lines: some steps of every KV format, beside what reading the weights takes at least."""

from __future__ import annotations

import json
from typing import Any

from calibration.measure.grid import DECODE, MIXED, PREFILL, Point
from engine.bench import tables

_HEADER = ("step", "ms", "p10", "p90", "GPU ms", "alone ms", "host ms", "× floor")
_CLOCK = ("cool_s", "hot_s")
_MOST_ROWS = {DECODE: 7, PREFILL: 5, MIXED: 3}


def text_of(profile: dict[str, Any], weight_bytes: int) -> str:
    """A table for each KV format, the limits, and the errors of the fit.

    Args:
        weight_bytes: that every step reads: at the copy rate, the floor.
    """
    limits = profile["limits"]
    floor_s = weight_bytes / limits["copy_bytes_per_s"]
    fp8 = limits["matmul_fp8_flops_per_s"]
    parts = [
        f"{profile['model']['name']} on {profile['gpu_name']}: copy {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"matmul {limits['matmul_flops_per_s'] / 1e12:,.1f} TFLOP/s"
        + (f", fp8 {fp8 / 1e12:,.1f}" if fp8 else "")
        + f"; reading {weight_bytes / 1e9:,.2f} GB of weights takes {floor_s * 1e3:.3f} ms"
    ]
    for name, kv in profile["kv"].items():
        count = sum(len(kv[table]) for table in _MOST_ROWS)
        parts.append(f"\n{name}: {kv['num_kv_blocks']:,} KV blocks, {count} points")
        rows = [_row(point, floor_s) for table, most in _MOST_ROWS.items() for point in _some(kv[table], most)]
        parts.append(tables.columns(_HEADER, rows))
        if kv["fit"] is not None:
            parts.append(f"errors of the fit, median / p90: {_fit(kv['fit'])}")
    if points := profile.get("clock", {}).get("points"):
        parts.append("\nprompts among decodes and among prompts, as shares of steps that follow their like:")
        rows = [[f"{row['tokens']:,}", *(f"{row[name] / row['steady_s']:.3f}" for name in _CLOCK)] for row in points]
        parts.append(tables.columns(("tokens", "cool", "hot"), rows))
    if profile["allreduce"]:
        parts.append("")
        parts += [
            f"all-reduce of {row['bytes']:,} bytes, {row['world_size']} GPUs: {row['time_s'] * 1e6:.1f} µs"
            for row in _some(profile["allreduce"], 4)
        ]
    parts += ["", *profile["notes"]] if "notes" in profile else []
    parts.append(f"\nmeasured in {profile['duration_s']:.0f} s")
    return "\n".join(parts)


def dumps(profile: dict[str, Any]) -> str:
    """JSON with a point per line."""
    return _dumps(profile, 0) + "\n"


def _dumps(value: Any, depth: int) -> str:
    indent = " " * (depth + 1)
    if isinstance(value, dict) and value and depth < 3:
        body = (f"{indent}{json.dumps(key)}: {_dumps(each, depth + 1)}" for key, each in value.items())
        return "{\n" + ",\n".join(body) + f"\n{indent[1:]}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        body = (indent + json.dumps(each, separators=(",", ":"), ensure_ascii=False) for each in value)
        return "[\n" + ",\n".join(body) + f"\n{indent[1:]}]"
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _some(points: list[Any], most: int) -> list[Any]:
    """Evenly spread over the list, its ends among them."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def _row(point: dict[str, Any], floor_s: float) -> list[str]:
    times_s = (point["step_s"], point["low_s"], point["high_s"], point["gpu_s"], point["alone_s"], point["host_s"])
    cells = [tables.MISSING if seconds is None else f"{seconds * 1e3:.3f}" for seconds in times_s]
    shape = Point("", *(tuple(map(tuple, point[name])) for name in ("prefills", "decodes")))
    return [describe(shape), *cells, f"{point['step_s'] / floor_s:.2f}"]


def describe(point: Point) -> str:
    """Its shape in a few words."""
    chunks = [f"{query}" + (f" behind {context}" if context else "") for query, context in point.prefills]
    if point.decodes:
        chunks.append(f"{point.num_decodes} × {sum(point.contexts) / point.num_decodes:,.0f}")
    return " + ".join(chunks)


def _fit(errors: dict[str, Any]) -> str:
    """Median and 90 % quantile of the relative error of every table, leaving out one where that was done."""
    found = []
    for name, value in errors.items():
        shown = (value.get("leave_one_out") or value.get("in_sample")) if isinstance(value, dict) else None
        if shown:
            found.append(f"{name} {shown['median']:.2%} / {shown['p90']:.2%}")
    return ", ".join(found)
