"""A first run: what a newcomer asks the model that `make run` has fetched, with the real client and no settings."""

import re
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.serving.launch import Server, running
from turbocache.models import STARTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STARTER.is_dir(), reason="the starter model is not there: make starter"),
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name, description in (("get_weather", "The weather in a city"), ("get_trains", "Trains that leave a city"))
]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("starter"), MODEL="") as process:
        yield process


@pytest.fixture(scope="module")
def client(started: Server) -> openai.OpenAI:
    return started.client()


def user(text: str) -> ChatCompletionMessageParam:
    return {"role": "user", "content": text}


def reply(client: openai.OpenAI, *messages: ChatCompletionMessageParam, **options: object) -> ChatCompletion:
    """An answer that is complete, and has no mark of the template in it."""
    answer = client.chat.completions.create(
        model="default", messages=messages, **{"max_completion_tokens": 80, **options}
    )
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "tool_calls")
    assert not re.search(r"<\|\w+\|>|assistant\n", choice.message.content or "")
    return answer


def said(client: openai.OpenAI, *messages: ChatCompletionMessageParam) -> str:
    return reply(client, *messages).choices[0].message.content or ""


def test_the_start_says_which_model_it_is_and_whose(started: Server, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.model_extra) == (
        STARTER.name,
        {
            "max_model_len": 8192,
            "license": "apache-2.0",
            "origin": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        },
    )
    log = started.log.read_text()
    assert "TURBOCACHE_MODEL is not set, so SmolLM2-135M-Instruct is served." in log
    assert "licence is apache-2.0, its origin https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct" in log
    assert "temperature 0, frequency_penalty 0.2" in log


def test_it_knows_some_things(client: openai.OpenAI) -> None:
    assert "Paris" in said(client, user("What is the capital of France?"))
    assert re.search(r"\b4\b", said(client, user("What is 2 + 2?")))


def test_a_greeting_is_answered(client: openai.OpenAI) -> None:
    assert re.match(r"(Hello|Hi)\b", said(client, user("Hello!")))


def test_a_haiku_is_a_few_lines(client: openai.OpenAI) -> None:
    lines = said(client, user("Write a haiku about the sea.")).splitlines()
    assert 2 <= len(lines) <= 5
    assert re.search(r"sea|wave|ocean|shore", " ".join(lines))


@pytest.mark.parametrize(
    ("first", "then", "word"),
    [
        ("What is the capital of France?", "And of Italy?", "Rome"),
        ("What is the capital of Japan?", "What language do people speak there?", "Japanese"),
    ],
)
def test_a_follow_up_needs_the_turn_before(client: openai.OpenAI, first: str, then: str, word: str) -> None:
    answer = said(client, user(first))
    assert word not in answer
    assert word in said(client, user(first), {"role": "assistant", "content": answer}, user(then))


def test_the_template_s_own_system_message_is_there_unless_there_is_another(started: Server) -> None:
    def prompt(*messages: ChatCompletionMessageParam) -> str:
        tokens = httpx.post(f"{started.url}/tokenize", json={"messages": messages}).json()["tokens"]
        return str(httpx.post(f"{started.url}/detokenize", json={"tokens": tokens}).json()["prompt"])

    assert prompt(user("hi")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    other = prompt({"role": "system", "content": "Be brief."}, user("hi"))
    assert other.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_tools_reach_a_model_whose_template_has_none(client: openai.OpenAI) -> None:
    asked = user("What is the weather in Oslo?")
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in (named, "required"):
        answer = reply(client, asked, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls or []
        assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Oslo"}')
    result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees, light rain"}
    after = reply(client, asked, answer.choices[0].message, result, tools=TOOLS).choices[0].message.content or ""
    assert re.search(r"rain|12", after)
    # Tools that it does not need do not confuse it.
    assert "Paris" in (
        reply(client, user("What is the capital of France?"), tools=TOOLS).choices[0].message.content or ""
    )
