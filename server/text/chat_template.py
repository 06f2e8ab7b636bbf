"""From conversations and texts to token ids, with what goes wrong in the words of a request."""

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from server.errors import InvalidRequest, UnsupportedField
from server.protocol import Conversation, Prompt
from server.text.token_memo import PromptEncoder
from turbocache.mlxlm.model import LoadedModel

_OURS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "tokenize"})
"""What the server itself tells a template."""
_THINKING = ("enable_thinking", "thinking")
"""Options by which templates let a model think or not."""
_NO_EFFORT = ("none", "minimal")


class PromptMaker:
    """Applies the chat template and the tokenizer. Safe to call from any thread."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._encoder = PromptEncoder(model.tokenizer)
        self._template = str(model.tokenizer.chat_template) if model.tokenizer.has_chat_template else ""

    @functools.cached_property
    def n_tokens(self) -> int:
        """How many tokens both the tokenizer and the model have."""
        n = len(self._model.tokenizer)
        return min(n, getattr(self._model.model.args, "vocab_size", None) or n)

    def prompt(self, conversation: Conversation) -> Prompt:
        """A conversation as token ids, with the places where conversations part. Raises InvalidRequest when the
        template refuses it, and UnsupportedField for an option that it does not know.
        """
        if not self._model.tokenizer.has_chat_template:
            raise InvalidRequest(f"The model {self._model.id} has no chat template.", param="messages")
        conversation = replace(conversation, options=self._options(conversation))
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
            # transformers says so where the template does not end with the last message's text.
            raise InvalidRequest(
                "The model's chat template can't go on with a begun answer.", param="messages"
            ) from error
        if not tokens:
            raise InvalidRequest("The model's chat template makes no prompt of these messages.", param="messages")
        tool = conversation.messages[-1].get("role") == "tool"
        messages_end = self._encoder.messages_end(tokens)
        return Prompt(
            tokens, system_end, messages_end, after_tool_result=tool, continued=conversation.continue_final_message
        )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """See `server.protocol.Engine`."""
        return list(self._model.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        """See `server.protocol.Engine`."""
        self._check(tokens, param)
        return str(self._model.tokenizer.decode(list(tokens)))

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        """See `server.protocol.Engine`."""
        self._check(tokens, "tokens")
        return list(self._model.tokenizer.convert_ids_to_tokens(list(tokens)))

    def _check(self, tokens: Sequence[int], param: str) -> None:
        n = self.n_tokens
        for token in tokens:
            if not 0 <= token < n:
                raise InvalidRequest(
                    f"Invalid '{param}': {token} is not a token of the model, whose tokens end at {n - 1}.",
                    param=param,
                    code="invalid_value",
                )

    def _options(self, conversation: Conversation) -> dict[str, Any]:
        """The template's options, all of which it knows."""
        options = dict(conversation.options)
        for name in options:
            if name in _OURS or not self._knows(name):
                raise UnsupportedField(
                    f"Unsupported parameter: 'chat_template_kwargs.{name[:100]}' is no option of the model's chat "
                    "template.",
                    param=f"chat_template_kwargs.{name[:100]}",
                )
        thinking = next((name for name in _THINKING if self._knows(name)), None)
        if thinking is not None and conversation.thinking is not None:
            options.setdefault(thinking, conversation.thinking)
        if (effort := conversation.reasoning_effort) is None:
            return options
        if thinking is not None and (effort in _NO_EFFORT or not self._knows("reasoning_effort")):
            options.setdefault(thinking, effort not in _NO_EFFORT)
        elif self._knows("reasoning_effort"):
            options.setdefault("reasoning_effort", effort)
        elif effort != "none" and not conversation.ignore_unknown_effort:
            raise UnsupportedField(
                "Unsupported parameter: 'reasoning_effort' is no option of the model's chat template.",
                param="reasoning_effort",
            )
        return options

    def _knows(self, option: str) -> bool:
        return re.search(rf"\b{re.escape(option)}\b", self._template) is not None
