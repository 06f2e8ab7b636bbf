"""How tokens are drawn: against numpy for what logits go through, and in a running engine for seeds and biases."""

from collections import Counter
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from server.engine.engine import MlxEngine
from server.engine.sampling import processors_for, seeded_sampler, suggested_sampling, top_tokens
from server.errors import InvalidRequest
from server.protocol import SamplingParams
from tests.server.engine.answers import GREEDY, Answer

pytestmark = pytest.mark.slow

ASKED = "Please continue: the river and the mill and the"


def processed(params: SamplingParams, prompt: list[int], answer: list[int], logits: np.ndarray) -> np.ndarray:
    out = mx.array(logits[None])
    for processor in processors_for(params, len(prompt)):
        out = processor(mx.array([*prompt, *answer]), out)
    return np.array(out[0])


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({}, SamplingParams()),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}, SamplingParams(0.6, 0.95, 20)),
        ({"do_sample": False, "temperature": 0.6, "frequency_penalty": 0.2}, SamplingParams(0, frequency_penalty=0.2)),
        ({"temperature": 1, "min_p": 0.1}, SamplingParams(1, min_p=0.1)),
        ({"repetition_penalty": 1.05}, SamplingParams(repetition_penalty=1.05)),
        ({"temperature": 3, "top_p": 0, "top_k": 2.5, "min_p": "0.1", "repetition_penalty": True}, SamplingParams()),
        ({"temperature": None, "top_k": None, "eos_token_id": [2], "max_new_tokens": 5}, SamplingParams()),
    ],
)
def test_what_a_generation_config_suggests(config: dict[str, Any], sampling: SamplingParams) -> None:
    assert suggested_sampling(config) == sampling


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=-0.7),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(logit_bias=((3, -100.0), (70, 12.5))),
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=0.8, logit_bias=((1, 2.0),)),
    ],
)
@pytest.mark.parametrize("n_answer", [0, 1, 200])
def test_logits_are_changed_as_openai_says(params: SamplingParams, n_answer: int) -> None:
    draw = np.random.default_rng(1)
    logits = draw.normal(size=100).astype(np.float32)
    prompt, answer = draw.integers(0, 60, 50).tolist(), draw.integers(0, 80, n_answer).tolist()
    want = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        want[token] += bias
    for token in {*prompt, *answer}:
        want[token] = (
            want[token] * params.repetition_penalty if want[token] < 0 else want[token] / params.repetition_penalty
        )
    for token, n in Counter(answer).items():
        want[token] -= params.presence_penalty + params.frequency_penalty * n
    np.testing.assert_allclose(processed(params, prompt, answer, logits), want, atol=1e-4)


def test_nothing_asked_for_is_nothing_done() -> None:
    assert processors_for(SamplingParams(), 10) == []


def test_seeded_draws_have_the_right_distribution_and_repeat() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    logprobs = mx.array(np.log(probabilities)[None].astype(np.float32))
    draw, again, other = (seeded_sampler(SamplingParams(seed=0), seed) for seed in (-5, -5, 6))
    drawn = [int(draw(logprobs).item()) for _ in range(2000)]
    assert drawn == [int(again(logprobs).item()) for _ in range(2000)]
    assert drawn[:200] != [int(other(logprobs).item()) for _ in range(200)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 2000, probabilities, atol=0.04)
    filtered = seeded_sampler(SamplingParams(top_k=3, top_p=0.7, min_p=0.4), 1)
    assert {int(filtered(logprobs).item()) for _ in range(200)} == {0, 1}


def test_top_tokens() -> None:
    logprobs = mx.array(np.random.default_rng(3).normal(size=50).astype(np.float32))
    values = np.array(logprobs)
    own, best = top_tokens(logprobs, 7, 5)
    assert own == float(values[7])
    assert [token for token, _ in best] == np.argsort(-values)[:5].tolist()
    assert [value for _, value in best] == [float(values[token]) for token, _ in best]
    assert top_tokens(logprobs, 7, 0) == (own, [])


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(engine: MlxEngine) -> None:
    long = tuple((token, -100.0) for token in engine.services.runtime.model.tokenizer.eos_token_ids)
    hot = SamplingParams(temperature=2.0, seed=11, logit_bias=long)
    alone = Answer(engine, ASKED, "a", sampling=hot, max_tokens=30).text()
    assert Answer(engine, ASKED, "b", sampling=hot, max_tokens=30).text() == alone
    others = [Answer(engine, ASKED, f"c{i}", sampling=replace(hot, seed=i), max_tokens=40) for i in range(3)]
    unseeded = Answer(engine, ASKED, "d", sampling=replace(hot, seed=None), max_tokens=40)
    assert Answer(engine, ASKED, "e", sampling=hot, max_tokens=30).text() == alone
    texts = {alone, *(other.text() for other in others)}
    assert len(texts) == 4
    unseeded.text()


def test_biases_force_and_ban(engine: MlxEngine) -> None:
    tokenizer = engine.services.runtime.model.tokenizer
    (word,) = tokenizer.encode(" harbour")[-1:]
    forced = SamplingParams(temperature=1.0, logit_bias=((word, 100.0),))
    assert Answer(engine, ASKED, "a", sampling=forced, max_tokens=5).text() == tokenizer.decode([word] * 5).strip()
    greedy = Answer(engine, ASKED, "b", sampling=GREEDY, max_tokens=5)
    first = tokenizer.encode(greedy.text())[0]
    banned = SamplingParams(temperature=0, logit_bias=((first, -100.0),))
    assert tokenizer.encode(Answer(engine, ASKED, "c", sampling=banned, max_tokens=5).text())[0] != first
    with pytest.raises(InvalidRequest, match="not a token"):
        Answer(engine, ASKED, "d", sampling=SamplingParams(logit_bias=((len(tokenizer), 1.0),)))


def test_penalties_reach_the_batch(engine: MlxEngine) -> None:
    """Among rows without any: no token comes twice, and the others answer as ever."""
    alone = Answer(engine, ASKED, "a", sampling=GREEDY, max_tokens=40).text()
    other = Answer(engine, ASKED, "b", sampling=GREEDY, max_tokens=40)
    ban = SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=10.0)
    text = Answer(engine, ASKED, "c", sampling=ban, max_tokens=25).text()
    tokens = engine.services.runtime.model.tokenizer.encode(text)
    assert max(Counter(tokens).values()) <= 2
    assert other.text() == alone


@pytest.mark.parametrize("seed", [None, 5])
def test_no_number_that_a_request_may_have_stops_the_batch(engine: MlxEngine, seed: int | None) -> None:
    greedy = Answer(engine, ASKED, "a", sampling=GREEDY).text()
    least = 5e-324
    for only_the_likeliest in ({"temperature": least}, {"temperature": 1e-39}, {"top_p": least}, {"top_p": 1e-39}):
        asked = SamplingParams(seed=seed, **only_the_likeliest)
        assert Answer(engine, ASKED, "b", sampling=asked).text() == greedy
    n = len(engine.services.runtime.model.tokenizer)
    for keeps_everything in ({"top_k": n}, {"top_k": 2**31 - 1}, {"min_p": least}, {"repetition_penalty": 0.01}):
        Answer(engine, ASKED, "c", sampling=SamplingParams(seed=seed, **keeps_everything)).whole()
    assert engine.services.faults.verdict is None
    assert engine.services.metrics.kernel_faults._value.get() == 0
