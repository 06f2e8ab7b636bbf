"""What schemathesis' cases need before they are sent, and which refusals of valid ones no schema can foretell."""

import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 6
MOST_ANSWERS = 3
ANSWERING = ("/v1/chat/completions", "/v1/completions")
RESPONSES = ("/v1/responses", "/v1/responses/input_tokens")
MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")


def sendable(path: str, body: Any, *, positive: bool, limits: Mapping[str, int]) -> Any:
    """The body as it is sent: no other in what it asks, but with short answers. `limits` are the largest valid
    `max_tokens` and token id.

    Of a valid one also: JSON Schema counts 1.0 among the integers, which no client writes; what JSON Schema can't tie
    together is made to agree, or hardly any case would come past its refusal.
    """
    body = _whole(body) if positive else body
    if path in RESPONSES and isinstance(body, dict):
        return _sendable_response(path, dict(body), positive)
    if path in MESSAGES and isinstance(body, dict):
        return _sendable_message(path, dict(body), positive, limits)
    if path not in ANSWERING or not isinstance(body, dict):
        return body
    body = dict(body)
    for name in ("max_tokens", "max_completion_tokens"):
        _lower(body, name, MOST_TOKENS, limits["max_tokens"])
    if all(body.get(name) is None for name in ("max_tokens", "max_completion_tokens")):
        body["max_tokens"] = MOST_TOKENS
    _lower(body, "n", MOST_ANSWERS, 128)
    return _agreeing(body, limits["token"]) if positive else body


def _sendable_response(path: str, body: dict[str, Any], positive: bool) -> dict[str, Any]:
    if path == RESPONSES[0]:
        _lower(body, "max_output_tokens", MOST_TOKENS, sys.maxsize)
        if body.get("max_output_tokens") is None:
            body["max_output_tokens"] = MOST_TOKENS
    if not positive:
        return body
    # An id that nobody has given is refused; those that a sequence brings from an answer are not.
    if body.get("input") and not str(body.get("previous_response_id")).startswith("resp_"):
        body.pop("previous_response_id", None)
    if (choice := _object(body.get("tool_choice"))) and body.get("tools"):
        named = {"type": "function", "name": body["tools"][0]["name"]}
        body["tool_choice"] = {**choice, "tools": [named]} if "tools" in choice else named
    luckless = _luckless(body, ("reasoning", "text"))
    return {name: value for name, value in body.items() if name not in luckless}


def _sendable_message(path: str, body: dict[str, Any], positive: bool, limits: Mapping[str, int]) -> dict[str, Any]:
    if path == MESSAGES[0]:
        _lower(body, "max_tokens", MOST_TOKENS, limits["max_tokens"])
    if not positive:
        return body
    if "name" in (choice := _object(body.get("tool_choice"))) and body.get("tools"):
        body["tool_choice"] = {**choice, "name": body["tools"][0]["name"]}
    luckless = _luckless(body, ("output_config", "output_format", "messages"))
    if "messages" in luckless:  # an answer as the last one can hardly ever be continued
        body["messages"] = [*body["messages"], {"role": "user", "content": "x"}]
    return {name: value for name, value in body.items() if name == "messages" or name not in luckless}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _luckless(body: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Half of the names, by dice that each body has of its own."""
    dice = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return [name for i, name in enumerate(names) if dice >> i & 1]


def _lower(body: dict[str, Any], name: str, most: int, valid: int) -> None:
    """Only a valid number: one that is to be refused must stay what it is."""
    if type(value := body.get(name)) is int and 1 <= value <= valid:
        body[name] = min(value, most)


def _agreeing(body: dict[str, Any], last_token: int) -> dict[str, Any]:
    if body.get("best_of") is not None:
        body["best_of"] = body.get("n") or 1
    if body.get("logit_bias"):
        body["logit_bias"] = {str(int(token) % (last_token + 1)): bias for token, bias in body["logit_bias"].items()}
    named = [tool["function"]["name"] for tool in body.get("tools") or ()]
    choice = body.get("tool_choice")
    if named and isinstance(choice, dict) and "function" in choice:
        body["tool_choice"] = {**choice, "function": {"name": named[0]}}
    # Most of these are refused, by the template or by the grammar; so half of the cases go without.
    for name in _luckless(body, ("chat_template_kwargs", "reasoning_effort", "response_format")):
        body.pop(name, None)
    return body


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True, slots=True)
class Refusal:
    """A 400 that a valid body may get, by its error's `param`, `code` and `message`, and why no schema can say it."""

    why: str
    applies: Callable[[str, str, str], bool]


def _by_param(pattern: str) -> Callable[[str, str, str], bool]:
    return lambda param, code, message: re.fullmatch(pattern, param, re.DOTALL) is not None


def _by_code(code: str) -> Callable[[str, str, str], bool]:
    return lambda param, found, message: found == code


def _by_message(pattern: str) -> Callable[[str, str, str], bool]:
    return lambda param, code, message: re.match(pattern, message) is not None


UNFORESEEABLE = (
    Refusal("only the tokenizer knows a prompt's length", lambda param, code, _: code == "context_length_exceeded"),
    Refusal(
        "only the template knows which messages it takes",
        lambda param, code, message: (
            param in ("messages", "input") and message.startswith("The model's chat template ")
        ),
    ),
    Refusal("only the template knows its options", _by_param(r"chat_template_kwargs\..*|reasoning[_.]effort")),
    Refusal(
        "whether an answer can be held to a schema is for llguidance to say",
        _by_param(r"response_format|text\.format\.schema|tools\[\d+\]\.(?:function\.)?parameters"),
    ),
    Refusal("no schema compares names in two places", _by_param("tools|tool_choice")),
    Refusal("no schema multiplies", lambda param, code, _: (param, code) == ("n", "integer_above_max_value")),
    Refusal("no schema knows which responses are stored", _by_code("previous_response_not_found")),
    Refusal(
        "which characters can be printed changes with Unicode, and would fill pages",
        lambda param, code, message: message.endswith("a session name must hold printable characters only."),
    ),
)


MESSAGES_UNFORESEEABLE = (
    Refusal("only the tokenizer knows a prompt's length", _by_message("prompt is too long: |input length and ")),
    Refusal("only the template knows which messages it takes", _by_message("messages: The model's chat template ")),
    Refusal(
        "whether an answer can be held to a schema is for llguidance to say",
        _by_message(
            r"Invalid schema for '(?:output_format\.|output_config\.format\.|tools\[\d+\]\.input_)schema'"
            "|tools: The tools and schemas of this request make no grammar"
        ),
    ),
    Refusal(
        "no schema compares names in two places",
        _by_message(
            "Invalid 'tools': two of them are called |tool_choice: Tool choice '.*' not found in 'tools' parameter"
        ),
    ),
    Refusal(
        "no schema looks at the end of a list",
        _by_message(
            "messages: (?:The last message calls tools|An answer can be continued from its text only)"
            "|messages: '[a-z_.]+' can't be combined with the beginning of an answer"
        ),
    ),
    Refusal(
        "whether all texts of a conversation together are empty",
        _by_message("messages: At least one message must have"),
    ),
)
"""Anthropic's errors have no `param` and no `code`: what they name is in the message."""


def unforeseeable(status: int, content: bytes) -> bool:
    """Whether a refusal of a valid body is one of those that no schema can foretell."""
    if status != 400:
        return False
    error = json.loads(content)["error"]
    if "param" not in error:
        return any(one.applies("", "", error["message"]) for one in MESSAGES_UNFORESEEABLE)
    return any(one.applies(error["param"] or "", error["code"] or "", error["message"]) for one in UNFORESEEABLE)
