"""`memwall export`: the launch command of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.commands.files import ensure_distinct
from planner.commands import tables
from planner.commands.options import OutputFile


def export(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What `memwall plan --output json` wrote.")],
    target: Annotated[str, typer.Option("--target", help="What to launch it with: vllm.", metavar="NAME")] = "vllm",
    rank: Annotated[int, typer.Option("--rank", help="Which plan: 1 is the best.", metavar="N")] = 1,
    output_file: OutputFile = None,
) -> None:
    """Print the command that launches a plan."""
    from planner.export import choose_plan, export_plan

    ensure_distinct([("the plan", plan)], [("--output-file", output_file)])
    script = export_plan(choose_plan(plan, rank), target)
    tables.show(script.rstrip("\n"))
    if output_file is not None:
        tables.write_whole(output_file, script)
