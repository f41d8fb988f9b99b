"""Chats as prompts: the tokenizer's chat template, or one that the server was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import UserError
from engine.server.errors import ApiError
from engine.server.protocol import ChatMessage
from engine.tokenizer import HFTokenizer, Tokenizer
from engine.values import shown

# What the renderer itself takes; the rest of `chat_template_kwargs` are variables of the template.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversations",
        "documents",
        "messages",
        "return_assistant_tokens_mask",
        "tools",
    }
)


class ChatTemplate:
    """How messages become the text that the model was trained to answer."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """
        Args:
            template: Jinja text in place of the tokenizer's own.
        """
        self._template = template
        self._special_tokens: dict[str, object] = {}
        if isinstance(tokenizer, HFTokenizer):
            self._special_tokens = dict(tokenizer.tokenizer.special_tokens_map)
            if template is None and tokenizer.tokenizer.chat_template:
                self._template = tokenizer.tokenizer.get_chat_template()

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The text of a chat.

        Args:
            add_generation_prompt: let it end where the assistant begins to speak.
            variables: further ones of the template.

        Raises:
            ApiError: there is no template, or it refuses these messages.
        """
        if self._template is None:
            raise ApiError(
                400,
                "the model has no chat template; start the server with --chat-template FILE, or send the prompt to "
                "/v1/completions",
                param="messages",
                code="no_chat_template",
            )
        for name in variables or ():
            if name in _RESERVED:
                raise ApiError(400, f"chat_template_kwargs must not have {shown(name)}", param="chat_template_kwargs")
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[_fields(message) for message in messages]],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **(variables or {})},
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            # Whatever a template does with messages that it does not expect.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ApiError(400, f"the chat template refuses these messages ({reason})", param="messages") from None
        return rendered[0]


def _fields(message: ChatMessage) -> dict[str, object]:
    fields = message.model_dump(exclude_unset=True)
    return {**fields, "content": message.content or ""}


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a rendered chat, to which its template has given the special tokens that it needs."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return tokenizer.encode(text)


def read_template(path: Path) -> str:
    """The text of a template file.

    Raises:
        UserError: it cannot be read, or is no Jinja.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--chat-template: {path} is not UTF-8") from None
    except OSError as error:
        raise UserError(f"--chat-template: {path} cannot be read ({error.strerror or error})") from None
    if not text.strip():
        raise UserError(f"--chat-template: {path} is empty; a template must write the messages")
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        environment.parse(text.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"--chat-template: {path}, line {error.lineno}: {error.message}") from None
    return text
