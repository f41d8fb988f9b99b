"""What the HTTP server is told, besides what the engine is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """One server.

    Attributes:
        model_names: what requests may call the model; answers carry the first.
        host, port: where to listen; port 0 takes any that is free.
        api_keys: any of them opens the API; none leaves it open.
        chat_template: Jinja text in place of the tokenizer's own.
        max_queue: requests that may wait for the engine.
        max_body_bytes: of a request.
        write_timeout_s: how long a client may take no data while there is some for it.
        shutdown_timeout_s: how long running requests may go on once the server is to end.
    """

    model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    chat_template: str | None = None
    max_queue: int = 1024
    max_body_bytes: int = 8 << 20
    write_timeout_s: float = 30.0
    shutdown_timeout_s: float = 30.0
