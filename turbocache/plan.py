"""Which layers of a model get the compressed cache, and why the others don't."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turbocache import seam


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What an attention layer hands to its cache. `dtype` is that of its keys."""

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One cache of the model: compressed with this geometry, or mlx-lm's own `kind` for the given reason."""

    kind: str
    geometry: LayerGeometry | None
    reason: str

    @property
    def compressed(self) -> bool:
        return self.geometry is not None


class _Observer(KVCache):  # type: ignore[misc]
    """mlx-lm's cache, noting what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.seen = keys, values
        fetched: tuple[mx.array, mx.array] = super().update_and_fetch(keys, values)
        return fetched


def plan_layers(model: nn.Module) -> list[LayerPlan]:
    """Run one token through the model and look at each layer's cache.

    Plain `KVCache` layers are compressed; sliding-window, recurrent and latent layers keep mlx-lm's own cache. The
    number of query heads is read where attention is called.
    """
    native = make_prompt_cache(model)
    caches = [_Observer() if type(cache) is KVCache else cache for cache in native]
    heads: dict[int, int] = {}

    def note(queries: mx.array, cache: Any) -> None:
        heads[id(cache)] = queries.shape[1]

    with seam.observed(note):
        mx.eval(model(mx.array([[0]]), cache=caches))
    plans = []
    for cache in caches:
        if not isinstance(cache, _Observer):
            kind = type(cache).__name__
            plans.append(LayerPlan(kind, None, f"{kind} layers keep mlx-lm's own cache"))
        elif cache.seen is None or id(cache) not in heads:
            plans.append(LayerPlan("KVCache", None, "the layer's attention does not pass through mlx-lm's shared one"))
        else:
            keys, values = cache.seen
            geometry = LayerGeometry(
                heads[id(cache)], keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype
            )
            plans.append(LayerPlan("PagedKVCache", geometry, "plain attention"))
    return plans


def all_native(plans: Sequence[LayerPlan], reason: str) -> list[LayerPlan]:
    """The same model without any compressed layer, for a reason that holds for all of them."""
    return [plan if not plan.compressed else LayerPlan("KVCache", None, reason) for plan in plans]
