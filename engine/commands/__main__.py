"""The engine's commands where the rest of Memwall is not installed: `python -m engine.commands generate ...`."""

from __future__ import annotations

import importlib
import os
import sys

from engine.errors import UserError

_COMMANDS = ("generate", "bench")
_BAD_INPUT = 2
_INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code. Bad input is one sentence on stderr."""
    if not arguments or arguments[0] not in _COMMANDS:
        print(f"usage: python -m engine.commands {{{','.join(_COMMANDS)}}} ... (--help says more)", file=sys.stderr)
        return _BAD_INPUT
    name, *rest = arguments
    try:
        return getattr(importlib.import_module(f"engine.commands.{name}"), name)(rest)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        sentence = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("engine", "kernels"):
            raise
        sentence = f"{name} needs more than is installed ({error.name} is missing): pip install 'memwall[engine]'"
    except OSError as error:
        sentence = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return _BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
