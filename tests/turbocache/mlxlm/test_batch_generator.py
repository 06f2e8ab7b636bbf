"""The adapter: the same tokens and caches as mlx-lm's own BatchGenerator in fewer passes, and marks of bad logits."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler

from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.batch_generator import NOT_FINITE, ShortPromptGenerator, mark_not_finite
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore, evaluate, fork

RNG = np.random.default_rng(0)
OPTIONS: dict[str, Any] = {
    "stop_tokens": [],
    "completion_batch_size": 4,
    "prefill_batch_size": 4,
    "prefill_step_size": 100,
}


def run(
    generator: BatchGenerator, prompts: list[list[int]], caches: list[list[Any]], lengths: list[int]
) -> tuple[list[list[int]], list[list[Any]], list[list[int]]]:
    """Answers, final caches, and the tokens that these hold."""
    uids = generator.insert(prompts, max_tokens=lengths, caches=caches)
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    ends: dict[int, Any] = {}
    begun: set[int] = set()
    while len(ends) < len(uids):
        progress, responses = generator.next()
        begun |= {p.uid for p in progress if p.end_of_prompt}
        for response in responses:
            assert response.uid in begun
            answers[response.uid].append(response.token)
            if response.finish_reason is not None:
                ends[response.uid] = response
    return (
        [answers[uid] for uid in uids],
        [ends[uid].prompt_cache for uid in uids],
        [ends[uid].all_tokens for uid in uids],
    )


@pytest.mark.parametrize("kind", ["paged", "mlx-lm"])
def test_the_same_answers_as_mlx_lms_generator(tiny_llama: Module, kind: str) -> None:
    """Cold and warm rows, short and long ones, more than there is room for, several turns."""
    store = CacheStore(tiny_llama, plan_layers(tiny_llama), preset("off"), "reference", RingConfig(4, 64), 200)

    def new_cache() -> list[Any]:
        return store.new_cache() if kind == "paged" else make_prompt_cache(tiny_llama)

    ours, theirs = ShortPromptGenerator(tiny_llama, **OPTIONS), BatchGenerator(tiny_llama, **OPTIONS)
    caches = {id(ours): [new_cache() for _ in range(6)], id(theirs): [new_cache() for _ in range(6)]}
    for turn in ([1, 230, 15, 64, 65, 3], [20, 20, 20, 20, 20, 20], [1, 2, 64, 300, 9, 64]):
        prompts = [RNG.integers(0, 97, size=n).tolist() for n in turn]
        results = []
        for generator in (ours, theirs):
            answers, caches[id(generator)], held = run(generator, prompts, caches[id(generator)], [9, 1, 5, 20, 3, 7])
            results.append((answers, held))
        assert results[0] == results[1]
    if kind == "paged":
        caches.clear()
        store.spec.check_integrity()
    ours.close()
    theirs.close()


class _Counting(Module):
    """Notes the shape of every forward pass."""

    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner = inner
        self.layers = inner.layers
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        self.shapes.append(tokens.shape)
        out: mx.array = self.inner(tokens, cache=cache)
        return out


def test_a_warm_turn_has_its_first_token_after_one_pass(tiny_llama: Module) -> None:
    store = CacheStore(tiny_llama, plan_layers(tiny_llama), preset("k4v4"), "packed", RingConfig(4, 64), 200)
    cache = store.new_cache()
    tiny_llama(mx.array([RNG.integers(0, 97, size=300).tolist()]), cache=cache)
    evaluate(cache)
    turn = RNG.integers(0, 97, size=15).tolist()
    logits = tiny_llama(mx.array([turn]), cache=fork(cache))
    model = _Counting(tiny_llama)
    generator = ShortPromptGenerator(model, **OPTIONS)
    (other,) = generator.insert([turn], max_tokens=[5], caches=[fork(cache)])
    generator.next()
    model.shapes.clear()
    (uid,) = generator.insert([turn], max_tokens=[2], caches=[cache])
    generator.next()
    assert generator.next_tokens([uid]) == {uid: int(mx.argmax(logits[0, -1]))}
    assert model.shapes == [(1, 15)]
    _, responses = generator.next()
    assert [response.uid for response in responses] == [other, uid]
    generator.close()


class _Faulty(_Counting):
    """Logits behind the token BAD are not finite."""

    BAD = 7

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        logits = super().__call__(tokens, cache)
        return mx.where((tokens[:, -1:] == self.BAD)[..., None], mx.nan, logits)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("length", [3, 80])
def test_a_mark_is_in_the_row_whose_logits_are_not_finite(tiny_llama: Module, shared: bool, length: int) -> None:
    """Whoever else is in the batch, with one sampler for all rows or one for each, after short prompts and long."""
    generator = ShortPromptGenerator(_Faulty(tiny_llama), **OPTIONS)
    one = mark_not_finite(greedy_sampler)
    prompts = [[1 + i] * (length - 1) + [last] for i, last in enumerate((5, _Faulty.BAD, 9))]
    uids = generator.insert(
        prompts,
        max_tokens=[3] * 3,
        samplers=[one if shared else mark_not_finite(greedy_sampler) for _ in prompts],
    )
    begun: set[int] = set()
    while len(begun) < len(uids):
        progress, _ = generator.next()
        ended = [p.uid for p in progress if p.end_of_prompt]
        begun |= set(ended)
        firsts = generator.next_tokens(ended)
        assert [uid for uid in ended if firsts[uid] == NOT_FINITE] == [uid for uid in ended if uid == uids[1]]
    _, responses = generator.next()
    assert [response.uid for response in responses if response.token == NOT_FINITE] == [uids[1]]
    assert generator.current_token(uids[1]) is None
    assert generator.current_token(uids[0]) == responses[0].token
    generator.close()
