"""Read what a served benchmark recorded per request, whichever tool wrote it, and what its server printed."""

from __future__ import annotations

from pathlib import Path

from planner.errors import UserError
from planner.external.bench_detail import is_bench_detail, read_bench_detail
from planner.external.request_table import read_request_table
from planner.external.served_run import ServedRun
from planner.external.server_facts import ServerFacts
from planner.external.server_log import read_server_log
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


def read_server_facts(*paths: Path | None) -> ServerFacts:
    """What a server said of itself, in its log and in the text of its /metrics; None for what there is not.

    Raises:
        UserError: a file that cannot be read or says nothing, by its name.
    """
    facts = ServerFacts()
    for path in paths:
        if path is not None:
            try:
                facts = facts.merged(read_server_log(read_text(path)))
            except UserError as error:
                named = str(error) if path.name in str(error) else f"{path.name}: {error}"
                raise UserError(named) from None
    return facts
