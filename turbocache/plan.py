"""Which layers of a model get the compressed cache, and why the others don't."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turbocache import seam


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What an attention layer hands to its cache. `dtype` is that of its keys; `sinks` if its attention has extra
    logits.
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    sinks: bool = False


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One cache of the model: compressed with this geometry, or mlx-lm's own `kind` for the given reason.

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


class _Observer:
    """mlx-lm's cache, noting what passes through it."""

    def __init__(self) -> None:
        self.native: Any = KVCache()
        self.seen: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.seen = keys, values
        return self.native.update_and_fetch(keys, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)


def plan_layers(model: Module) -> list[LayerPlan]:
    """Run one token through the model and look at each layer's cache.

    Plain `KVCache` layers are compressed; sliding-window, recurrent and latent layers keep mlx-lm's own cache. The
    number of query heads is read where attention is called.
    """
    native = make_prompt_cache(model)
    caches = [_Observer() if type(cache) is KVCache else cache for cache in native]
    heads: dict[int, tuple[int, bool]] = {}

    def note(queries: mx.array, cache: Any, sinks: mx.array | None) -> None:
        heads[id(cache)] = queries.shape[1], sinks is not None

    with seam.observed(note):
        mx.eval(model(mx.array([[0]]), cache=caches))
    plans = []
    for cache in caches:
        if not isinstance(cache, _Observer):
            plans.append(_native(cache, f"{type(cache).__name__} layers keep mlx-lm's own cache"))
        elif cache.seen is None or id(cache) not in heads:
            plans.append(_native(cache, "the layer's attention does not pass through mlx-lm's shared one"))
        else:
            keys, values = cache.seen
            n_heads, sinks = heads[id(cache)]
            geometry = LayerGeometry(n_heads, keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype, sinks)
            plans.append(LayerPlan("PagedKVCache", geometry, "plain attention"))
    return plans


def all_native(plans: Sequence[LayerPlan], reason: str) -> list[LayerPlan]:
    """The same model without any compressed layer, for a reason that holds for all of them."""

    def native(plan: LayerPlan) -> LayerPlan:
        if (g := plan.geometry) is None:
            return plan
        return LayerPlan("KVCache", None, reason, 0, g.n_kv_heads * (g.key_dim + g.value_dim) * g.dtype.size)

    return [native(plan) for plan in plans]


def _native(cache: Any, reason: str) -> LayerPlan:
    kind = "KVCache" if isinstance(cache, _Observer) else type(cache).__name__
    if cache.empty():
        return LayerPlan(kind, None, reason)
    if not hasattr(cache, "step"):  # recurrent states: the same size at any length
        return LayerPlan(kind, None, reason, fixed_nbytes=cache.nbytes)
    slots = cache.keys.shape[2]
    limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return LayerPlan(kind, None, reason, token_nbytes=-(-cache.nbytes // slots), max_tokens=limit)
