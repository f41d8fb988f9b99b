"""Compiles one kernel for Hopper and prints what came out as JSON; `python specimens.py MODULE FUNCTION`.

FUNCTION of the test module MODULE takes nothing and returns a `kernels.aot.Compiled`. It runs in a process of its own
because a kernel that was decorated under TRITON_INTERPRET=1 cannot be compiled.
"""

import dataclasses
import importlib
import json
import sys

if __name__ == "__main__":
    module, function = sys.argv[1:]
    print(json.dumps(dataclasses.asdict(getattr(importlib.import_module(module), function)())))
