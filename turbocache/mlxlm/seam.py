"""The one place where this project enters mlx-lm's attention.

mlx-lm's model modules import `scaled_dot_product_attention` from `mlx_lm.models.base` by name and call it with
whatever the layer's cache returned. `install` puts a function in its place that answers `PendingAttention` itself and
passes everything else on unchanged.
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
    """The arguments of one call of attention, as a model made it."""

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
    """mlx-lm's `scaled_dot_product_attention`, with compressed caches answered by their own attention.

    The mask is ignored for these: a paged cache is causal by itself and knows each row's tokens. Raises TypeError for
    options that only other caches understand.
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
    """How often a layer with mlx-lm's own cache has attended since the start."""
    return _native_calls


def install() -> None:
    """Route mlx-lm's attention through `attention`, in `base` and in every model module already imported.

    Idempotent. Modules imported later take the name from `base` and so get it too.
    """
    # A copy: an import by another thread or by the garbage collector may change `sys.modules` in between.
    for name, module in sys.modules.copy().items():
        if name.startswith("mlx_lm.models.") and getattr(module, _NAME, None) is _original:
            setattr(module, _NAME, attention)


@contextmanager
def observed(note: Callable[[AttentionCall], tuple[Any, Any]]) -> Iterator[None]:
    """While the block runs, ask `note` about every attention that passes through the seam. It returns the keys and
    values with which the call goes on.
    """
    global _observer
    install()
    _observer = note
    try:
        yield
    finally:
        _observer = None
