"""Says anew what the fit of a profile is good for: `python -m calibration.refit PROFILE...`.

A profile keeps the errors of the fit that it was written with. Where the fit has changed since, they are another fit's;
what was measured stays as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from calibration.command import exit_code
from calibration.measure.fit import fit_errors
from calibration.measure.table import dumps
from engine.bench.record import write_text
from engine.commands.arguments import ArgumentParser
from planner.profile.schema import parse_profile, read_profile

_PROG = "python -m calibration.refit"


def refit(path: Path) -> bool:
    """Bring the `fit` sections of a profile up to date; whether they were not.

    Raises:
        UserError: it is no profile, or cannot be read or written.
    """
    text = read_profile(path)
    parse_profile(text, path.name)  # refuses what is none
    profile = json.loads(text)
    before = dumps(profile)
    for name, errors in fit_errors(profile).items():
        profile["kv"][name]["fit"] = errors
    after = dumps(profile)
    if after != before:
        write_text(path, after)
    return after != before


def main(arguments: list[str]) -> int:
    """Run the command. Returns its exit code."""

    def run(arguments: list[str]) -> int:
        parser = ArgumentParser(_PROG, "Say anew in profiles what their fit is good for, where the fit has changed.")
        parser.add_argument("profiles", type=Path, nargs="+", metavar="PROFILE", help="of memwall calibrate")
        options = parser.read(arguments)
        for path in options.profiles if options else ():
            print(f"{path}: {'written' if refit(path) else 'as it was'}")
        return 0

    return exit_code(_PROG, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
