"""What caches of other methods share: mlx-lm's interface, and attention of their own through the seam."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from turbocache.cache.view import PendingAttention

Answer = Callable[[mx.array, float, mx.array | None], mx.array]
"""Attention over what a layer holds: `(queries, scale, sinks)` to the output, as in `PendingAttention.attend`."""


class PendingAnswer(PendingAttention):
    """The handle that `update_and_fetch` returns in the place of keys and values."""

    __slots__ = ("_answer", "_dtype")

    def __init__(self, dtype: mx.Dtype, answer: Answer) -> None:
        self._dtype, self._answer = dtype, answer

    @property
    def dtype(self) -> mx.Dtype:
        return self._dtype

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        return self._answer(queries, scale, sinks)


class ComparedLayer(ABC):
    """One layer's cache for one row, with the interface of mlx-lm's caches. Its attention is causal."""

    @property
    @abstractmethod
    def offset(self) -> int:
        """Tokens so far."""

    @property
    @abstractmethod
    def state(self) -> Any:
        """All arrays that the layer holds. Their bytes are the layer's size."""

    @abstractmethod
    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PendingAttention, PendingAttention]:
        """Store keys and values `[1, n_kv_heads, L, dim]`. Returns the handle in the place of both."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """A causal mask. Raises ValueError for other masks."""
        if window_size is not None or return_array:
            raise ValueError("the comparison with other caches serves plain causal attention only")
        return "causal" if N > 1 else None

    def empty(self) -> bool:
        return self.offset == 0
