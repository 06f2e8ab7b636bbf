"""Messages to token ids, with what earlier turns have been tokenised for already."""

import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.protocol import Conversation

_MOST_CHARACTERS = 1 << 22
"""Text whose ids are remembered: about 4 MiB of ids."""

_OPENED: Mapping[str, Any] = MappingProxyType({"add_generation_prompt": True})

_SAMPLES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello! 12 + 3.5 =\n\n  15,5\t(Größe, 名前, 🙂)  "}],
    [
        {"role": "user", "content": " one two "},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "\nfour"},
    ],
)


class PromptEncoder:
    """The model's chat template and tokenizer. Safe to call from any thread, one at a time.

    A tokenizer cuts text at its special tokens before it does anything else, so the rendered prompt is cut before each
    of them and the pieces' ids are remembered, longest unused first out. A piece begins with its special token: only
    the first one begins where the text does, which some tokenizers treat differently. `remembers` tells whether the
    tokenizer works like that: its tokens must be free of options that look at their neighbours, and sample
    conversations must get the same ids either way.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._pieces: OrderedDict[str, array[int]] = OrderedDict()
        self._n_characters = 0
        self._cut = _cut_before(tokenizer) if tokenizer.has_chat_template else None
        if self._cut is not None and any(self._encode(sample) != self._plainly(sample) for sample in _SAMPLES):
            self._cut = None
        self._opening = self._answer_opening() if tokenizer.has_chat_template else []

    @property
    def remembers(self) -> bool:
        return self._cut is not None

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of the conversation and, if it is `opened`, of the answer's opening. Raises what the template
        raises.
        """
        messages = [_plain(message) for message in conversation.messages]
        options: dict[str, Any] = {**conversation.options, "add_generation_prompt": conversation.add_generation_prompt}
        if conversation.tools:
            options["tools"] = conversation.tools
        if conversation.continue_final_message:
            options |= {"add_generation_prompt": False, "continue_final_message": True}
        with self._lock:
            return self._plainly(messages, options) if self._cut is None else self._encode(messages, options)

    def messages_end(self, tokens: list[int]) -> int:
        """Number of `tokens` without the answer's opening; 0 where the template's opening is not at the end."""
        n = len(self._opening)
        return len(tokens) - n if n and tokens[-n:] == self._opening else 0

    def system_end(self, conversation: Conversation, tokens: list[int]) -> int:
        """Number of `tokens` that any conversation with the same system message and tools begins with; 0 without."""
        messages = conversation.messages
        system = messages[:1] if messages[0]["role"] in ("system", "developer") else []
        if len(messages) == len(system) or not (system or conversation.tools):
            return 0
        try:
            other = self.encode(
                replace(
                    conversation, messages=[*system, {"role": "user", "content": "."}], continue_final_message=False
                )
            )
        except TemplateError:  # what the template minds is the other conversation
            return 0
        return _common(tokens, other)

    def _answer_opening(self) -> list[int]:
        """The ids with which the template opens an answer; empty if it changes what is before them."""
        try:
            opened = self._plainly(_SAMPLES[0])
            closed = list(self._tokenizer.apply_chat_template(_SAMPLES[0], add_generation_prompt=False))
        except Exception:  # foreign code, as in `_cut_before`
            return []
        return opened[len(closed) :] if opened[: len(closed)] == closed else []

    def _plainly(self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any] = _OPENED) -> list[int]:
        return list(self._tokenizer.apply_chat_template(list(messages), **options))

    def _encode(self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any] = _OPENED) -> list[int]:
        assert self._cut is not None
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        ids: list[int] = []
        for piece in self._cut.split(text):
            if piece:
                ids.extend(self._ids(piece))
        return ids

    def _ids(self, piece: str) -> "array[int]":
        if piece in self._pieces:
            self._pieces.move_to_end(piece)
            return self._pieces[piece]
        ids = array("i", self._tokenizer.encode(piece, add_special_tokens=False))
        self._pieces[piece] = ids
        self._n_characters += len(piece)
        while self._n_characters > _MOST_CHARACTERS:
            oldest, _ = self._pieces.popitem(last=False)
            self._n_characters -= len(oldest)
        return ids


def _common(tokens: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), min(len(tokens), len(other))
    )


def _cut_before(tokenizer: TokenizerWrapper) -> "re.Pattern[str] | None":
    """Matches the empty places before the tokens at which the template's text can be cut; None when there are none."""
    try:
        text = "".join(
            tokenizer.apply_chat_template(sample, add_generation_prompt=True, tokenize=False) for sample in _SAMPLES
        )
        added = list(tokenizer.added_tokens_decoder.values())
    except Exception:  # templates and tokenizers are foreign code; the plain way will tell what is wrong
        return None
    others = [token.content for token in added]
    simple = [
        token.content
        for token in added
        if token.content in text
        and not (token.lstrip or token.rstrip or token.normalized or token.single_word)
        and not any(_runs_into(other, token.content) for other in others)
    ]
    return re.compile("|".join(f"(?={re.escape(token)})" for token in simple)) if simple else None


def _runs_into(other: str, token: str) -> bool:
    """Whether an occurrence of `other` can begin before one of `token` and overlap it."""
    return any(token.startswith(other[i:]) or other[i:].startswith(token) for i in range(1, len(other)))


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates know it: text parts joined, `developer` under its older name `system`."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}
