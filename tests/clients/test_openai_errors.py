"""Refusals as the `openai` package raises them, and what it looks like to the server when a client goes away."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.clients.conftest import KEYS, openai_client
from tests.clients.talk import CODE, ENDLESS, QUESTION, wait_for, wait_until_idle
from tests.serving.launch import Server, digits, filler

ASK: dict[str, Any] = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
TALK: dict[str, Any] = {"model": "default", **ENDLESS}


def read(seed: int) -> dict[str, Any]:
    """A question with some seconds of prefill: 2,000 to 3,000 tokens that no session has."""
    return {**ASK, "messages": [{"role": "user", "content": "Read this: " + filler(250, seed)}]}


@pytest.fixture(scope="module")
def ours(narrow: Server) -> Iterator[openai.OpenAI]:
    with openai_client(narrow, api_key=KEYS[0]) as made:
        yield made


def chat(client: openai.OpenAI, **changes: Any) -> Callable[[], object]:
    return lambda: client.chat.completions.create(**{**ASK, **changes})


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"extra_body": {"colour": "green"}}, "colour", "unknown_parameter"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "unsupported_parameter"),
        ({"max_tokens": 9000}, "messages", "context_length_exceeded"),
    ],
)
def test_a_wrong_request_is_a_bad_request_error_that_names_the_field(
    ours: openai.OpenAI, changes: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(ours, **changes)()
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    assert caught.value.message


def test_another_model_and_another_address_are_not_found(ours: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(ours, model="gpt-4o")()
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        ours.embeddings.create(model="default", input="x")


@pytest.mark.parametrize("key", ["wrong-key", KEYS[0] + "x", KEYS[0][:-1]])
def test_a_wrong_key_is_an_authentication_error(narrow: Server, key: str) -> None:
    with openai_client(narrow, api_key=key) as stranger, pytest.raises(openai.AuthenticationError) as caught:
        chat(stranger)()
    assert caught.value.code == "invalid_api_key"


def test_either_key_is_right_and_each_has_sessions_of_its_own(narrow: Server) -> None:
    for key in KEYS:
        with openai_client(narrow, api_key=key) as one:
            answer = one.chat.completions.create(**ASK, prompt_cache_key="mine")
        assert digits(answer.choices[0].message.content or "") == CODE
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_too_large_a_body_is_413(ours: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(ours, messages=[{"role": "user", "content": "x" * 70_000}])()
    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"


@contextmanager
def full(narrow: Server, client: openai.OpenAI) -> Iterator[None]:
    """One answer runs and one waits, both streams of a client that is still reading."""
    running = client.chat.completions.create(**TALK, stream=True)
    wait_for(narrow, "requests_running", 1)
    waiting = client.chat.completions.create(**TALK, stream=True)
    wait_for(narrow, "requests_waiting", 1)
    try:
        yield
    finally:
        running.close()
        waiting.close()
        wait_until_idle(narrow)


def test_a_full_queue_is_a_rate_limit_error_with_a_time_to_wait(narrow: Server, ours: openai.OpenAI) -> None:
    with full(narrow, ours), pytest.raises(openai.RateLimitError) as caught:
        chat(ours)()
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    chat(ours)()


def test_the_clients_own_retries_get_the_answer_once_there_is_room(narrow: Server, ours: openai.OpenAI) -> None:
    answers: list[Any] = []
    patient = ours.with_options(max_retries=3)
    refused = narrow.metric("admission_refusals_total", reason="rate_limit_exceeded")
    asking = threading.Thread(target=lambda: answers.append(chat(patient)()))
    with full(narrow, ours):
        asking.start()
        wait_for(narrow, "admission_refusals_total", refused + 1, reason="rate_limit_exceeded")
    asking.join(20)
    assert digits(answers[0].choices[0].message.content) == CODE


@contextmanager
def one_is_cancelled(narrow: Server) -> Iterator[None]:
    """Soon afterwards the server has noticed that a client left, and does nothing any more."""
    before = narrow.metric("requests_finished_total", reason="cancelled")
    yield
    wait_for(narrow, "requests_finished_total", before + 1, reason="cancelled")
    wait_until_idle(narrow)


@pytest.mark.parametrize("request_", [TALK, read(1)], ids=["answering", "prefill"])
def test_a_clients_timeout_ends_the_work(narrow: Server, ours: openai.OpenAI, request_: dict[str, Any]) -> None:
    with one_is_cancelled(narrow), pytest.raises(openai.APITimeoutError):
        ours.with_options(timeout=1.0).chat.completions.create(**request_)


def test_a_stream_that_is_closed_halfway_ends_the_work_and_its_session_goes_on(
    narrow: Server, ours: openai.OpenAI
) -> None:
    with one_is_cancelled(narrow):
        stream = ours.chat.completions.create(**TALK, stream=True, prompt_cache_key="left")
        heard = [next(stream) for _ in range(10)]
        stream.close()
    text = "".join(choice.delta.content or "" for chunk in heard for choice in chunk.choices)
    longer = [*ENDLESS["messages"], {"role": "assistant", "content": text}, {"role": "user", "content": "Thank you."}]
    answer = ours.chat.completions.create(**{**ASK, "messages": longer}, prompt_cache_key="left")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    # The first question is 20 tokens or so and its answer is longer; both were in the cache.
    assert answer.usage.prompt_tokens_details.cached_tokens > 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_task_that_is_cancelled_during_prefill_ends_the_work(narrow: Server, stream: bool) -> None:
    prefilled = narrow.metric("prompt_tokens_total", source="prefilled")

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{narrow.url}/v1", api_key=KEYS[0], max_retries=0) as client:
            asking = asyncio.create_task(client.chat.completions.create(**read(2 + stream), stream=stream))
            await asyncio.to_thread(wait_for, narrow, "requests_running", 1)
            asking.cancel()
            if not stream or not asking.done():
                with pytest.raises(asyncio.CancelledError):
                    await asking

    with one_is_cancelled(narrow):
        asyncio.run(leave())
    assert narrow.metric("prompt_tokens_total", source="prefilled") - prefilled < 1000
