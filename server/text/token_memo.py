"""Tokenizes conversations, and caches the token ids of their parts for later turns."""

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
from server.text.beginnings import Openings, beginnings, marked, openings, without_marks

_MAX_CHARACTERS = 1 << 22
"""Bound on the text in the cache; its ids take about 4 MiB."""

_OPTIONS: Mapping[str, Any] = MappingProxyType({"add_generation_prompt": True})

_SAMPLES: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello! 12 + 3.5 =\n\n  15,5\t(Größe, 名前, 🙂)  "}],
    [
        {"role": "user", "content": " one two "},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "\nfour"},
    ],
)


class ChatEncoder:
    """Applies the chat template and the tokenizer. Safe to call from any thread; calls run one at a time.

    A tokenizer first splits text at its special tokens. So the rendered prompt is split before each special token, and
    the ids of each piece are cached (least recently used out). A piece begins with its special token: some tokenizers
    treat the beginning of a text differently, and only the first piece begins there.

    The cache is used only if that gives the same ids: special tokens must not have options that depend on their
    neighbours, and sample conversations must get the same ids both ways.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._pieces: OrderedDict[str, array[int]] = OrderedDict()
        self._n_characters = 0
        self._boundary = _boundary(tokenizer) if tokenizer.has_chat_template else None
        if self._boundary is not None and any(self._encode_pieces(s) != self._encode_whole(s) for s in _SAMPLES):
            self._boundary = None
        self._opening = self._answer_opening() if tokenizer.has_chat_template else []
        self._openings = self._read_openings() if self.uses_cache else Openings()

    @property
    def uses_cache(self) -> bool:
        return self._boundary is not None

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of the conversation and, if it is `opened`, of the answer's opening. Exceptions of the template
        pass through.
        """
        options = _options_of(conversation)
        with self._lock:
            return (self._encode_whole if self._boundary is None else self._encode_pieces)(
                conversation.messages, options
            )

    def messages_end(self, tokens: list[int]) -> int:
        """Number of `tokens` before the answer's opening; 0 if they do not end with it."""
        n = len(self._opening)
        return len(tokens) - n if n and tokens[-n:] == self._opening else 0

    def system_end(self, conversation: Conversation, tokens: list[int]) -> int:
        """Number of leading `tokens` that all conversations with this system message and these tools share. 0 if the
        conversation has neither.
        """
        messages = conversation.messages
        system = messages[:1] if messages[0]["role"] == "system" else []
        if len(messages) == len(system) or not (system or conversation.tools):
            return 0
        try:
            other = self.encode(
                replace(
                    conversation, messages=[*system, {"role": "user", "content": "."}], continue_final_message=False
                )
            )
        except TemplateError:  # the template refuses the made-up conversation, not this one
            return 0
        return _n_shared(tokens, other)

    def beginnings(self, conversation: Conversation, tokens: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where turns begin in the conversation's `tokens`, and where the model goes on after results of tools. Places
        that are not known are left out: a template may write messages that nothing sets apart.
        """
        if self._boundary is None or (messages := marked(conversation.messages)) is None:
            return (), ()
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **_options_of(conversation))
        except (TemplateError, ValueError):  # the template refuses the marks, not this conversation
            return (), ()
        if (found := beginnings(messages, text, self._openings)) is None:
            return (), ()
        starts, n_letters, ids = dict[int, int](), 0, list[int]()
        with self._lock:
            for piece in self._boundary.split(without_marks(text)):
                starts[n_letters] = len(ids)
                n_letters += len(piece)
                ids.extend(self._ids(piece) if piece else ())
        if ids != tokens:
            return (), ()
        turns, steps = (tuple(starts[place] for place in places if place in starts) for places in found)
        return turns, steps

    def _read_openings(self) -> Openings:
        def render(messages: list[dict[str, Any]], answer: bool) -> str:
            return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False))

        try:
            return openings(render)
        except Exception:  # third-party code, as in `_boundary`
            return Openings()

    def _answer_opening(self) -> list[int]:
        """The ids with which the template opens an answer; empty if opening one changes earlier ids."""
        try:
            opened = self._encode_whole(_SAMPLES[0])
            closed = list(self._tokenizer.apply_chat_template(_SAMPLES[0], add_generation_prompt=False))
        except Exception:  # third-party code, as in `_boundary`
            return []
        return opened[len(closed) :] if opened[: len(closed)] == closed else []

    def _encode_whole(self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any] = _OPTIONS) -> list[int]:
        return list(self._tokenizer.apply_chat_template(list(messages), **options))

    def _encode_pieces(self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any] = _OPTIONS) -> list[int]:
        assert self._boundary is not None
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        ids: list[int] = []
        for piece in self._boundary.split(text):
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
        while self._n_characters > _MAX_CHARACTERS:
            oldest, _ = self._pieces.popitem(last=False)
            self._n_characters -= len(oldest)
        return ids


def _options_of(conversation: Conversation) -> dict[str, Any]:
    """What the template gets besides the messages."""
    options: dict[str, Any] = {**conversation.options, "add_generation_prompt": conversation.add_generation_prompt}
    if conversation.tools:
        options["tools"] = conversation.tools
    if conversation.continue_final_message:
        options |= {"add_generation_prompt": False, "continue_final_message": True}
    return options


def _n_shared(tokens: list[int], other: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), min(len(tokens), len(other))
    )


def _boundary(tokenizer: TokenizerWrapper) -> "re.Pattern[str] | None":
    """Matches the (empty) positions at which the template's text can be split; None if there are none."""
    try:
        text = "".join(
            tokenizer.apply_chat_template(sample, add_generation_prompt=True, tokenize=False) for sample in _SAMPLES
        )
        added = list(tokenizer.added_tokens_decoder.values())
    except Exception:  # third-party code; encoding the whole text will raise the same error with a request
        return None
    others = [token.content for token in added]
    simple = [
        token.content
        for token in added
        if token.content in text
        and not (token.lstrip or token.rstrip or token.normalized or token.single_word)
        and not any(_may_overlap(other, token.content) for other in others)
    ]
    return re.compile("|".join(f"(?={re.escape(token)})" for token in simple)) if simple else None


def _may_overlap(other: str, token: str) -> bool:
    """Whether `other` can begin before `token` in a text and overlap it."""
    return any(token.startswith(other[i:]) or other[i:].startswith(token) for i in range(1, len(other)))
