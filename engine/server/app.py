"""The endpoints: OpenAI's, and those by which a server is watched."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from engine.errors import UserError
from engine.prompts import read_prompt
from engine.sampling_params import SamplingParams
from engine.sequence import check_bias
from engine.server import errors, protocol
from engine.server.answers import Answer, ChatAnswer, CompletionAnswer, Continuation, abort_all, together
from engine.server.async_engine import EngineDead, QueueFull
from engine.server.chat import ChatTemplate, encode_chat
from engine.server.errors import ApiError, JsonResponse
from engine.server.guard import Guard
from engine.server.logprobs import TokenTexts, longest_token
from engine.server.protocol import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from engine.server.settings import ServerSettings
from engine.server.sse import EventStream, Stalls, watch
from engine.text import OutputText

if TYPE_CHECKING:
    from engine.server.async_engine import AsyncEngine, RequestStream
    from engine.server.metrics import Metrics
    from engine.tokenizer import Tokenizer

# Long prompts take a while, so that one must not make all others wait.
_TOKENIZER_THREADS = 2
# Of all texts of a request together (`protocol.num_entries`): they are made one after the other, while all others wait.
_MOST_ENTRIES = 1 << 18

_ERRORS = {
    400: "Malformed, out of range, unsupported, or longer than the model's context.",
    401: "A wrong API key.",
    404: "No such model.",
    413: "The body is too large.",
    500: "The engine has stopped.",
    503: "Too many requests are waiting, or the server is shutting down.",
    "default": "Anything else.",
}
_ERROR_RESPONSES = {status: {"model": protocol.ErrorResponse, "description": text} for status, text in _ERRORS.items()}
_STREAM = {
    200: {
        "description": 'The answer; with "stream" its chunks as server-sent events, the last of which is [DONE].',
        "content": {"text/event-stream": {}},
    }
}


def create_app(engine: AsyncEngine, tokenizer: Tokenizer, settings: ServerSettings, metrics: Metrics) -> FastAPI:
    """The ASGI application of a running engine; `app.state.service` is what its endpoints share."""
    service = Service(engine, tokenizer, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        checks = asyncio.create_task(service.stalls.run())
        yield
        checks.cancel()

    app = FastAPI(
        title="Memwall",
        description="OpenAI-compatible serving of one model.",
        version=version(),
        docs_url=None,  # these two load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings)
    errors.install_handlers(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_watching(app, service, metrics)
    return app


def version() -> str:
    """Of Memwall, as it is installed."""
    try:
        return metadata.version("memwall")
    except metadata.PackageNotFoundError:
        return "unknown"


class Service:
    """What the endpoints share.

    Attributes:
        is_closing: set once the server is to end; then it takes no more requests.
        stalls: the streams that are being written.
    """

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.is_closing = False
        self.started_s = int(time.time())
        self.stalls = Stalls(settings.write_timeout_s)
        self._chat_template = ChatTemplate(tokenizer, settings.chat_template)
        self._token_texts = TokenTexts(tokenizer)
        self._longest_token = longest_token(tokenizer)
        self._threads = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    # ---- requests in -----------------------------------------------------------------------------------------------

    def admit(self, request: protocol.ModelRequest) -> None:
        """
        Raises:
            ApiError: the server takes no requests, it has no such model, or the request wants what it does not have.
        """
        if self.is_closing:
            raise errors.shutting_down()
        if not self.engine.is_alive:
            raise errors.engine_dead()
        if request.model is not None and request.model not in self.settings.model_names:
            raise errors.model_not_found(request.model, self.settings.model_names[0])
        protocol.refuse_unsupported(request)

    def check_count(self, request: CompletionRequest | ChatCompletionRequest, num_continuations: int) -> None:
        """
        Raises:
            ApiError: that many would never be taken at once, or have too large tables together.
        """
        most = self.engine.info.max_num_seqs + self.settings.max_queue
        if num_continuations > most:
            message = f"the request asks for {num_continuations} texts at once; this server takes at most {most}"
            raise ApiError(400, message, param="n")
        num_entries = protocol.num_entries(request)
        if num_entries * num_continuations > _MOST_ENTRIES:
            message = (
                f"the request asks for {num_continuations} texts with {num_entries} entries in logit_bias, "
                f"stop_token_ids and the characters of stop; texts times entries must be at most {_MOST_ENTRIES}"
            )
            raise ApiError(400, message)

    async def encode(self, prompt: str | list[int], param: str) -> list[int]:
        """The token ids of a prompt.

        Raises:
            ApiError: it is none.
        """
        try:
            text, token_ids = read_prompt(prompt)
            if text is None:
                return token_ids
            self._check_length(text, param)
            return await self._in_thread(self.tokenizer.encode, text)
        except UserError as error:
            raise ApiError(400, str(error), param=param) from None

    def _check_length(self, text: str, param: str) -> None:
        """Refuse now what would be refused after seconds of tokenising: no token stands for more than so much text."""
        max_model_len = self.engine.info.max_model_len
        if len(text) > max_model_len * self._longest_token:
            raise errors.text_too_long(len(text), max_model_len, param)

    async def encode_chat(self, request: ChatCompletionRequest | TokenizeRequest) -> list[int]:
        """The token ids of a chat.

        Raises:
            ApiError: the template refuses it, or there is none.
        """
        render = partial(
            self._chat_template.render,
            request.messages,
            add_generation_prompt=request.add_generation_prompt is not False,
            variables=request.chat_template_kwargs,
        )
        text = read_chat(await self._in_thread(render))
        self._check_length(text, "messages")
        return await self._in_thread(encode_chat, self.tokenizer, text)

    async def decode(self, token_ids: list[int]) -> str:
        """The text of tokens."""
        return await self._in_thread(self.tokenizer.decode, token_ids)

    async def _in_thread(self, function: Callable, *arguments: object) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def max_tokens(
        self,
        num_prompt_tokens: int,
        request: CompletionRequest | ChatCompletionRequest,
        default: int | None,
        param: str,
    ) -> int:
        """How many tokens a request may generate.

        Args:
            default: for a request that does not say it, as far as the context has room; None for all that it has.
            param: the field of the prompt.

        Raises:
            ApiError: prompt and output do not fit into the context.
        """
        max_model_len = self.engine.info.max_model_len
        room = max_model_len - num_prompt_tokens
        if room < 1:
            raise errors.context_length_exceeded(num_prompt_tokens, None, max_model_len, param)
        is_chat = isinstance(request, ChatCompletionRequest)
        for name in ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",):
            wanted = getattr(request, name)
            if wanted is not None and wanted > room:
                raise errors.context_length_exceeded(num_prompt_tokens, wanted, max_model_len, name)
            if wanted is not None:
                return wanted
        return room if default is None else min(default, room)

    def submit(self, prompts: list[tuple[list[int], SamplingParams]], param: str) -> list[Continuation]:
        """Queue n continuations of each prompt, or none at all.

        Raises:
            ApiError: a prompt that the engine refuses, or an engine that takes no more requests.
        """
        streams: list[tuple[RequestStream, list[int], SamplingParams]] = []
        try:
            for _, params in prompts:
                check_bias(params, self.engine.info.vocab_size)
        except UserError as error:
            raise ApiError(400, str(error), param="logit_bias") from None
        try:
            for token_ids, params in prompts:
                for index in range(params.n):
                    stream = self.engine.submit(token_ids, params.continuation(index))
                    streams.append((stream, token_ids, params))
            return [
                Continuation(index, stream, OutputText(self.tokenizer, token_ids, params), params.logprobs is not None)
                for index, (stream, token_ids, params) in enumerate(streams)
            ]
        except Exception as error:
            for stream, *_ in streams:
                stream.abort()
            if isinstance(error, (UserError, QueueFull, EngineDead)):
                raise self._refusal(error, param) from None
            raise

    def _refusal(self, error: UserError | QueueFull | EngineDead, param: str) -> ApiError:
        if isinstance(error, UserError):
            return ApiError(400, str(error), param=param)
        if isinstance(error, QueueFull):
            return errors.queue_full()
        return errors.shutting_down() if self.is_closing or self.engine.is_alive else errors.engine_dead()

    # ---- answers out -----------------------------------------------------------------------------------------------

    async def answer(
        self,
        kind: type[Answer],
        request: Request,
        body: CompletionRequest | ChatCompletionRequest,
        continuations: list[Continuation],
    ) -> Response:
        """The response with what continuations give; they end when the client leaves.

        Raises:
            ApiError: the engine ended them.
        """
        model = body.model or self.settings.model_names[0]
        answer = kind(continuations, model, uuid.uuid4().hex, self._token_texts, body.n or 1)
        if body.stream:
            return EventStream(answer, body.include_usage, self.stalls)
        watcher = asyncio.create_task(watch(request.receive, lambda: abort_all(continuations)))
        try:
            await together(continuations, Continuation.finish)
        finally:
            watcher.cancel()
            abort_all(continuations)
        return JsonResponse(answer.whole())


def read_chat(text: str) -> str:
    """A rendered chat, checked as a prompt is.

    Raises:
        ApiError: it is empty, or no text.
    """
    try:
        read_prompt(text)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from None
    return text


# ---- endpoints -----------------------------------------------------------------------------------------------------


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=protocol.CompletionResponse, responses={**_STREAM, **_ERROR_RESPONSES})
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        _admit_generation(service, body)
        service.check_count(body, len(body.prompt) * (body.n or 1))
        prompts = []
        for index, prompt in enumerate(body.prompt):
            param = "prompt" if len(body.prompt) == 1 else f"prompt[{index}]"
            token_ids = await service.encode(prompt, param)
            most = service.max_tokens(len(token_ids), body, protocol.DEFAULT_MAX_TOKENS, param)
            prompts.append((token_ids, protocol.sampling_params(body, most)))
        return await service.answer(CompletionAnswer, request, body, service.submit(prompts, "prompt"))

    @app.post(
        "/v1/chat/completions",
        response_model=protocol.ChatCompletionResponse,
        responses={**_STREAM, **_ERROR_RESPONSES},
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Let the assistant answer a chat."""
        _admit_generation(service, body)
        service.check_count(body, body.n or 1)
        token_ids = await service.encode_chat(body)
        most = service.max_tokens(len(token_ids), body, None, "messages")
        continuations = service.submit([(token_ids, protocol.sampling_params(body, most))], "messages")
        return await service.answer(ChatAnswer, request, body, continuations)


def _admit_generation(service: Service, body: CompletionRequest | ChatCompletionRequest) -> None:
    service.admit(body)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": service.started_s,
            "owned_by": "memwall",
            "max_model_len": service.engine.info.max_model_len,
            "vocab_size": service.engine.info.vocab_size,
        }

    @app.get("/v1/models", response_model=protocol.ModelList, responses=_ERROR_RESPONSES)
    async def list_models() -> Response:
        """The names of the served model."""
        return JsonResponse({"object": "list", "data": [card(name) for name in service.settings.model_names]})

    @app.get("/v1/models/{model:path}", response_model=protocol.ModelCard, responses=_ERROR_RESPONSES)
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        if model not in service.settings.model_names:
            raise errors.model_not_found(model, service.settings.model_names[0])
        return JsonResponse(card(model))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=protocol.TokenizeResponse, responses=_ERROR_RESPONSES)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The token ids of a prompt or a chat, as a completion of it would have them."""
        service.admit(body)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = await service.encode_chat(body)
        else:
            tokens = await service.encode(body.prompt, "prompt")
        max_model_len = service.engine.info.max_model_len
        return JsonResponse({"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens})

    @app.post("/detokenize", response_model=protocol.DetokenizeResponse, responses=_ERROR_RESPONSES)
    async def detokenize(body: protocol.DetokenizeRequest) -> Response:
        """The text of token ids; special tokens have none."""
        service.admit(body)
        vocab_size = service.engine.info.vocab_size
        wrong = next((token for token in body.tokens if token >= vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"tokens has {wrong}; the model's are 0 to {vocab_size - 1}", param="tokens")
        return JsonResponse({"prompt": await service.decode(body.tokens)})


def _add_watching(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health", response_class=Response, responses=_ERROR_RESPONSES)
    async def health() -> Response:
        """Whether the server takes requests."""
        if service.is_closing:
            raise errors.shutting_down()
        if not service.engine.is_alive:
            raise ApiError(503, errors.engine_dead().detail, code="engine_dead")
        return Response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def get_metrics() -> Response:
        """What Prometheus scrapes."""
        body, content_type = metrics.render()
        return Response(body, media_type=content_type)

    @app.get("/version", response_model=protocol.VersionResponse, responses=_ERROR_RESPONSES)
    async def get_version() -> Response:
        """Of Memwall."""
        return JsonResponse({"version": version()})
