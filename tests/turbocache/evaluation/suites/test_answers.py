from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from turbocache.evaluation.rows import Row
from turbocache.evaluation.suites.answers import answer_nats
from turbocache.evaluation.suites.suite import Material

PROMPT = (
    "Copy these words: anchor, bridge, candle, desert, engine, forest, garden, harbor, island. The words are: anchor,"
)


@pytest.fixture(scope="module")
def prompt(material: Material) -> list[int]:
    return list(material.loaded.tokenizer.encode(PROMPT))


@pytest.mark.parametrize("name", ["full", "k2v2", "mlx-lm-4"])
def test_answers_are_what_mlx_lm_generates_whatever_the_draft(
    material: Material, row_of: Callable[[str], Row], generated: Callable[..., list[int]], prompt: list[int], name: str
) -> None:
    row, reader = row_of(name), material.reader
    expected = generated(prompt, row.open(200).layers, 16)
    cache = row.open(400).layers
    reader.read(cache, prompt[:20])
    wrong = [5] * 4
    for draft in ([], expected, expected[:7], expected[:7] + wrong, wrong, expected * 2):
        assert reader.answer(cache, prompt[20:], 16, lambda _: False, draft=draft) == expected
        assert cache[0].offset == 20


def test_an_answer_ends_where_it_should(material: Material, prompt: list[int], generated: Callable[..., Any]) -> None:
    reader, model = material.reader, material.loaded.model
    expected = generated(prompt, make_prompt_cache(model), 12)
    for draft in ([], expected):
        told = reader.answer(
            make_prompt_cache(model), prompt, 12, lambda answer: answer[-1] == expected[4], draft=draft
        )
        assert told == expected[: expected.index(expected[4]) + 1]


def test_the_likelihood_is_that_of_the_whole_text(material: Material, prompt: list[int]) -> None:
    reader, model = material.reader, material.loaded.model
    answer = material.loaded.tokenizer.encode(" bridge, candle, forest", add_special_tokens=False)
    cache = make_prompt_cache(model)
    reader.read(cache, prompt[:9])
    logits = model(mx.array([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]
    expected = float(nn.losses.cross_entropy(logits, mx.array(answer), reduction="sum"))
    judged = reader.judge(cache, prompt[9:], answer)
    assert -sum(answer_nats(judged, answer)) == pytest.approx(expected, rel=1e-4)
    # What is known about a draft need not be read again.
    known = reader.answer(cache, prompt[9:], 8, lambda _: False, draft=answer, judged=judged)
    assert known == reader.answer(cache, prompt[9:], 8, lambda _: False)
    assert cache[0].offset == 9


def test_the_text_ends_before_the_end_token(material: Material) -> None:
    reader, tokenizer = material.reader, material.loaded.tokenizer
    ids = tokenizer.encode("42", add_special_tokens=False)
    end = next(iter(tokenizer.eos_token_ids))
    assert reader.text([*ids, end, *ids]) == reader.text(ids) == "42"
    assert reader.has_ended([*ids, end])
    assert not reader.has_ended(ids)
