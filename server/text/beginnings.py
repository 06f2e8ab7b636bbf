"""Where the turns of a conversation begin in the text of its chat template.

Templates are programs, so the places are not computed but observed: the conversation is rendered a second time with a
mark in each message of the user and in each result of a tool. The text without its marks must be the text of the
prompt. A turn begins with the text that opens a message of the user in a sample, a step with the text that opens an
answer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.tool_prompt import RESULT_START

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[list[dict[str, Any]], bool], str]
"""Applies the chat template to messages, with or without the opening of an answer."""

_USER, _TOOL = "\ue0b1", "\ue0b2"
"""Marks: characters of Unicode's private use area."""
_ASKED, _ANSWERED = {"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}
_CONTENT = "Three."


@dataclass(frozen=True, slots=True)
class Openings:
    """The template's texts before the content of a message. Empty if they are not known."""

    user: str = ""
    answer: str = ""


def openings(render: Render) -> Openings:
    """Read from samples. Exceptions of the template pass through."""
    before = [_ASKED, _ANSWERED]
    closed, asked = render(before, False), [*before, {"role": "user", "content": _CONTENT}]
    text, opened = render(asked, False), render(asked, True)
    if not (text.startswith(closed) and opened.startswith(text)):
        return Openings()
    user, found, _ = text[len(closed) :].partition(_CONTENT)
    return Openings(user if found else "", opened[len(text) :])


def marked(messages: Messages) -> list[dict[str, Any]] | None:
    """The messages with a mark before the first letter of each content that gets one. None if they have marks already.

    Templates may strip contents, so the mark comes after leading whitespace.
    """
    made = []
    for message in messages:
        content, mark = message.get("content"), _mark_of(message)
        if isinstance(content, str):
            if _USER in content or _TOOL in content:
                return None
            if mark is not None:
                rest = content.lstrip()
                message = {**message, "content": content[: len(content) - len(rest)] + mark + rest}
        made.append(dict(message))
    return made


def _mark_of(message: Mapping[str, Any]) -> str | None:
    role, content = message.get("role"), message.get("content")
    if role == "user" and isinstance(content, str) and without_marks(content).startswith(RESULT_START):
        return _TOOL
    return {"user": _USER, "tool": _TOOL}.get(str(role))


def without_marks(text: str) -> str:
    return text.replace(_USER, "").replace(_TOOL, "")


def beginnings(messages: Messages, text: str, opens: Openings) -> tuple[list[int], list[int]] | None:
    """Where turns and steps begin in the rendered `text` of `marked` messages, as places in the text without marks.

    None if the text has not one mark for each message, in their order.
    """
    marks = [_mark_of(message) for message in messages]
    wanted = [(mark, i) for i, mark in enumerate(marks) if mark is not None]
    places = [(found.start(), found[0]) for found in re.finditer(f"[{_USER}{_TOOL}]", text)]
    if [mark for mark, _ in wanted] != [letter for _, letter in places]:
        return None
    plain, turns, steps = without_marks(text), list[int](), list[int]()
    at = [place - n for n, (place, _) in enumerate(places)]
    for n, (mark, i) in enumerate(wanted):
        end = at[n + 1] if n + 1 < len(at) else len(plain)
        if mark == _USER and (i == 0 or marks[i - 1] != _USER) and opens.user:
            begins = plain.rfind(opens.user, 0, at[n])
            if begins >= 0 and not plain[begins + len(opens.user) : at[n]].strip():
                turns.append(begins)
        elif mark == _TOOL and opens.answer:
            begins = plain.find(opens.answer, at[n], end)
            if begins >= 0:
                steps.append(begins)
    return turns, steps
