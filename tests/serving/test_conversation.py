"""The main job, end to end: real uvicorn, real openai client, the bundled model."""

import threading
from typing import Any

import httpx
import pytest

from tests.serving.launch import Server, digits, filler

NAMES = ("Anna", "Boris", "Carla", "Dora", "Emil", "Frank", "Greta", "Henry")


def ask(server: Server, messages: list[dict[str, str]], stream: bool, **options: Any) -> tuple[str, Any]:
    """The answer's text and its usage."""
    request: dict[str, Any] = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 40, **options}
    completions = server.client().chat.completions
    if not stream:
        answer = completions.create(**request)
        return answer.choices[0].message.content or "", answer.usage
    text, usage = "", None
    for chunk in completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text, usage


def hold_conversation(server: Server, name: str, code: str, stream: bool) -> list[Any]:
    """Tell a fact, read long filler, ask for the fact. Returns the three turns' usages."""
    messages = [{"role": "user", "content": f"My name is {name} and my locker code is {code}."}]
    usages = []
    for following in ("Please read this text: " + filler(70, seed=int(code)), "What is my locker code?", None):
        text, usage = ask(server, messages, stream, extra_body={"prompt_cache_key": f"talk-{name}-{stream}"})
        usages.append(usage)
        messages.append({"role": "assistant", "content": text})
        if following:
            messages.append({"role": "user", "content": following})
    assert digits(messages[-1]["content"]) == code
    return usages


@pytest.mark.parametrize("stream", [False, True])
def test_a_fact_survives_long_filler_and_later_turns_prefill_only_what_is_new(server: Server, stream: bool) -> None:
    prefilled = server.metric("prompt_tokens_total", source="prefilled")
    first, second, third = hold_conversation(server, "Anna", "5926" if stream else "5917", stream)
    assert first.prompt_tokens_details.cached_tokens == 0
    # What the session holds after a turn is the prompt and the answer, so the next prompt repeats all of it.
    assert second.prompt_tokens_details.cached_tokens == first.prompt_tokens + first.completion_tokens
    assert third.prompt_tokens_details.cached_tokens == second.prompt_tokens + second.completion_tokens
    assert second.prompt_tokens > 700
    told = sum(u.prompt_tokens - u.prompt_tokens_details.cached_tokens for u in (first, second, third))
    assert server.metric("prompt_tokens_total", source="prefilled") - prefilled == told


@pytest.mark.slow
def test_eight_sessions_at_once_each_keep_their_own_fact(server: Server) -> None:
    usages: dict[str, list[Any]] = {}
    errors: list[BaseException] = []

    def talk(name: str, code: str) -> None:
        try:
            usages[name] = hold_conversation(server, f"{name}-8", code, stream=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(name, str(1003 + 911 * i))) for i, name in enumerate(NAMES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(u.prompt_tokens_details.cached_tokens > 0 for turns in usages.values() for u in turns[1:])
    assert server.metric("requests_running") == 0
    assert server.metric("raw_shadow_bytes") == 0


def test_an_unnamed_conversation_continues_the_longest_cached_prefix(server: Server) -> None:
    opening = [{"role": "user", "content": "The colour of the little boat is green. " + filler(12, seed=5)}]
    text, first = ask(server, opening, stream=False)
    longer = [*opening, {"role": "assistant", "content": text}, {"role": "user", "content": "Thank you."}]
    _, second = ask(server, longer, stream=False)
    assert second.prompt_tokens_details.cached_tokens == first.prompt_tokens + first.completion_tokens
    # Another end to the same beginning shares the pages and leaves the first conversation as it was.
    edited = [*longer[:-1], {"role": "user", "content": "What was the colour of the boat?"}]
    _, third = ask(server, edited, stream=False)
    assert third.prompt_tokens_details.cached_tokens >= first.prompt_tokens
    _, again = ask(server, longer, stream=False)
    assert again.prompt_tokens_details.cached_tokens >= second.prompt_tokens - 1


def test_an_edited_message_goes_back_to_what_still_matches(server: Server) -> None:
    key = {"prompt_cache_key": "edited"}
    opening = [{"role": "user", "content": "My name is Rosa and my locker code is 8306. " + filler(30, seed=9)}]
    text, first = ask(server, opening, stream=False, extra_body=key)
    talk = [*opening, {"role": "assistant", "content": text}]
    ask(server, [*talk, {"role": "user", "content": "Please read this: " + filler(20, seed=4)}], False, extra_body=key)
    answer, usage = ask(server, [*talk, {"role": "user", "content": "What is my locker code?"}], False, extra_body=key)
    assert digits(answer) == "8306"
    assert usage.prompt_tokens_details.cached_tokens >= first.prompt_tokens + first.completion_tokens


@pytest.mark.parametrize("header", ["X-Session-ID", "Session-Id", "X-Session-Affinity", "X-Claude-Code-Session-Id"])
def test_headers_name_a_session(server: Server, header: str) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    ask(server, messages, stream=False, extra_headers={header: f"by-{header}"})
    assert server.sessions()[f"by-{header}"]["name"] == f"by-{header}"


def test_the_status_pages_tell_what_runs(server: Server) -> None:
    backend = httpx.get(f"{server.url}/v1/backend").json()
    assert backend["requested"] == "auto"
    assert backend["reason"]
    assert any(check["passed"] for check in backend["checks"])
    assert backend["preset"] == "k6v4"
    assert len(backend["layers"]) == 8
    assert backend["blas"]["name"]
    models = server.client().models.list().data
    assert [model.id for model in models] == ["tiny-recall-4bit"]
    log = server.log.read_text()
    for said in ("model tiny-recall-4bit", "backend ", "cache preset k6v4", "memory budget", "Uvicorn running on"):
        assert said in log
