"""The text of a call, as a chat template writes it: what is fixed in it, and where name and arguments stand."""

import json
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

NAMES = ("get_city_weather", "find_next_train")
ARGUMENTS = {"destination": "Oslo-S", "n_days": 37}
TOOLS = [
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
    for name in NAMES
]
_ID = "call_7"
_ASK = {"role": "user", "content": "Hello"}


@dataclass(frozen=True, slots=True)
class CallShape:
    """A call is `before` NAME `between` ARGUMENTS `after`. `separator` stands between two calls, None where several
    don't simply follow each other.

    ARGUMENTS are one JSON object, or with `parameter` each by itself.
    """

    before: str
    between: str
    after: str
    separator: str | None
    parameter: "ParameterShape | None" = None


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """An argument is `opening` KEY `middle` VALUE `closing`; strings are written as they are, other values as JSON."""

    opening: str
    middle: str
    closing: str


def written(tokenizer: TokenizerWrapper, n_calls: int) -> str | None:
    """The template's text of an answer that calls the first `n_calls` of NAMES, from the answer's beginning on; None
    where it refuses.
    """
    calls = [
        {"id": _ID, "type": "function", "function": {"name": name, "arguments": ARGUMENTS}} for name in NAMES[:n_calls]
    ]
    answer = {"role": "assistant", "content": "", "tool_calls": calls}
    options = {"tools": TOOLS, "add_generation_prompt": False, "tokenize": False}
    try:
        asked: str = tokenizer.apply_chat_template([_ASK], **options)
        whole: str = tokenizer.apply_chat_template([_ASK, answer], **options)
    except Exception:  # templates are foreign code; one that can't write calls has no format of them
        return None
    return whole[len(asked) :] if whole.startswith(asked) else None


def call_shape(tokenizer: TokenizerWrapper, call: str) -> CallShape | None:
    """The shape of one whole call of `written`; None for a text that is not made like that."""
    if call.count(NAMES[0]) != 1 or _ID in call:  # an id in it: each call has a name of its own
        return None
    before, _, rest = call.partition(NAMES[0])
    both, second = written(tokenizer, 2) or "", call.replace(NAMES[0], NAMES[1])
    separator = None
    if both.count(call) == 1 and both.count(second) == 1:
        separator = both[both.index(call) + len(call) : both.index(second)]
    arguments = json.dumps(ARGUMENTS)
    if rest.count(arguments) == 1:
        between, _, after = rest.partition(arguments)
        return CallShape(before, between, after, separator)
    return _with_parameters(before, rest, separator)


def _with_parameters(before: str, rest: str, separator: str | None) -> CallShape | None:
    """The shape if the rest of a call has each key and each value once, in their order, all framed alike."""
    pieces: list[str] = []
    for text in _in_order():
        piece, found, rest = rest.partition(text)
        if not found:
            return None
        pieces.append(piece)
    head, middle, joint, other_middle = pieces
    if middle != other_middle or any(text in rest for text in _in_order()):
        return None
    # The joint closes one argument and opens the next. Where it is cut does not matter as long as both ends agree, but
    # marks are better left whole.
    cuts = [(joint[:cut], joint[cut:]) for cut in range(1, len(joint) + 1)]
    fitting = [(end, start) for end, start in cuts if rest.startswith(end) and head.endswith(start)]
    if not fitting:
        return None
    closing, opening = next((cut for cut in fitting if cut[0].endswith(">")), fitting[0])
    parameter = ParameterShape(opening, middle, closing)
    return CallShape(before, head.removesuffix(opening), rest.removeprefix(closing), separator, parameter)


def _in_order() -> list[str]:
    values: list[Any] = [item for pair in ARGUMENTS.items() for item in pair]
    return [value if isinstance(value, str) else json.dumps(value) for value in values]
