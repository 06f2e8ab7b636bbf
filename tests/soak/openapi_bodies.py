"""What schemathesis' cases need before they are sent, and which refusals of valid ones no schema can foretell."""

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 6
MOST_ANSWERS = 3
ANSWERING = ("/v1/chat/completions", "/v1/completions")


def sendable(path: str, body: Any, *, positive: bool, limits: Mapping[str, int]) -> Any:
    """The body as it is sent: no other in what it asks, but with short answers. `limits` are the largest valid
    `max_tokens` and token id.

    Of a valid one also: JSON Schema counts 1.0 among the integers, which no client writes; what JSON Schema can't tie
    together is made to agree, or hardly any case would come past its refusal.
    """
    body = _whole(body) if positive else body
    if path not in ANSWERING or not isinstance(body, dict):
        return body
    body = dict(body)
    for name in ("max_tokens", "max_completion_tokens"):
        _lower(body, name, MOST_TOKENS, limits["max_tokens"])
    if all(body.get(name) is None for name in ("max_tokens", "max_completion_tokens")):
        body["max_tokens"] = MOST_TOKENS
    _lower(body, "n", MOST_ANSWERS, 128)
    return _agreeing(body, limits["token"]) if positive else body


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
    dice = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    for i, name in enumerate(("chat_template_kwargs", "reasoning_effort", "response_format")):
        if dice >> i & 1:
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


UNFORESEEABLE = (
    Refusal("only the tokenizer knows a prompt's length", lambda param, code, _: code == "context_length_exceeded"),
    Refusal(
        "only the template knows which messages it takes",
        lambda param, code, message: param == "messages" and message.startswith("The model's chat template "),
    ),
    Refusal("only the template knows its options", _by_param(r"chat_template_kwargs\..*|reasoning_effort")),
    Refusal(
        "whether an answer can be held to a schema is for llguidance to say",
        _by_param(r"response_format|tools\[\d+\]\.function\.parameters"),
    ),
    Refusal("no schema compares names in two places", _by_param("tools|tool_choice")),
    Refusal("no schema multiplies", lambda param, code, _: (param, code) == ("n", "integer_above_max_value")),
    Refusal(
        "which characters can be printed changes with Unicode, and would fill pages",
        lambda param, code, message: message.endswith("a session name must hold printable characters only."),
    ),
)


def unforeseeable(status: int, content: bytes) -> bool:
    """Whether a refusal of a valid body is one of `UNFORESEEABLE`."""
    if status != 400:
        return False
    error = json.loads(content)["error"]
    return any(one.applies(error["param"] or "", error["code"] or "", error["message"]) for one in UNFORESEEABLE)
