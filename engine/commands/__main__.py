"""The engine's commands where the rest of Memwall is not installed: `python -m engine.commands generate ...`."""

from __future__ import annotations

import importlib
import sys
import traceback

from engine.commands.streams import discard_stdout, prepare_streams
from engine.errors import UserError

_COMMANDS = ("generate", "serve", "bench")
_BAD_INPUT = 2
_DEFECT = 70  # EX_SOFTWARE of sysexits.h
_INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code. Bad input is one sentence on stderr."""
    prepare_streams()
    if not arguments or arguments[0] not in _COMMANDS:
        print(f"usage: python -m engine.commands {{{','.join(_COMMANDS)}}} ... (--help says more)", file=sys.stderr)
        return _BAD_INPUT
    name, *rest = arguments
    try:
        code = getattr(importlib.import_module(f"engine.commands.{name}"), name)(rest)
        sys.stdout.flush()  # now, while a reader that has left can still be told from an error
        return code
    except BrokenPipeError:  # `| head` has seen enough
        discard_stdout()
        return 0
    except UserError as error:
        sentence = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("engine", "kernels"):
            return _defect()
        sentence = f"{name} needs more than is installed ({error.name} is missing): pip install 'memwall[engine]'"
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        sentence = f"{where}{error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception:
        return _defect()
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return _BAD_INPUT


def _defect() -> int:
    traceback.print_exc()
    print("error: this is a defect of memwall, not of your input; please report the lines above", file=sys.stderr)
    return _DEFECT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
