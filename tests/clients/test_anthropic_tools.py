"""The `anthropic` package on tool use and structured output."""

from typing import Any, Literal

import anthropic
import pytest
from anthropic.types import Message, ToolUseBlock
from pydantic import BaseModel

from tests.clients.talk import CODE, QUESTION
from tests.clients.tools import ASK_WEATHER, NOTE, PARIS, RESULT, WEATHER
from tests.serving.launch import digits


def as_tool(function: dict[str, Any]) -> dict[str, Any]:
    inner = function["function"]
    return {"name": inner["name"], "description": inner["description"], "input_schema": inner["parameters"]}


ASK: dict[str, Any] = {
    "model": "default",
    "max_tokens": 200,
    "messages": ASK_WEATHER,
    "tools": [as_tool(WEATHER), as_tool(NOTE)],
    "extra_body": {"temperature": 0},
}
GREETING = [{"role": "user", "content": "Hello!"}]


def uses(message: Message) -> list[ToolUseBlock]:
    return [block for block in message.content if block.type == "tool_use"]


def test_a_tool_is_used_and_its_result_answered(claude: anthropic.Anthropic) -> None:
    first = claude.messages.create(**ASK)
    (use,) = uses(first)
    assert first.stop_reason == "tool_use"
    assert (use.name, use.input) == ("get_weather", PARIS)
    assert use.id.startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": RESULT}]}
    talk = [*ASK_WEATHER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(**{**ASK, "messages": talk})
    assert second.stop_reason == "end_turn"
    assert "sunny" in "".join(block.text for block in second.content if block.type == "text")
    assert first.usage.cache_read_input_tokens is not None
    known = first.usage.input_tokens + first.usage.cache_read_input_tokens + first.usage.output_tokens
    # More where another client has held this conversation before.
    assert second.usage.cache_read_input_tokens is not None
    assert second.usage.cache_read_input_tokens >= known


def test_a_streamed_use_comes_as_json_deltas(claude: anthropic.Anthropic) -> None:
    events = list(claude.messages.create(**ASK, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    opening = events[1]
    assert opening.type == "content_block_start"
    assert opening.content_block.type == "tool_use"
    assert (opening.content_block.name, opening.content_block.input) == ("get_weather", {})
    deltas = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert set(deltas) == {"input_json_delta"}
    with claude.messages.stream(**ASK) as stream:
        final = stream.get_final_message()
    assert [use.input for use in uses(final)] == [PARIS]
    assert final.stop_reason == "tool_use"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "delete_note"}])
def test_a_tool_is_used_when_it_must_be(claude: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    message = claude.messages.create(
        **{**ASK, "messages": GREETING, "tool_choice": {**choice, "disable_parallel_tool_use": True}}
    )
    (use,) = uses(message)
    assert use.name == choice.get("name", use.name)
    assert set(use.input) & {"city", "number"}


def test_none_uses_nothing(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**{**ASK, "messages": QUESTION, "tool_choice": {"type": "none"}})
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].type == "text"
    assert digits(message.content[0].text) == CODE


def test_tools_count(claude: anthropic.Anthropic) -> None:
    with_tools = claude.messages.count_tokens(model="default", messages=ASK_WEATHER, tools=ASK["tools"])
    without = claude.messages.count_tokens(model="default", messages=ASK_WEATHER)
    assert with_tools.input_tokens > without.input_tokens + 50
    usage = claude.messages.create(**ASK).usage
    assert with_tools.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


class Locker(BaseModel):
    """Without limits of texts and numbers: the package turns those into descriptions before it sends the schema."""

    size: Literal["small", "large"]
    open: bool
    remark: Literal["none"] | None


def test_structured_output_is_parsed_by_the_sdk(claude: anthropic.Anthropic) -> None:
    asked = {"model": "default", "max_tokens": 200, "messages": QUESTION, "extra_body": {"temperature": 0}}
    parsed = claude.messages.parse(**asked, output_format=Locker)
    assert isinstance(parsed.parsed_output, Locker)
    with claude.messages.stream(**asked, output_format=Locker) as stream:
        assert stream.get_final_message().parsed_output == parsed.parsed_output


@pytest.mark.parametrize(
    "choice", [{"type": "tool", "name": "nowhere"}, {"type": "sometimes"}], ids=["unknown tool", "unknown type"]
)
def test_what_cannot_be_used_is_refused(claude: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    # This API has no field for what is wrong, so the message must name it.
    with pytest.raises(anthropic.BadRequestError, match=r"(?i)tool.choice"):
        claude.messages.create(**ASK, tool_choice=choice)
