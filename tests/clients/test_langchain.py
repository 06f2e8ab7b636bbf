"""`langchain-openai`'s ChatOpenAI: invoke, stream, batch and a limit of its own."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from tests.clients.talk import ASKED, CODE, COPY, TOLD
from tests.serving.launch import Server, digits

TALK: list[BaseMessage] = [HumanMessage(TOLD), AIMessage("Got it."), HumanMessage(ASKED)]
Make = Callable[..., ChatOpenAI]


@pytest.fixture(scope="module")
def model(server: Server) -> Make:
    def make(**options: Any) -> ChatOpenAI:
        chosen = {"temperature": 0, "max_tokens": 30, "max_retries": 0, "timeout": 60, **options}
        return ChatOpenAI(model="default", base_url=f"{server.url}/v1", api_key="none", **chosen)

    return make


def test_invoke_answers_with_usage_and_reason(model: Make) -> None:
    answer = model().invoke([SystemMessage("Answer briefly."), *TALK])
    assert isinstance(answer, AIMessage)
    assert digits(answer.text) == CODE
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0


def test_a_stream_adds_up_to_the_answer_and_its_usage(model: Make) -> None:
    chunks = list(model(stream_usage=True).stream(f"Repeat after me: {COPY}"))
    assert len(chunks) > 3
    whole = sum(chunks[1:], start=chunks[0])
    assert whole.text == COPY
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 3
    assert whole.response_metadata["finish_reason"] == "stop"


def test_a_batch_is_answered_in_order(model: Make) -> None:
    codes = ["1234", "5678", "9012"]
    talks = [[HumanMessage(TOLD.replace(CODE, code)), *TALK[1:]] for code in codes]
    answers = asyncio.run(model().abatch(talks))
    assert [digits(answer.text) for answer in answers] == codes


def test_options_reach_the_server(model: Make) -> None:
    answer = model(stop=["ûlée"], seed=3, top_p=0.9, frequency_penalty=0.1).invoke(f"Repeat after me: {COPY}")
    assert answer.text == COPY.split("ûlée")[0]
    likely = model(logprobs=True, top_logprobs=2).invoke(TALK)
    assert "".join(token["token"] for token in likely.response_metadata["logprobs"]["content"]) == likely.text


def test_a_refusal_is_the_sdks_exception(model: Make) -> None:
    # What frameworks catch to shorten the conversation.
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        model(max_tokens=9000).invoke(TALK)
    assert caught.value.code == "context_length_exceeded"
