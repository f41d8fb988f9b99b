"""The tables of the READMEs that come from `validation.json` and from the shipped profiles.

`python -m tests.calibration.readme_tables` writes them. A table is known by the beginnings of its rows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "calibration" / "records"
PROFILES = ROOT / "planner" / "data" / "profiles"
#: The one that was profiled, and others of its type.
GPUS = {"A": RECORDS, "B": RECORDS / "device_b", "C": RECORDS / "device_c"}
_LEVEL = re.compile(r"serve_h200_(bf16|fp8)_(\d+)")
_NAMES = {"bf16": "bfloat16", "fp8": "fp8"}


def levels(path: Path) -> dict[tuple[str, int], dict]:
    """What a validation says of each load, by KV format and share of the capacity."""
    found = json.loads(path.read_text())["levels"]
    named = {_LEVEL.fullmatch(level["record"]): level for level in found}
    return {(match[1], int(match[2])): level for match, level in named.items()}


def signed(share: float, digits: int = 1) -> str:
    """A relative error in per cent."""
    text = f"{100 * share:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _error(level: dict, metric: str) -> str:
    return signed(level["metrics"][metric]["error"])


def _all_rows(name: str, folder: Path) -> list[str]:
    rows = []
    for (kv, share), level in levels(folder / "validation.json").items():
        steps = next(each for each in level["steps"] if each["kind"] == "all with prompts")
        twice = level["num_runs"] > 1
        apart = [level["metrics"][metric]["spread"] for metric in ("ttft_ms.p50", "tpot_ms.mean")] if twice else []
        cells = [
            name,
            f"{_NAMES[kv]}, {share} %",
            f"{level['request_rate_per_s']:.1f}",
            " / ".join(_error(level, f"ttft_ms.{at}") for at in ("p50", "p99")),
            " / ".join(_error(level, f"tpot_ms.{at}") for at in ("mean", "p50", "p99")),
            " / ".join(_error(level, f"e2el_ms.{at}") for at in ("p50", "p90")),
            _error(level, "output_throughput_tokens_per_s"),
            f"{100 * steps['median']:.1f} / {100 * steps['p90']:.1f}",
            " / ".join(f"{100 * each:.1f}" for each in apart) or "– / –",
        ]
        rows.append((kv, share, f"| {' | '.join(cells)} |"))
    return [row for _, _, row in sorted(rows)]


def calibration_rows() -> list[str]:
    """Of calibration/README.md."""
    return [row for name, folder in GPUS.items() for row in _all_rows(name, folder)]


def fit_rows() -> list[str]:
    """Errors of the fits of the shipped profiles: of calibration/README.md."""
    rows = []
    for name in ("llama-3.1-8b", "llama-3.1-8b_fp8", "llama-3.2-1b"):
        profile = json.loads((PROFILES / f"{name}_h200.json").read_text())
        for kv, tables in profile["kv"].items():
            fit = tables["fit"]
            cells = [name.replace("_fp8", ", fp8 weights"), kv]
            cells += [_told(fit[table], "leave_one_out") for table in ("decode", "prefill", "mixed")]
            cells.append(_told(fit["service, prompt"], "in_sample"))
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _told(errors: dict, which: str) -> str:
    """Median and 90th percentile, and of how many points."""
    return f"{100 * errors[which]['median']:.1f} / {100 * errors[which]['p90']:.1f} % ({errors['points']})"


def readme_rows() -> list[str]:
    """Of README.md: the errors on all GPUs."""
    found = [levels(folder / "validation.json") for folder in GPUS.values()]
    rows = []
    for kv, share in sorted(found[0]):
        cells = [f"{_NAMES[kv]}, {share} %"]
        for metric in ("ttft_ms.p50", "tpot_ms.mean", "e2el_ms.p50", "output_throughput_tokens_per_s"):
            known = [_error(each[kv, share], metric) if (kv, share) in each else "–" for each in found]
            cells.append(" / ".join(known))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def trimmed_rows() -> list[str]:
    """Loads as foreseen from two others: of calibration/README.md and README.md."""
    rows = []
    for path in sorted((RECORDS / "trimmed").glob("validation_*.json")):
        gpu, _, *fitted = path.stem.removeprefix("validation_").split("_")
        for (kv, share), level in levels(path).items():
            cells = [
                f"{gpu}, {_NAMES[kv]}, {share} % from {' and '.join(fitted)} %",
                " / ".join(_error(level, f"ttft_ms.{at}") for at in ("p50", "p99")),
                " / ".join(_error(level, f"tpot_ms.{at}") for at in ("mean", "p50", "p99")),
                " / ".join(_error(level, f"e2el_ms.{at}") for at in ("p50", "p90", "p99")),
                _error(level, "output_throughput_tokens_per_s"),
            ]
            rows.append(((gpu, kv, share), f"| {' | '.join(cells)} |"))
    return [row for _, row in sorted(rows)]


def tables(text: str, rows: list[str], begin: str) -> str:
    """The text with the rows that begin like that exchanged for these."""
    lines = text.splitlines()
    old = [index for index, line in enumerate(lines) if re.match(begin, line)]
    lines[old[0] : old[-1] + 1] = rows
    return "\n".join(lines) + "\n"


#: File, its rows, and how they begin.
TABLES = (
    (ROOT / "README.md", readme_rows, r"\| (bfloat16|fp8), \d+ % \|"),
    (
        ROOT / "calibration" / "README.md",
        fit_rows,
        r"\| llama-[\w.-]+(, fp8 weights)? \| (bfloat16|fp8|int8|int4) \| \d",
    ),
    (ROOT / "calibration" / "README.md", trimmed_rows, r"\| [ABC], (bfloat16|fp8), \d+ % from"),
    (ROOT / "calibration" / "README.md", calibration_rows, r"\| [ABC] \| (bfloat16|fp8), \d+ % \|"),
)


if __name__ == "__main__":
    for path, rows, begin in TABLES:
        path.write_text(tables(path.read_text(), rows(), begin))
