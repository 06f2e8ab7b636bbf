"""Which layers of a model get the compressed cache, and why the others don't."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from turbocache.mlxlm.observe import PASSES, WatchedCache, watched_leaves
from turbocache.mlxlm.prompt_cache import leaves


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What an attention layer hands to its cache. `dtype` is that of its keys; `sinks` says whether its softmax has
    attention sinks.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One leaf of the model's prompt cache: compressed with this geometry, or mlx-lm's own `kind` for the given reason.

    `fixed_nbytes` and `token_nbytes` say what mlx-lm's own cache costs, for at most `max_tokens` tokens.
    """

    kind: str
    geometry: LayerGeometry | None
    reason: str
    fixed_nbytes: int = 0
    token_nbytes: int = 0
    max_tokens: int | None = None

    def native_nbytes(self, n_tokens: int) -> int:
        """Bytes of a layer that keeps mlx-lm's cache, at `n_tokens`; 0 for a compressed one."""
        if self.compressed:
            return 0
        held = n_tokens if self.max_tokens is None else min(n_tokens, self.max_tokens)
        return self.fixed_nbytes + self.token_nbytes * held

    @property
    def compressed(self) -> bool:
        return self.geometry is not None


def plan_layers(model: Module) -> list[LayerPlan]:
    """Run a few tokens through the model and see what it does with each of its caches (turbocache/mlxlm/observe.py).

    One plan per leaf of the model's prompt cache, in order; the members of a `CacheList` are planned one by one. Plain
    `KVCache`s behind mlx-lm's shared causal attention are compressed, others keep mlx-lm's own cache, with the reason.
    A model that can't run at all is planned as well, with its error as the reason.
    """
    try:
        found = watched_leaves(model)
    except Exception as error:  # models are foreign code
        return _unwatched(model, f"{type(error).__name__}: {error}")
    return [_watched(leaf) if isinstance(leaf, WatchedCache) else _native(leaf, _reason(leaf)) for leaf in found]


def all_native(plans: Sequence[LayerPlan], reason: str) -> list[LayerPlan]:
    """The same model without any compressed layer, for a reason that holds for all of them."""

    def native(plan: LayerPlan) -> LayerPlan:
        if (g := plan.geometry) is None:
            return plan
        return LayerPlan("KVCache", None, reason, 0, g.n_kv_heads * (g.key_dim + g.value_dim) * g.dtype.size)

    return [native(plan) for plan in plans]


def _watched(cache: WatchedCache) -> LayerPlan:
    if cache.reason is not None or cache.new is None or cache.n_heads is None:
        return _native(cache.native, cache.reason or "")
    keys, values = cache.new
    geometry = LayerGeometry(cache.n_heads, keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, cache.sinks)
    return LayerPlan("PagedKVCache", geometry, "plain attention")


def _unwatched(model: Module, error: str) -> list[LayerPlan]:
    """Plans of a model that raised while it was watched."""
    cache = make_prompt_cache(model)
    reason = f"the model can't be watched: {error}"
    try:
        mx.eval(model(mx.array([list(range(PASSES[0]))]), cache=cache))
    except Exception as own:
        reason = f"the model fails with mlx-lm's own cache: {type(own).__name__}: {own}"
        cache = make_prompt_cache(model)
    return [_native(leaf, reason) for leaf in leaves(cache)]


def _native(cache: Any, reason: str) -> LayerPlan:
    kind = type(cache).__name__
    if cache.empty():
        return LayerPlan(kind, None, reason)
    if not hasattr(cache, "step"):  # recurrent states: the same size at any length
        return LayerPlan(kind, None, reason, fixed_nbytes=cache.nbytes)
    slots = cache.keys.shape[2]
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return LayerPlan(kind, None, reason, token_nbytes=-(-cache.nbytes // slots), max_tokens=limit)


_REASONS = {
    "RotatingKVCache": "sliding window: mlx-lm's own cache holds no more than the window",
    "ArraysCache": "recurrent state: the same size at any length",
    "ChunkedKVCache": "chunked attention: mlx-lm's own cache holds no more than the chunk",
}


def _reason(cache: Any) -> str:
    kind = type(cache).__name__
    return _REASONS.get(kind, f"{kind} is the model's own kind of cache")
