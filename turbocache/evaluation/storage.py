"""Bytes that a session's cache holds, counted from its arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from turbocache.store import CacheStore, native_nbytes

_HALF = 2


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of one session, allocated but unused slots counted. `half_nbytes` is the same where the model computes in
    half precision: a model in float32 keeps raw tokens, or scales, in twice the bytes.
    """

    nbytes: int
    half_nbytes: int


def paged_bytes(store: CacheStore, cache: Sequence[Any]) -> Stored:
    """A session of this project: its pages, its sink and window with all their slots, what belongs to it beside them,
    and the layers that keep mlx-lm's caches.
    """
    total = store.held_nbytes(cache)
    native = native_nbytes(cache)
    raw = [
        (layer.lanes.shape.n_kv_heads * (layer.lanes.shape.key_dim + layer.lanes.shape.value_dim), layer.dtype.size)
        for layer in store.spec.layers
    ]
    saved = sum(values * max(0, size - _HALF) for values, size in raw) * store.spec.ring.raw_slots
    saved += native - _halved(_arrays(cache)) if native else 0
    if not store.preset.compressed:  # pages hold raw tokens as well
        pages = total - native - store.spec.raw_nbytes
        saved += sum(pages // len(raw) * max(0, size - _HALF) // size for _, size in raw)
    return Stored(total, total - saved)


def foreign_bytes(cache: Sequence[Any]) -> Stored:
    """A session of mlx-lm's or mlx-vlm's caches: every array that they hold."""
    arrays = _arrays(cache)
    return Stored(sum(array.nbytes for array in arrays), _halved(arrays))


def n_values(cache: Sequence[Any]) -> int:
    """Numbers that a full-precision cache of mlx-lm's holds, unused slots not counted."""
    total = 0
    for layer in cache:
        held = getattr(layer, "offset", None)
        for array in _arrays([layer]):
            slots = array.shape[2] if array.ndim == 4 and isinstance(held, int) else 0
            total += array.size // slots * min(held, slots) if slots and isinstance(held, int) else array.size
    return total


def _arrays(cache: Sequence[Any]) -> list[mx.array]:
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
