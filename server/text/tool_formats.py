"""How a model writes tool calls: mlx-lm's parsers, and the one that fits a model."""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx_lm.tool_parsers
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.text.call_shapes import ARGUMENTS, NAMES, TOOLS, CallShape, call_shape, written


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the model wrote it; `arguments` is JSON text of an object, `id` what the model itself calls it."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """`start` and `end` mark calls in an answer; an empty `end` means the end of the answer. `name` is mlx-lm's.
    `shape` is None where calls are not made of fixed text around names and arguments.
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
    text = written(tokenizer, 1)
    for candidate in candidates:
        if text is not None and (inside := _inside(candidate, text)) is not None:
            read = candidate.read(inside, TOOLS)
            if read and [(call.name, json.loads(call.arguments)) for call in read] == [(NAMES[0], ARGUMENTS)]:
                # Without an end mark it is the end of the answer, which the template's text does not tell.
                whole = candidate.start + inside + candidate.end if candidate.end else ""
                return replace(candidate, shape=call_shape(tokenizer, whole))
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


def _inside(format: ToolFormat, written: str) -> str | None:
    _, start, rest = written.partition(format.start)
    inside, end, _ = rest.partition(format.end) if format.end else (rest, "", "")
    return inside if start and end == format.end else None
