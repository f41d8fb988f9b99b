"""The `memwall` executable: collects the commands of every room, runs one, and turns what goes wrong into a sentence.

A room offers its commands as entry points of the group `memwall.commands`, each a plain function with Typer options
that may return an exit code. A function marked `takes_arguments = True` gets the list of its arguments instead and
reads them itself, `--help` included: so do the engine's, as Typer is not among its libraries. A command is imported
when it is asked for, so that one room's libraries cost another room's commands nothing; a module that offers commands
should itself import little, as `memwall --help` imports them all.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import traceback
from collections.abc import Iterator, MutableMapping, Sequence
from importlib import metadata
from typing import Annotated

import typer
from pydantic import ValidationError
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from engine.commands.streams import discard_stdout, prepare_streams
from planner.errors import UserError

GROUP = "memwall.commands"

ANSWERED = 0
ANSWER_IS_NO = 1
BAD_INPUT = 2
DEFECT = 70  # EX_SOFTWARE of sysexits.h; not 1, which a script would take for an answer
INTERRUPTED = 130

_ROOMS = ("dashboard", "calibration", "planner", "engine", "kernels")
_EXTRAS = dict.fromkeys(("generate", "serve", "bench", "calibrate"), "engine")
_ORDER = (
    "plan", "simulate", "memory", "catalog", "export", "generate", "serve", "bench", "calibrate", "calibrate-from",
    "validate",
)  # fmt: skip
_ABOUT = "Plan LLM serving before renting a GPU: how many, which, at which precision, and what latency to expect."
_EXIT_CODES = (
    "Exit codes: 0 the question was answered; 1 it was answered, and the answer is no (it does not fit, misses its "
    "SLO, or no plan is feasible); 2 the input was bad, and one sentence on stderr says how; 70 a defect of memwall; "
    "130 Ctrl-C."
)


def main() -> int:
    """Run `memwall` with the arguments of this process; returns the exit code."""
    prepare_streams()
    code = run(sys.argv[1:], metadata.entry_points(group=GROUP))
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; the answer stands
        discard_stdout()
    return code


def run(arguments: Sequence[str], entry_points: Sequence[metadata.EntryPoint]) -> int:
    """Run one command line and return its exit code. What goes wrong is one sentence on stderr.

    Args:
        arguments: without the program's name.
        entry_points: the commands, in any order.
    """
    try:
        code = build_app(entry_points).main(list(arguments), prog_name="memwall", standalone_mode=False)
        if code == INTERRUPTED:
            return _complain("interrupted", INTERRUPTED)
        return code if isinstance(code, int) else ANSWERED
    except UserError as error:
        return _complain(str(error))
    except TyperException as error:
        return _complain(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", INTERRUPTED)
    except ModuleNotFoundError as error:
        name = next((word for word in arguments if not word.startswith("-")), "memwall")
        if _is_ours(error):
            return _defect()
        return _complain(_missing_extra(name, error, _EXTRAS.get(name)))
    except BrokenPipeError:
        return ANSWERED
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        discard_stdout()  # Typer and Rich exit with 1 where a reader has left, which here would be an answer
        return ANSWERED
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _complain(f"{where}{error.strerror or error}")
    except Exception:
        return _defect()


def build_app(entry_points: Sequence[metadata.EntryPoint]) -> TyperGroup:
    """The `memwall` command group over these entry points, none of them imported yet."""
    app = typer.Typer(
        name="memwall",
        help=_ABOUT,
        epilog=_EXIT_CODES,
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=False,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def memwall(
        context: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
        ] = False,
    ) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    group.commands = _Commands(entry_points)
    return group


class _Commands(MutableMapping[str, TyperCommand]):
    """Commands by name, imported when they are looked up."""

    def __init__(self, entry_points: Sequence[metadata.EntryPoint]) -> None:
        known = {name: place for place, name in enumerate(_ORDER)}
        ordered = sorted(entry_points, key=lambda entry: (known.get(entry.name, len(known)), entry.name))
        self._entries = {entry.name: entry for entry in ordered}
        self._loaded: dict[str, TyperCommand] = {}

    def __getitem__(self, name: str) -> TyperCommand:
        if name not in self._loaded:
            self._loaded[name] = _load(self._entries[name])
        return self._loaded[name]

    def __setitem__(self, name: str, command: TyperCommand) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _RawCommand(TyperCommand):
    """A command that gets its arguments exactly as they were written."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args


def _load(entry: metadata.EntryPoint) -> TyperCommand:
    """The command of an entry point, or one that says what to install."""
    try:
        function = entry.load()
    except ImportError as error:
        return _unavailable(entry, error)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    help_text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    if getattr(function, "takes_arguments", False):

        def pass_on(context: typer.Context) -> int:
            return function(context.args)

        app.command(entry.name, help=help_text, cls=_RawCommand)(pass_on)
        return typer.main.get_command(app)
    app.command(
        entry.name,
        help=help_text,
        epilog=_EXIT_CODES,
        context_settings={"help_option_names": ["-h", "--help"]},
    )(function)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def _unavailable(entry: metadata.EntryPoint, error: ImportError) -> TyperCommand:
    extra = next(iter(entry.extras), _EXTRAS.get(entry.name))
    sentence = _missing_extra(entry.name, error, extra)

    def say_what_is_missing(context: typer.Context) -> None:
        raise UserError(sentence)

    app = typer.Typer(add_completion=False)
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    install = _distribution(extra).replace("[", "\\[")  # the help is Rich markup, where [engine] would be a style
    help_text = "Cannot be loaded." if _is_ours(error) else f"Not installed: pip install '{install}'"
    app.command(entry.name, help=help_text, add_help_option=False, context_settings=settings)(say_what_is_missing)
    return typer.main.get_command(app)


def _missing_extra(command: str, error: ImportError, extra: str | None) -> str:
    """What to install, or, where it is our own code that cannot be imported, what failed."""
    if _is_ours(error):
        return f"memwall {command} cannot be loaded ({error}); reinstall memwall"
    missing = f" ({error.name} is missing)" if error.name else f" ({error})"
    return f"memwall {command} needs more than is installed{missing}: pip install '{_distribution(extra)}'"


def _distribution(extra: str | None) -> str:
    return f"memwall[{extra}]" if extra else "memwall"


def _is_ours(error: ImportError) -> bool:
    return (error.name or "").partition(".")[0] in _ROOMS


def _usage(error: TyperException) -> str:
    """A usage error as one sentence, with the nearest flag where one was misspelt."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "memwall"
    flag = getattr(error, "option_name", None)
    parameter = getattr(error, "param", None)
    if flag is not None and error.message.startswith("No such option"):
        flags = [name for option in context.command.params for name in (*option.opts, *option.secondary_opts)]
        nearest = difflib.get_close_matches(flag.replace("_", "-"), [name for name in flags if name[:2] == "--"], n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"`{command} --help` lists them"
        return f"{command} has no option {flag}; {hint}"
    if parameter is not None:
        name = next((name for name in parameter.opts if name[:2] == "--"), parameter.metavar or parameter.name)
        return _bad_value(name, error) if error.message else f"{command} needs {name}; see `{command} --help`"
    message = error.format_message().rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; see `{command} --help`"


def _bad_value(name: str, error: TyperException) -> str:
    """Pydantic's "Input should be a valid integer, …" in our words, with what was written."""
    if not isinstance(error.__cause__, ValidationError):
        return f"{name}: {error.message.rstrip('.')}"
    details = error.__cause__.errors()[0]
    requirement = details["msg"].removeprefix("Value error, ").partition(", unable")[0].rstrip(".")
    if requirement.startswith("Input should "):
        return f"{name} is {details['input']!r}; it must {requirement.removeprefix('Input should ')}"
    return f"{name}: {requirement}"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memwall {metadata.version('memwall')}")
        raise typer.Exit


def _complain(sentence: str, code: int = BAD_INPUT) -> int:
    """One line on stderr, whatever the sentence quotes."""
    line = " ".join(sentence.split())
    typer.echo(line if code == INTERRUPTED else f"error: {line}", err=True)
    return code


def _defect() -> int:
    traceback.print_exc()
    typer.echo("error: this is a defect of memwall, not of your input; please report the lines above", err=True)
    return DEFECT


if __name__ == "__main__":
    sys.exit(main())
