"""From tokens to text that is safe to send: whole characters, no stop strings, reasoning kept apart."""

import functools
from collections.abc import Sequence

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.protocol import Channel, TextDelta

_CHANNELS: dict[str, Channel] = {"normal": "content", "reasoning": "reasoning"}

_TEMPLATE_TAIL = 8
"""A thought that the template opened for this answer stands among the prompt's last tokens; older ones are history."""


class TokenBytes:
    """The bytes of single tokens; llguidance knows how each kind of tokenizer writes them."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._wrapped = tokenizer

    @functools.cached_property
    def _tokenizer(self) -> LLTokenizer:
        # Not at the start: it takes a while with large vocabularies, and few ask for it.
        return from_tokenizer(self._wrapped._tokenizer)

    def __call__(self, token: int) -> bytes:
        return self._tokenizer.decode_bytes([token])


class TextAssembler:
    """One answer's text. `stopped` turns True when a stop string has appeared; it is not part of the text."""

    def __init__(self, tokenizer: TokenizerWrapper, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped = False
        self._detokenizer = tokenizer.detokenizer
        edges: dict[str, list[tuple[str, str | None]]] = {"normal": [], "reasoning": []}
        if tokenizer.has_thinking:
            edges["normal"].append((tokenizer.think_start, "reasoning"))
            edges["reasoning"].append((tokenizer.think_end, "normal"))
        for state in edges:
            edges[state].extend((text, None) for text in stop)
        self._state = TextStateMachine(edges).make_state(_initial_state(tokenizer, prompt))

    def add(self, token: int) -> list[TextDelta]:
        """The text that one more token makes certain."""
        self._detokenizer.add_token(token)
        return self._split(self._detokenizer.last_segment)

    def finish(self) -> list[TextDelta]:
        """The rest, when no token follows."""
        self._detokenizer.finalize()
        deltas = self._split(self._detokenizer.last_segment)
        if not self.stopped:
            self._state, rest, name = TextStateMachine.flush(self._state)
            if rest:
                deltas.append(TextDelta(rest, _CHANNELS[name]))
        return deltas

    def _split(self, text: str) -> list[TextDelta]:
        if self.stopped or not text:
            return []
        self._state, segments = TextStateMachine.split(self._state, text)
        self.stopped = self._state[0] is None
        return [TextDelta(part, _CHANNELS[name]) for name, part in segments if part]


def _initial_state(tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> str:
    """`reasoning` when the template has opened a thought and not closed it."""
    if not tokenizer.has_thinking:
        return "normal"
    opened, closed = tokenizer.rfind_think_start(prompt), tokenizer.rfind_think_end(prompt)
    return "reasoning" if opened > closed and opened >= len(prompt) - _TEMPLATE_TAIL else "normal"
