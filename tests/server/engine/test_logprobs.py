"""Log-probabilities of answers: those of a plain forward pass, and the tokens of just the text that is sent."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from server.engine.engine import MlxEngine
from server.protocol import DrawnToken, Finished, SamplingParams, TextDelta
from tests.server.engine.answers import GREEDY, Answer, on_engine


def drawn(answer: Answer) -> tuple[str, list[DrawnToken]]:
    text, tokens = "", list[DrawnToken]()
    while not isinstance(event := answer.events.get(timeout=60), Finished):
        if isinstance(event, TextDelta):
            text += event.text
            tokens += event.tokens
    return text, tokens


def test_they_are_those_of_a_forward_pass(engine: MlxEngine) -> None:
    asked = "Please repeat: Füße 🦶 in the river and the mill."
    answer = Answer(engine, asked, "a", max_tokens=30, logprobs=5)
    text, tokens = drawn(answer)
    assert b"".join(token.token for token in tokens).decode().strip() == text.strip()
    assert len(tokens) > 3
    model = engine.services.runtime.model
    ids = {bytes(engine.services.vocabulary.token_bytes(i)): i for i in range(len(model.tokenizer))}
    cache, fed = make_prompt_cache(model.model), list(answer.request.prompt.tokens)
    for token in tokens:
        logits = on_engine(engine, lambda fed=fed: _last_logits(model.model, fed, cache))
        want = logits - np.logaddexp.reduce(logits)
        assert abs(token.logprob - want[ids[token.token]]) < 1e-3
        best = np.argsort(-want)[:5]
        np.testing.assert_allclose([other.logprob for other in token.top], want[best], atol=1e-3)
        assert (token.top[0].token, token.top[0].logprob) == (token.token, token.logprob)  # greedy
        assert sum(math.exp(other.logprob) for other in token.top) <= 1 + 1e-6
        fed = [ids[token.token]]


def _last_logits(model: Module, fed: list[int], cache: list[Any]) -> np.ndarray:
    logits = model(mx.array([fed]), cache=cache)[0, -1].astype(mx.float32)
    return np.array(logits).astype(np.float64)


def test_nobody_pays_who_does_not_ask(engine: MlxEngine) -> None:
    _, tokens = drawn(Answer(engine, "Please repeat: alpha beta gamma.", "a", max_tokens=10))
    assert tokens == []


def test_a_warm_turn_and_a_batch_show_every_token(engine: MlxEngine) -> None:
    """The first token takes another way than the rest."""
    asked = "Please continue: the river and the mill and the " * 6
    answers = [Answer(engine, asked, name, max_tokens=12, sampling=GREEDY, logprobs=0) for name in ("a", "b", "a")]
    shown = [drawn(answer) for answer in answers]
    assert all(text == shown[0][0] for text, _ in shown)
    for text, tokens in shown:
        assert b"".join(token.token for token in tokens).decode().strip() == text.strip()
        assert all(token.top == () for token in tokens)


def test_tokens_of_a_stop_string_are_not_shown(engine: MlxEngine) -> None:
    whole, tokens = drawn(Answer(engine, "Please repeat: alpha beta gamma delta.", "a", max_tokens=30, logprobs=0))
    middle = whole[len(whole) // 2 : len(whole) // 2 + 4]
    stopped = Answer(engine, "Please repeat: alpha beta gamma delta.", "b", max_tokens=30, logprobs=0, stop=(middle,))
    text, fewer = drawn(stopped)
    assert whole.startswith(text)
    assert middle not in text
    assert len(fewer) < len(tokens)


def test_penalties_and_seeds_change_nothing_about_what_is_shown(engine: MlxEngine) -> None:
    params = SamplingParams(temperature=1.5, seed=3, frequency_penalty=0.5)
    text, tokens = drawn(
        Answer(engine, "Please repeat: alpha beta gamma.", "a", max_tokens=20, sampling=params, logprobs=2)
    )
    assert b"".join(token.token for token in tokens).decode().strip() == text.strip()
    assert all(len(token.top) == 2 for token in tokens)
