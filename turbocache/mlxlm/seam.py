"""Replaces mlx-lm's attention. No other module does.

mlx-lm's model modules import `scaled_dot_product_attention` from `mlx_lm.models.base` by name and call it with the keys
and values that the layer's cache returned. `install` replaces it with `attention`, which computes `PendingAttention`
itself and passes all other calls to the original.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from turbocache.cache.view import PendingAttention

_NAME = "scaled_dot_product_attention"
_original: Callable[..., mx.array] = base.scaled_dot_product_attention
_native_calls = 0


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of a model's call of attention."""

    queries: mx.array
    keys: Any
    values: Any
    cache: Any
    mask: Any
    sinks: mx.array | None
    options: dict[str, Any]


_observer: Callable[[AttentionCall], tuple[Any, Any]] | None = None


def attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`, which leaves compressed caches to their own attention.

    A compressed cache is always causal and ignores the mask. Raises TypeError for options that it does not have.
    """
    if _observer is not None:
        keys, values = _observer(AttentionCall(queries, keys, values, cache, mask, sinks, options))
    if isinstance(keys, PendingAttention):
        if options:
            raise TypeError(f"attention over a paged cache has no option {', '.join(options)}")
        return keys.attend(queries, scale, sinks)
    global _native_calls
    _native_calls += cache is not None
    return _original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks, **options)


def native_calls() -> int:
    """Calls of attention over mlx-lm's own caches since the start."""
    return _native_calls


def install() -> None:
    """Route mlx-lm's attention through `attention`, in `base` and in every model module already imported.

    Idempotent. Modules imported later get it from `base`.
    """
    # A copy: an import by another thread or by the garbage collector may change `sys.modules` in between.
    for name, module in sys.modules.copy().items():
        if name.startswith("mlx_lm.models.") and getattr(module, _NAME, None) is _original:
            setattr(module, _NAME, attention)


@contextmanager
def observed(note: Callable[[AttentionCall], tuple[Any, Any]]) -> Iterator[None]:
    """Within the block, call `note` for every attention. It returns the keys and values for the rest of the call."""
    global _observer
    install()
    _observer = note
    try:
        yield
    finally:
        _observer = None
