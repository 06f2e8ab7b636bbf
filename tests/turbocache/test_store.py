from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models import base, llama
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from turbocache.cache.ring import RingConfig
from turbocache.cache.view import PagedKVCache
from turbocache.presets import preset
from turbocache.store import CacheStore, checked_plans


def test_a_mixed_model_says_the_same_as_with_mlx_lms_caches(gemma: Module) -> None:
    plans = checked_plans(gemma)
    assert [plan.compressed for plan in plans] == [False, True, False, True]
    store = CacheStore(gemma, plans, preset("off"), "packed", RingConfig(4, 0), 50)
    ours, theirs = store.new_cache(), make_prompt_cache(gemma)
    assert [type(layer) for layer in ours] == [RotatingKVCache, PagedKVCache] * 2
    for tokens in ([5] * 3 + list(range(90)), [7], list(range(40)), [1]):
        got, want = (gemma(mx.array([tokens]), cache=cache) for cache in (ours, theirs))
        assert float(mx.abs(got - want).max()) < 1e-3 * float(mx.abs(want).max())


class _Peeking(Module):
    """A model that looks at its keys before attention, which only real arrays allow; in long prompts only."""

    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner = inner
        self.layers = inner.layers

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        n = tokens.shape[1]
        for layer in cache:
            q, k, v = mx.ones((1, 4, n, 64)), mx.ones((1, 2, n, 64)), mx.ones((1, 2, n, 64))
            keys, values = layer.update_and_fetch(k, v)
            keys, mask = (keys[..., :] if n > 20 else keys), "causal" if n > 1 else None
            base.scaled_dot_product_attention(q, keys, values, cache=layer, scale=1.0, mask=mask)
        return mx.ones((1, n, 97))


def test_a_model_that_cannot_use_paged_caches_falls_back_as_a_whole_with_the_reason(tiny_llama: Module) -> None:
    plans = checked_plans(_Peeking(tiny_llama))
    assert not any(plan.compressed for plan in plans)
    assert "can't use a paged cache: TypeError" in plans[0].reason


class _Deaf(llama.Model):  # type: ignore[misc]
    """A model that gives its cache other keys than attention should see: it moves the positions of long prompts."""

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        out: mx.array = super().__call__(inputs, cache=cache)
        if cache is not None and isinstance(cache[0], PagedKVCache):
            out = out[:, :, ::-1]
        return out


class _Undefined(llama.Model):  # type: ignore[misc]
    """A model that has no numbers to show over paged caches."""

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        out: mx.array = super().__call__(inputs, cache=cache)
        return out * float("nan") if cache is not None and isinstance(cache[0], PagedKVCache) else out


def test_logits_that_are_no_numbers_are_a_reason_to_fall_back(tiny_llama: Module) -> None:
    undefined = _Undefined(tiny_llama.args)
    undefined.update(tiny_llama.parameters())
    plans = checked_plans(undefined)
    assert not any(plan.compressed for plan in plans)
    assert "differ by inf%" in plans[0].reason


class _LongFails(llama.Model):  # type: ignore[misc]
    """A model that fails with any cache, in prompts that are not very short."""

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        if inputs.shape[1] > 20:
            raise ValueError("too long")
        out: mx.array = super().__call__(inputs, cache=cache)
        return out


def test_a_model_that_fails_anyway_is_not_said_to_fail_because_of_pages(tiny_llama: Module) -> None:
    failing = _LongFails(tiny_llama.args)
    failing.update(tiny_llama.parameters())
    reason = checked_plans(failing)[0].reason
    assert reason == "the model fails with mlx-lm's own cache: ValueError: too long"


def test_other_logits_than_with_mlx_lms_caches_are_a_reason_to_fall_back(tiny_llama: Module) -> None:
    deaf = _Deaf(tiny_llama.args)
    deaf.update(tiny_llama.parameters())
    plans = checked_plans(deaf)
    assert not any(plan.compressed for plan in plans)
    assert "logits over a paged cache differ by" in plans[0].reason
    assert plans[0].token_nbytes == 2 * 2 * 64 * 4
    assert all(plan.compressed for plan in checked_plans(tiny_llama))
