"""POST /v1/messages on the bundled model, in a real server process."""

import json
from typing import Any

import httpx
import pytest

from tests.processes import patient
from tests.serving.launch import Server, digits, filler

AGENT = "You are an agent. " + filler(30, seed=12)
TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def ask(server: Server, messages: list[dict[str, Any]], session: str | None = None, **options: Any) -> dict[str, Any]:
    """One whole answer."""
    body = {"model": "default", "max_tokens": 40, "temperature": 0, "messages": messages, **options}
    headers = {} if session is None else {"X-Claude-Code-Session-Id": session}
    response = httpx.post(f"{server.url}/v1/messages", json=body, headers=headers, timeout=patient(60))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def seen(answer: dict[str, Any]) -> int:
    """Tokens of the prompt and the answer."""
    usage = answer["usage"]
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(version: str, hash: str) -> list[dict[str, Any]]:
    """As Claude Code sends it."""
    line = f"x-anthropic-billing-header: cc_version={version}; cc_entrypoint=cli; cch={hash};"
    return [{"type": "text", "text": line}, {"type": "text", "text": AGENT, "cache_control": {"type": "ephemeral"}}]


@pytest.mark.parametrize("session", [None, "claude-code"])
def test_the_attribution_line_leaves_the_cached_prefix_whole(server: Server, session: str | None) -> None:
    code = "5917" if session else "5918"
    talk = [user(f"My name is Anna and my locker code is {code}.")]
    first = ask(server, talk, session, system=system(f"2.1.{code}.01c", "36ee5"))
    talk += [{"role": "assistant", "content": first["content"]}, user("What is my locker code?")]
    second = ask(server, talk, session, system=system(f"2.1.{code}.7b4", "0aaa9"))
    assert second["usage"]["cache_read_input_tokens"] == seen(first)
    assert second["usage"]["input_tokens"] < 20
    assert digits(second["content"][0]["text"]) == code


def test_a_stream_tells_what_was_cached_before_its_first_text(server: Server) -> None:
    said = [user("Hello! " + filler(5, seed=3))]
    body = {"model": "default", "max_tokens": 8, "system": AGENT, "messages": said}
    ask(server, said, system=AGENT)
    with httpx.stream(
        "POST", f"{server.url}/v1/messages", json={**body, "stream": True}, timeout=patient(60)
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines]
    started, ended = events[0]["message"]["usage"], events[-2]["usage"]
    assert started["cache_read_input_tokens"] > 300
    assert started == {**ended, "output_tokens": 0}
    counted = {key: body[key] for key in ("model", "system", "messages")}
    count = httpx.post(f"{server.url}/v1/messages/count_tokens", json=counted).json()
    assert count == {"input_tokens": ended["input_tokens"] + ended["cache_read_input_tokens"]}


def test_a_call_and_its_result(server: Server) -> None:
    talk = [user("What is the weather in Oslo?")]
    options: dict[str, Any] = {"tools": [TOOL], "max_tokens": 80}
    answer = ask(server, talk, "weather", **options, tool_choice={"type": "tool", "name": "get_weather"})
    [call] = answer["content"]
    assert (answer["stop_reason"], call["type"], call["name"]) == ("tool_use", "tool_use", "get_weather")
    assert isinstance(call["input"]["city"], str)
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "It rains."}
    talk += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": [result]}]
    after = ask(server, talk, "weather", **options)
    # The call is rendered as the model wrote it.
    assert after["usage"]["cache_read_input_tokens"] == seen(answer)


def test_an_answer_that_was_begun_is_continued(server: Server) -> None:
    talk = [user("My name is Anna and my locker code is 5917."), {"role": "assistant", "content": "Okay, I will"}]
    assert ask(server, talk)["content"] == [{"type": "text", "text": " remember that."}]


def test_structured_output(server: Server) -> None:
    schema = {"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}
    said = [user("My name is Anna and my locker code is 5917.")]
    answer = ask(server, said, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert isinstance(json.loads(answer["content"][0]["text"])["code"], int)


def test_the_stop_sequence_that_ended_an_answer_is_told(server: Server) -> None:
    [whole] = ask(server, [user("Hello!")])["content"]
    before, stop = whole["text"].split()[:2]
    stopped = ask(server, [user("Hello!")], stop_sequences=["zebra", stop])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", stop)
    assert stopped["content"] == [{"type": "text", "text": f"{before} "}]


def test_a_model_that_can_not_think_may(server: Server) -> None:
    thinking = [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}, {"type": "disabled"}]
    answers = [ask(server, [user("Hello!")], thinking=one, output_config={"effort": "high"}) for one in thinking]
    assert answers[0]["content"] == answers[1]["content"] == answers[2]["content"]
