import gc
import sys
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from tests.oracles import Heads, attend_dense, make_spec
from turbocache.cache.ring import RingConfig
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam


def random(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def test_install_reaches_base_and_every_imported_model_and_is_idempotent(
    tiny_llama: Module, tiny_qwen3: Module
) -> None:
    seam.install()
    seam.install()
    assert base.scaled_dot_product_attention is seam.attention
    for name in ("mlx_lm.models.llama", "mlx_lm.models.qwen3"):
        assert sys.modules[name].scaled_dot_product_attention is seam.attention  # type: ignore[attr-defined]
    assert seam._original is not seam.attention


def test_install_bears_imports_while_it_looks_at_the_modules() -> None:
    """The garbage collector runs finalizers at any allocation, and these may import."""
    names = [f"tests.imported_by_a_finalizer_{i}" for i in range(100)]
    waiting = list(names)

    def import_one(phase: str, info: dict[str, int]) -> None:
        if waiting:
            name = waiting.pop()
            sys.modules[name] = ModuleType(name)

    # CPython keeps 2,000 freed pairs, which it hands out again without an allocation: hold them.
    pairs = [(name, i) for name in names for i in range(50)]
    thresholds = gc.get_threshold()
    gc.callbacks.append(import_one)
    gc.set_threshold(1)
    try:
        seam.install()
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(import_one)
        for name in names:
            sys.modules.pop(name, None)
    del pairs


@pytest.mark.parametrize("mask", [None, "causal"])
def test_other_caches_pass_through_unchanged(mask: str | None) -> None:
    q, k, v = random(1, 4, 5, 16, seed=0), random(1, 2, 9, 16, seed=1), random(1, 2, 9, 16, seed=2)
    got = seam.attention(q, k, v, KVCache(), scale=0.25, mask=mask)
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask)
    np.testing.assert_array_equal(np.array(got), np.array(want))
    sinks = random(4, seed=3)
    got = seam.attention(q, k, v, None, scale=0.25, mask=mask, sinks=sinks)
    want = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask, sinks=sinks)
    np.testing.assert_array_equal(np.array(got), np.array(want))


def test_mlx_lms_quantised_caches_pass_through_unchanged() -> None:
    cache = QuantizedKVCache(group_size=32, bits=4)
    q = random(1, 4, 1, 32, seed=0)
    keys, values = cache.update_and_fetch(random(1, 2, 9, 32, seed=1), random(1, 2, 9, 32, seed=2))
    got = seam.attention(q + 0, keys, values, cache, scale=0.25, mask=None)
    want = base.quantized_scaled_dot_product_attention(
        q + 0, keys, values, scale=0.25, mask=None, group_size=32, bits=4
    )
    np.testing.assert_array_equal(np.array(got), np.array(want))


@pytest.mark.parametrize("preset_name", ["off", "k8v8"])
@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_attention_sinks_reach_paged_attention(preset_name: str, backend: str) -> None:
    """A logit per head without a value, in prefill and in decode (gpt-oss); mlx-lm refuses them when quantised."""
    heads = Heads(4, 2, 64, 64)
    spec = make_spec(RingConfig(0, 0, None), [heads], 8, preset_name, backend)
    view = PagedKVCache.layers(spec)[0]
    sinks = random(4, seed=9) * 3
    keys, values = np.zeros((0, 2, 64)), np.zeros((0, 2, 64))
    for n in (70, 1, 1):
        q, k, v = random(1, 4, n, 64, seed=n), random(1, 2, n, 64, seed=n + 1), random(1, 2, n, 64, seed=n + 2)
        pending = view.update_and_fetch(k, v)
        out = np.array(seam.attention(q, *pending, view, scale=0.125, mask=None, sinks=sinks))
        keys = np.concatenate([keys, np.array(k)[0].swapaxes(0, 1)])
        values = np.concatenate([values, np.array(v)[0].swapaxes(0, 1)])
        for column in range(n):
            end = len(keys) - n + column + 1
            want = attend_dense(np.array(q)[0, :, column], keys[:end], values[:end], 0.125, np.array(sinks))
            without = attend_dense(np.array(q)[0, :, column], keys[:end], values[:end], 0.125)
            np.testing.assert_allclose(out[0, :, column], want, atol=5e-6 if preset_name == "off" else 1e-2)
        assert np.abs(want - without).max() > 3e-2 * np.abs(without).max()


def test_options_of_other_caches_are_refused() -> None:
    view = PagedKVCache.layers(make_spec(RingConfig(0, 0, None), [Heads()], 4))[0]
    pending = view.update_and_fetch(random(1, 2, 3, 16, seed=0), random(1, 2, 3, 16, seed=1))
    with pytest.raises(TypeError, match="no option window"):
        seam.attention(random(1, 4, 3, 16, seed=2), *pending, view, scale=1.0, mask=None, window=3)


def test_queries_in_another_dtype_get_their_answer_in_it() -> None:
    view = PagedKVCache.layers(make_spec(RingConfig(0, 0, None), [Heads()], 4, dtype=mx.float16))[0]
    for n in (70, 1):
        keys, values = view.update_and_fetch(*(random(1, 2, n, 16, seed=i).astype(mx.float16) for i in range(2)))
        assert values.dtype == mx.float16
        queries = random(1, 4, n, 16, seed=2)
        out = seam.attention(queries, keys.astype(mx.float32), values, view, scale=1.0, mask=None)
        assert out.dtype == mx.float32


def test_observed_sees_every_call_and_stops_at_the_end(tiny_llama: Module) -> None:
    seen: list[tuple[int, ...]] = []

    def note(call: seam.AttentionCall) -> tuple[Any, Any]:
        seen.append(call.queries.shape)
        return call.keys, call.values

    with seam.observed(note):
        tiny_llama(mx.array([[1, 2, 3]]), cache=make_prompt_cache(tiny_llama))
    assert seen == [(1, 4, 3, 64)] * 2
    tiny_llama(mx.array([[1, 2, 3]]), cache=make_prompt_cache(tiny_llama))
    assert len(seen) == 2
    with pytest.raises(KeyError), seam.observed(note):
        raise KeyError
    tiny_llama(mx.array([[1, 2, 3]]), cache=make_prompt_cache(tiny_llama))
    assert len(seen) == 2
