"""From tokens to what is safe to send: whole characters, no stop strings, reasoning and calls kept apart."""

import codecs
import functools
import json
import uuid
from collections.abc import Callable, Sequence

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.protocol import AnswerRules, Channel, TextDelta, ToolCall
from server.text.tool_formats import ToolFormat

_CHANNELS: dict[str, Channel] = {"normal": "content", "reasoning": "reasoning"}

_CALL, _STOP = "tool", "stop "
"""States of a text: within a call, as mlx-lm names it, and, with a number, behind a stop string."""

_NO_RULES = AnswerRules()

_TEMPLATE_TAIL = 8
"""A thought that the template opened for this answer stands among the prompt's last tokens; older ones are history."""


class Lexicon:
    """The bytes of single tokens, as llguidance knows them for each kind of tokenizer."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._wrapped = tokenizer

    @functools.cached_property
    def tokens(self) -> LLTokenizer:
        # Not at the start: it takes a while with large vocabularies, and not everybody asks for it.
        ends = sorted(self._wrapped.eos_token_ids)
        return from_tokenizer(self._wrapped._tokenizer, eos_token=ends)

    def token_bytes(self, token: int) -> bytes:
        return self.tokens.decode_bytes([token])


class _Continuation:
    """A detokenizer as mlx-lm has them, whose text goes on with another: theirs drop a space at its beginning."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self.last_segment = ""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add_token(self, token: int) -> None:
        self.last_segment = self._decoder.decode(self._token_bytes(token))

    def finalize(self) -> None:
        self.last_segment = self._decoder.decode(b"", final=True)


class TextAssembler:
    """One answer's text. `stopped` turns True when it has ended by a stop string, which is `stop` and not part of the
    text, or by the one call that `rules` allow. `called`: it holds a call. `reasoned` tokens were of a thought.
    One that has `begun` goes on with the prompt's text, by the bytes of `lexicon`.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        prompt: Sequence[int],
        stop: Sequence[str],
        rules: AnswerRules = _NO_RULES,
        format: ToolFormat | None = None,
        *,
        begun: bool = False,
        lexicon: Lexicon | None = None,
    ) -> None:
        self.stopped, self.called = False, False
        self.stop: str | None = None
        self.reasoned = 0
        self._rules, self._format = rules, format if rules.calls else None
        self._tools = [tool.template for tool in rules.tools]
        self._stops = {f"{_STOP}{i}": text for i, text in enumerate(stop)}
        self._call, self._looked = "", 0
        if begun:
            assert lexicon is not None
            self._detokenizer = _Continuation(lexicon.token_bytes)
        else:
            self._detokenizer = tokenizer.detokenizer
        self._machine = TextStateMachine(self._edges(tokenizer))
        self._state = self._machine.make_state("normal" if rules.raw else opening_state(tokenizer, prompt))

    def add(self, token: int) -> list[TextDelta | ToolCall]:
        """What one more token makes certain."""
        self._detokenizer.add_token(token)
        found = self._split(self._detokenizer.last_segment)
        self.reasoned += self._state[0] == "reasoning"
        return found

    def finish(self) -> list[TextDelta | ToolCall]:
        """The rest, when no token follows."""
        self._detokenizer.finalize()
        found = self._split(self._detokenizer.last_segment)
        if self.stopped:
            return found
        self._state, rest, name = TextStateMachine.flush(self._state)
        if name != _CALL:
            return [*found, *([TextDelta(rest, _CHANNELS[name])] if rest and name in _CHANNELS else [])]
        self._call += rest
        return [*found, *self._read_call(ended=False)]

    def _edges(self, tokenizer: TokenizerWrapper) -> dict[str, list[tuple[str, str]]]:
        edges: dict[str, list[tuple[str, str]]] = {"normal": [], "reasoning": []}
        if tokenizer.has_thinking and not self._rules.raw:
            edges["normal"].append((tokenizer.think_start, "reasoning"))
            edges["reasoning"].append((tokenizer.think_end, "normal"))
        if self._format is not None:
            edges["normal"].append((self._format.start, _CALL))
            edges[_CALL] = []  # its end is looked for by `_call_end`, which knows of strings
        for mark in tokenizer.structural_markers or ():
            edges["normal"].append((mark, "normal"))
        for state, more in tokenizer.response_transitions.items():
            edges.setdefault(state, []).extend(edge for edge in more if edge[1] != _CALL or self._format is not None)
        for name, text in self._stops.items():
            edges["normal"].append((text, name))
            edges["reasoning"].append((text, name))
            edges[name] = []
        return edges

    def _split(self, text: str) -> list[TextDelta | ToolCall]:
        found: list[TextDelta | ToolCall] = []
        while text and not self.stopped:
            self._state, segments = TextStateMachine.split(self._state, text)
            text = ""
            for name, part in segments:
                if name in self._stops:
                    self.stopped, self.stop = True, self._stops[name]
                    break
                if name == _CALL:
                    self._call += part
                elif part and name in _CHANNELS:  # other states than these two are a form's own headings
                    found.append(TextDelta(part, _CHANNELS[name]))
            if (end := self._call_end()) is not None:
                self._call, text = self._call[:end], self._call[end + len(self._end_mark) :]
                found += self._read_call(ended=True)
                self._state = self._machine.make_state("normal")
        return found

    @property
    def _end_mark(self) -> str:
        return "" if self._format is None else self._format.end

    def _call_end(self) -> int | None:
        """Where the call's end mark stands; one within a string of its arguments is none."""
        while self._end_mark and (end := self._call.find(self._end_mark, self._looked)) >= 0:
            if not _within_string(self._call[:end]):
                return end
            self._looked = end + len(self._end_mark)
        self._looked = max(self._looked, len(self._call) - len(self._end_mark) + 1, 0)
        return None

    def _read_call(self, ended: bool) -> list[TextDelta | ToolCall]:
        """The calls of the text between the marks; one that can't be read is text as it was written."""
        assert self._format is not None
        text, self._call, self._looked = self._call, "", 0
        calls = self._format.read(text, self._tools)
        if calls is None:
            return [TextDelta(self._format.start + text + (self._format.end if ended else ""))]
        self.called = True
        if not self._rules.parallel:
            calls, self.stopped = calls[:1], True
        return [ToolCall(call.id or f"call_{uuid.uuid4().hex[:24]}", call.name, call.arguments) for call in calls]


def _within_string(text: str) -> bool:
    """Whether a beginning of JSON ends within a string."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    return False


def opening_state(tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> str:
    """`reasoning` when the template has opened a thought and not closed it, else `normal`, or what mlx-lm knows of a
    model's own form of answers.
    """
    if tokenizer.response_initial_state is not None:
        return str(tokenizer.response_initial_state)
    if not tokenizer.has_thinking:
        return "normal"
    opened, closed = tokenizer.rfind_think_start(prompt), tokenizer.rfind_think_end(prompt)
    return "reasoning" if opened > closed and opened >= len(prompt) - _TEMPLATE_TAIL else "normal"
