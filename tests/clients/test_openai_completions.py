"""The `openai` package on the older completions endpoint: plain text goes on."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.clients.conftest import openai_client
from tests.clients.talk import ENDLESS, wait_until_idle
from tests.serving.launch import BUNDLED, Server

PROMPT = "The miller walked to the river. The miller walked to the"
ASK: dict[str, Any] = {"model": "default", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def lenient(server: Server) -> Iterator[openai.OpenAI]:
    """For streams: the package's types want a finish reason in each chunk, OpenAI's own server has it in the last."""
    with openai_client(server, _strict_response_validation=False) as made:
        yield made


def test_text_goes_on(client: openai.OpenAI) -> None:
    answer = client.completions.create(**ASK)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    # Spaces are the model's own: nothing is put between the prompt and the text.
    assert choice.text.startswith(" river")
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_a_stream_says_the_same(lenient: openai.OpenAI) -> None:
    whole = lenient.completions.create(**ASK)
    *body, last = lenient.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in body) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in body]
    assert reasons[-1] == "length"
    assert not any(reasons[:-1])
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def test_echo_repeats_the_prompt(client: openai.OpenAI) -> None:
    plain = client.completions.create(**ASK).choices[0].text
    assert client.completions.create(**ASK, echo=True).choices[0].text == PROMPT + plain


def test_several_prompts_and_several_answers(client: openai.OpenAI) -> None:
    other = "One two three four one two three four one two"
    answer = client.completions.create(**{**ASK, "prompt": [PROMPT, other]}, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] == client.completions.create(**ASK).choices[0].text
    assert texts[2] == texts[3] != texts[0]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4 * 8


def test_a_prompt_of_token_ids_is_the_same_as_its_text(client: openai.OpenAI) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    as_text, as_ids = (client.completions.create(**{**ASK, "prompt": prompt}) for prompt in (PROMPT, ids))
    assert as_ids.choices[0].text == as_text.choices[0].text
    assert as_ids.usage is not None
    assert as_ids.usage.prompt_tokens == len(ids)


def test_stop_and_seed(client: openai.OpenAI) -> None:
    whole = client.completions.create(**ASK).choices[0].text
    assert client.completions.create(**ASK, stop="iver").choices[0].text == whole.split("iver")[0]
    hot = {**ASK, "temperature": 1.5}
    first, again, other = (client.completions.create(**hot, seed=seed).choices[0].text for seed in (3, 3, 4))
    assert first == again != other


def test_logprobs_have_the_older_shape(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(**ASK, logprobs=2).choices
    told = choice.logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert told.text_offset is not None
    assert "".join(told.tokens) == choice.text
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 8
    assert all(sum(map(math.exp, top.values())) <= 1 + 1e-5 for top in told.top_logprobs)
    assert told.text_offset == sorted(told.text_offset)


def test_a_stream_that_is_left_ends_the_work(lenient: openai.OpenAI, server: Server) -> None:
    bias = ENDLESS["logit_bias"]
    stream = lenient.completions.create(**{**ASK, "max_tokens": 4000}, logit_bias=bias, stream=True)
    next(stream)
    stream.close()
    wait_until_idle(server)


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"max_tokens": -1}, "max_tokens"), ({"logprobs": 100}, "logprobs"), ({"suffix": "x"}, "suffix")],
)
def test_what_cannot_be_is_refused(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**ASK, **changes})
    assert caught.value.param == param
