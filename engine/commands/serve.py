"""`memwall serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands.arguments import ArgumentParser, add_engine_options, engine_config, integer, number
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.server.settings import ServerSettings

_API_KEY_VARIABLE = "MEMWALL_API_KEY"


def serve(arguments: list[str]) -> int:
    """Serve a model to any OpenAI client, until Ctrl-C or SIGTERM.

    Endpoints: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics (Prometheus, vLLM's names),
    /version, /tokenize, /detokenize and /openapi.json. Where the memory went and the address are printed on stderr.
    Once it is to end, running requests may finish, within --shutdown-timeout, and new ones get a 503; a second Ctrl-C
    ends it at once. Try it without a model: memwall serve tiny --load-format dummy
    """
    options = _parser().read(arguments)
    if options is None:
        return 0
    _check(options)
    config = engine_config(options)

    from engine.server.run import serve as run

    return run(config, _settings(options))


serve.takes_arguments = True


def _parser() -> ArgumentParser:
    parser = ArgumentParser("memwall serve", " ".join(inspect.getdoc(serve).split()))
    parser.epilog = (
        "Exit codes: 0 it was told to end, and did; 2 the input was bad, and one sentence on stderr says how; 70 the "
        "engine stopped, or another defect of memwall; 130 a second Ctrl-C."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face folder; with --load-format dummy also a config.json, or a built-in shape such as tiny",
    )
    _add_server_options(parser)
    add_engine_options(parser)
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    from engine.server.settings import ServerSettings as Defaults

    group = parser.add_argument_group("server")

    def add(flag: str, kind, metavar: str, text: str, default: object) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {default})", default=default)

    add("--host", str, "ADDRESS", "where to listen; 0.0.0.0 for all addresses of this machine", Defaults.host)
    add("--port", integer, "N", "0 for any that is free, which is then printed", Defaults.port)
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="answer only who sends this key, /health and /metrics excepted; may be given several times (default: "
        f"the environment variable {_API_KEY_VARIABLE}, which other users of this machine cannot see)",
    )
    group.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what requests call the model; may be given several times, and answers have the first (default: MODEL)",
    )
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template of chats, in place of the tokenizer's own"
    )
    add("--max-queue", integer, "N", "requests that may wait; more get a 503", Defaults.max_queue)
    add("--max-body-bytes", integer, "N", "largest body of a request; a larger one gets a 413", Defaults.max_body_bytes)
    add(
        "--write-timeout",
        number,
        "S",
        "seconds for which a client may take no data before it is dropped",
        Defaults.write_timeout_s,
    )
    add(
        "--shutdown-timeout",
        number,
        "S",
        "seconds for which running requests may go on at the end",
        Defaults.shutdown_timeout_s,
    )


def _check(options: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a value out of its range.
    """
    if not 0 <= options.port <= 65535:
        raise UserError(f"--port is {options.port}; it must be from 0 to 65535")
    for name, least in (("max_queue", 0), ("max_body_bytes", 1), ("shutdown_timeout", 0)):
        value = getattr(options, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if options.write_timeout <= 0:
        raise UserError(f"--write-timeout is {options.write_timeout}; it must be above 0")
    for flag, values in (("--api-key", options.api_key), ("--served-model-name", options.served_model_name)):
        if any(not value.strip() for value in values or ()):
            raise UserError(f"{flag} is empty; it needs at least one character")


def _settings(options: argparse.Namespace) -> ServerSettings:
    from engine.server.chat import read_template
    from engine.server.settings import ServerSettings

    keys = options.api_key or [key for key in (os.environ.get(_API_KEY_VARIABLE),) if key]
    return ServerSettings(
        model_names=tuple(options.served_model_name or [options.model]),
        host=options.host,
        port=options.port,
        api_keys=tuple(keys),
        chat_template=None if options.chat_template is None else read_template(options.chat_template),
        max_queue=options.max_queue,
        max_body_bytes=options.max_body_bytes,
        write_timeout_s=options.write_timeout,
        shutdown_timeout_s=options.shutdown_timeout,
    )
