"""Bytes that a session's cache holds, counted from its arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import CacheStore, native_nbytes, ring_of

_HALF = 2


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of one session, allocated but unused slots counted. `half_nbytes` is the same where the model computes in
    half precision: a model in float32 keeps raw tokens, or scales, in twice the bytes.
    """

    nbytes: int
    half_nbytes: int


def paged_bytes(store: CacheStore, cache: PromptCache) -> Stored:
    """A session of this project: its pages, its sink and window with all their slots, what belongs to it beside them,
    and the layers that keep mlx-lm's caches.
    """
    total, native = store.held_nbytes(cache), native_nbytes(cache)
    ring = ring_of(cache)
    pages = 0 if ring is None else len(ring.pages) * store.spec.pool.page_nbytes
    raw = total - native - pages
    # Codes and scales are the same in every model; `off` keeps raw tokens in its pages.
    as_the_model_has_them = raw if store.preset.compressed else raw + pages
    saved = _share_saved(store) * as_the_model_has_them + native - _halved(_arrays(cache))
    return Stored(total, total - round(saved))


def _share_saved(store: CacheStore) -> float:
    """Of a raw token's bytes, how much half precision would save."""
    shapes = [(layer.lanes.shape, layer.dtype.size) for layer in store.spec.layers]
    values = [(shape.n_kv_heads * (shape.key_dim + shape.value_dim), size) for shape, size in shapes]
    nbytes = sum(count * size for count, size in values)
    return sum(count * max(0, size - _HALF) for count, size in values) / nbytes if nbytes else 0.0


def foreign_bytes(cache: PromptCache) -> Stored:
    """A session of mlx-lm's or mlx-vlm's caches: every array that they hold."""
    arrays = _arrays(cache)
    return Stored(sum(array.nbytes for array in arrays), _halved(arrays))


def n_values(cache: PromptCache) -> int:
    """Numbers that a full-precision cache of mlx-lm's holds, unused slots not counted."""
    total = 0
    for layer in cache:
        held = getattr(layer, "offset", None)
        for array in _arrays([layer]):
            slots = array.shape[2] if array.ndim == 4 and isinstance(held, int) else 0
            total += array.size // slots * min(held, slots) if slots and isinstance(held, int) else array.size
    return total


def _arrays(cache: PromptCache) -> list[mx.array]:
    """Arrays of caches that are not paged ones."""
    found: list[mx.array] = []
    for leaf in (leaf for layer in cache for leaf in getattr(layer, "caches", (layer,))):
        if hasattr(leaf, "batch"):
            continue
        state = [leaf.keys, leaf.values] if hasattr(leaf, "keys") else leaf.state
        tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, mx.array) else None, state)
    return found


def _halved(arrays: Sequence[mx.array]) -> int:
    return sum(array.size * _HALF if array.dtype == mx.float32 else array.nbytes for array in arrays)
