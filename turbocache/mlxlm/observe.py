"""Observes how a model uses its caches: runs a few tokens through it.

Each plain `KVCache`, and each `RotatingKVCache` without a sink, is replaced by one that returns handles, as the paged
cache does. Only mlx-lm's shared attention can open them. A model that uses a handle in another way raises. It runs
again with real arrays in that cache, and that cache is not compressed. Nothing is evaluated, so it costs a few graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam
from turbocache.mlxlm.prompt_cache import PromptCache, leaves, with_leaves

PASSES = (5, 1, 3)
"""Tokens of each pass: a prompt, a decode step, a second chunk. Models may use another mask in each."""

WINDOW = "the layer has a sliding window, and no cache that is made for one"
OTHER_WINDOW = "the layer's mask has another window than its cache"
SERVES_OTHERS = "its mask serves layers with mlx-lm's own cache as well"
OWN_ATTENTION = "the layer's attention does not pass through mlx-lm's shared one"
CHANGED_KEYS = "keys or values are computed with between cache and attention, as in latent attention"


class _Misuse(Exception):
    """A handle was used as an array, or in the wrong place."""

    def __init__(self, leaf: "WatchedCache") -> None:
        super().__init__()
        self.leaf = leaf


class _Handle:
    """Replaces a cache's keys or values until attention opens it. Has the attributes of `PendingAttention`."""

    def __init__(self, leaf: "WatchedCache", array: mx.array) -> None:
        self.leaf, self.array = leaf, array

    @property
    def dtype(self) -> mx.Dtype:
        return self.array.dtype

    def astype(self, dtype: mx.Dtype) -> "_Handle":
        return self

    def __getattr__(self, name: str) -> NoReturn:
        raise _Misuse(self.leaf)

    def __getitem__(self, key: Any) -> NoReturn:
        raise _Misuse(self.leaf)


class _NamedMask(str):
    """A mask given by a name (`causal`), as an object with an identity."""


class WatchedCache:
    """mlx-lm's `KVCache` or `RotatingKVCache` with notes of how the model uses it."""

    def __init__(self, watch: "_Watch", opaque: bool, native: Any) -> None:
        self.native = native
        self.window: int | None = getattr(native, "max_size", None)
        """Tokens that a query sees if it is a sliding window."""
        self.opaque = opaque
        """Whether the model gets handles instead of arrays."""
        self.reason: str | None = None
        """Why it can't be a paged cache. None: no reason so far."""
        self.mask_reason: str | None = None
        """Why it can't, if the model uses the masks that it makes."""
        self.new: tuple[mx.array, mx.array] | None = None
        """Keys and values of the newest update."""
        self.handles: tuple[_Handle, _Handle] | None = None
        self.n_heads: int | None = None
        self.sinks = False
        self.reaches_attention = False
        self.makes_masks = False
        self.mask_sources: list[WatchedCache] = []
        """The caches that made the masks of its attention."""
        self._watch = watch

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """As mlx-lm's. An opaque cache returns handles for keys and values."""
        self.new = keys, values
        self._watch.updates.append(self)
        arrays = self.native.update_and_fetch(keys, values)
        if not self.opaque:
            return arrays
        self.handles = _Handle(self, arrays[0]), _Handle(self, arrays[1])
        return self.handles

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """As mlx-lm's, in an object whose use can be recognised."""
        self.makes_masks = True
        mask = self.native.make_mask(N, return_array=return_array, window_size=window_size)
        if isinstance(mask, str):
            mask = _NamedMask(mask)
        window = self.window if window_size is None else window_size
        if mask is not None:
            self._watch.masks.append(_Mask(mask, self, window))
        if window != self.window:
            self.mask_reason = WINDOW if self.window is None else OTHER_WINDOW
        elif return_array:
            self.mask_reason = "the model wants its mask as an array"
        return mask

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.native, name)
        if not hasattr(PagedKVCache, name):
            self.refuse(f"the model reads `{name}` of its cache")
        return value

    def refuse(self, reason: str) -> None:
        """Note why this can't be a paged cache. The first reason stays."""
        self.reason = self.reason or reason


@dataclass(frozen=True, slots=True)
class _Mask:
    mask: Any
    source: WatchedCache
    window: int | None


@dataclass
class _Watch:
    """The notes of one run: the masks that caches made, and the order of updates."""

    masks: list[_Mask] = field(default_factory=list)
    updates: list[WatchedCache] = field(default_factory=list)

    def attention(self, call: seam.AttentionCall) -> tuple[Any, Any]:
        """Open the handles of a call that a paged cache can serve. Raises _Misuse for other uses of handles."""
        made = next((made for made in self.masks if made.mask is call.mask), None)
        handles = [x for x in (call.keys, call.values) if isinstance(x, _Handle)]
        if not handles:
            if isinstance(call.cache, WatchedCache):
                call.cache.reaches_attention = True
            if made is not None:
                made.source.mask_reason = SERVES_OTHERS
            return call.keys, call.values
        leaf = handles[0].leaf
        if leaf.handles is None or call.keys is not leaf.handles[0] or call.values is not leaf.handles[1]:
            raise _Misuse(leaf)
        _note(leaf, call, made)
        return handles[0].array, handles[1].array


def _note(leaf: WatchedCache, call: seam.AttentionCall, made: _Mask | None) -> None:
    """Note a call of attention over a cache's own keys and values."""
    assert leaf.new is not None
    _, n_heads, n_tokens, _ = call.queries.shape
    leaf.sinks |= call.sinks is not None
    if leaf.n_heads not in (None, n_heads):
        leaf.refuse("layers with different numbers of query heads attend to it")
    leaf.n_heads = n_heads
    if n_tokens != leaf.new[0].shape[2]:
        leaf.refuse("attention asks for other tokens than the newest")
    if call.options:
        leaf.refuse(f"its attention has the option {', '.join(call.options)}")
    if made is not None:
        leaf.mask_sources.append(made.source)
        if made.window != leaf.window:
            leaf.refuse(WINDOW if leaf.window is None else OTHER_WINDOW)
    elif isinstance(call.mask, mx.array):
        leaf.refuse("its mask is the model's own (a window, chunks or biases)")
    elif call.mask is None and n_tokens > 1:
        leaf.refuse("its attention is not causal")
    elif leaf.window is not None and n_tokens > 1:
        leaf.refuse(OTHER_WINDOW)


def watched_leaves(model: Module) -> list[Any]:
    """The leaves of a prompt cache after a few tokens, watched if pages may serve them. Raises the model's errors."""
    transparent: set[int] = set()
    while True:
        watch, native = _Watch(), make_prompt_cache(model)
        watched = [
            WatchedCache(watch, i not in transparent, leaf) if _may_be_paged(leaf) else leaf
            for i, leaf in enumerate(leaves(native))
        ]
        try:
            with seam.observed(watch.attention):
                for n in PASSES:
                    _forward(model, with_leaves(native, iter(watched)), n, watch)
        except Exception as error:  # a model that meets a handle may raise anything
            opaque = [leaf for leaf in watch.updates if leaf.opaque]
            culprit = error.leaf if isinstance(error, _Misuse) else opaque[-1] if opaque else None
            if culprit is None:
                raise
            transparent.add(watched.index(culprit))
        else:
            _judge([leaf for leaf in watched if isinstance(leaf, WatchedCache)])
            return watched


def _may_be_paged(leaf: Any) -> bool:
    return type(leaf) is KVCache or (type(leaf) is RotatingKVCache and leaf.keep == 0)


def _forward(model: Module, cache: PromptCache, n_tokens: int, watch: _Watch) -> None:
    """Run one pass and check the order in which it updates the caches."""
    watch.updates.clear()
    model(mx.array([list(range(n_tokens))]), cache=cache)
    order = {id(leaf): i for i, leaf in enumerate(leaves(cache))}
    last = -1
    for leaf in watch.updates:
        if watch.updates.count(leaf) > 1:
            leaf.refuse("the cache is updated more than once per token")
        elif order[id(leaf)] < last:
            leaf.refuse("the caches are not updated in the order in which they stand")
        last = max(last, order[id(leaf)])


def _judge(caches: Sequence[WatchedCache]) -> None:
    """Note the reasons that are known only after all passes."""
    for cache in caches:
        if cache.new is None:
            cache.refuse("the model does not use this cache")
        elif not cache.opaque:
            cache.refuse(CHANGED_KEYS if cache.reaches_attention else OWN_ATTENTION)
        elif cache.n_heads is None:
            cache.refuse(OWN_ATTENTION)
        if cache.mask_reason is not None:
            cache.refuse(cache.mask_reason)
    _refuse_sources(caches)


def _refuse_sources(caches: Sequence[WatchedCache]) -> None:
    """Refuse caches whose masks serve layers with mlx-lm's own cache, because batches are padded differently there.

    A model's own attention hides its mask, so it may use any.
    """
    makers = [cache for cache in caches if cache.makes_masks]
    refused = [cache for cache in caches if cache.reason and cache.new is not None]
    while refused:
        cache = refused.pop()
        unknown = cache.n_heads is None and not cache.makes_masks
        for source in makers if unknown else cache.mask_sources:
            if source.reason is None:
                source.refuse(SERVES_OTHERS)
                refused.append(source)
