"""Counts the bytes of a session's cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map

from turbocache.cache.spec import CacheSpec
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import CacheStore, batches_of, beside_pages, native_nbytes

_HALF = 2


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of one session, with unused slots that are allocated."""

    nbytes: int
    half_nbytes: int
    """The same for half precision. A float32 model stores raw tokens and scales in twice the bytes."""


def paged_bytes(store: CacheStore, cache: PromptCache) -> Stored:
    """Bytes of a session of this project: pages, sink, window, and the layers with mlx-lm's caches."""
    total = store.held_nbytes(cache)
    saved = float(native_nbytes(cache) - _halved(_arrays(cache)))
    for batch in batches_of(cache):
        # Codes and scales do not depend on the model's dtype. Pages of `off` hold raw tokens.
        pages = 0 if store.preset.compressed else len(batch.rings[0].pages) * batch.spec.pool.page_nbytes
        saved += _share_saved(batch.spec) * (beside_pages(batch) + pages)
    return Stored(total, total - round(saved))


def _share_saved(spec: CacheSpec) -> float:
    """The share of a raw token's bytes that half precision saves."""
    halved = sum(layer.n_values * min(_HALF, layer.dtype.size) for layer in spec.layers)
    return 1 - halved / spec.raw_token_nbytes


def foreign_bytes(cache: PromptCache) -> Stored:
    """Bytes of a session in mlx-lm's or mlx-vlm's caches: all their arrays."""
    arrays = _arrays(cache)
    return Stored(sum(array.nbytes for array in arrays), _halved(arrays))


def n_values(cache: PromptCache) -> int:
    """Numbers in a full-precision cache of mlx-lm, without unused slots."""
    total = 0
    for layer in cache:
        held = getattr(layer, "offset", None)
        for array in _arrays([layer]):
            slots = array.shape[2] if array.ndim == 4 and isinstance(held, int) else 0
            total += array.size // slots * min(held, slots) if slots and isinstance(held, int) else array.size
    return total


def _arrays(cache: PromptCache) -> list[mx.array]:
    """Arrays of all caches that are not paged."""
    arrays: list[mx.array] = []
    for leaf in (leaf for layer in cache for leaf in getattr(layer, "caches", (layer,))):
        if hasattr(leaf, "batch"):
            continue
        state = [leaf.keys, leaf.values] if hasattr(leaf, "keys") else leaf.state
        tree_map(lambda leaf: arrays.append(leaf) if isinstance(leaf, mx.array) else None, state)
    return arrays


def _halved(arrays: Sequence[mx.array]) -> int:
    return sum(array.size * _HALF if array.dtype == mx.float32 else array.nbytes for array in arrays)
