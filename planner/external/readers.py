"""Read what a served benchmark recorded per request, whichever tool wrote it."""

from __future__ import annotations

from pathlib import Path

from planner.external.bench_detail import is_bench_detail, read_bench_detail
from planner.external.request_table import read_request_table
from planner.external.served_run import ServedRun
from planner.workload.tables import read_text


def read_served_runs(path: str | Path) -> list[ServedRun]:
    """The runs of one file, gzipped or not.

    Three kinds of file: what `vllm bench serve --save-result --save-detailed` writes (with --append-result several
    runs), what SGLang's bench_serving appends with --output-details (one run a line), and a table of requests (JSONL
    or CSV) with columns for arrival, first and last token and the two lengths.

    Raises:
        UserError: one sentence with file, line and field.
    """
    file = Path(path).name
    text = read_text(path)
    if is_bench_detail(text):
        return read_bench_detail(text, file)
    return [read_request_table(text, file)]
