"""`langchain-openai`: what it makes of messages, tools, chunks and errors. It calls the server through openai's SDK."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.clients.talk import ASKED, CODE, COPY, QUESTION, TOLD
from tests.clients.tools import ASK_WEATHER, PARIS, RESULT, WEATHER
from tests.serving.launch import Server, digits

TALK: list[BaseMessage] = [HumanMessage(TOLD), AIMessage("Got it."), HumanMessage(ASKED)]
WEATHER_ASKED = ASK_WEATHER[0]["content"]
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


@pytest.fixture(scope="module")
def responses(model: Make) -> Make:
    """The same over the responses endpoint."""
    return partial(model, use_responses_api=True)


def test_invoke_answers_with_usage_and_reason(model: Make) -> None:
    answer = model().invoke([SystemMessage("Answer briefly."), *TALK])
    assert isinstance(answer, AIMessage)
    assert digits(answer.text) == CODE
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0


def test_a_stream_adds_up_to_the_answer_and_its_usage(model: Make) -> None:
    chunks = list(model(stream_usage=True).stream(f"Repeat after me: {COPY}"))
    assert len(chunks) > 3
    whole = sum(chunks[1:], start=chunks[0])
    assert whole.text == COPY
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 3
    assert whole.response_metadata["finish_reason"] == "stop"


def test_a_refusal_is_the_sdks_exception(model: Make) -> None:
    # What frameworks catch to shorten the conversation.
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        model(max_tokens=9000).invoke(TALK)
    assert caught.value.code == "context_length_exceeded"


def test_a_bound_tool_is_called_run_and_answered(model: Make) -> None:
    bound = model().bind_tools([get_weather])
    asked = HumanMessage(WEATHER_ASKED)
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
    for chunk in model().bind_tools([get_weather]).stream(WEATHER_ASKED):
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


def test_turns_go_on_from_the_previous_response(responses: Make) -> None:
    talking = responses(use_previous_response_id=True)
    told = talking.invoke(TOLD)
    asked = talking.invoke([HumanMessage(TOLD), told, HumanMessage(ASKED)])
    assert digits(asked.text) == CODE
    assert told.usage_metadata is not None
    assert asked.usage_metadata is not None
    assert asked.usage_metadata["input_token_details"]["cache_read"] == told.usage_metadata["total_tokens"]


def test_a_stream_of_responses_adds_up(responses: Make) -> None:
    whole: AIMessageChunk | None = None
    for chunk in responses().stream(f"Repeat after me: {COPY}"):
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.text == COPY


def test_a_bound_tool_is_called_over_responses(responses: Make) -> None:
    bound = responses().bind_tools([WEATHER])
    asked = HumanMessage(WEATHER_ASKED)
    first = bound.invoke([asked])
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", PARIS)
    second = bound.invoke([asked, first, ToolMessage(RESULT, tool_call_id=call["id"])])
    assert "sunny" in second.text
