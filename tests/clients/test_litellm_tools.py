"""`litellm`: tools, structured output, and what it sends to other endpoints for its own calls."""

import json
from typing import Annotated, Any, Literal

import litellm
import pytest
from pydantic import BaseModel, Field

from tests.clients.talk import QUESTION
from tests.clients.tools import ASK_WEATHER, NOTE, PARIS, RESULT, WEATHER, check_arguments
from tests.serving.launch import Server

# litellm's own quarrels with pydantic.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_.*' attribute on the instance:DeprecationWarning"),
]


class Locker(BaseModel):
    owner: Annotated[str, Field(max_length=12)]
    code: Annotated[str, Field(pattern=r"^[0-9]{4}$")]
    size: Literal["small", "large"]


@pytest.fixture(scope="module")
def call(server: Server) -> dict[str, Any]:
    return {
        "model": "openai/default", "api_base": f"{server.url}/v1", "api_key": "none",
        "temperature": 0, "max_tokens": 120, "num_retries": 0,
    }  # fmt: skip


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


def test_required_calls_something(call: dict[str, Any]) -> None:
    answer = litellm.completion(
        **call, messages=[{"role": "user", "content": "Hello!"}], tools=[WEATHER], tool_choice="required"
    )
    check_arguments(WEATHER, answer.choices[0].message.tool_calls[0].function.arguments)


@pytest.mark.parametrize("stream", [False, True])
def test_a_pydantic_model_as_response_format(call: dict[str, Any], stream: bool) -> None:
    answer = litellm.completion(**call, messages=QUESTION, response_format=Locker, stream=stream)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer), messages=QUESTION)
    Locker.model_validate_json(answer.choices[0].message.content)
