"""Turns tokens into text that is safe to send: whole characters, no stop strings, reasoning and calls separated."""

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
from turbocache.mlxlm.model import wrapped_tokenizer

_CHANNELS: dict[str, Channel] = {"normal": "content", "reasoning": "reasoning"}

_CALL, _STOP = "tool", "stop "
"""States of the text machine: inside a call (mlx-lm's name), and after stop string number N (prefix and N)."""

_NO_RULES = AnswerRules()


class Vocabulary:
    """The bytes of each token. llguidance knows them for every kind of tokenizer."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer

    @functools.cached_property
    def ll_tokenizer(self) -> LLTokenizer:
        """Built at first use: it is slow with large vocabularies, and most requests do not need it."""
        return from_tokenizer(wrapped_tokenizer(self._tokenizer), eos_token=sorted(self._tokenizer.eos_token_ids))

    def token_bytes(self, token: int) -> bytes:
        return self.ll_tokenizer.decode_bytes([token])


class _ContinuedDetokenizer:
    """A detokenizer for text that continues a prompt. mlx-lm's detokenizers drop a leading space."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self.last_segment = ""
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add_token(self, token: int) -> None:
        self.last_segment = self._decoder.decode(self._token_bytes(token))

    def finalize(self) -> None:
        self.last_segment = self._decoder.decode(b"", final=True)


class TextAssembler:
    """The text of one answer, built token by token.

    stopped: a stop string, or the only call that `rules` allow, has ended the text.
    stop: the stop string that ended it. The text does not contain it.
    called: the text contains a call.
    reasoned: number of tokens inside thoughts.

    With `begun`, the text continues the last message of the prompt; this needs `vocabulary`.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        opening: str,
        stop: Sequence[str],
        rules: AnswerRules = _NO_RULES,
        format: ToolFormat | None = None,
        *,
        begun: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.stopped, self.called = False, False
        self.stop: str | None = None
        self.reasoned = 0
        self._rules, self._format = rules, format if rules.calls else None
        self._tools = [tool.template for tool in rules.tools]
        self._stops = {f"{_STOP}{i}": text for i, text in enumerate(stop)}
        self._call, self._searched = "", 0
        if begun:
            assert vocabulary is not None
            self._detokenizer = _ContinuedDetokenizer(vocabulary.token_bytes)
        else:
            self._detokenizer = tokenizer.detokenizer
        self._machine = TextStateMachine(self._edges(tokenizer))
        self._state = self._machine.make_state(opening)

    def add(self, token: int) -> list[TextDelta | ToolCall]:
        """The text that can be sent after one more token."""
        self._detokenizer.add_token(token)
        deltas = self._split(self._detokenizer.last_segment)
        self.reasoned += self._state[0] == "reasoning"
        return deltas

    def finish(self) -> list[TextDelta | ToolCall]:
        """The remaining text, after the last token."""
        self._detokenizer.finalize()
        deltas = self._split(self._detokenizer.last_segment)
        if self.stopped:
            return deltas
        self._state, rest, name = TextStateMachine.flush(self._state)
        if name != _CALL:
            return [*deltas, *([TextDelta(rest, _CHANNELS[name])] if rest and name in _CHANNELS else [])]
        self._call += rest
        return [*deltas, *self._read_call(ended=False)]

    def _edges(self, tokenizer: TokenizerWrapper) -> dict[str, list[tuple[str, str]]]:
        edges: dict[str, list[tuple[str, str]]] = {"normal": [], "reasoning": []}
        if tokenizer.has_thinking and not self._rules.raw:
            edges["normal"].append((tokenizer.think_start, "reasoning"))
            edges["reasoning"].append((tokenizer.think_end, "normal"))
        if self._format is not None:
            edges["normal"].append((self._format.start, _CALL))
            edges[_CALL] = []  # `_call_end` finds its end: an end mark inside a string does not count
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
        deltas: list[TextDelta | ToolCall] = []
        while text and not self.stopped:
            self._state, segments = TextStateMachine.split(self._state, text)
            text = ""
            for name, part in segments:
                if name in self._stops:
                    self.stopped, self.stop = True, self._stops[name]
                    break
                if name == _CALL:
                    self._call += part
                elif part and name in _CHANNELS:  # the other states are headings of the model's own answer format
                    deltas.append(TextDelta(part, _CHANNELS[name]))
            if (end := self._call_end()) is not None:
                self._call, text = self._call[:end], self._call[end + len(self._end_mark) :]
                deltas += self._read_call(ended=True)
                self._state = self._machine.make_state("normal")
        return deltas

    @property
    def _end_mark(self) -> str:
        return "" if self._format is None else self._format.end

    def _call_end(self) -> int | None:
        """Position of the call's end mark. A mark inside a string of the arguments does not count."""
        while self._end_mark and (end := self._call.find(self._end_mark, self._searched)) >= 0:
            if not _ends_inside_string(self._call[:end]):
                return end
            self._searched = end + len(self._end_mark)
        self._searched = max(self._searched, len(self._call) - len(self._end_mark) + 1, 0)
        return None

    def _read_call(self, ended: bool) -> list[TextDelta | ToolCall]:
        """Parse the text between the marks. Text that does not parse is sent as content, unchanged."""
        assert self._format is not None
        text, self._call, self._searched = self._call, "", 0
        calls = self._format.read(text, self._tools)
        if calls is None:
            return [TextDelta(self._format.start + text + (self._format.end if ended else ""))]
        self.called = True
        if not self._rules.parallel:
            calls, self.stopped = calls[:1], True
        return [ToolCall(call.id or f"call_{uuid.uuid4().hex[:24]}", call.name, call.arguments) for call in calls]


def _ends_inside_string(text: str) -> bool:
    """Whether the first part of a JSON text ends inside a string."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    return False
