"""mlx-vlm's TurboQuant cache under a model of mlx-lm: the comparison that is not in mlx-lm itself.

mlx-vlm answers its caches in an attention function of its own, which mlx-lm's models do not call. Here such a cache
hands the model a handle that this project's seam asks for the attention's output, and the handle calls mlx-vlm's
function. Without Metal that takes mlx-vlm's path of plain MLX operations, with the same numbers to within float32.
"""

import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from turbocache.cache.view import PendingAttention


class NotInstalled(Exception):
    """mlx-vlm can't be imported; the message says why."""


class _Pending(PendingAttention):
    """Keys and values in mlx-vlm's form, with the attention that belongs to them."""

    __slots__ = ("_answer",)

    def __init__(self, answer: Callable[..., mx.array]) -> None:
        self._answer = answer

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        return self._answer(queries, scale, sinks)


class TurboQuantLayer:
    """One layer's TurboQuant cache of mlx-vlm as mlx-lm's models use a cache, for one row."""

    def __init__(self, native: Any, attention: Callable[..., mx.array]) -> None:
        self._native, self._attention = native, attention

    @property
    def offset(self) -> int:
        return int(self._native.offset)

    @property
    def state(self) -> Any:
        return self._native.state

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PendingAttention, PendingAttention]:
        """Store `[1, n_kv_heads, L, dim]` and return the handle for their attention, twice."""
        states = self._native.update_and_fetch(keys, values)

        def answer(queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
            mask = "causal" if queries.shape[2] > 1 else None
            return self._attention(queries, *states, cache=self._native, scale=scale, mask=mask, sinks=sinks)

        pending = _Pending(answer)
        return pending, pending

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """mlx-vlm's cache is causal by itself. Raises ValueError for masks that this comparison does not serve."""
        if window_size is not None or return_array:
            raise ValueError("the comparison with mlx-vlm serves plain causal attention only")
        return "causal" if N > 1 else None

    def empty(self) -> bool:
        return self.offset == 0


def layer_maker(bits: float) -> Callable[[], TurboQuantLayer]:
    """What makes a layer's cache of `bits` a value. Raises NotInstalled where mlx-vlm can't be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies
            from mlx_vlm.models.base import scaled_dot_product_attention
            from mlx_vlm.turboquant import TurboQuantKVCache
    except Exception as error:  # foreign imports fail in their own ways
        raise NotInstalled(f"mlx-vlm can't be imported ({type(error).__name__}: {error})") from error
    return lambda: TurboQuantLayer(TurboQuantKVCache(bits), scaled_dot_product_attention)
