"""How a model writes tool calls: the parser that reads them, and the fixed text around names and arguments.

Both come from a sample: the chat template writes a call, and mlx-lm's parsers read it back.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx_lm.tool_parsers
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.protocol import Conversation
from server.text.tool_prompt import tools_as_text

_NAMES = ("get_city_weather", "find_next_train")
_ARGUMENTS = {"destination": "Oslo-S", "n_days": 37}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "-",
            "parameters": {
                "type": "object",
                "properties": {"destination": {"type": "string"}, "n_days": {"type": "integer"}},
                "required": ["destination", "n_days"],
            },
        },
    }
    for name in _NAMES
]
_ID = "call_7"
_USER = {"role": "user", "content": "Hello"}


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """One argument is `opening` KEY `middle` VALUE `closing`. Strings are plain text, other values JSON."""

    opening: str
    middle: str
    closing: str


@dataclass(frozen=True, slots=True)
class CallShape:
    """One call is `before` NAME `between` ARGUMENTS `after`."""

    before: str
    between: str
    after: str
    separator: str | None
    """Text between two calls; None if the template does not write calls one after the other."""
    parameter: ParameterShape | None = None
    """How each argument is written; None if ARGUMENTS is one JSON object."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the model wrote it."""

    name: str
    arguments: str
    """JSON text of an object."""
    id: str | None = None
    """The model's own id for the call."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The text format of a model's tool calls."""

    name: str
    """mlx-lm's name of the parser."""
    start: str
    end: str
    """Marks around the calls of an answer. If `end` is empty, calls last to the end of the answer."""
    parse: Callable[[str, Any], Any]
    shape: CallShape | None = None
    """None if calls are not fixed text around names and arguments."""

    def read(self, text: str, tools: Any) -> list[Call] | None:
        """Parse the text between the marks; None if it is malformed. `tools` are in the form for chat templates."""
        try:
            parsed = self.parse(text, tools)
            return [_call(one) for one in (parsed if isinstance(parsed, list) else [parsed])] or None
        except Exception:  # parsers are third-party code: they raise anything on malformed text
            return None


def _call(parsed: Any) -> Call:
    name, arguments, id = parsed["name"], parsed.get("arguments", {}), parsed.get("id")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("a call has a name, and an object of arguments")
    return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False), id if isinstance(id, str) else None)


def template_knows_tools(tokenizer: TokenizerWrapper) -> bool:
    """Whether mlx-lm knows the model's calls, or the chat template shows a sample tool or a sample call. Otherwise the
    model gets tools, calls and results through `tools_as_text`.
    """
    if not tokenizer.has_chat_template or tokenizer.has_tool_calling:
        return True
    return any(_NAMES[0] in (_rendered(tokenizer, Conversation(talk, _TOOLS)) or "") for talk in ([_USER], _called(1)))


def tool_format(tokenizer: TokenizerWrapper) -> ToolFormat | None:
    """The format of a model's calls: the one that mlx-lm gives for the model, else the first whose parser reads back
    what the chat template writes, or what `tools_as_text` writes in its place. None for models without tools.
    """
    if not tokenizer.has_chat_template:
        return None
    candidates = [_format_of(tokenizer.tool_parser.__module__)] if tokenizer.has_tool_calling else list(_all_formats())
    text = _template_text(tokenizer, 1)
    for candidate in candidates:
        if text is not None and (inside := _between_marks(candidate, text)) is not None:
            read = candidate.read(inside, _TOOLS)
            if read and [(call.name, json.loads(call.arguments)) for call in read] == [(_NAMES[0], _ARGUMENTS)]:
                # Without an end mark the call's shape is unknown: the template's text continues after the call.
                whole = candidate.start + inside + candidate.end if candidate.end else ""
                return replace(candidate, shape=_call_shape(tokenizer, whole))
    return candidates[0] if tokenizer.has_tool_calling else None


def _format_of(parser: str) -> ToolFormat:
    module = importlib.import_module(parser)
    name = parser.rpartition(".")[2]
    return ToolFormat(name, module.tool_call_start, module.tool_call_end or "", module.parse_tool_call)


def _all_formats() -> Iterator[ToolFormat]:
    """mlx-lm's formats. `json_tools` comes first: other formats share its marks, and it is the simplest."""
    names = [info.name for info in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)]
    for name in sorted(names, key=lambda name: name != "json_tools"):
        try:
            yield _format_of(f"{mlx_lm.tool_parsers.__name__}.{name}")
        except AttributeError:  # a helper module of another parser
            continue


def _between_marks(format: ToolFormat, text: str) -> str | None:
    _, start, rest = text.partition(format.start)
    inside, end, _ = rest.partition(format.end) if format.end else (rest, "", "")
    return inside if start and end == format.end else None


def _template_text(tokenizer: TokenizerWrapper, n_calls: int) -> str | None:
    """The text of an answer that calls the first `n_calls` sample tools, as the model sees it in a conversation. None
    if the template refuses.
    """
    show = (lambda talk: talk) if template_knows_tools(tokenizer) else tools_as_text
    prompt, whole = (_rendered(tokenizer, show(Conversation(talk, _TOOLS))) for talk in ([_USER], _called(n_calls)))
    return None if prompt is None or whole is None or not whole.startswith(prompt) else whole[len(prompt) :]


def _called(n_calls: int) -> list[dict[str, Any]]:
    """A conversation that ends with calls of the first `n_calls` sample tools."""
    calls = [
        {"id": _ID, "type": "function", "function": {"name": name, "arguments": _ARGUMENTS}}
        for name in _NAMES[:n_calls]
    ]
    return [_USER, {"role": "assistant", "content": "", "tool_calls": calls}]


def _rendered(tokenizer: TokenizerWrapper, conversation: Conversation) -> str | None:
    """The template's text, without an opening of an answer. None if the template refuses."""
    options: dict[str, Any] = {"tools": conversation.tools} if conversation.tools else {}
    try:
        return str(
            tokenizer.apply_chat_template(conversation.messages, add_generation_prompt=False, tokenize=False, **options)
        )
    except Exception:  # templates are third-party code; one that can't write calls has no call format
        return None


def _call_shape(tokenizer: TokenizerWrapper, call: str) -> CallShape | None:
    """The shape of one sample call; None if the text has no such shape."""
    if call.count(_NAMES[0]) != 1 or _ID in call:  # ids differ from call to call, so a shape can't contain one
        return None
    before, _, rest = call.partition(_NAMES[0])
    both, second = _template_text(tokenizer, 2) or "", call.replace(_NAMES[0], _NAMES[1])
    separator = None
    if both.count(call) == 1 and both.count(second) == 1:
        separator = both[both.index(call) + len(call) : both.index(second)]
    arguments = json.dumps(_ARGUMENTS)
    if rest.count(arguments) == 1:
        between, _, after = rest.partition(arguments)
        return CallShape(before, between, after, separator)
    return _with_parameters(before, rest, separator)


def _with_parameters(before: str, rest: str, separator: str | None) -> CallShape | None:
    """The shape, if `rest` has each key and each value once, in order, and all with the same text around them."""
    values: list[Any] = [item for pair in _ARGUMENTS.items() for item in pair]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    pieces: list[str] = []
    for text in texts:
        piece, found, rest = rest.partition(text)
        if not found:
            return None
        pieces.append(piece)
    head, middle, joint, other_middle = pieces
    if middle != other_middle or any(text in rest for text in texts):
        return None
    # The joint closes one argument and opens the next. Any cut is correct if both ends of the call agree with it.
    # A cut after ">" keeps marks whole.
    cuts = [(joint[:cut], joint[cut:]) for cut in range(1, len(joint) + 1)]
    fitting = [(end, start) for end, start in cuts if rest.startswith(end) and head.endswith(start)]
    if not fitting:
        return None
    closing, opening = next((cut for cut in fitting if cut[0].endswith(">")), fitting[0])
    parameter = ParameterShape(opening, middle, closing)
    return CallShape(before, head.removesuffix(opening), rest.removeprefix(closing), separator, parameter)
