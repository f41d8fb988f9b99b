"""Files that are no benchmark: what each is, and where it belongs."""

from __future__ import annotations

import json

from planner.errors import UserError
from planner.external.bench_detail import is_bench_detail

_BEHIND_PROFILE = "it belongs behind --profile"
# By the `kind` that a file says of itself: what wrote it, and what to do with it.
_KINDS = {
    "memwall-external-calibration": ("a calibration of `memwall calibrate-from`", _BEHIND_PROFILE),
    "memwall-profile": ("a profile of `memwall calibrate`", _BEHIND_PROFILE),
    "memwall-validation": ("what `memwall validate --json` wrote", "give the records that it was made from"),
    "all-reduce": ("a measurement of all-reduces", "it is added to profiles"),
}
_WANTED = (
    "wanted is what `vllm bench serve --save-detailed`, SGLang's bench_serving or `memwall bench serve` writes, or a "
    "table with one request per line"
)
_HEAD = 1000  # our files say their kind before anything long


def ensure_no_other_kind(document: object, file: str) -> None:
    """
    Raises:
        UserError: the JSON says that it is another kind of file than a benchmark.
    """
    kind = document.get("kind") if isinstance(document, dict) else None
    if isinstance(kind, str) and kind in _KINDS:
        what, remedy = _KINDS[kind]
        raise UserError(f"{file} is {what}, not a benchmark; {remedy}")


def ensure_benchmark_text(text: str, file: str) -> None:
    """Tell a JSON document of another kind from a benchmark and from a table with an object per line.

    Raises:
        UserError: it is such a document, or one over several lines that is not complete.
    """
    first = text.lstrip().partition("\n")[0].rstrip()
    # An object of its own ends on its line.
    is_spread = first[:1] in ("{", "[") and first[-1:] not in ("}", "]")
    if not is_spread and '"kind"' not in first[:_HEAD]:
        return
    try:
        document = json.loads(text)
    except RecursionError:
        raise UserError(f"{file} is nested too deeply for a benchmark") from None
    except json.JSONDecodeError as error:
        if is_spread:
            raise UserError(f"{file} line {error.lineno} is not complete JSON: {error.msg}") from None
        return
    ensure_no_other_kind(document, file)
    if is_spread and not is_bench_detail(text):
        shape = "array" if isinstance(document, list) else "object"
        raise UserError(f"{file} is one JSON {shape} over several lines, and no benchmark; {_WANTED}")
