"""Runs mlx-vlm's TurboQuant cache under a model of mlx-lm.

mlx-vlm has its own attention function for its caches, which mlx-lm's models do not call. Here the cache returns a
handle. This project's seam asks the handle for the attention's output, and the handle calls mlx-vlm's function. Without
Metal, mlx-vlm computes with plain MLX operations, with the same results to within float32.
"""

import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from turbocache.cache.view import PendingAttention
from turbocache.evaluation.compared import ComparedLayer, PendingAnswer


class NotInstalled(Exception):
    """mlx-vlm can't be imported. The message says why."""


class TurboQuantLayer(ComparedLayer):
    """mlx-vlm's TurboQuant cache of one layer and one row."""

    def __init__(self, native: Any, attention: Callable[..., mx.array]) -> None:
        self._native, self._attention = native, attention

    @property
    def offset(self) -> int:
        return int(self._native.offset)

    @property
    def state(self) -> Any:
        return self._native.state

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PendingAttention, PendingAttention]:
        states = self._native.update_and_fetch(keys, values)

        def answer(queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
            mask = "causal" if queries.shape[2] > 1 else None
            return self._attention(queries, *states, cache=self._native, scale=scale, mask=mask, sinks=sinks)

        pending = PendingAnswer(keys.dtype, answer)
        return pending, pending


def layer_maker(bits: float) -> Callable[[], TurboQuantLayer]:
    """Returns a function that makes a layer's cache of `bits` per value. Raises NotInstalled without mlx-vlm."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of its dependencies
            from mlx_vlm.models.base import scaled_dot_product_attention
            from mlx_vlm.turboquant import TurboQuantKVCache
    except Exception as error:  # an import of another project may raise anything
        raise NotInstalled(f"mlx-vlm can't be imported ({type(error).__name__}: {error})") from error
    return lambda: TurboQuantLayer(TurboQuantKVCache(bits), scaled_dot_product_attention)
