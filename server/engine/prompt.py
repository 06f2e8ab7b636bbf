"""From chat messages to token ids, through the model's own template."""

import threading
from typing import Any

from jinja2 import TemplateError

from server.errors import InvalidRequest
from turbocache.model import LoadedModel


class PromptMaker:
    """Applies the chat template. Safe to call from any thread; the tokenizer is used by one at a time."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._lock = threading.Lock()

    def tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Messages as token ids. Raises InvalidRequest when the template refuses them."""
        tokenizer = self._model.tokenizer
        if not tokenizer.has_chat_template:
            raise InvalidRequest(f"The model {self._model.id} has no chat template.", param="messages")
        try:
            with self._lock:
                return list(tokenizer.apply_chat_template([_plain(m) for m in messages], add_generation_prompt=True))
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates know it: text parts joined, `developer` under its older name `system`."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}
