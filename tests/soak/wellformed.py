"""What an answer must look like, whatever was asked. All of these raise AssertionError or ValueError."""

import json
from typing import Any

from server.api.openai.chat_answer import ChatCompletion, ChatCompletionChunk, UsageBody

_STATES = {"resident", "spilled", "running"}
_COUNTS = ("tokens_seen", "tokens_held", "checkpoints", "turns")
_ENDS = {"stop", "length"}


def error_code(body: bytes) -> str | None:
    """The code of OpenAI's error envelope, which is all that the body holds."""
    error = json.loads(body)
    assert set(error) == {"error"}, error
    assert set(error["error"]) == {"message", "type", "param", "code"}, error
    assert error["error"]["message"], error
    code: str | None = error["error"]["code"]
    return code


def check_whole(body: bytes, limit: int | None) -> str:
    """An answer in one piece, of at most `limit` tokens; returns its text."""
    answer = ChatCompletion.model_validate_json(body, strict=True)
    (choice,) = answer.choices
    assert choice.finish_reason in _ENDS, choice
    _check_usage(answer.usage, limit)
    assert choice.message.content is not None
    return choice.message.content


def check_stream(lines: list[str], limit: int | None) -> str:
    """The data of a stream that was read to its end; returns its text."""
    assert lines[-1] == "[DONE]", lines[-1]
    chunks = [ChatCompletionChunk.model_validate_json(line, strict=True) for line in lines[:-1]]
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert not last.choices, last
    assert last.usage is not None
    _check_usage(last.usage, limit)
    ends = [choice.finish_reason for chunk in parts for choice in chunk.choices]
    assert ends[-1] in _ENDS, ends
    assert not any(ends[:-1]), ends
    assert parts[0].choices[0].delta.role == "assistant", parts[0]
    return "".join(choice.delta.content or "" for chunk in parts for choice in chunk.choices)


def check_row(row: dict[str, Any]) -> None:
    """One session as the server shows it."""
    assert isinstance(row["id"], str), row
    assert row["id"], row
    assert row["state"] in _STATES, row
    assert all(type(row[count]) is int and row[count] >= 0 for count in _COUNTS), row
    assert row["tokens_held"] <= row["tokens_seen"], row
    assert row["name"] is None or isinstance(row["name"], str), row


def _check_usage(usage: UsageBody, limit: int | None) -> None:
    cached = usage.prompt_tokens_details.cached_tokens
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens, usage
    assert 0 <= cached < usage.prompt_tokens, usage
    assert usage.completion_tokens > 0, usage
    assert limit is None or usage.completion_tokens <= limit, usage
