"""Writes the rules of an answer as a grammar, in llguidance's dialect of Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.errors import InvalidRequest, UnsupportedField
from server.protocol import AnswerRules, Tool
from server.text.tool_formats import CallShape, ParameterShape, ToolFormat

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The spacing of `json.dumps` and of templates. With free whitespace a hot model may write nothing else."""

_LENIENT: Mapping[str, Any] = MappingProxyType({"lenient": True, "coerce_one_of": True})
"""Ignore keywords that llguidance can't enforce."""


def check_schema(schema: dict[str, Any], param: str, tokenizer: LLTokenizer, options: Mapping[str, Any]) -> None:
    """Raises InvalidRequest if llguidance can't enforce all of a schema."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": {**options, **_SPACING}}))
    except ValueError as error:
        raise InvalidRequest(f"Invalid schema for '{param}': {error}", param=param) from error
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if failed:
        raise InvalidRequest(f"Invalid schema for '{param}': {messages[0].strip()}.", param=param)


class GrammarText:
    """Collects the rules of one grammar."""

    def __init__(self, tokenizer: TokenizerWrapper, ll_tokenizer: LLTokenizer) -> None:
        self.schemas: list[tuple[dict[str, Any], str, Mapping[str, Any]]] = []
        self._tokenizer = tokenizer
        self._ll_tokenizer = ll_tokenizer
        self._rules: list[str] = []
        self._end = ""

    def source(self) -> str:
        return "\n".join(["%llguidance {}", *self._rules, ""])

    def answer(self, rules: AnswerRules, format: ToolFormat | None, in_thought: bool) -> None:
        """Add the start rule: a thought if the model writes one, then content and calls."""
        content = "" if rules.schema is None else self._json("content", rules.schema, rules.param)
        if format is None or not rules.calls:
            body = content or self._plain(format)
        elif rules.tool_choice == "required":
            body = self._calls(rules, format)
        elif content:
            body = f"({content} | {self._calls(rules, format)})"
        else:
            body = self._calls_among_text(rules, format)
        self._rules.insert(0, f"start: {self._thought(in_thought)} {body}")

    def _thought(self, in_thought: bool) -> str:
        """A thought: required if the template leaves one open, optional if the template mentions thoughts."""
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
        """One call, or more if both the rules and the model's format allow that."""
        shape = self._call_rules(rules, format, opened=False)
        if not rules.parallel or shape.separator is None:
            return "call"
        return f"call ({self._literal(shape.separator)} call)*"

    def _calls_among_text(self, rules: AnswerRules, format: ToolFormat) -> str:
        """Text with calls in any place."""
        self._call_rules(rules, format, opened=True)
        opening, plain = self._until("LEAD", format.start), self._plain(format)
        return f"({opening} call)* {plain}" if rules.parallel else f"({opening} call | {plain})"

    def _call_rules(self, rules: AnswerRules, format: ToolFormat, opened: bool) -> CallShape:
        """Add the rule `call`. With `opened`, another rule reads the opening mark."""
        if (shape := format.shape) is None:
            raise UnsupportedField(
                f"This model writes calls in the format {format.name}, which this version can't hold it to. Use "
                "tool_choice 'auto' or 'none', and no strict tools.",
                param="tool_choice",
            )
        self._end = format.end
        before = shape.before.removeprefix(format.start) if opened else shape.before
        tools = [tool for tool in rules.tools if rules.allowed_tools is None or tool.name in rules.allowed_tools]
        self._rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
        for i, tool in enumerate(tools):
            arguments = self._arguments(f"arguments_{i}", tool, shape.parameter)
            head = self._literal(before + tool.name + shape.between)
            self._rules.append(f"call_{i}: {head} {arguments} {self._literal(shape.after)}")
        return shape

    def _arguments(self, name: str, tool: Tool, parameter: ParameterShape | None) -> str:
        """The arguments of one tool. Without `strict`, what llguidance can't enforce is ignored."""
        schema = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}
        if schema.get("type", "object") != "object":
            if tool.strict:
                raise InvalidRequest(f"Invalid schema for '{tool.param}': its type must be 'object'.", param=tool.param)
            schema = {"type": "object"}
        if parameter is not None:
            return self._parameters(name, tool, schema, parameter)
        if tool.strict:
            return self._json(name, {**schema, "type": "object"}, tool.param)
        try:
            check_schema(schema, tool.param, self._ll_tokenizer, _LENIENT)
        except InvalidRequest:
            return self._json(name, {"type": "object"}, tool.param)
        return self._json(name, {**schema, "type": "object"}, tool.param, _LENIENT)

    def _parameters(self, name: str, tool: Tool, schema: dict[str, Any], shape: ParameterShape) -> str:
        """One rule for each argument, in the schema's order. Arguments that are not required are optional."""
        known: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        properties = []
        for i, (key, value) in enumerate(schema.get("properties", {}).items()):
            value = value if isinstance(value, dict) else {}
            body = self._value(f"{name}_{i}", {**known, **value}, tool, shape)
            rule = f"{self._literal(shape.opening + key + shape.middle)} {body}"
            properties.append(rule if key in schema.get("required", ()) else f"({rule})?")
        self._rules.append(f"{name}: {' '.join(properties)}" if properties else f'{name}: ""')
        return name

    def _value(self, name: str, schema: dict[str, Any], tool: Tool, shape: ParameterShape) -> str:
        """The value and its closing mark. A string is plain text, another value is JSON."""
        closing = self._literal(shape.closing)
        texts = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if schema.get("type", "string") == "string" and texts and all(isinstance(text, str) for text in texts):
            choices = " | ".join(self._literal(text) or '""' for text in texts)
            return f"({choices}) {closing}"
        bounds = {"minLength", "maxLength", "pattern", "format", "allOf"} & schema.keys()
        if schema.get("type") == "string" and not (tool.strict and bounds):
            return self._until(name.upper(), shape.closing, self._end)
        if schema.get("type") in ("integer", "number", "boolean", "object", "array"):
            options = MappingProxyType({}) if tool.strict else _LENIENT
            return f"{self._json(name, schema, tool.param, options)} {closing}"
        if tool.strict:
            raise UnsupportedField(
                f"Invalid schema for '{tool.param}': this model writes arguments each by itself, and so strict ones "
                "must have one type, and strings no bounds besides an enum.",
                param=tool.param,
            )
        return self._until(name.upper(), shape.closing, self._end)

    def _plain(self, format: ToolFormat | None) -> str:
        """Any text without the beginning of a call."""
        without = "" if format is None else f" & ~/(.|\\n)*{_escaped(format.start)}(.|\\n)*/"
        self._rules.append(f"PLAIN: /(.|\\n)*/{without}")
        return "PLAIN"

    def _json(
        self, name: str, schema: dict[str, Any], param: str, options: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        self.schemas.append((schema, param, options))
        self._rules.append(f"{name}: %json {json.dumps({**schema, 'x-guidance': {**options, **_SPACING}})}")
        return name

    def _until(self, name: str, mark: str, unless: str = "") -> str:
        """Any text up to a mark, and the mark. The text must not contain `unless`."""
        parts = self._parts(mark)
        special = next((i for i, (_, token) in enumerate(parts) if token is not None), None)
        without = f" & ~/(.|\\n)*{_escaped(unless)}(.|\\n)*/" if unless and unless != mark else ""
        if special is None:  # lazy: the text ends at the first mark
            self._rules += [f"{name.lower()}_[lazy]: {name}", f"{name}: /(.|\\n)*{_escaped(mark)}/{without}"]
            return f"{name.lower()}_"
        # A special token never matches text. The part of the mark before it may.
        self._rules.append(f"{name}: /(.|\\n)*/ & ~/(.|\\n)*{_escaped(mark)}(.|\\n)*/{without}")
        return f"{name} {_joined(parts[special:])}"

    def _token(self, text: str) -> int | None:
        """The id of the special token with this text, None if there is none."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 and self._ll_tokenizer.is_special_token(ids[0]) else None

    def _literal(self, text: str) -> str:
        """A fixed text. Special tokens in it are given by id, because text does not match them."""
        return _joined(self._parts(text))

    def _parts(self, text: str) -> list[tuple[str, int | None]]:
        """Split a text into plain parts (None) and special tokens (their ids)."""
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.content in text]
        specials = [token for token in sorted(added, key=len, reverse=True) if self._token(token) is not None]
        pieces = re.split("(" + "|".join(map(re.escape, specials)) + ")", text) if specials else [text]
        return [(piece, self._token(piece) if piece in specials else None) for piece in pieces if piece]


def _joined(parts: Sequence[tuple[str, int | None]]) -> str:
    return " ".join(json.dumps(text) if token is None else f"<[{token}]>" for text, token in parts)


def _escaped(text: str) -> str:
    """A text for use inside /.../."""
    return re.sub(r"([^\w\s<>=])", r"\\\1", text).replace("\n", "\\n")
