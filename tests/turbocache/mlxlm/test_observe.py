"""What stands against a paged cache is seen, for each cache of a model by itself."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models import base
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from turbocache.cache.ring import RingConfig
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import observe
from turbocache.mlxlm.plan import LayerPlan, plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore, can_trim_to, native_nbytes, ring_of

Forward = Callable[[mx.array, list[Any]], None]


class _Model(Module):
    """A model that does with its caches what a test tells it to."""

    def __init__(self, forward: Forward, make: Callable[[], list[Any]] = lambda: [KVCache(), KVCache()]) -> None:
        super().__init__()
        self._forward, self._make = forward, make

    def make_cache(self) -> list[Any]:
        return self._make()

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        self._forward(mx.zeros((1, tokens.shape[1], 8)), cache)
        return mx.zeros((1, tokens.shape[1], 97))


def _update(h: mx.array, cache: Any) -> Any:
    return cache.update_and_fetch(*(mx.ones((1, 2, h.shape[1], 16)) for _ in range(2)))


def _attend(
    h: mx.array, cache: Any, mask: Any, n_heads: int = 4, keys: Any = None, values: Any = None, **more: Any
) -> None:
    if keys is None:
        keys, values = _update(h, cache)
    queries = mx.ones((1, n_heads, h.shape[1], 16))
    base.scaled_dot_product_attention(queries, keys, values, cache=cache, scale=1.0, mask=mask, **more)


def _plain(h: mx.array, cache: list[Any]) -> None:
    mask = base.create_attention_mask(h, cache[0])
    for layer in cache:
        _attend(h, layer, mask)


def _reasons(plans: list[LayerPlan]) -> list[str]:
    return [plan.reason for plan in plans]


def test_the_control_is_compressed() -> None:
    assert _reasons(plan_layers(_Model(_plain))) == ["plain attention"] * 2


def test_sinks_are_noted() -> None:
    def forward(h: mx.array, cache: list[Any]) -> None:
        _attend(h, cache[0], base.create_attention_mask(h, cache[0]), sinks=mx.zeros(4))
        _attend(h, cache[1], base.create_attention_mask(h, cache[1]))

    assert [plan.geometry.sinks for plan in plan_layers(_Model(forward)) if plan.geometry] == [True, False]


def _latent(h: mx.array, cache: Any) -> None:
    latent, _ = _update(h, cache)
    _attend(h, cache, "causal" if h.shape[1] > 1 else None, keys=latent, values=latent)


def _cut(h: mx.array, cache: Any) -> None:
    keys, values = _update(h, cache)
    _attend(h, cache, None, keys=keys[:, :, -2:], values=values[:, :, -2:])


def _own(h: mx.array, cache: Any) -> None:
    keys, values = _update(h, cache)
    mx.fast.scaled_dot_product_attention(keys, keys, values, scale=1.0)


def _twice(h: mx.array, cache: Any) -> None:
    for _ in range(2):
        _attend(h, cache, base.create_attention_mask(h, cache))


def _windowed(h: mx.array, cache: Any) -> None:
    _attend(h, cache, base.create_attention_mask(h, cache, window_size=3))


def _biased(h: mx.array, cache: Any) -> None:
    _attend(h, cache, base.create_causal_mask(h.shape[1], cache.offset))


def _unmasked(h: mx.array, cache: Any) -> None:
    _attend(h, cache, None)


def _array(h: mx.array, cache: Any) -> None:
    _attend(h, cache, base.create_attention_mask(h, cache, return_array=True))


def _reading(h: mx.array, cache: Any) -> None:
    _attend(h, cache, base.create_attention_mask(h, cache))
    cache.keys_and_values()


def _uneven(h: mx.array, cache: Any) -> None:
    keys, values = _update(h, cache)
    for n_heads in (4, 2):
        _attend(h, cache, "causal" if h.shape[1] > 1 else None, n_heads, keys, values)


def _last_query(h: mx.array, cache: Any) -> None:
    keys, values = _update(h, cache)
    _attend(h[:, -1:], cache, None, keys=keys, values=values)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (_latent, observe.CHANGED_KEYS),
        (_cut, observe.CHANGED_KEYS),
        (_own, observe.OWN_ATTENTION),
        (_twice, "the cache is updated more than once per token"),
        (_windowed, observe.WINDOW),
        (_biased, "its mask is the model's own (a window, chunks or biases)"),
        (_unmasked, "its attention is not causal"),
        (_array, "the model wants its mask as an array"),
        (_reading, "the model reads `keys_and_values` of its cache"),
        (_uneven, "layers with different numbers of query heads attend to it"),
        (_last_query, "attention asks for other tokens than the newest"),
        (lambda h, cache: None, "the model does not use this cache"),
    ],
)
def test_a_layer_that_does_something_else_is_refused_alone(layer: Callable[[mx.array, Any], None], reason: str) -> None:
    def forward(h: mx.array, cache: list[Any]) -> None:
        _attend(h, cache[0], "causal" if h.shape[1] > 1 else None)
        layer(h, cache[1])

    assert _reasons(plan_layers(_Model(forward))) == ["plain attention", reason]


def test_a_mask_of_a_paged_cache_never_serves_another_kind_of_cache() -> None:
    def shared_mask(h: mx.array, cache: list[Any]) -> None:
        mask = base.create_attention_mask(h, cache[0])
        _attend(h, cache[0], mask)
        _attend(h, cache[1], mask)

    mixed = _Model(shared_mask, lambda: [KVCache(), RotatingKVCache(max_size=8)])
    assert _reasons(plan_layers(mixed))[0] == observe.SERVES_OTHERS

    def hidden_mask(h: mx.array, cache: list[Any]) -> None:
        mask = base.create_attention_mask(h, cache[0])
        _attend(h, cache[0], mask)
        _own(h, cache[1])
        _attend(h, cache[2], mask)

    plans = plan_layers(_Model(hidden_mask, lambda: [KVCache(), KVCache(), KVCache()]))
    assert _reasons(plans) == [observe.SERVES_OTHERS, observe.OWN_ATTENTION, "plain attention"]


def test_a_windowed_mask_speaks_against_every_layer_that_uses_it() -> None:
    def forward(h: mx.array, cache: list[Any]) -> None:
        _attend(h, cache[0], base.create_attention_mask(h, cache[0]))
        mask = base.create_attention_mask(h, cache[1], window_size=3)
        _attend(h, cache[1], mask)
        _attend(h, cache[2], mask)

    plans = plan_layers(_Model(forward, lambda: [KVCache(), KVCache(), KVCache()]))
    assert _reasons(plans) == ["plain attention", observe.WINDOW, observe.WINDOW]


def test_caches_that_are_updated_out_of_order_are_refused() -> None:
    def forward(h: mx.array, cache: list[Any]) -> None:
        for layer in reversed(cache):
            _attend(h, layer, "causal" if h.shape[1] > 1 else None)

    reasons = _reasons(plan_layers(_Model(forward)))
    assert reasons == ["the caches are not updated in the order in which they stand", "plain attention"]


def test_a_model_that_fails_by_itself_is_planned_with_its_error() -> None:
    def forward(h: mx.array, cache: list[Any]) -> None:
        _plain(h, cache)
        raise ValueError("no such kernel")

    plans = plan_layers(_Model(forward))
    assert _reasons(plans) == ["the model fails with mlx-lm's own cache: ValueError: no such kernel"] * 2


def test_a_model_that_only_fails_under_watch_keeps_the_sizes_of_its_caches() -> None:
    def forward(h: mx.array, cache: list[Any]) -> None:
        if not isinstance(cache[0], KVCache):
            raise TypeError("a KVCache is wanted")
        _plain(h, cache)

    plans = plan_layers(_Model(forward))
    assert plans[0].reason == "the model can't be watched: TypeError: a KVCache is wanted"
    assert plans[0].native_nbytes(10) == 10 * 2 * 2 * 16 * 4


def _with_lists() -> list[Any]:
    return [CacheList(ArraysCache(size=1), KVCache()), KVCache()]


def _hybrid(h: mx.array, cache: list[Any]) -> None:
    cache[0][0][0] = mx.zeros((1, 4))
    for layer in (cache[0][1], cache[1]):
        _attend(h, layer, base.create_attention_mask(h, layer))


def test_the_members_of_a_cache_list_are_planned_and_replaced_one_by_one() -> None:
    model = _Model(_hybrid, _with_lists)
    plans = plan_layers(model)
    assert [plan.kind for plan in plans] == ["ArraysCache", "PagedKVCache", "PagedKVCache"]
    store = CacheStore(model, plans, preset("off"), "reference", RingConfig(2, 0), n_pages=4)
    cache = store.new_cache()
    assert isinstance(cache[0], CacheList)
    assert [type(leaf) for leaf in cache[0].caches] == [ArraysCache, PagedKVCache]
    model(mx.array([[1] * 70]), cache=cache)
    assert ring_of(cache[:1]) is not None
    assert native_nbytes(cache) == 16
    assert can_trim_to(cache, 70, 70)
    assert not can_trim_to(cache, 60, 70)  # the recurrent state can't
    assert len(store.spec.live) == 1
    store.close_all_but([cache[:1]])
    assert ring_of(cache).offset == 70  # type: ignore[union-attr]


def test_nothing_stays_of_the_watch(tiny_llama: Module) -> None:
    plan_layers(tiny_llama)
    cache = make_prompt_cache(tiny_llama)
    tiny_llama(mx.array([[1, 2]]), cache=cache)
    assert cache[0].keys.shape[1] == 2


def _window_of(size: int | None) -> Callable[[mx.array, list[Any]], None]:
    def forward(h: mx.array, cache: list[Any]) -> None:
        mask = base.create_attention_mask(h, cache[0], window_size=size)
        for layer in cache:
            _attend(h, layer, mask)

    return forward


def _named(h: mx.array, cache: list[Any]) -> None:
    for layer in cache:
        _attend(h, layer, "causal" if h.shape[1] > 1 else None)


SLIDING = "sliding window of 200 tokens"


@pytest.mark.parametrize(
    ("forward", "kinds", "reasons"),
    [
        (_window_of(None), (200, 200), [SLIDING, SLIDING]),
        (_window_of(200), (200, 200), [SLIDING, SLIDING]),
        (_window_of(150), (200, 200), [observe.OTHER_WINDOW, observe.OTHER_WINDOW]),
        (_named, (200, 200), [observe.OTHER_WINDOW, observe.OTHER_WINDOW]),
        (_named, (None, 200), ["plain attention", observe.OTHER_WINDOW]),
        (_window_of(None), (200, None), [observe.SERVES_OTHERS, observe.WINDOW]),
        (_window_of(None), (None, 200), [observe.SERVES_OTHERS, observe.OTHER_WINDOW]),
        (_window_of(None), (200, 300), [observe.SERVES_OTHERS, observe.OTHER_WINDOW]),
    ],
)
def test_a_sliding_window_is_that_of_cache_and_mask(
    forward: Forward, kinds: tuple[int | None, ...], reasons: list[str]
) -> None:
    def make() -> list[Any]:
        return [KVCache() if size is None else RotatingKVCache(size) for size in kinds]

    assert _reasons(plan_layers(_Model(forward, make))) == reasons


def test_a_sliding_window_with_a_sink_keeps_mlx_lms_cache() -> None:
    plans = plan_layers(_Model(_window_of(None), lambda: [RotatingKVCache(200, keep=4)]))
    assert _reasons(plans) == ["a sliding window with a sink: mlx-lm's own cache holds no more than the window"]
