"""`langchain-openai`: bound tools, structured output by each of its methods."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.clients.talk import QUESTION
from tests.clients.tools import ASK_WEATHER, PARIS, RESULT
from tests.serving.launch import Server

ASKED = ASK_WEATHER[0]["content"]
Make = Callable[..., ChatOpenAI]


@tool
def get_weather(city: str) -> str:
    """Get the weather for the user"""
    return f"The weather in {city} is sunny."


class Locker(BaseModel):
    """A locker."""

    owner: Annotated[str, Field(max_length=12)]
    code: Annotated[str, Field(pattern=r"^[0-9]{4}$")]
    size: Literal["small", "large"]


@pytest.fixture(scope="module")
def model(server: Server) -> Make:
    def make(**options: Any) -> ChatOpenAI:
        chosen = {"temperature": 0, "max_tokens": 120, "max_retries": 0, "timeout": 60, **options}
        return ChatOpenAI(model="default", base_url=f"{server.url}/v1", api_key="none", **chosen)

    return make


def test_a_bound_tool_is_called_run_and_answered(model: Make) -> None:
    bound = model().bind_tools([get_weather])
    asked = HumanMessage(ASKED)
    first = bound.invoke([asked])
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", PARIS)
    assert first.invalid_tool_calls == []
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert result.content == RESULT
    second = bound.invoke([asked, first, result])
    assert "sunny" in second.text
    assert second.tool_calls == []
    assert second.usage_metadata is not None
    assert first.usage_metadata is not None
    # More where another client has held this conversation before.
    assert second.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["total_tokens"]


def test_streamed_chunks_add_up_to_the_call(model: Make) -> None:
    whole: AIMessageChunk | None = None
    for chunk in model().bind_tools([get_weather]).stream(ASKED):
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("get_weather", PARIS)]


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_tool_is_called_when_it_must_be(model: Make, choice: str) -> None:
    bound = model().bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False, strict=True)
    (call,) = bound.invoke("Hello!").tool_calls
    assert set(call["args"]) == {"city"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_instance(model: Make, method: Literal["json_schema", "function_calling"]) -> None:
    structured = model().with_structured_output(Locker, method=method)
    assert isinstance(structured.invoke(QUESTION), Locker)


def test_structured_output_as_plain_json(model: Make) -> None:
    found = model().with_structured_output(None, method="json_mode").invoke('Repeat after me: {"code": "5917"}')
    assert isinstance(found, dict)
