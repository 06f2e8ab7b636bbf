"""Builds prompts from conversations, and encodes and decodes plain text. Errors name the field of the request."""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.errors import InvalidRequest, UnsupportedField
from server.protocol import Conversation, Prompt
from server.text.token_memo import ChatEncoder
from server.text.tool_formats import template_knows_tools
from server.text.tool_prompt import tools_as_text
from turbocache.cache.outline import PLAIN, Outline
from turbocache.mlxlm.model import LoadedModel

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"})
"""Template arguments that only the server sets."""
_THINKING = ("enable_thinking", "thinking")
"""Template options that turn reasoning on or off. Templates use one or the other name."""
_NO_EFFORT = ("none", "minimal")
_TEMPLATE_TAIL = 8
"""A thought that the template opens for this answer is among the prompt's last 8 tokens. Earlier ones are history."""


def check_tokens(tokens: Iterable[int], n_tokens: int, param: str) -> None:
    """Raises InvalidRequest for a token id that is not below `n_tokens`. `param` names its place in the request."""
    for token in tokens:
        if not 0 <= token < n_tokens:
            raise InvalidRequest(
                f"Invalid '{param}': {token} is not a token of the model, whose tokens end at {n_tokens - 1}.",
                param=param,
                code="invalid_value",
            )


def opening_state(tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> str:
    """The state in which an answer begins: `reasoning` if the template leaves a thought open, else `normal`. For models
    with an answer format of their own, mlx-lm gives the state.
    """
    if tokenizer.response_initial_state is not None:
        return str(tokenizer.response_initial_state)
    if not tokenizer.has_thinking:
        return "normal"
    opened, closed = tokenizer.rfind_think_start(prompt), tokenizer.rfind_think_end(prompt)
    return "reasoning" if opened > closed and opened >= len(prompt) - _TEMPLATE_TAIL else "normal"


class PromptBuilder:
    """Applies the chat template and the tokenizer. Safe to call from any thread.

    With `outlines`, prompts say where their turns begin. This takes a second rendering.
    """

    def __init__(self, model: LoadedModel, *, outlines: bool = False) -> None:
        self._model = model
        self._outlines = outlines
        self._encoder = ChatEncoder(model.tokenizer)
        self._knows_tools = template_knows_tools(model.tokenizer)
        self._template = str(model.tokenizer.chat_template) if model.tokenizer.has_chat_template else ""

    @functools.cached_property
    def n_tokens(self) -> int:
        """Number of token ids that both the tokenizer and the model have."""
        n = len(self._model.tokenizer)
        return min(n, getattr(self._model.model.args, "vocab_size", None) or n)

    def build(self, conversation: Conversation) -> Prompt:
        """Token ids of a conversation, and where its system message and its messages end. Raises InvalidRequest when
        the template refuses the messages, and UnsupportedField for an option that the template does not have.
        """
        if not self._model.tokenizer.has_chat_template:
            raise InvalidRequest(f"The model {self._model.id} has no chat template.", param="messages")
        tool = conversation.messages[-1].get("role") == "tool"
        conversation = replace(conversation, options=self._options(conversation))
        if not self._knows_tools:
            conversation = tools_as_text(conversation)
        try:
            tokens = self._encoder.encode(conversation)
            system_end = self._encoder.system_end(conversation, tokens)
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except ValueError as error:
            if not conversation.continue_final_message:
                raise
            # transformers raises this when the template's text does not end with the last message.
            raise InvalidRequest(
                "The model's chat template can't go on with a begun answer.", param="messages"
            ) from error
        if not tokens:
            raise InvalidRequest("The model's chat template makes no prompt of these messages.", param="messages")
        messages_end = self._encoder.messages_end(tokens)
        opening = opening_state(self._model.tokenizer, tokens)
        outline = self._outline(conversation, tokens, system_end) if self._outlines else PLAIN
        return Prompt(
            tokens, system_end, messages_end, tool, conversation.continue_final_message, opening, outline=outline
        )

    def _outline(self, conversation: Conversation, tokens: list[int], system_end: int) -> Outline:
        turns, steps = self._encoder.beginnings(conversation, tokens)
        first = conversation.messages[: 2 if conversation.messages[0]["role"] == "system" else 1][-1]
        # Templates put tools, and system messages of their own, before the first turn.
        return Outline(turns[0] if turns and first["role"] == "user" else system_end, turns, steps)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(self._model.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        check_tokens(tokens, self.n_tokens, param)
        return str(self._model.tokenizer.decode(list(tokens)))

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        check_tokens(tokens, self.n_tokens, "tokens")
        return list(self._model.tokenizer.convert_ids_to_tokens(list(tokens)))

    def _options(self, conversation: Conversation) -> dict[str, Any]:
        """The options for the template, each checked against its text."""
        options = dict(conversation.options)
        for name in options:
            if name in _RESERVED or not self._has_option(name):
                raise UnsupportedField(
                    f"Unsupported parameter: 'chat_template_kwargs.{name[:100]}' is no option of the model's chat "
                    "template.",
                    param=f"chat_template_kwargs.{name[:100]}",
                )
        thinking = next((name for name in _THINKING if self._has_option(name)), None)
        if thinking is not None and conversation.thinking is not None:
            options.setdefault(thinking, conversation.thinking)
        if (effort := conversation.reasoning_effort) is None:
            return options
        if thinking is not None and (effort in _NO_EFFORT or not self._has_option("reasoning_effort")):
            options.setdefault(thinking, effort not in _NO_EFFORT)
        elif self._has_option("reasoning_effort"):
            options.setdefault("reasoning_effort", effort)
        elif effort != "none" and not conversation.ignore_unknown_effort:
            raise UnsupportedField(
                "Unsupported parameter: 'reasoning_effort' is no option of the model's chat template.",
                param="reasoning_effort",
            )
        return options

    def _has_option(self, option: str) -> bool:
        return re.search(rf"\b{re.escape(option)}\b", self._template) is not None
