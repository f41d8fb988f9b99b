"""Read what a served benchmark recorded per request, whichever tool wrote it, and what its server printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from planner.errors import UserError
from planner.external.bench_detail import is_bench_detail, read_bench_detail
from planner.external.kinds import ensure_benchmark_text
from planner.external.memwall_record import MemwallRecord, is_memwall_record, read_memwall_record
from planner.external.request_table import read_request_table
from planner.external.served_run import ServedRun
from planner.external.server_facts import ServerFacts
from planner.external.server_log import read_server_log
from planner.workload.tables import read_text


def read_benchmark_text(path: str | Path) -> str:
    """The text of a file that should be a benchmark, gzipped or not.

    Raises:
        UserError: there is none to be had.
    """
    return read_text(path, "benchmark")


def read_served_runs(path: str | Path) -> list[ServedRun]:
    """The runs of one file, gzipped or not.

    Three kinds of file: what `vllm bench serve --save-result --save-detailed` writes (with --append-result several
    runs), what SGLang's bench_serving appends with --output-details (one run a line), and a table of requests (JSONL
    or CSV) with columns for arrival, first and last token and the two lengths.

    Raises:
        UserError: one sentence with file, line and field.
    """
    file = Path(path).name
    text = read_benchmark_text(path)
    ensure_benchmark_text(text, file)
    if is_bench_detail(text):
        return read_bench_detail(text, file)
    return [read_request_table(text, file)]


def read_own_records(paths: Sequence[Path]) -> MemwallRecord | None:
    """Records of `memwall bench serve`, all of one server, as one; None if none of the files is one.

    Raises:
        UserError: one of them is something else, cannot be used, or is of another server than the first.
    """
    texts = {path: read_benchmark_text(path) for path in paths}
    own = [path for path, text in texts.items() if is_memwall_record(text)]
    if not own:
        return None
    for path in texts:
        if path not in own:
            raise UserError(
                f"{path.name} is no record of `memwall bench serve`, but {own[0].name} is one; give runs of one server"
            )
    first, *others = (read_memwall_record(texts[path], path.name) for path in own)
    for path, record in zip(own[1:], others, strict=True):
        for name, value in (first.server() | record.server()).items():
            if first.server().get(name) != value or record.server().get(name) != value:
                raise UserError(
                    f"{path.name} was served with {name} {record.server().get(name)}, {own[0].name} with "
                    f"{first.server().get(name)}; give runs of one server"
                )
    return replace(first, runs=tuple(run for record in (first, *others) for run in record.runs))


def read_server_facts(*paths: Path | None) -> ServerFacts:
    """What a server said of itself, in its log and in the text of its /metrics; None for what there is not.

    Raises:
        UserError: a file that cannot be read or says nothing, by its name.
    """
    facts = ServerFacts()
    for path in paths:
        if path is not None:
            try:
                facts = facts.merged(read_server_log(read_text(path, "server log", "UTF-8 text")))
            except UserError as error:
                named = str(error) if path.name in str(error) else f"{path.name}: {error}"
                raise UserError(named) from None
    return facts


def refuse_twice(paths: Sequence[Path]) -> None:
    """
    Raises:
        UserError: a file is given twice, or its content is, which would count as twice the data.
    """
    first: dict[str, Path] = {}
    for path in paths:
        same = first.setdefault(read_benchmark_text(path), path)
        if same is not path:
            what = "is given twice" if same.resolve() == path.resolve() else f"has the same content as {same.name}"
            raise UserError(f"{path.name} {what}; give each benchmark once")
