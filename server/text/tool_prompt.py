"""Tools for models whose chat template knows none: described in the system message, calls and results as plain text."""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mlx_lm.tool_parsers import json_tools

from server.protocol import Conversation

_START, _END = json_tools.tool_call_start, json_tools.tool_call_end

_HEAD = "You can call these functions:\n"
_FOOT = (
    f'\nTo call one, write {_START}{{"name": NAME, "arguments": {{...}}}}{_END}. '
    "Call one only if the user needs it. Otherwise answer in words."
)


RESULT_START = "<tool_response>"
"""Messages of the user that begin so are results of tools, here and in templates that write results so."""


def tools_as_text(conversation: Conversation) -> Conversation:
    """The same conversation for a template that shows neither tools nor calls nor results.

    Tools go to the end of the system message, which is made if there is none. A call becomes text of its message, in
    the format of mlx-lm's `json_tools`. Results that follow each other become one message of the user.
    """
    messages = [_with_calls(message) for message in _results_as_users(conversation.messages)]
    if conversation.tools:
        described = "".join((_HEAD, *(f"{_json(tool)}\n" for tool in conversation.tools), _FOOT.lstrip("\n")))
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        messages.insert(0, {"role": "system", "content": f"{system}\n\n{described}".lstrip("\n")})
    return replace(conversation, messages=messages, tools=[])


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    if not (calls := message.get("tool_calls")):
        return message
    written = [
        f'{_START}{{"name": {_json(call["function"]["name"])}, "arguments": {_arguments(call)}}}{_END}'
        for call in calls
    ]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, [message.get("content"), *written]))}


def _results_as_users(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    follows = False
    for message in messages:
        if is_result := message["role"] == "tool":
            text = f"{RESULT_START}\n{message['content']}\n</tool_response>"
            if follows:
                found[-1]["content"] += f"\n{text}"
            else:
                found.append({"role": "user", "content": text})
        else:
            found.append(message)
        follows = is_result
    return found


def _arguments(call: dict[str, Any]) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else _json(arguments)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
