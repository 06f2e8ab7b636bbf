"""How a model writes tool calls: mlx-lm's parsers, the one that fits a model, and the shape that its template gives."""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx_lm.tool_parsers
from mlx_lm.tokenizer_utils import TokenizerWrapper

_NAMES = ("get_city_weather", "find_next_train")
_ARGUMENTS = {"place": "Oslo", "days": 3}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "-",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["place", "days"],
            },
        },
    }
    for name in _NAMES
]
_ID = "call_7"
_ASK = {"role": "user", "content": "Hello"}


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the model wrote it; `arguments` is JSON text of an object, `id` what the model itself calls it."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallShape:
    """The text of a call whose arguments are one JSON object: `before` NAME `between` ARGUMENTS `after`, and what
    stands between two calls, None where several don't simply follow each other.
    """

    before: str
    between: str
    after: str
    separator: str | None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`start` and `end` mark calls in an answer; an empty `end` means the end of the answer. `name` is mlx-lm's.
    `shape` is None where arguments are not written as JSON.
    """

    name: str
    start: str
    end: str
    parse: Callable[[str, Any], Any]
    shape: CallShape | None = None

    def read(self, text: str, tools: Any) -> list[Call] | None:
        """The calls in what stands between the marks, None if it is malformed. `tools` are as templates take them."""
        try:
            found = self.parse(text, tools)
            return [_call(one) for one in (found if isinstance(found, list) else [found])] or None
        except Exception:  # a parser is foreign code and raises whatever it meets in the model's text
            return None


def _call(found: Any) -> Call:
    name, arguments, id = found["name"], found.get("arguments", {}), found.get("id")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("a call has a name, and an object of arguments")
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False), id if isinstance(id, str) else None)


def tool_format(tokenizer: TokenizerWrapper) -> ToolFormat | None:
    """The format of a model's calls: what mlx-lm takes it for, else the one whose parser reads back what the chat
    template writes. None for models that know no tools.
    """
    if not tokenizer.has_chat_template:
        return None
    candidates = [_named(tokenizer.tool_parser.__module__)] if tokenizer.has_tool_calling else list(_known())
    written = _written(tokenizer, 1)
    for candidate in candidates:
        if written is not None and (inside := _inside(candidate, written)) is not None:
            read = candidate.read(inside, _TOOLS)
            if read and [(call.name, json.loads(call.arguments)) for call in read] == [(_NAMES[0], _ARGUMENTS)]:
                return _with_shape(candidate, tokenizer, written)
    return candidates[0] if tokenizer.has_tool_calling else None


def _named(module: str) -> ToolFormat:
    found = importlib.import_module(module)
    return ToolFormat(
        module.rpartition(".")[2], found.tool_call_start, found.tool_call_end or "", found.parse_tool_call
    )


def _known() -> Iterator[ToolFormat]:
    """mlx-lm's formats, the plainest first: several share their marks."""
    names = [info.name for info in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)]
    for name in sorted(names, key=lambda name: name != "json_tools"):
        try:
            yield _named(f"{mlx_lm.tool_parsers.__name__}.{name}")
        except AttributeError:  # a part of another format
            continue


def _written(tokenizer: TokenizerWrapper, n_calls: int) -> str | None:
    """The template's text of an answer with calls, from the answer's beginning on; None where it refuses."""
    calls = [
        {"id": _ID, "type": "function", "function": {"name": name, "arguments": _ARGUMENTS}}
        for name in _NAMES[:n_calls]
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        asked: str = tokenizer.apply_chat_template([_ASK], tools=_TOOLS, add_generation_prompt=False, tokenize=False)
        whole: str = tokenizer.apply_chat_template(
            [_ASK, answer], tools=_TOOLS, add_generation_prompt=False, tokenize=False
        )
    except Exception:  # templates are foreign code; one that can't write calls has no format of them
        return None
    return whole[len(asked) :] if whole.startswith(asked) else None


def _inside(format: ToolFormat, written: str) -> str | None:
    _, start, rest = written.partition(format.start)
    inside, end, _ = rest.partition(format.end) if format.end else (rest, "", "")
    return inside if start and end == format.end else None


def _with_shape(format: ToolFormat, tokenizer: TokenizerWrapper, written: str) -> ToolFormat:
    """With the shape of a call, if the template writes a name and its arguments as JSON, each once."""
    inside, arguments = _inside(format, written), json.dumps(_ARGUMENTS)
    if inside is None or not format.end or inside.count(_NAMES[0]) != 1 or inside.count(arguments) != 1:
        return format
    before, _, rest = inside.partition(_NAMES[0])
    between, _, after = rest.partition(arguments)
    if arguments in before or _ID in inside:  # named behind its arguments; or each call has a name of its own
        return format
    both, separator = _written(tokenizer, 2) or "", None
    second = format.start + inside.replace(_NAMES[0], _NAMES[1]) + format.end
    first = format.start + inside + format.end
    if both.count(first) == 1 and both.count(second) == 1:
        separator = both[both.index(first) + len(first) : both.index(second)]
    shape = CallShape(format.start + before, between, after + format.end, separator)
    return ToolFormat(format.name, format.start, format.end, format.parse, shape)
