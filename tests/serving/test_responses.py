"""The Responses API with the bundled model: real uvicorn, real openai client."""

import json
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
from openai.types.responses import Response

from tests.serving.launch import Server, digits, filler, running

READ = "Please read this text: " + filler(12, seed=3)


def respond(server: Server, input: Any, **options: Any) -> Response:
    fields: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": 40, **options}
    response: Response = server.client().responses.create(input=input, **fields)
    assert response.status == "completed"
    return response


def cached(response: Response) -> int:
    assert response.usage is not None
    return response.usage.input_tokens_details.cached_tokens


def total(response: Response) -> int:
    assert response.usage is not None
    return response.usage.total_tokens


@pytest.mark.parametrize(("key", "code"), [(None, "5917"), ("my-key", "3086")])
def test_a_later_turn_prefills_only_what_is_new(server: Server, key: str | None, code: str) -> None:
    options = {} if key is None else {"prompt_cache_key": key}
    first = respond(server, f"My name is Anna and my locker code is {code}. {READ}", **options)
    second = respond(server, "What is my locker code?", previous_response_id=first.id, **options)
    third = respond(server, "What is my name?", previous_response_id=second.id, **options)
    assert (cached(first) < 64, cached(second), cached(third)) == (True, total(first), total(second))
    assert digits(second.output_text) == code
    assert "Anna" in third.output_text
    assert (key or first.id) in server.sessions()


def test_two_continuations_of_one_response(server: Server) -> None:
    first = respond(server, f"My name is Boris and my locker code is 4402. {READ}")
    code = respond(server, "What is my locker code?", previous_response_id=first.id)
    name = respond(server, "What is my name?", previous_response_id=first.id)
    assert min(cached(code), cached(name)) >= total(first)
    assert (digits(code.output_text), "Boris" in name.output_text) == ("4402", True)
    # And the first of them goes on where it was.
    again = respond(server, "And what is my name?", previous_response_id=code.id)
    assert cached(again) >= total(code)
    assert "Boris" in again.output_text


def test_a_stream_has_the_same_end_as_a_whole_answer(server: Server) -> None:
    ask: dict[str, Any] = {
        "model": "default",
        "input": "My locker code is 7305. What is my locker code?",
        "temperature": 0,
    }
    with server.client().responses.stream(**ask, max_output_tokens=20) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        streamed = stream.get_final_response()
    whole = respond(server, ask["input"])
    assert text == streamed.output_text == whole.output_text
    assert server.client().responses.retrieve(streamed.id).output_text == text


@pytest.mark.slow
def test_a_conversation_and_its_cache_survive_a_restart(tmp_path: Path) -> None:
    where = {"SESSION_DIR": str(tmp_path / "sessions")}
    with running(tmp_path, **where) as server:
        first = respond(server, f"My name is Carla and my locker code is 6128. {READ}")
        second = respond(server, "Thank you.", previous_response_id=first.id)
    with running(tmp_path, **where) as server:
        third = respond(server, "What is my locker code?", previous_response_id=second.id)
        assert server.metric("restores_total") == 1
    assert cached(third) == total(second)
    assert digits(third.output_text) == "6128"


class Locker(pydantic.BaseModel):
    """Nothing in it can go on for ever."""

    owner: Literal["Dora", "Emil"]
    size: Literal["small", "large"]
    locked: bool


def test_structured_output_is_parsed_by_the_client(server: Server) -> None:
    parsed = server.client().responses.parse(
        model="default",
        input="My name is Dora and my locker code is 9156. Describe my locker.",
        text_format=Locker,
        temperature=0,
        max_output_tokens=60,
    )
    assert isinstance(parsed.output_parsed, Locker)


TOOL: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_tools_go_round_and_their_prefix_is_cached(server: Server) -> None:
    first = respond(server, "What is the weather in Paris?", tools=[TOOL], tool_choice="required")
    [call] = first.output
    assert call.type == "function_call"
    assert list(json.loads(call.arguments)) == ["city"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees and sunny"}
    second = respond(server, [result], tools=[TOOL], previous_response_id=first.id)
    assert cached(second) == total(first)
    assert "18" in second.output_text
