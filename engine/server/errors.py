"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.errors import UserError
from engine.values import shown

_RETRY_AFTER = {"retry-after": "1"}


class ApiError(HTTPException):
    """An answer that is an error."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            message: one sentence. param: the field of the request that it is about. code: for programs to tell apart.
        """
        super().__init__(status_code, message, dict(headers) if headers else None)
        self.param, self.code = param, code

    def body(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


class JsonResponse(Response):
    """JSON in ASCII: a client may send half of a surrogate pair, and no other encoding could quote it."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_response(error: ApiError) -> JsonResponse:
    return JsonResponse(error.body(), error.status_code, error.headers)


# ---- what may go wrong ---------------------------------------------------------------------------------------------


def bad_request(error: UserError, params: frozenset[str] = frozenset()) -> ApiError:
    """A value that the engine refuses. Its sentence may begin with the name of a field, one of `params`."""
    found = re.match(r"\w+", str(error))
    name = found[0] if found and found[0] in params else None
    return ApiError(400, str(error), param=name)


def unsupported(param: str, advice: str = "leave it out") -> ApiError:
    return ApiError(
        400, f"{param} is not supported by this server; {advice}", param=param, code="unsupported_parameter"
    )


def context_length_exceeded(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int, param: str) -> ApiError:
    """
    Args:
        max_tokens: that were asked for; None if the prompt alone is too long.
        param: the field that is to blame.
    """
    if max_tokens is None:
        message = (
            f"the prompt has {num_prompt_tokens} tokens; at most {max_model_len - 1} leave room for one token of "
            f"output within the model's context of {max_model_len} tokens"
        )
    else:
        message = (
            f"the prompt has {num_prompt_tokens} tokens, and with {param} {max_tokens} that makes "
            f"{num_prompt_tokens + max_tokens}; the model's context has {max_model_len}, so ask for at most "
            f"{max_model_len - num_prompt_tokens} tokens or shorten the prompt"
        )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def text_too_long(num_characters: int, max_model_len: int, param: str) -> ApiError:
    message = (
        f"the prompt has {num_characters} characters, more than the model's context of {max_model_len} tokens holds"
    )
    return ApiError(400, message, param=param, code="context_length_exceeded")


def model_not_found(name: str, served: str) -> ApiError:
    message = f"there is no model {shown(name)} here; this server has {shown(served)}"
    return ApiError(404, message, param="model", code="model_not_found")


def invalid_api_key() -> ApiError:
    return ApiError(
        401,
        "the API key is missing or wrong; send one that this server knows as 'Authorization: Bearer KEY'",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def body_too_large(max_body_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"the body of the request is larger than the {max_body_bytes} bytes that this server takes",
        code="request_too_large",
        headers={"connection": "close"},
    )


def queue_full() -> ApiError:
    return ApiError(
        503, "too many requests are waiting; try again later", code="engine_overloaded", headers=_RETRY_AFTER
    )


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=_RETRY_AFTER)


def engine_dead() -> ApiError:
    return ApiError(500, "the engine has stopped after an error; this server must be started anew", code="engine_dead")


def engine_failed(reason: str | None) -> ApiError:
    """A request that the engine began and could not end."""
    return ApiError(500, f"the engine failed: {reason or 'it has stopped'}", code="engine_error")


def defect() -> ApiError:
    return ApiError(
        500,
        "the server failed with a defect of its own; its log says more",
        code="internal_error",
        headers={"connection": "close"},  # uvicorn closes it behind a defect, said or not
    )


# ---- FastAPI -------------------------------------------------------------------------------------------------------


def install_handlers(app: FastAPI) -> None:
    """Give every error of an app this shape: validation, unknown paths, wrong methods and defects among them."""

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JsonResponse:
        return error_response(_validation_error(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JsonResponse:
        return error_response(error if isinstance(error, ApiError) else _routing_error(request, error))

    @app.exception_handler(Exception)
    async def on_defect(request: Request, error: Exception) -> JsonResponse:
        return error_response(defect())


def _routing_error(request: Request, error: HTTPException) -> ApiError:
    message, path = error.detail, request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is nothing at {path}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.method} is not allowed at {path}; use {allowed}"
    elif error.status_code == HTTPStatus.BAD_REQUEST:
        message = "the body is no JSON that can be read"
    return ApiError(error.status_code, message, headers=error.headers)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first of the things that are wrong, as a sentence."""
    found = error.errors()[0]
    place, message = found["loc"], found["msg"]
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']} at character {place[-1]}")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[1:]).removeprefix(".")
    if not param:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    if found["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param)
    requirement = re.sub(r"^(Input|List|String|Dictionary) should ", "it must ", message.removeprefix("Value error, "))
    requirement = re.sub(r" after validation, not \d+$", "", requirement)
    return ApiError(400, f"{param} is {shown(found['input'])}; {requirement}", param=param)
