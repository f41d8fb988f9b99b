"""All-reduce by bytes, for profiles that were measured on one GPU: `python -m calibration.allreduce RECORD PROFILE...`.

`memwall calibrate` measures it beside all else where it finds several GPUs. Where a profile was measured on one, a
machine with several of the type, lent for a minute, tells the rest:

    python -m calibration.allreduce allreduce.json                    # there: measures, and writes the record
    python -m calibration.allreduce allreduce.json profile.json       # anywhere: adds what it says to a profile
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.command import exit_code
from calibration.measure.table import dumps
from engine.bench.record import as_committed, commit, ensure_writable, environment, write_text
from engine.commands.arguments import ArgumentParser
from engine.errors import UserError

if TYPE_CHECKING:
    import argparse

_PROG = "python -m calibration.allreduce"
_DESCRIPTION = (
    "Measure all-reduces of 8 KiB to 256 MiB between the GPUs of this machine, unless RECORD is there already, and add "
    "what it says to profiles of the same GPU, which then foresee tensor parallelism by it."
)
KIND = "all-reduce"
VERSION = 1


def main(arguments: list[str]) -> int:
    """Run the command. Returns its exit code."""
    return exit_code(_PROG, run, arguments)


def run(arguments: list[str]) -> int:
    """Measure if there is no record yet, add to the profiles that are named, and say what was done.

    Raises:
        UserError: bad input, or one GPU only.
    """
    parser = ArgumentParser(_PROG, _DESCRIPTION)
    parser.add_argument("record", type=Path, metavar="RECORD", help="JSON; measured now if it is not there")
    parser.add_argument(
        "profiles", type=Path, nargs="*", default=[], metavar="PROFILE", help="of memwall calibrate, to be added to"
    )
    parser.add_argument("--commit", metavar="NAME", help="of the source, where it is no git checkout")
    options = parser.read(arguments)
    if options is None:
        return 0
    if not options.record.exists():
        _measure_into(options, arguments)
    record = _read(options.record)
    # All of them before the first is written.
    for path, text in [(path, added(path, record)) for path in options.profiles]:
        write_text(path, text)
        print(f"{path}: all-reduces of {_worlds(record)} GPUs added")
    return 0


def _measure_into(options: argparse.Namespace, arguments: list[str]) -> None:
    import torch

    from calibration.measure import facts
    from calibration.measure.allreduce import measure_allreduce, world_sizes

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        raise UserError(
            f"{options.record} is not there, and this machine has {count} of the two GPUs or more that it takes to "
            "measure it"
        )
    ensure_writable(options.record)
    device = torch.device("cuda", 0)
    rows = [row for size in world_sizes(count) for row in measure_allreduce(size)]
    record = {
        "kind": KIND,
        "version": VERSION,
        "command": " ".join([_PROG, *map(as_committed, arguments)]),
        "commit": options.commit or commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device) | _nccl(),
        **facts.gpu(device),
        "allreduce": rows,
    }
    write_text(options.record, dumps(record))
    for row in rows:
        rate = row["bytes"] / row["time_s"] / 1e9
        print(f"{row['world_size']} GPUs, {row['bytes']:>11,} bytes: {row['time_s'] * 1e6:9.1f} us, {rate:6.1f} GB/s")


def _nccl() -> dict[str, Any]:
    """The library, and what it was told: some machines forbid it its fastest ways."""
    import torch

    told = {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")}
    return {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "nccl_environment": told}


def added(path: Path, record: dict[str, Any]) -> str:
    """The text of a profile with the record's all-reduces in place of its own.

    Raises:
        UserError: it is no profile, or of another GPU, or the record holds nonsense.
    """
    from planner.profile.schema import parse_profile, read_profile

    text = read_profile(path)
    measured = parse_profile(text, path.name).record
    for of_profile, of_record in ((measured.gpu_name, record["gpu_name"]), (measured.gpu, record.get("gpu"))):
        if of_profile != of_record:
            raise UserError(
                f"profile {path} was measured on {of_profile}, and these all-reduces on {of_record}; they go "
                "together only if the GPU is the same"
            )
    profile = json.loads(text)
    profile["allreduce"] = record["allreduce"]
    told = ("command", "commit", "date", "environment")
    profile["allreduce_measured"] = {name: record[name] for name in told if name in record}
    text = dumps(profile)
    parse_profile(text, f"{path.name} with these all-reduces")
    return text


def _read(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: it is no such record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("kind") != KIND or record.get("version") != VERSION:
        raise UserError(f"{path} is no record of all-reduces of version {VERSION}, as `{_PROG}` writes it")
    if not isinstance(record.get("gpu_name"), str) or not isinstance(record.get("allreduce"), list):
        raise UserError(f"{path} lacks gpu_name or allreduce, a text and a list")
    if not isinstance(record.get("environment"), dict):
        raise UserError(f"{path} lacks environment, which says where the all-reduces were measured")
    if not record["allreduce"]:
        raise UserError(f"{path} has no all-reduce in it")
    return record


def _worlds(record: dict[str, Any]) -> str:
    return ", ".join(map(str, sorted({row["world_size"] for row in record["allreduce"]})))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
