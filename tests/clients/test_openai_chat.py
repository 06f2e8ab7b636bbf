"""The `openai` package on chat completions: answers, streams and sampling. Its own types judge every shape."""

import asyncio
import math
from collections import Counter
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from tokenizers import Tokenizer

from tests.clients.talk import CODE, COPY, QUESTION
from tests.serving.launch import BUNDLED, Server, digits

ASK: dict[str, Any] = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 30}
REPEAT: dict[str, Any] = {**ASK, "messages": [{"role": "user", "content": f"Repeat after me: {COPY}"}]}
HOT: dict[str, Any] = {**REPEAT, "temperature": 1.8, "max_tokens": 12}


def content(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_a_question_about_the_conversation_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASK)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny-recall-4bit"
    (choice,) = answer.choices
    assert digits(choice.message.content or "") == CODE
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id == answer.id


def test_a_stream_opens_with_the_role_says_the_same_and_ends_with_reason_and_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**REPEAT)
    chunks = list(client.chat.completions.create(**REPEAT, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert content(chunks) == whole.choices[0].message.content == COPY
    assert body[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in body)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    # Accents and the emoji are several tokens each: a chunk has all of a character or nothing.
    assert any("🙂" in content([chunk]) for chunk in body)
    assert "\ufffd" not in content(chunks)


def test_without_include_usage_no_chunk_has_any(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**REPEAT, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_the_stream_helper_accumulates_the_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**REPEAT) as stream:
        kinds = Counter(event.type for event in stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.content == COPY
    assert kinds["content.done"] == 1
    assert kinds["content.delta"] > 1


async def collect(url: str, n: int) -> list[str]:
    """`n` streams of one asynchronous client at once, read in turn as they come."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def read() -> str:
            stream = await client.chat.completions.create(**REPEAT, stream=True)
            return content([chunk async for chunk in stream])

        return list(await asyncio.gather(*(read() for _ in range(n))))


def test_four_asynchronous_streams_at_once_say_the_same(server: Server) -> None:
    assert asyncio.run(collect(server.url, 4)) == [COPY] * 4


def test_roles_names_and_text_parts_are_taken(client: openai.OpenAI) -> None:
    told, got, asked = QUESTION
    parts = [{"type": "text", "text": "My name is Anna and"}, {"type": "text", "text": f"my locker code is {CODE}."}]
    answer = client.chat.completions.create(
        **{
            **ASK,
            "messages": [
                {"role": "developer", "content": "Answer briefly."},
                {**told, "content": parts, "name": "anna"},
                {**got, "content": [{"type": "text", "text": got["content"]}]},
                asked,
            ],
        },
        user="someone",
        metadata={"purpose": "test"},
    )
    assert digits(answer.choices[0].message.content or "") == CODE


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_ends_with_length(client: openai.OpenAI, field: str) -> None:
    rest = {name: value for name, value in REPEAT.items() if name != "max_tokens"}
    answer = client.chat.completions.create(**rest, **{field: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", ["brûl", ["nowhere", "ûlée"], ["🙂"]])
def test_stop_strings_cut_the_answer_also_within_tokens_and_in_a_stream(client: openai.OpenAI, stop: Any) -> None:
    first = next(text for text in ([stop] if isinstance(stop, str) else stop) if text in COPY)
    answer = client.chat.completions.create(**REPEAT, stop=stop)
    assert answer.choices[0].message.content == COPY.split(first)[0]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**REPEAT, stop=stop, stream=True))
    assert content(chunks) == COPY.split(first)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text_and_another_another(client: openai.OpenAI) -> None:
    first, again, other = (
        client.chat.completions.create(**HOT, seed=seed).choices[0].message.content for seed in (7, 7, 8)
    )
    assert first == again != other


def test_logprobs_are_those_of_the_text_whole_and_streamed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**REPEAT, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content).decode() == COPY
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        ranked = [other.logprob for other in token.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert sum(map(math.exp, ranked)) <= 1 + 1e-5
        # Greedy: what was drawn is the likeliest.
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, ranked[0])
    streamed = [
        token
        for chunk in client.chat.completions.create(**REPEAT, logprobs=True, top_logprobs=3, stream=True)
        for chosen in chunk.choices
        if chosen.logprobs
        for token in chosen.logprobs.content or ()
    ]
    assert [token.token for token in streamed] == [token.token for token in choice.logprobs.content]
    assert [token.logprob for token in streamed] == pytest.approx(
        [token.logprob for token in choice.logprobs.content], abs=1e-3
    )


def test_logit_bias_forbids_and_forces_tokens(client: openai.OpenAI) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    (five,) = tokenizer.encode("5", add_special_tokens=False).ids
    without = client.chat.completions.create(**ASK, logit_bias={str(five): -100})
    assert "5" not in (without.choices[0].message.content or "")
    always = client.chat.completions.create(**{**ASK, "max_tokens": 4}, logit_bias={str(five): 100})
    assert always.choices[0].message.content == "5555"


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_penalties_change_what_is_repeated(client: openai.OpenAI, penalty: str) -> None:
    echo = {**ASK, "messages": [{"role": "user", "content": "Repeat after me: one one one one one one one one"}]}
    plain = client.chat.completions.create(**echo).choices[0].message.content or ""
    punished = client.chat.completions.create(**echo, **{penalty: 2}).choices[0].message.content or ""
    assert punished.count("one") < plain.count("one")


def test_local_extensions_go_through_extra_body(client: openai.OpenAI) -> None:
    greedy = client.chat.completions.create(**{**HOT, "max_tokens": 30}, extra_body={"top_k": 1})
    assert greedy.choices[0].message.content == COPY
    steady = client.chat.completions.create(**{**HOT, "max_tokens": 30}, extra_body={"min_p": 1.0})
    assert steady.choices[0].message.content == COPY


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id) == listed
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_second_turn_continues_the_session_of_the_first(client: openai.OpenAI, server: Server) -> None:
    named = {**ASK, "prompt_cache_key": "openai-chat"}
    first = client.chat.completions.create(**named)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    longer = [*QUESTION, answer, {"role": "user", "content": "What is my name?"}]
    second = client.chat.completions.create(**{**named, "messages": longer})
    assert "Anna" in (second.choices[0].message.content or "")
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    # More where another test has led the same conversation: sessions share what they have in common.
    assert (
        first.usage.total_tokens <= (second.usage.prompt_tokens_details.cached_tokens or 0) < second.usage.prompt_tokens
    )
    assert server.sessions()["openai-chat"]["name"] == "openai-chat"
