"""The record of a study as text: a Markdown table per question, which a terminal shows as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_of(record: dict[str, Any]) -> str:
    """All tables of a record."""
    model, settings = record["model"], record["settings"]
    head = (
        f"{model['parameters'] / 1e6:.1f} M parameters, {settings['windows']} windows of {settings['context']:,} "
        f"tokens from {settings['documents']} documents; intervals of 95 % by resampling documents"
    )
    parts = [head, _quality(record), _by_context(record)]
    parts += [_retrieval(record)] if record["retrieval_chance"] else []
    return "\n\n".join([*parts, _attention(record)])


def _quality(record: dict[str, Any]) -> str:
    rows = []
    for each in record["variants"]:
        kl, perplexity, ratio, top1 = (
            each[name] for name in ("kl", "perplexity", "perplexity_ratio", "top1_agreement")
        )
        rows.append(
            [
                _name(each),
                f"{kl['mean']:.3g}",
                f"{kl['p99']:.3g}",
                f"{perplexity['value']:.3f}",
                f"{_percent(ratio['value'])} ({_percent(ratio['interval'][0])} to {_percent(ratio['interval'][1])})",
                f"{top1['value']:.2%}",
            ]
        )
    header = ["KV", "KL, nats", "p99", "perplexity", "against the reference", "top-1 agreement"]
    return _table(header, rows) + ("\n\n¹ " + record["emulation"] if _is_emulated(record) else "")


def _by_context(record: dict[str, Any]) -> str:
    parts = record["variants"][0]["by_context"]
    header = ["KL by tokens of context", *[f"{part['from']:,} to {part['to'] - 1:,}" for part in parts]]
    rows = [[_name(each), *[f"{part['kl']['mean']:.3g}" for part in each["by_context"]]] for each in record["variants"]]
    return _table(header, rows)


def _retrieval(record: dict[str, Any]) -> str:
    chance = record["retrieval_chance"]
    header = ["found again at distance", *[f"{each['distance']:,}" for each in chance]]
    shown = [(_name(each), each["retrieval"]) for each in record["variants"]] + [("not planted", chance)]
    rows = [
        [name, *[f"{each['exact'] / each['trials']:.0%} ({each['log_prob']:.2f})" for each in found]]
        for name, found in shown
    ]
    note = f"Share of {chance[0]['trials']} values each; in brackets the mean log-probability of a value's token."
    return _table(header, rows) + "\n\n" + note


def _attention(record: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys((each["outliers"], each["strength"]) for each in record["attention"]))
    formats = list(dict.fromkeys(each["kv_cache_dtype"] for each in record["attention"]))
    errors = {
        (each["kv_cache_dtype"], each["outliers"], each["strength"]): each["error_ordinary"]
        for each in record["attention"]
    }
    titles = ["none" if where == "none" else f"{where.upper()} {strength} σ" for where, strength in kinds]
    rows = [[name, *[f"{errors[name, *kind]:.3%}" for kind in kinds]] for name in formats]
    return _table(["error of attention's output, outliers in", *titles], rows)


def _name(variant: dict[str, Any]) -> str:
    return variant["name"] + " ¹" * variant["emulated"]


def _is_emulated(record: dict[str, Any]) -> bool:
    return any(each["emulated"] for each in record["variants"])


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.3f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
