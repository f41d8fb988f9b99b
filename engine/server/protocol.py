"""Requests and responses of OpenAI's API, as far as this server has them, with vLLM's additions.

A field that is null counts as left out. Fields that are not known here are ignored, as clients send many; those that
would change the answer, and that this server does not have, are refused (`refuse_unsupported`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from engine.errors import UserError
from engine.sampling_params import SamplingParams
from engine.server.errors import ApiError, bad_request, unsupported
from engine.values import MAX_INT32, MAX_SEED, shown

MAX_CHOICES = 128
MAX_LOGPROBS = 20
_MAX_STOP_STRINGS = 64
DEFAULT_MAX_TOKENS = 16  # of a completion; a chat has the rest of the context

# Fields that would change the answer, and the values of theirs that do not.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tool_calls": ([],),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


# ---- values of several forms ---------------------------------------------------------------------------------------


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> list[str | list[int]]:
    """The prompts of a completion request, each text or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("it must be text, a list of texts, a list of token ids, or a list of such lists, and not empty")


def _content(value: object) -> str | None:
    """The text of a message: its content, or that of its parts."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("it must be text or a list of parts")
    return "\n".join(_part(part) for part in value)


def _part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None:
        raise ValueError('a part must be an object with a "type"')
    if kind != "text":
        raise ValueError(f'the model reads text only, so a part must be {{"type": "text"}} and not {shown(kind)}')
    if not isinstance(part.get("text"), str):
        raise ValueError('a part of type text must have a "text"')
    return part["text"]


_TOKEN_IDS_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKEN_IDS_SCHEMA,
        {"type": "array", "items": _TOKEN_IDS_SCHEMA, "minItems": 1},
    ]
}
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}
_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": _MAX_STOP_STRINGS},
        {"type": "null"},
    ]
}

Prompts = Annotated[list[Any], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Content = Annotated[str | None, BeforeValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1)]] | None,
    Field(max_length=_MAX_STOP_STRINGS),
    BeforeValidator(_one_or_many),
    WithJsonSchema(_STOP_SCHEMA),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]


# ---- requests ------------------------------------------------------------------------------------------------------


class ModelRequest(BaseModel):
    """What all requests to the model have."""

    # Strict: a number in quotes is a mistake of the client's, and OpenAI refuses it too.
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="Its name; the served model if left out.")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk without choices.")


class _GenerationRequest(ModelRequest):
    temperature: float | None = Field(None, ge=0, description="0 takes the most probable token. Default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_INT32, description="0 or -1 for all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED, description="-1 for none, as left out.")
    stop: StopStrings = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, float] | None = Field(None, description="By token id: -100 to 100, added to the logit.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")

    @property
    def include_usage(self) -> bool:
        """Whether a stream is to end with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content = None


class _ChatFields(ModelRequest):
    """What a chat template reads."""

    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_generation_prompt: bool | None = Field(None, description="Let the assistant begin to speak. Default true.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Further variables of the template.")


class ChatCompletionRequest(_ChatFields, _GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Takes precedence over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class TokenizeRequest(_ChatFields):
    """POST /tokenize: a prompt, or the messages of a chat."""

    prompt: str | None = None


class DetokenizeRequest(ModelRequest):
    """POST /detokenize."""

    tokens: list[TokenId]


# ---- responses -----------------------------------------------------------------------------------------------------


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    vocab_size: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeResponse(BaseModel):
    prompt: str


class VersionResponse(BaseModel):
    version: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


# ---- requests as the engine takes them -----------------------------------------------------------------------------


def refuse_unsupported(request: BaseModel) -> None:
    """
    Raises:
        ApiError: a field of the request asks for what this server does not have.
    """
    extra = request.model_extra or {}
    for name, value in extra.items():
        if value is not None and name in _UNSUPPORTED and value not in _UNSUPPORTED[name]:
            raise unsupported(name)
    if extra.get("best_of") not in (None, getattr(request, "n", None) or 1):
        raise unsupported("best_of", "it must be n, or left out")
    # By class, here and elsewhere: of another request "messages" is an unknown field, which may be anything.
    for message in (isinstance(request, _ChatFields) and request.messages) or ():
        refuse_unsupported(message)


def num_entries(request: CompletionRequest | ChatCompletionRequest) -> int:
    """Entries of the tables that each of a request's texts has of its own: biases, stop tokens, stop characters."""
    return len(request.logit_bias or ()) + len(request.stop_token_ids or ()) + sum(map(len, request.stop or ()))


def sampling_params(request: CompletionRequest | ChatCompletionRequest, max_tokens: int) -> SamplingParams:
    """
    Raises:
        ApiError: a value that the engine refuses.
    """
    given = {name: getattr(request, name) for name in _SAMPLING_FIELDS}
    given = {name: value for name, value in given.items() if value is not None}
    if "seed" in given:
        given["seed"] = _seed(given["seed"])
    given["logprobs"] = _num_logprobs(request)
    if request.logit_bias is not None:
        given["logit_bias"] = {_token_id(key): bias for key, bias in request.logit_bias.items()}
    if request.stop is not None:
        given["stop"] = tuple(request.stop)
    try:
        return SamplingParams(max_tokens=max_tokens, **given)
    except UserError as error:
        raise bad_request(error, frozenset(type(request).model_fields)) from None


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def _seed(seed: int) -> int | None:
    """OpenAI's seeds are any int64 and the engine's have no sign; -1 is vLLM's word for none."""
    return None if seed == -1 else seed & MAX_SEED


def _num_logprobs(request: CompletionRequest | ChatCompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 11):
        raise ApiError(400, f"logit_bias has {shown(key)}; its keys must be token ids", param="logit_bias")
    return int(key)
