"""Says anew what the fit of a profile is good for: `python -m calibration.refit PROFILE...`.

A profile keeps the errors of the fit that it was written with. Where the fit has changed since, they are another fit's;
what was measured stays as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from calibration.measure.fit import fit_errors
from calibration.measure.table import dumps


def refit(path: Path) -> bool:
    """Bring the `fit` sections of a profile up to date; whether they were not."""
    profile = json.loads(path.read_text(encoding="utf-8"))
    before = dumps(profile)
    for name, errors in fit_errors(profile).items():
        profile["kv"][name]["fit"] = errors
    after = dumps(profile)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {'written' if refit(Path(argument)) else 'as it was'}")
