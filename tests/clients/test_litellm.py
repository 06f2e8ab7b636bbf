"""`litellm` with the server as an OpenAI-compatible provider: chat, streams and its own exceptions."""

import asyncio
from typing import Any

import litellm
import pytest

from tests.clients.talk import CODE, COPY, QUESTION
from tests.serving.launch import Server, digits

REPEAT = [{"role": "user", "content": f"Repeat after me: {COPY}"}]

# litellm's own quarrels with pydantic.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_.*' attribute on the instance:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def call(server: Server) -> dict[str, Any]:
    return {
        "model": "openai/default", "api_base": f"{server.url}/v1", "api_key": "none",
        "temperature": 0, "max_tokens": 30, "num_retries": 0,
    }  # fmt: skip


def test_a_completion(call: dict[str, Any]) -> None:
    answer = litellm.completion(**call, messages=QUESTION)
    assert digits(answer.choices[0].message.content) == CODE
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_and_what_litellm_builds_of_its_chunks(call: dict[str, Any]) -> None:
    chunks = list(litellm.completion(**call, messages=REPEAT, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == COPY
    built = litellm.stream_chunk_builder(chunks, messages=REPEAT)
    assert built.choices[0].message.content == COPY
    assert built.choices[0].finish_reason == "stop"
    assert built.usage.completion_tokens > 3


def test_asynchronous_completions(call: dict[str, Any]) -> None:
    async def both() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**call, messages=REPEAT, seed=n) for n in range(2)))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(both()) == [COPY, COPY]


def test_options_reach_the_server(call: dict[str, Any]) -> None:
    cut = litellm.completion(**call, messages=REPEAT, stop=["ûlée"], top_p=0.9, presence_penalty=0.1)
    assert cut.choices[0].message.content == COPY.split("ûlée")[0]
    likely = litellm.completion(**call, messages=REPEAT, logprobs=True, top_logprobs=2)
    assert "".join(token.token for token in likely.choices[0].logprobs.content)[:2] == COPY[:2]


def test_refusals_are_litellms_exceptions(call: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**{**call, "temperature": 3}, messages=QUESTION)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**call, "model": "openai/another"}, messages=QUESTION)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**call, "max_tokens": 9000}, messages=QUESTION)
