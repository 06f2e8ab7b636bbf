"""The `openai` package on responses: shapes, the order of events, state from one response to the next, tools."""

import json
from typing import Annotated, Any

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel, Field

from tests.clients.talk import ASKED, CODE, COPY, LONG, QUESTION, TOLD, wait_until_idle
from tests.clients.tools import ASK_WEATHER, PARIS, RESULT, WEATHER
from tests.serving.launch import Server, digits

ASK: dict[str, Any] = {"model": "default", "temperature": 0, "max_output_tokens": 60}
REPEAT: dict[str, Any] = {**ASK, "input": f"Repeat after me: {COPY}"}
TOOL: dict[str, Any] = {"type": "function", "strict": False, **WEATHER["function"]}
CALL: dict[str, Any] = {**ASK, "input": ASK_WEATHER, "tools": [TOOL]}


def only_call(response: Response) -> ResponseFunctionToolCall:
    (call,) = (item for item in response.output if item.type == "function_call")
    return call


def test_a_conversation_is_answered(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASK, input=QUESTION, instructions="Answer briefly.", metadata={"a": "b"})
    assert (response.object, response.status) == ("response", "completed")
    assert response.id.startswith("resp_")
    assert digits(response.output_text) == CODE
    (message,) = response.output
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "completed")
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    # What was asked comes back.
    assert (response.instructions, response.metadata, response.temperature) == ("Answer briefly.", {"a": "b"}, 0)
    assert response.max_output_tokens == 60
    assert response.error is None


def test_a_stream_has_the_documented_order_and_counts_its_events(client: openai.OpenAI) -> None:
    events = list(client.responses.create(**REPEAT, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == COPY
    (done,) = (event for event in events if event.type == "response.output_text.done")
    assert done.text == COPY
    first, last = events[0], events[-1]
    assert first.type == "response.created"
    assert last.type == "response.completed"
    assert (first.response.status, first.response.output) == ("in_progress", [])
    assert (last.response.id, last.response.output_text) == (first.response.id, COPY)
    assert last.response.usage is not None


def test_the_stream_helper_accumulates_the_response(client: openai.OpenAI) -> None:
    with client.responses.stream(**REPEAT) as stream:
        heard = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert heard == final.output_text == COPY


def test_the_next_response_goes_on_from_the_previous_one_and_its_cache(client: openai.OpenAI) -> None:
    told = client.responses.create(**ASK, input=TOLD)
    asked = client.responses.create(**ASK, input=ASKED, previous_response_id=told.id)
    assert asked.previous_response_id == told.id
    assert digits(asked.output_text) == CODE
    assert told.usage is not None
    assert asked.usage is not None
    assert asked.usage.input_tokens_details.cached_tokens >= told.usage.total_tokens
    # Another question to the same response knows nothing of the first one.
    other = client.responses.create(**ASK, input="What is my name?", previous_response_id=told.id)
    assert "Anna" in other.output_text
    assert other.usage is not None
    assert other.usage.input_tokens < asked.usage.input_tokens + asked.usage.output_tokens
    # And a third turn has both before it.
    third = client.responses.create(**ASK, input="What is my name?", previous_response_id=asked.id)
    assert "Anna" in third.output_text


def test_instructions_are_not_inherited(client: openai.OpenAI) -> None:
    told = client.responses.create(**ASK, input=TOLD, instructions="Answer briefly.")
    asked = client.responses.create(**ASK, input=ASKED, previous_response_id=told.id)
    assert asked.instructions is None
    assert digits(asked.output_text) == CODE


def test_a_response_can_be_looked_at_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(**ASK, input=QUESTION)
    found = client.responses.retrieve(made.id)
    assert found.to_dict() == made.to_dict()
    items = client.responses.input_items.list(made.id, order="asc")
    assert [getattr(item, "role", None) for item in items] == ["user", "assistant", "user"]
    newest = client.responses.input_items.list(made.id, limit=1)
    assert newest.data[0].id == items.data[-1].id
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)


def test_what_is_not_stored_cannot_be_continued(client: openai.OpenAI) -> None:
    made = client.responses.create(**ASK, input=TOLD, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(**ASK, input=ASKED, previous_response_id=made.id)
    assert caught.value.status_code in (400, 404)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_a_limit_of_tokens_leaves_it_incomplete(client: openai.OpenAI) -> None:
    cut = {**REPEAT, "max_output_tokens": 16, "input": "Repeat after me: " + "one two three four five " * 5}
    whole = client.responses.create(**cut)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    *_, last = client.responses.create(**cut, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text


@pytest.mark.parametrize("state", ["stored", "sent"])
def test_a_function_is_called_and_its_result_answered(client: openai.OpenAI, state: str) -> None:
    first = client.responses.create(**CALL)
    call = only_call(first)
    assert (call.name, json.loads(call.arguments)) == ("get_weather", PARIS)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    if state == "stored":
        second = client.responses.create(**{**CALL, "input": [result]}, previous_response_id=first.id)
    else:
        # As programs without state do it: the SDK's own items go back.
        second = client.responses.create(**{**CALL, "input": [*ASK_WEATHER, *first.output, result]}, store=False)
    assert "sunny" in second.output_text
    assert first.usage is not None
    assert second.usage is not None
    # More where another client has held this conversation before.
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens


def test_a_streamed_call_has_its_own_events(client: openai.OpenAI) -> None:
    events = list(client.responses.create(**CALL, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(pieces)) == PARIS
    with client.responses.stream(**CALL) as stream:
        assert json.loads(only_call(stream.get_final_response()).arguments) == PARIS


def test_a_function_is_called_when_it_must_be(client: openai.OpenAI) -> None:
    greeting = {**CALL, "input": "Hello!", "max_output_tokens": 200}
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        assert "city" in json.loads(only_call(client.responses.create(**greeting, tool_choice=choice)).arguments)
    none = client.responses.create(**greeting, tool_choice="none")
    assert [item.type for item in none.output] == ["message"]


class Locker(BaseModel):
    owner: Annotated[str, Field(max_length=12)]
    code: Annotated[str, Field(pattern=r"^[0-9]{4}$")]


def test_structured_text_is_parsed_by_the_sdk(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(**ASK, input=QUESTION, text_format=Locker)
    assert isinstance(parsed.output_parsed, Locker)
    with client.responses.stream(**ASK, input=QUESTION, text_format=Locker) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def test_a_stream_that_is_left_ends_the_work(client: openai.OpenAI, server: Server) -> None:
    stream = client.responses.create(model="default", input=LONG, temperature=0, stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    stream.close()
    wait_until_idle(server)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"input": []}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"extra_body": {"colour": "green"}}, "colour"),
        ({"background": True}, "background"),
    ],
)
def test_what_cannot_be_is_refused(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{**REPEAT, **changes})
    assert caught.value.param == param
