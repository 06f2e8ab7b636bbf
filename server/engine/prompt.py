"""From chat messages to token ids, with what goes wrong in the words of a request."""

from typing import Any

from jinja2 import TemplateError

from server.engine.prompts import PromptEncoder
from server.errors import InvalidRequest
from server.protocol import Prompt
from turbocache.model import LoadedModel


class PromptMaker:
    """Applies the chat template. Safe to call from any thread."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._encoder = PromptEncoder(model.tokenizer)

    def prompt(self, messages: list[dict[str, Any]]) -> Prompt:
        """Messages as token ids, with the places where conversations part. Raises InvalidRequest when the template
        refuses them.
        """
        if not self._model.tokenizer.has_chat_template:
            raise InvalidRequest(f"The model {self._model.id} has no chat template.", param="messages")
        try:
            tokens = self._encoder.encode(messages)
            system_end, messages_end = self._encoder.system_end(messages, tokens), self._encoder.messages_end(tokens)
            return Prompt(tokens, system_end, messages_end, tool=messages[-1].get("role") == "tool")
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
