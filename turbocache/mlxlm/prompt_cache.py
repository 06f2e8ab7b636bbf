"""mlx-lm's prompt caches and their leaves: a `CacheList` is one layer with several caches."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm.models.cache import CacheList

PromptCache = list[Any]
"""A model's prompt cache: mlx-lm's cache objects, one for each layer."""


def leaves(cache: Sequence[Any]) -> list[Any]:
    """The caches of all layers, each `CacheList` replaced by its members, in order."""
    flat: list[Any] = []
    for layer in cache:
        flat += leaves(layer.caches) if isinstance(layer, CacheList) else [layer]
    return flat


def with_leaves(cache: Sequence[Any], replacements: Iterator[Any]) -> PromptCache:
    """The same structure with leaves from `replacements`, in order."""
    return [
        CacheList(*with_leaves(layer.caches, replacements)) if isinstance(layer, CacheList) else next(replacements)
        for layer in cache
    ]
