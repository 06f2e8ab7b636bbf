"""`litellm`: what it makes of messages, tools, chunks and errors, and the routes that it speaks without an SDK."""

import asyncio
import json
from typing import Annotated, Any, Literal

import litellm
import pytest
from pydantic import BaseModel, Field

from tests.clients.talk import CODE, COPY, QUESTION
from tests.clients.tools import ASK_WEATHER, NOTE, PARIS, RESULT, WEATHER
from tests.serving.launch import Server, digits

REPEAT = [{"role": "user", "content": f"Repeat after me: {COPY}"}]

# Warnings of litellm about its own pydantic models.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_.*' attribute on the instance:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
]


class Locker(BaseModel):
    owner: Annotated[str, Field(max_length=12)]
    code: Annotated[str, Field(pattern=r"^[0-9]{4}$")]
    size: Literal["small", "large"]


@pytest.fixture(scope="module", autouse=True)
def no_default_loop() -> None:
    """litellm makes the default event loop where there may be one, and never closes it."""
    asyncio.set_event_loop(None)


@pytest.fixture(scope="module")
def call(server: Server) -> dict[str, Any]:
    return {
        "model": "openai/default", "api_base": f"{server.url}/v1", "api_key": "none",
        "temperature": 0, "max_tokens": 120, "num_retries": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def openai_route(server: Server) -> dict[str, Any]:
    return {"model": "openai/default", "api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0}


@pytest.fixture(scope="module")
def anthropic_route(server: Server) -> dict[str, Any]:
    shared = {"api_base": server.url, "api_key": "none", "temperature": 0, "max_tokens": 60}
    return {"model": "anthropic/default", **shared}


def test_a_stream_and_what_litellm_builds_of_its_chunks(call: dict[str, Any]) -> None:
    chunks = list(litellm.completion(**call, messages=REPEAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == COPY
    built = litellm.stream_chunk_builder(chunks, messages=REPEAT)
    assert built.choices[0].message.content == COPY
    assert built.choices[0].finish_reason == "stop"
    assert built.usage.completion_tokens > 3


def test_refusals_are_litellms_exceptions(call: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**{**call, "temperature": 3}, messages=QUESTION)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**call, "model": "openai/another"}, messages=QUESTION)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**call, "max_tokens": 9000}, messages=QUESTION)


def test_a_function_is_called_and_its_result_answered(call: dict[str, Any]) -> None:
    first = litellm.completion(**call, messages=ASK_WEATHER, tools=[WEATHER, NOTE])
    message = first.choices[0].message
    (made,) = message.tool_calls
    assert first.choices[0].finish_reason == "tool_calls"
    assert (made.function.name, json.loads(made.function.arguments)) == ("get_weather", PARIS)
    talk = [*ASK_WEATHER, message, {"role": "tool", "tool_call_id": made.id, "content": RESULT}]
    second = litellm.completion(**call, messages=talk, tools=[WEATHER, NOTE])
    assert "sunny" in second.choices[0].message.content
    # More where another client has held this conversation before.
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens


def test_chunks_are_built_into_the_call(call: dict[str, Any]) -> None:
    chunks = list(litellm.completion(**call, messages=ASK_WEATHER, tools=[WEATHER], stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=ASK_WEATHER)
    (made,) = built.choices[0].message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("get_weather", PARIS)
    assert built.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_pydantic_model_as_response_format(call: dict[str, Any], stream: bool) -> None:
    answer = litellm.completion(**call, messages=QUESTION, response_format=Locker, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=QUESTION)
    Locker.model_validate_json(answer.choices[0].message.content)


def test_responses_whole_and_streamed(openai_route: dict[str, Any]) -> None:
    whole = litellm.responses(**openai_route, input=REPEAT[0]["content"], max_output_tokens=60)
    assert whole.output[0].content[0].text == COPY
    kinds = [event.type for event in litellm.responses(**openai_route, input=REPEAT[0]["content"], stream=True)]
    assert kinds[-1] == "response.completed"


def test_messages_by_the_anthropic_route(anthropic_route: dict[str, Any]) -> None:
    answer = litellm.completion(**anthropic_route, messages=QUESTION)
    assert digits(answer.choices[0].message.content) == CODE
    chunks = list(litellm.completion(**anthropic_route, messages=REPEAT, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == COPY


def test_tools_by_the_anthropic_route(anthropic_route: dict[str, Any]) -> None:
    answer = litellm.completion(**anthropic_route, messages=ASK_WEATHER, tools=[WEATHER])
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", PARIS)
    assert answer.choices[0].finish_reason == "tool_calls"
