"""Decides which layers of a model get the compressed cache, with reasons for the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from kernels.codec.layout import PAGE
from turbocache.mlxlm.observe import PASSES, WatchedCache, watched_leaves
from turbocache.mlxlm.prompt_cache import leaves

LEAST_WINDOW = 2 * PAGE
"""Shorter sliding windows are never compressed."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What an attention layer gives its cache."""

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    """Of the keys."""
    sinks: bool = False
    """Whether the softmax has attention sinks."""

    @property
    def token_nbytes(self) -> int:
        """Bytes of a raw token."""
        return self.n_kv_heads * (self.key_dim + self.value_dim) * self.dtype.size


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The plan of one leaf of the model's prompt cache."""

    kind: str
    """The class of the cache."""
    geometry: LayerGeometry | None
    """None if the layer keeps mlx-lm's own cache."""
    reason: str
    fixed_nbytes: int = 0
    """Bytes of mlx-lm's own cache at any length."""
    token_nbytes: int = 0
    """Bytes of mlx-lm's own cache for each token it holds."""
    max_tokens: int | None = None
    """Tokens that mlx-lm's own cache holds at most. In a compressed layer, the sliding window: what a query sees."""

    def native_nbytes(self, n_tokens: int) -> int:
        """Bytes of mlx-lm's own cache after `n_tokens`. 0 for a compressed layer."""
        if self.compressed:
            return 0
        held = n_tokens if self.max_tokens is None else min(n_tokens, self.max_tokens)
        return self.fixed_nbytes + self.token_nbytes * held

    @property
    def compressed(self) -> bool:
        return self.geometry is not None

    @property
    def window(self) -> int | None:
        """The sliding window of a compressed layer."""
        return self.max_tokens if self.compressed else None

    def native(self, reason: str) -> "LayerPlan":
        """The plan with mlx-lm's own cache."""
        if (g := self.geometry) is None:
            return self
        kind = "KVCache" if self.max_tokens is None else "RotatingKVCache"
        return LayerPlan(kind, None, reason, 0, g.token_nbytes, self.max_tokens)


def plan_layers(model: Module) -> list[LayerPlan]:
    """Run a few tokens through the model and observe how it uses its caches (turbocache/mlxlm/observe.py).

    Returns one plan for each leaf of the model's prompt cache, in order. A plain `KVCache` under mlx-lm's shared causal
    attention is compressed, and a `RotatingKVCache` without a sink under the same with its window. Others keep mlx-lm's
    own cache. If the model can't run, its error is the reason.
    """
    try:
        watched = watched_leaves(model)
    except Exception as error:  # models are foreign code
        return _unwatched(model, f"{type(error).__name__}: {error}")
    return [_watched(leaf) if isinstance(leaf, WatchedCache) else _native(leaf, _reason(leaf)) for leaf in watched]


def all_native(plans: Sequence[LayerPlan], reason: str) -> list[LayerPlan]:
    """The same plans without a compressed layer, for one reason."""
    return [plan.native(reason) for plan in plans]


def _watched(cache: WatchedCache) -> LayerPlan:
    if cache.reason is not None or cache.new is None or cache.n_heads is None:
        return _native(cache.native, cache.reason or "")
    keys, values = cache.new
    geometry = LayerGeometry(cache.n_heads, keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, cache.sinks)
    if cache.window is None:
        return LayerPlan("PagedKVCache", geometry, "plain attention")
    plan = LayerPlan("PagedKVCache", geometry, f"sliding window of {cache.window} tokens", max_tokens=cache.window)
    return plan if cache.window >= LEAST_WINDOW else plan.native(too_small(cache.window))


def _unwatched(model: Module, error: str) -> list[LayerPlan]:
    """Plans of a model that raised under observation."""
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


def too_small(window: int) -> str:
    """Why layers with a sliding window keep mlx-lm's own cache."""
    return f"a sliding window of {window} tokens is too small for pages to pay"


_REASONS = {
    "RotatingKVCache": "a sliding window with a sink: mlx-lm's own cache holds no more than the window",
    "ArraysCache": "recurrent state: the same size at any length",
    "ChunkedKVCache": "chunked attention: mlx-lm's own cache holds no more than the chunk",
}


def _reason(cache: Any) -> str:
    kind = type(cache).__name__
    return _REASONS.get(kind, f"{kind} is the model's own kind of cache")
