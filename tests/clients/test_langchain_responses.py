"""`langchain-openai` over the responses endpoint, which it can use instead of chat completions."""

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from tests.clients.talk import ASKED, CODE, COPY, TOLD
from tests.clients.tools import ASK_WEATHER, PARIS, RESULT, WEATHER
from tests.serving.launch import Server, digits

Make = Callable[..., ChatOpenAI]


@pytest.fixture(scope="module")
def model(server: Server) -> Make:
    def make(**options: Any) -> ChatOpenAI:
        chosen = {"temperature": 0, "max_tokens": 60, "max_retries": 0, "timeout": 60, **options}
        return ChatOpenAI(
            model="default", base_url=f"{server.url}/v1", api_key="none", use_responses_api=True, **chosen
        )

    return make


def test_turns_go_on_from_the_previous_response(model: Make) -> None:
    talking = model(use_previous_response_id=True)
    told = talking.invoke(TOLD)
    asked = talking.invoke([HumanMessage(TOLD), told, HumanMessage(ASKED)])
    assert digits(asked.text) == CODE
    assert told.usage_metadata is not None
    assert asked.usage_metadata is not None
    assert asked.usage_metadata["input_token_details"]["cache_read"] == told.usage_metadata["total_tokens"]


def test_a_stream_adds_up(model: Make) -> None:
    whole: AIMessageChunk | None = None
    for chunk in model().stream(f"Repeat after me: {COPY}"):
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.text == COPY


def test_a_bound_tool_is_called_and_answered(model: Make) -> None:
    bound = model().bind_tools([WEATHER])
    asked = HumanMessage(ASK_WEATHER[0]["content"])
    first = bound.invoke([asked])
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", PARIS)
    second = bound.invoke([asked, first, ToolMessage(RESULT, tool_call_id=call["id"])])
    assert "sunny" in second.text
