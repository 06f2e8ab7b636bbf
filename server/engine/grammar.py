"""What holds an answer to its rules: grammars by llguidance (https://github.com/guidance-ai/llguidance), and the way
through one of them.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.engine.tool_formats import CallShape, ToolFormat
from server.errors import InvalidRequest, UnsupportedField
from server.protocol import AnswerRules, Grammar, Tool

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` and templates write JSON. Free whitespace would let a hot model write nothing else for ever."""

_KEPT = 64
"""Compiled grammars that are remembered: agents send the same tools with every request."""


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that is known to compile. Copies of its matcher start anew."""

    matcher: LLMatcher
    lexicon: LLTokenizer

    def guide(self, latest: Callable[[], int | None]) -> "Guide":
        return Guide(self.matcher.deep_copy(), self.lexicon, latest)


def compiled(grammar: Grammar | None) -> CompiledGrammar | None:
    """What `GrammarMaker.make` has made, as it comes back with a request."""
    assert grammar is None or isinstance(grammar, CompiledGrammar)
    return grammar


class Guide:
    """One row's way through its grammar, as a logits processor of mlx-lm. Logits are `[1, vocab]`; those of tokens that
    can't follow become -inf.

    `latest` gives the row's last token, None before its first one. `error` says why the grammar could not go on; its
    row is no longer held to it then.
    """

    def __init__(self, matcher: LLMatcher, lexicon: LLTokenizer, latest: Callable[[], int | None]) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._lexicon = lexicon
        self._latest = latest
        self._bits = np.zeros(-(-lexicon.vocab_size // 32), dtype=np.uint32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        # The step's own graph runs while the token before it is read and the mask is made.
        mx.async_eval(logits)
        token = self._latest()
        if token is not None and not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        if self._matcher.is_stopped():
            self._bits[:] = 0
            for end in self._lexicon.eos_tokens:
                self._bits[end // 32] |= np.uint32(1 << end % 32)
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
            return logits
        return _masked(logits, self._bits)


def _masked(logits: mx.array, bits: np.ndarray) -> mx.array:
    """Logits `[1, vocab]` where bit i of `bits` allows token i, else -inf. A tokenizer may have fewer tokens than a
    model has logits, or more.
    """
    n = logits.shape[-1]
    allowed = ((mx.array(bits)[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).reshape(-1)[:n].astype(mx.bool_)
    if allowed.size < n:
        allowed = mx.pad(allowed, (0, n - allowed.size))
    return mx.where(allowed, logits, mx.array(-mx.inf, dtype=logits.dtype))


class GrammarMaker:
    """Compiles rules into grammars. Safe to call from any thread."""

    def __init__(
        self, tokenizer: TokenizerWrapper, format: ToolFormat | None, lexicon: Callable[[], LLTokenizer]
    ) -> None:
        self._tokenizer = tokenizer
        self._format = format
        self._lexicon = lexicon
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, CompiledGrammar] = OrderedDict()

    def make(self, rules: AnswerRules, in_thought: bool) -> CompiledGrammar | None:
        """The grammar of an answer, None where nothing must be held. `in_thought`: the prompt has opened a thought.
        Raises InvalidRequest and UnsupportedField, as `server.protocol.Engine.constrain` says.
        """
        if rules.tools and self._format is None:
            raise UnsupportedField("The model's chat template knows no tools, so it can't call any.", param="tools")
        strict = any(tool.strict for tool in rules.tools)
        free = rules.choice == "auto" and rules.allowed is None and not strict
        if rules.schema is None and (free or not rules.tools):
            return None
        text = _Text(self._tokenizer, self._lexicon())
        text.answer(rules, self._format, in_thought)
        return self._compile(text)

    def _compile(self, text: "_Text") -> CompiledGrammar:
        source = text.source()
        with self._lock:
            if (known := self._compiled.get(source)) is not None:
                self._compiled.move_to_end(source)
                return known
        for schema, param, options in text.schemas:  # each by itself, so that the error names the one that is wrong
            _check(schema, param, self._lexicon(), options)
        matcher = LLMatcher(self._lexicon(), source, log_level=0)
        if matcher.is_error():
            error = matcher.get_error().strip().splitlines()[0]
            raise InvalidRequest(f"The tools and schemas of this request make no grammar: {error}", param="tools")
        compiled = CompiledGrammar(matcher, self._lexicon())
        with self._lock:
            self._compiled[source] = compiled
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return compiled


def _check(schema: dict[str, Any], param: str, lexicon: LLTokenizer, options: Mapping[str, Any]) -> None:
    """Raises InvalidRequest where llguidance does not hold an answer to all that a schema says."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": {**options, **_SPACING}}))
    except ValueError as error:
        raise InvalidRequest(f"Invalid schema for '{param}': {error}", param=param) from error
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, lexicon)
    if failed:
        raise InvalidRequest(f"Invalid schema for '{param}': {messages[0].strip()}.", param=param)


class _Text:
    """A grammar in llguidance's dialect of Lark, as it is put together."""

    def __init__(self, tokenizer: TokenizerWrapper, lexicon: LLTokenizer) -> None:
        self.schemas: list[tuple[dict[str, Any], str, Mapping[str, Any]]] = []
        self._tokenizer = tokenizer
        self._lexicon = lexicon
        self._rules: list[str] = []

    def source(self) -> str:
        return "\n".join(["%llguidance {}", *self._rules, ""])

    def answer(self, rules: AnswerRules, format: ToolFormat | None, in_thought: bool) -> None:
        """The start rule: a thought where there is one, then content and calls."""
        content = "" if rules.schema is None else self._json("content", rules.schema, rules.param)
        if format is None or not rules.calls:
            body = content or self._plain(format)
        elif rules.choice == "required":
            body = self._calls(rules, format)
        elif content:
            body = f"({content} | {self._calls(rules, format)})"
        else:
            body = self._calls_among_text(rules, format)
        self._rules.insert(0, f"start: {self._thought(in_thought)} {body}")

    def _thought(self, in_thought: bool) -> str:
        """A thought that the template has opened, or that the model may open where its template speaks of thoughts."""
        tokenizer = self._tokenizer
        if not tokenizer.has_thinking:
            return ""
        ending = f"{self._until('THOUGHT', tokenizer.think_end)} GAP"
        if in_thought:
            self._rules.append(r"GAP: /[ \n]{0,4}/")
            return ending
        if tokenizer.think_start in str(tokenizer.chat_template):
            self._rules.append(r"GAP: /[ \n]{0,4}/")
            return f"({self._literal(tokenizer.think_start)} {ending})?"
        return ""

    def _calls(self, rules: AnswerRules, format: ToolFormat) -> str:
        """One call, or several where the rules and the model's format have them."""
        shape = self._call_rules(rules, format, opened=False)
        if not rules.parallel or shape.separator is None:
            return "call"
        return f"call ({self._literal(shape.separator)} call)*"

    def _calls_among_text(self, rules: AnswerRules, format: ToolFormat) -> str:
        """Calls wherever the model opens one."""
        self._call_rules(rules, format, opened=True)
        opening, plain = self._until("LEAD", format.start), self._plain(format)
        return f"({opening} call)* {plain}" if rules.parallel else f"({opening} call | {plain})"

    def _call_rules(self, rules: AnswerRules, format: ToolFormat, opened: bool) -> CallShape:
        """The rule `call`, of which the format's opening mark has been read if `opened`."""
        if (shape := format.shape) is None:
            raise UnsupportedField(
                f"This model writes calls in the format {format.name}, which this version can't hold it to. Use "
                "tool_choice 'auto' or 'none', and no strict tools.",
                param="tool_choice",
            )
        before = shape.before.removeprefix(format.start) if opened else shape.before
        tools = [tool for tool in rules.tools if rules.allowed is None or tool.name in rules.allowed]
        self._rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
        for i, tool in enumerate(tools):
            arguments = self._arguments(f"arguments_{i}", tool)
            head = self._literal(before + tool.name + shape.between)
            self._rules.append(f"call_{i}: {head} {arguments} {self._literal(shape.after)}")
        return shape

    def _arguments(self, name: str, tool: Tool) -> str:
        """All of a strict schema; of another what can be held to."""
        schema = tool.parameters if tool.parameters is not None else {"type": "object"}
        if tool.strict:
            return self._json(name, schema, tool.param)
        options = {"lenient": True, "coerce_one_of": True}
        try:
            _check(schema, tool.param, self._lexicon, options)
        except InvalidRequest:
            return self._json(name, {"type": "object"}, tool.param)
        return self._json(name, {**schema, "type": "object"}, tool.param, options)

    def _plain(self, format: ToolFormat | None) -> str:
        """Any text in which no call begins."""
        unless = "" if format is None else f" & ~/(.|\\n)*{_escaped(format.start)}(.|\\n)*/"
        self._rules.append(f"PLAIN: /(.|\\n)*/{unless}")
        return "PLAIN"

    def _json(
        self, name: str, schema: dict[str, Any], param: str, options: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        self.schemas.append((schema, param, options))
        self._rules.append(f"{name}: %json {json.dumps({**schema, 'x-guidance': {**options, **_SPACING}})}")
        return name

    def _until(self, name: str, mark: str) -> str:
        """Any text up to a mark and the mark itself, which may be a token of its own."""
        if (token := self._token(mark)) is None:
            self._rules.append(f"{name}[lazy]: /(.|\\n)*{_escaped(mark)}/")
            return name
        self._rules.append(f"{name}: /(.|\\n)*/ & ~/(.|\\n)*{_escaped(mark)}(.|\\n)*/")
        return f"{name} <[{token}]>"

    def _token(self, text: str) -> int | None:
        """The special token that a text is, if it is one."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and self._lexicon.is_special_token(ids[0]) else None

    def _literal(self, text: str) -> str:
        """A fixed text; tokens of their own in it are named, because they are not spelled."""
        specials = [t.content for t in self._tokenizer.added_tokens_decoder.values() if t.content in text]
        if not specials:
            return json.dumps(text) if text else ""
        parts = re.split("(" + "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)) + ")", text)
        pieces = []
        for part in parts:
            token = self._token(part) if part in specials else None
            pieces.append(json.dumps(part) if token is None else f"<[{token}]>")
        return " ".join(piece for piece in pieces if piece != '""')


def _escaped(text: str) -> str:
    """A text within /.../."""
    return re.sub(r"([^\w\s<>=])", r"\\\1", text).replace("\n", "\\n")
