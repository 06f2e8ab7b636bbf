"""`litellm` on the other endpoints: completions, responses and Anthropic's messages."""

import json
from typing import Any

import litellm
import pytest

from tests.clients.talk import CODE, COPY, QUESTION
from tests.clients.tools import ASK_WEATHER, PARIS, WEATHER
from tests.serving.launch import Server, digits

# litellm's own quarrels with pydantic.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_.*' attribute on the instance:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
]
REPEAT = f"Repeat after me: {COPY}"


@pytest.fixture(scope="module")
def openai_route(server: Server) -> dict[str, Any]:
    return {"model": "openai/default", "api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0}


@pytest.fixture(scope="module")
def anthropic_route(server: Server) -> dict[str, Any]:
    shared = {"api_base": server.url, "api_key": "none", "temperature": 0, "max_tokens": 60}
    return {"model": "anthropic/default", **shared}


def test_a_text_completion(server: Server) -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/default", api_base=f"{server.url}/v1", api_key="none",
        prompt="The miller walked to the river. The miller walked to the", max_tokens=8, temperature=0,
    )  # fmt: skip
    assert answer.choices[0].text.startswith(" river")


def test_responses_whole_and_streamed(openai_route: dict[str, Any]) -> None:
    whole = litellm.responses(**openai_route, input=REPEAT, max_output_tokens=60)
    assert whole.output[0].content[0].text == COPY
    kinds = [event.type for event in litellm.responses(**openai_route, input=REPEAT, stream=True)]
    assert kinds[-1] == "response.completed"


def test_messages_by_the_anthropic_route(anthropic_route: dict[str, Any]) -> None:
    answer = litellm.completion(**anthropic_route, messages=QUESTION)
    assert digits(answer.choices[0].message.content) == CODE
    chunks = list(litellm.completion(**anthropic_route, messages=[{"role": "user", "content": REPEAT}], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == COPY


def test_tools_by_the_anthropic_route(anthropic_route: dict[str, Any]) -> None:
    answer = litellm.completion(**anthropic_route, messages=ASK_WEATHER, tools=[WEATHER])
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", PARIS)
    assert answer.choices[0].finish_reason == "tool_calls"
