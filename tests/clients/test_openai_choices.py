"""Several answers to one question (`n`), as the `openai` package sees them."""

from collections import defaultdict
from typing import Any

import openai
import pytest

from tests.clients.talk import CODE, ENDLESS, QUESTION, wait_until_idle
from tests.serving.launch import Server, digits

ASK: dict[str, Any] = {"model": "default", "messages": QUESTION, "max_tokens": 16}
HOT: dict[str, Any] = {**ASK, "messages": [{"role": "user", "content": "Hello!"}], "temperature": 1.5}


def test_four_answers_share_one_prompt(client: openai.OpenAI) -> None:
    single = client.chat.completions.create(**ASK, temperature=0)
    answer = client.chat.completions.create(**ASK, temperature=0, n=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [digits(choice.message.content or "") for choice in answer.choices] == [CODE] * 4
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 4
    assert single.usage is not None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == single.usage.prompt_tokens
    assert answer.usage.completion_tokens == 4 * single.usage.completion_tokens


def test_sampled_answers_differ_and_a_seed_repeats_them_all(client: openai.OpenAI) -> None:
    first, again = (
        [choice.message.content for choice in client.chat.completions.create(**HOT, n=3, seed=5).choices]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1


def test_streamed_choices_come_side_by_side(client: openai.OpenAI) -> None:
    texts: dict[int, str] = defaultdict(str)
    order, reasons, roles = [], {}, {}
    usage = None
    asked = {**HOT, "n": 3, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**asked):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.delta.content or ""
            order.append(choice.index)
            if choice.delta.role:
                assert choice.index not in roles
                roles[choice.index] = choice.delta.role
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert set(roles) == set(reasons) == set(texts) == {0, 1, 2}
    # Not one after the other: the second begins before the first has ended.
    assert order.index(1) < max(i for i, index in enumerate(order) if index == 0)
    whole = client.chat.completions.create(**{**asked, "stream": False, "stream_options": openai.omit})
    assert [texts[choice.index] for choice in whole.choices] == [choice.message.content for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_each_choice_has_its_own_logprobs(client: openai.OpenAI) -> None:
    for choice in client.chat.completions.create(**{**HOT, "temperature": 0}, n=2, logprobs=True).choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == choice.message.content


def test_a_stream_that_is_left_ends_all_its_choices(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(model="default", **ENDLESS, n=3, stream=True)
    next(stream)
    stream.close()
    wait_until_idle(server)


@pytest.mark.parametrize("n", [0, -1, 1000])
def test_a_number_that_cannot_be_is_refused(client: openai.OpenAI, n: int) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ASK, n=n)
    assert caught.value.param == "n"
