"""The tables of the READMEs that come from `validation.json` and from the shipped profiles.

`python -m tests.calibration.readme_tables` writes them. A table is known by the beginnings of its rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from calibration.validate.errors import LIMITS, MIXED_STEP_LIMITS, SATURATION_LIMIT
from planner.catalog import load_gpu, load_model
from planner.kv_format import KVCacheDtype
from planner.profile.library import find_profile, shipped_profiles, step_time_of
from planner.profile.schema import load_profile, read_profile
from planner.profile.tables import Point, point_shape

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "calibration" / "records"
PROFILES = ROOT / "planner" / "data" / "profiles"
#: Two that were profiled, of which the first one's profile is shipped, and others of their type.
GPUS = {"A": RECORDS} | {letter.upper(): RECORDS / f"device_{letter}" for letter in "bcde"}
_PROFILED = ("A", "B")
_FP8_WEIGHTS_KV = "bfloat16"
#: Steps of a table, by their prompts and decodes.
_FP8_WEIGHTS_STEPS = {
    **{((), ((160, count),)): f"{count} decode{'s' * (count > 1)}" for count in (1, 8, 16, 32, 128, 256)},
    **{(((tokens, 0),), ()): f"prompt of {tokens:,}" for tokens in (64, 128, 256, 512, 2048, 8192)},
}
_LEVEL = re.compile(r"serve_h200_(bf16|fp8|1b)_(\d+)")
_NAMES = {"bf16": "bfloat16", "fp8": "fp8", "1b": "1B, bfloat16"}
#: What was to be reached: its name, and its metrics, which have one limit.
_FIGURES = {
    "TPOT mean": ("tpot_ms.mean",),
    "TPOT p50": ("tpot_ms.p50",),
    "E2EL p50": ("e2el_ms.p50",),
    "E2EL p90": ("e2el_ms.p90",),
    "TTFT p50": ("ttft_ms.p50",),
    "p99 of TTFT": ("ttft_ms.p99",),
    "p99 of TPOT and of E2EL": ("tpot_ms.p99", "e2el_ms.p99"),
    "throughput": ("output_throughput_tokens_per_s",),
}


def _validation(path: Path) -> dict:
    return json.loads(path.read_text())


def levels(path: Path) -> dict[tuple[str, int], dict]:
    """What a validation says of each load, by KV format and share of the capacity."""
    found = _validation(path)["levels"]
    named = {_LEVEL.fullmatch(level["record"]): level for level in found}
    return {(match[1], int(match[2])): level for match, level in named.items()}


def signed(share: float, digits: int = 1) -> str:
    """A relative error in per cent."""
    text = f"{100 * share:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _error(level: dict, metric: str) -> str:
    return signed(level["metrics"][metric]["error"])


def _prompt_steps(level: dict) -> dict:
    return next(each for each in level["steps"] if each["kind"] == "all with prompts")


def _all_rows(name: str, path: Path) -> list[str]:
    rows = []
    for (kv, share), level in levels(path).items():
        steps = _prompt_steps(level)
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
        rows.append((kv, share, _row(cells)))
    return [row for _, _, row in sorted(rows)]


def calibration_rows() -> list[str]:
    """Of calibration/README.md: every load by itself."""
    rows = [row for name, folder in GPUS.items() for row in _all_rows(name, folder / "validation.json")]
    return rows + _all_rows("B", GPUS["B"] / "validation_1b.json")


def figure_rows() -> list[str]:
    """Of calibration/README.md: of how many loads of each GPU a figure was reached."""
    validations = [_validation(folder / "validation.json") for folder in GPUS.values()]
    rows = []
    for name, metrics in _FIGURES.items():
        (limit,) = {LIMITS[metric] for metric in metrics}
        errors = [
            [[level["metrics"][metric]["error"] for metric in metrics] for level in validation["levels"]]
            for validation in validations
        ]
        reached = [sum(all(abs(each) <= limit for each in one) for one in of_gpu) for of_gpu in errors]
        worst = max((each for of_gpu in errors for one in of_gpu for each in one), key=abs)
        cells = [name, f"{100 * limit:.0f} %"]
        cells += [f"{count} of {len(of_gpu)}" for count, of_gpu in zip(reached, errors, strict=True)]
        rows.append(_row([*cells, f"{signed(worst)} %"]))
    return [*rows, *_other_figures(validations)]


def _other_figures(validations: list[dict]) -> Iterator[str]:
    """Of whole engines, of single steps, and of intervals."""
    points = [[each["error"] for each in one["saturation"].values()] for one in validations]
    known = [[error for error in of_gpu if error is not None] for of_gpu in points]
    cells = [
        f"{sum(abs(each) <= SATURATION_LIMIT for each in of_gpu)} of {len(of_gpu)}" if of_gpu else "–"
        for of_gpu in known
    ]
    worst = max((each for of_gpu in known for each in of_gpu), key=abs)
    yield _row(["saturation point", f"{100 * SATURATION_LIMIT:.0f} %", *cells, f"{signed(worst)} %"])
    steps = [[_prompt_steps(level) for level in one["levels"]] for one in validations]
    limits = MIXED_STEP_LIMITS
    cells = [
        " / ".join(str(sum(each[name] <= limit for each in of_gpu)) for name, limit in limits.items())
        for of_gpu in steps
    ]
    worst = " / ".join(f"{100 * max(each[name] for of_gpu in steps for each in of_gpu):.1f}" for name in limits)
    asked = " / ".join(f"{100 * limit:.0f}" for limit in limits.values())
    yield _row(["steps with prompts, median / 90 %", f"{asked} %", *cells, f"{worst} %"])
    found = [one["coverage"]["all"] for one in validations]
    share = sum(each["inside"] for each in found) / sum(each["of"] for each in found)
    cells = [f"{100 * each['share']:.1f} %" for each in found]
    yield _row(["90 % intervals that hold", "85 to 95 %", *cells, f"in all {100 * share:.1f} %"])


def transfer_rows() -> list[str]:
    """Of calibration/README.md: the models as foreseen from each other."""
    rows = []
    for name, kv, path in (
        ("8B from 1B, bfloat16", "bf16", "validation_8b_from_1b.json"),
        ("8B from 1B, fp8", "fp8", "validation_8b_from_1b.json"),
        ("1B from 8B, bfloat16", "1b", "validation_1b_from_8b.json"),
    ):
        found = levels(GPUS["B"] / path)
        rows.append(_row([name, *(_error(found[kv, share], "tpot_ms.mean") for share in (20, 50, 80, 95))]))
    return rows


def fp8_weight_rows() -> list[str]:
    """Of calibration/README.md: what fp8 weights make of the 1B model's steps, and what the 8B profile said they would.

    Times on the device, of prompts that the CPU had launched in time where that was measured.
    """
    shipped = {profile.name: profile for profile in shipped_profiles()}
    other = shipped["llama-3.2-1b_h200.json.gz"].tables.kv[_FP8_WEIGHTS_KV]
    of_f = load_profile(RECORDS / "device_f" / "llama-3.2-1b_fp8_h200.json.gz").tables.kv[_FP8_WEIGHTS_KV]
    model, gpu, kv = load_model("llama-3.2-1b", "fp8"), load_gpu("h200_sxm"), KVCacheDtype(_FP8_WEIGHTS_KV)
    match = find_profile(model, gpu, kv, 1, [shipped["llama-3.1-8b_fp8_h200.json"]])
    foreseen = step_time_of(match, model, gpu, kv, 1, 64, 256, 8192).fitted
    before = {(point.prefills, point.decodes): _device_s(point) for point in other.decode + other.prefill}
    rows = []
    for kind, points in (("decodes", of_f.decode), ("prompts", of_f.prefill)):
        errors = []
        for point in points:
            found_s, foreseen_s = _device_s(point), foreseen.seconds(point_shape(point))
            errors.append(foreseen_s / found_s - 1)
            step = point.prefills, point.decodes
            if step in _FP8_WEIGHTS_STEPS:
                times = [f"{1e3 * seconds:#.3g}" for seconds in (before[step], found_s, foreseen_s)]
                rows.append(_row([_FP8_WEIGHTS_STEPS[step], *times, signed(errors[-1])]))
        rows.append(_row([f"all {len(errors)} {kind}", "", "", "", f"{signed(min(errors))} to {signed(max(errors))}"]))
    return rows


def _device_s(point: Point) -> float:
    return point.ahead_s or point.gpu_s or point.step_s


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def fit_rows() -> list[str]:
    """Errors of the fits of the shipped profiles: of calibration/README.md."""
    rows = []
    for name in ("llama-3.1-8b", "llama-3.1-8b_fp8", "llama-3.2-1b"):
        (path,) = PROFILES.glob(f"{name}_h200.json*")
        profile = json.loads(read_profile(path))
        for kv, tables in profile["kv"].items():
            fit = tables["fit"]
            cells = [name.replace("_fp8", ", fp8 weights"), kv]
            cells += [_told(fit[table], "leave_one_out") for table in ("decode", "prefill", "mixed")]
            cells.append(_told(fit["service, prompt"], "in_sample"))
            rows.append(_row(cells))
    return rows


def _told(errors: dict, which: str) -> str:
    """Median and 90th percentile, and of how many points."""
    return f"{100 * errors[which]['median']:.1f} / {100 * errors[which]['p90']:.1f} % ({errors['points']})"


def readme_rows() -> list[str]:
    """Of README.md: the errors on the GPUs that were profiled."""
    found = [levels(GPUS[name] / "validation.json") for name in _PROFILED]
    rows = []
    for kv, share in sorted(found[0]):
        cells = [f"{_NAMES[kv]}, {share} %"]
        metrics = ("ttft_ms.p50", "tpot_ms.mean", "e2el_ms.p50", "output_throughput_tokens_per_s")
        cells += [" / ".join(_error(each[kv, share], metric) for each in found) for metric in metrics]
        rows.append(_row(cells))
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
            rows.append(((gpu, kv, share), _row(cells)))
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
    (ROOT / "calibration" / "README.md", transfer_rows, r"\| \dB from \dB"),
    (
        ROOT / "calibration" / "README.md",
        fp8_weight_rows,
        r"\| (\d+ decodes?|prompt of [\d,]+|all \d+ (decodes|prompts)) \|",
    ),
    (ROOT / "calibration" / "README.md", trimmed_rows, r"\| [A-E], (bfloat16|fp8), \d+ % from"),
    (ROOT / "calibration" / "README.md", calibration_rows, r"\| [A-E] \| (1B, )?(bfloat16|fp8), \d+ % \|"),
    (
        ROOT / "calibration" / "README.md",
        figure_rows,
        r"\| (TPOT|E2EL|TTFT|p99|throughput|saturation|steps with|90 % int)[^|,]*(, median / 90 %)? \| [0-9/ to]+ % \|",
    ),
)


if __name__ == "__main__":
    for path, rows, begin in TABLES:
        path.write_text(tables(path.read_text(), rows(), begin))
