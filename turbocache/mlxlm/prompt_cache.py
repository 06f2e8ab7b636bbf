"""A prompt cache's layers, with mlx-lm's `CacheList`s (several caches of one layer) taken apart."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.models.cache import CacheList


def leaves(cache: Sequence[Any]) -> list[Any]:
    """The caches that hold something themselves, in the order in which they stand."""
    found = []
    for layer in cache:
        found += leaves(layer.caches) if isinstance(layer, CacheList) else [layer]
    return found


def with_leaves(cache: Sequence[Any], replacements: Iterator[Any]) -> list[Any]:
    """The same structure with its leaves taken from `replacements`, in order."""
    return [
        CacheList(*with_leaves(layer.caches, replacements)) if isinstance(layer, CacheList) else next(replacements)
        for layer in cache
    ]
