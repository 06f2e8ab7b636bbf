"""/v1/responses over a real socket: the forms of answers, and what is remembered of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from server.errors import ContextLengthExceeded, InvalidRequest, OutOfMemory, UnsupportedField
from server.protocol import (
    DrawnToken,
    Failed,
    Finished,
    PrefillProgress,
    TextDelta,
    TokenLogprob,
    ToolCall,
    Usage,
)
from tests.server.api.responses.test_request import CODEX
from tests.server.conftest import Serve, Served, error_of, events_of
from tests.server.scripted_engine import HELLO, USAGE, ScriptedEngine, Wait

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "default", "input": "hi there"}
THINKING = (
    TextDelta("2+", "reasoning"),
    TextDelta("2", "reasoning"),
    TextDelta("I "),
    TextDelta("count."),
    ToolCall("call_1", "add", '{"a": 2}'),
    ToolCall("call_2", "add", '{"a": 3}'),
    Finished("tool_calls", Usage(12, 8, 9, 2)),
)


def events(server: Served, **fields: Any) -> list[dict[str, Any]]:
    """A stream's events, whose `event:` lines and numbers are right."""
    text = server.http.post(PATH, json={**ASK, "stream": True, **fields}).text
    found = [json.loads(line) for line in events_of(text)]
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def types(found: Sequence[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in found]


def create(server: Served, **fields: Any) -> dict[str, Any]:
    answer = server.http.post(PATH, json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_whole_response_is_one_of_openais(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    raw = server.http.post(PATH, json={**ASK, "metadata": {"a": "b"}, "max_output_tokens": 7, "temperature": 0.5})
    body = raw.json()
    Response.model_validate(body, strict=False)
    assert set(Response.model_fields) - set(body) == {
        "access_programs", "conversation", "image", "input_transformations", "moderation", "prompt",
        "prompt_cache_diagnostics", "prompt_cache_options", "prompt_cache_retention", "tool_usage",
    }  # fmt: skip
    assert body["id"] == raw.headers["x-request-id"] == server.engine.requests[0].request_id
    assert body["id"].startswith("resp_")
    assert (body["status"], body["error"], body["incomplete_details"]) == ("completed", None, None)
    assert (body["metadata"], body["store"], body["completed_at"] >= body["created_at"]) == ({"a": "b"}, True, True)
    [message] = body["output"]
    assert message == {
        "id": message["id"],
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}],
    }
    assert body["usage"] == {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
    }
    [request] = server.engine.requests
    assert (request.max_tokens, request.sampling.temperature, request.logprobs) == (7, 0.5, None)


def test_the_order_of_a_streams_events(serve: Serve) -> None:
    server = serve(ScriptedEngine(THINKING))
    tool = {"type": "function", "name": "add", "parameters": None}
    found = events(server, tools=[tool])
    item, part = ("output_item.added", "content_part.added"), ("content_part.done", "output_item.done")
    call = ("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done")
    assert types(found) == [
        "created", "in_progress",
        *item, "reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done", *part,
        *item, "output_text.delta", "output_text.delta", "output_text.done", *part,
        *call, *call, "completed",
    ]  # fmt: skip
    assert [event["output_index"] for event in found if event["type"] == "response.output_item.added"] == [0, 1, 2, 3]
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    body = found[-1]["response"]
    assert body["output"] == done
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call", "function_call"]
    assert (done[0]["content"], done[0]["summary"]) == ([{"type": "reasoning_text", "text": "2+2"}], [])
    assert done[1]["content"][0]["text"] == "I count."
    assert (done[2]["call_id"], done[2]["name"], done[2]["arguments"]) == ("call_1", "add", '{"a": 2}')
    assert done[2]["id"].startswith("fc_")
    assert body["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}
    assert found[0]["response"]["status"] == found[1]["response"]["status"] == "in_progress"
    whole = create(server, tools=[tool])
    assert [{**item, "id": ""} for item in whole["output"]] == [{**item, "id": ""} for item in done]


def test_text_after_a_call_is_an_item_of_its_own(serve: Serve) -> None:
    script = [TextDelta("a"), ToolCall("c", "add", "{}"), TextDelta("b"), TextDelta(""), Finished("tool_calls", USAGE)]
    server = serve(ScriptedEngine(script))
    tool = {"type": "function", "name": "add", "parameters": None}
    whole, streamed = create(server, tools=[tool]), events(server, tools=[tool])[-1]["response"]
    for body in (whole, streamed):
        assert [item["type"] for item in body["output"]] == ["message", "function_call", "message"]


def test_openais_client_reads_the_stream(serve: Serve) -> None:
    server = serve(ScriptedEngine([PrefillProgress(4, 4), *THINKING[2:4], Finished("stop", USAGE)]))
    with server.openai.responses.stream(model="default", input="hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "I count."


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_incomplete(serve: Serve, stream: bool) -> None:
    server = serve(ScriptedEngine([TextDelta("a"), Finished("length", USAGE)]))
    body = events(server)[-1]["response"] if stream else create(server)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (body["output"][0]["status"], body["completed_at"]) == ("incomplete", None)
    if stream:
        assert types(events(server))[-1] == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_text_is_an_empty_message(serve: Serve, stream: bool) -> None:
    server = serve(ScriptedEngine([TextDelta(""), Finished("stop", USAGE)]))
    body = events(server)[-1]["response"] if stream else create(server)
    [message] = body["output"]
    assert message["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


def test_a_failure_amid_a_stream(serve: Serve) -> None:
    server = serve(ScriptedEngine([TextDelta("a"), Wait(0.05), Failed(OutOfMemory("No room."))]))
    found = events(server)
    body = found[-1]["response"]
    assert (types(found)[-1], body["status"]) == ("failed", "failed")
    assert body["error"] == {"code": "server_error", "message": "No room."}
    assert body["output"][0]["content"][0]["text"] == "a"
    missing = server.http.get(f"{PATH}/{body['id']}")
    assert missing.status_code == 404


def test_a_failure_before_any_text_has_its_status(serve: Serve) -> None:
    server = serve(ScriptedEngine([Failed(OutOfMemory())]))
    for body in (ASK, {**ASK, "stream": True}):
        response = server.http.post(PATH, json=body)
        assert (response.status_code, error_of(response)["code"]) == (503, "out_of_memory")


def test_too_long_an_input(serve: Serve) -> None:
    server = serve(ScriptedEngine(max_tokens=8))
    response = server.http.post(PATH, json=ASK)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
    found = events(server)
    assert types(found) == ["created", "in_progress", "failed"]
    assert found[-1]["response"]["error"]["code"] == "context_length_exceeded"
    assert server.engine.requests == []
    assert server.metric('turbocache_admission_refusals_total{reason="context_length_exceeded"}') == 2
    late = ContextLengthExceeded(limit=1, prompt_tokens=2, max_tokens=None)
    assert types(events(serve(ScriptedEngine(submit_error=late))))[-1] == "failed"


def test_errors_name_this_apis_fields(serve: Serve) -> None:
    refusals = [
        (InvalidRequest("Roles must alternate.", param="messages"), "input", "Roles"),
        (UnsupportedField("'reasoning_effort' is no option.", param="reasoning_effort"), "reasoning.effort", "'reason"),
    ]
    for refusal, param, words in refusals:
        error = error_of(serve(ScriptedEngine(tokenize_error=refusal)).http.post(PATH, json=ASK))
        assert error["param"] == param
        assert error["message"].startswith(words)
        assert "reasoning_effort" not in error["message"]


TOKENS = (DrawnToken(b"F", -0.5, (TokenLogprob(b"G", -1.5),)),)
SHOWN = {"token": "F", "logprob": -0.5, "bytes": [70], "top_logprobs": [{"token": "G", "logprob": -1.5, "bytes": [71]}]}


def test_logprobs_of_the_text_where_they_are_included(serve: Serve) -> None:
    script = [TextDelta("t", "reasoning", tokens=TOKENS), TextDelta("F", tokens=TOKENS), Finished("stop", USAGE)]
    server = serve(ScriptedEngine(script))
    included = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    assert create(server, **included)["output"][1]["content"][0]["logprobs"] == [SHOWN]
    found = events(server, **included)
    for kind in ("response.output_text.delta", "response.output_text.done"):
        assert [event["logprobs"] for event in found if event["type"] == kind] == [[SHOWN]]
    assert create(server)["output"][1]["content"][0]["logprobs"] == []
    assert [request.logprobs for request in server.engine.requests] == [1, 1, None]


# What is remembered.


def test_a_conversation_goes_on_by_the_id_of_its_last_response(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    first = create(server, instructions="Be brief.")
    second = create(server, input="and you?", previous_response_id=first["id"], instructions="Be kind.")
    third = create(server, input=None, previous_response_id=second["id"])
    assert second["previous_response_id"] == first["id"]
    asked, answered = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "Hello!"}
    again = {"role": "user", "content": "and you?"}
    assert server.engine.messages == [
        [{"role": "system", "content": "Be brief."}, asked],
        [{"role": "system", "content": "Be kind."}, asked, answered, again],
        [asked, answered, again, answered],
    ]
    assert third["instructions"] is None
    # One KV session for all of it, which the client hears of.
    assert [request.session for request in server.engine.requests] == [first["id"]] * 3


def test_tools_go_round(serve: Serve) -> None:
    server = serve(ScriptedEngine(THINKING))
    tools = [{"type": "function", "name": "add", "parameters": None}]
    first = create(server, tools=tools)
    server.engine.script = HELLO
    results = [{"type": "function_call_output", "call_id": f"call_{i}", "output": str(i)} for i in (1, 2)]
    create(server, tools=tools, input=results, previous_response_id=first["id"])
    # The same without the server's memory: by references, and by the items themselves.
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    create(server, tools=tools, input=[{"role": "user", "content": "hi there"}, *references, *results])
    create(server, tools=tools, input=[{"role": "user", "content": "hi there"}, *first["output"], *results])
    _, *later = server.engine.messages
    assert later[0] == later[1] == later[2]
    assert [message["role"] for message in later[0]] == ["user", "assistant", "tool", "tool"]
    assert later[0][1]["reasoning_content"] == "2+2"
    assert [call["id"] for call in later[0][1]["tool_calls"]] == ["call_1", "call_2"]
    # Who brings the history along has no session's name.
    assert [request.session for request in server.engine.requests] == [first["id"], first["id"], None, None]


def test_names_of_the_session(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    named = server.http.post(PATH, json={**ASK, "prompt_cache_key": "mine"})
    by_header = server.http.post(PATH, json=ASK, headers={"X-Session-ID": "header"})
    unstored = server.http.post(PATH, json={**ASK, "store": False})
    create(server, previous_response_id=named.json()["id"])
    assert [request.session for request in server.engine.requests] == ["mine", "header", None, "mine"]
    assert (named.headers["x-session-id"], by_header.headers["x-session-id"]) == ("mine", "header")
    assert "x-session-id" not in unstored.headers


def test_codex_is_answered(serve: Serve) -> None:
    server = serve(ScriptedEngine(THINKING[:4] + THINKING[-1:]))
    found = events(server, **CODEX)
    assert types(found)[-1] == "completed"
    thought = found[-1]["response"]["output"][0]
    assert (thought["content"][0]["text"], thought["encrypted_content"]) == ("2+2", None)
    assert server.engine.requests[0].session == "0199-codex"
    assert server.http.get(f"{PATH}/{found[0]['response']['id']}").status_code == 404


def test_retrieve_list_and_delete(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    first = server.openai.responses.create(model="default", input="hi there")
    second = server.openai.responses.create(model="default", input="again", previous_response_id=first.id)
    assert server.http.get(f"{PATH}/{first.id}").json() == json.loads(first.to_json())
    assert server.openai.responses.retrieve(second.id) == second
    items = server.openai.responses.input_items.list(second.id, order="asc")
    assert [item.content[0].text for item in items.data] == ["hi there", "Hello!", "again"]
    assert not items.has_more
    pages = list(server.openai.responses.input_items.list(second.id, limit=1))
    assert [item.content[0].text for item in pages] == ["again", "Hello!", "hi there"]
    deleted = server.http.delete(f"{PATH}/{first.id}")
    assert deleted.json() == {"id": first.id, "object": "response", "deleted": True}
    for path in (f"{PATH}/{first.id}", f"{PATH}/{first.id}/input_items"):
        missing = server.http.get(path)
        assert (missing.status_code, error_of(missing)["message"]) == (
            404,
            f"Response with id '{first.id}' not found.",
        )
    assert server.http.delete(f"{PATH}/{first.id}").status_code == 404
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai.responses.create(model="default", input="more", previous_response_id=second.id)
    assert caught.value.code == "previous_response_not_found"


def test_bad_questions_about_a_response(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    id = create(server)["id"]
    for query, param in (
        ("?stream=true", "stream"),
        ("?include[]=message.output_text.logprobs", "include[]"),
        ("?what=1", "what"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?order=up", "order"),
    ):
        response = server.http.get(f"{PATH}/{id}{query}")
        assert (response.status_code, error_of(response)["param"]) == (400, param)
    missing = server.http.get(f"{PATH}/{id}/input_items?after=msg_none")
    assert (missing.status_code, error_of(missing)["param"]) == (404, "after")


def test_unknown_ids(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    response = server.http.post(PATH, json={**ASK, "previous_response_id": "resp_none"})
    assert (response.status_code, error_of(response)) == (
        400,
        {
            "message": "Previous response with id 'resp_none' not found.",
            "type": "invalid_request_error",
            "param": "previous_response_id",
            "code": "previous_response_not_found",
        },
    )
    response = server.http.post(PATH, json={**ASK, "input": [{"type": "item_reference", "id": "rs_none"}]})
    assert (response.status_code, error_of(response)["param"]) == (404, "input")
    assert server.engine.requests == []


def test_a_response_is_its_keys_alone(serve: Serve) -> None:
    server = serve(ScriptedEngine(), api_keys=("one", "two"))
    mine, other = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    first = server.http.post(PATH, json=ASK, headers=mine).json()
    assert server.http.get(f"{PATH}/{first['id']}", headers=mine).status_code == 200
    assert server.http.get(f"{PATH}/{first['id']}").status_code == 401
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    for answer in (
        server.http.get(f"{PATH}/{first['id']}", headers=other),
        server.http.get(f"{PATH}/{first['id']}/input_items", headers=other),
        server.http.delete(f"{PATH}/{first['id']}", headers=other),
        server.http.post(PATH, json={**ASK, "input": [reference]}, headers=other),
    ):
        assert answer.status_code == 404
    answer = server.http.post(PATH, json={**ASK, "previous_response_id": first["id"]}, headers=other)
    assert error_of(answer)["code"] == "previous_response_not_found"
    assert server.http.post(PATH, json={**ASK, "input": [reference]}, headers=mine).status_code == 200


def test_responses_survive_a_restart_where_sessions_do(serve: Serve, tmp_path: Path) -> None:
    before = serve(ScriptedEngine(), session_dir=tmp_path)
    first = create(before)
    before.stack.close()
    after = serve(ScriptedEngine(), session_dir=tmp_path)
    assert after.http.get(f"{PATH}/{first['id']}").json() == first
    create(after, input="again", previous_response_id=first["id"])
    assert [message["content"] for message in after.engine.messages[0]] == ["hi there", "Hello!", "again"]
    assert after.engine.requests[0].session == first["id"]


def test_how_many_tokens_an_input_has(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    first = create(server)
    assert server.openai.responses.input_tokens.count(model="default", input="hello").input_tokens == 5
    counted = server.openai.responses.input_tokens.count(input="you", previous_response_id=first["id"])
    assert (counted.input_tokens, counted.object) == (len("hi thereHello!you"), "response.input_tokens")
    refused = server.http.post(f"{PATH}/input_tokens", json={"input": "a", "personality": "friendly"})
    assert error_of(refused)["param"] == "personality"
    assert len(server.engine.requests) == 1


def test_functions_that_can_not_be_held_to_by_default_are_not(serve: Serve) -> None:
    """And those that must be are refused."""

    class Picky(ScriptedEngine):
        def constrain(self, rules: Any, prompt: Any) -> None:
            super().constrain(rules, prompt)
            if any(tool.strict for tool in rules.tools):
                raise InvalidRequest("Invalid schema.", param="tools[0].parameters")

    server = serve(Picky())
    tool = {"type": "function", "name": "add", "parameters": {"type": "object"}}
    assert create(server, tools=[tool])["tools"] == [{**tool, "description": None, "strict": False}]
    refused = server.http.post(PATH, json={**ASK, "tools": [{**tool, "strict": True}]})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "tools[0].parameters")
