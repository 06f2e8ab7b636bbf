"""What mlx-lm sees: one cache object per attention layer, all of them views of one `CacheBatch`.

mlx-lm treats a prompt cache as a list of independent layer caches. Here the layers of a spec share page lists. So the
view of a spec's first layer (the leader) changes rows and steps for all its layers, and the others follow. This relies
on one thing: mlx-lm visits the layers in order in every operation.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from kernels.attention.device import constant, resident, steps_on_device
from kernels.lanes.base import Pair
from turbocache.cache.batch import CacheBatch
from turbocache.cache.spec import CacheSpec
from turbocache.cache.steps import DecodeStep, PrefillStep


class PendingAttention:
    """Returned by `update_and_fetch` in place of keys and values. The seam calls its `attend`."""

    __slots__ = ("_batch", "_layer", "_step", "_tokens")

    def __init__(
        self, batch: CacheBatch, layer: int, step: DecodeStep | PrefillStep, tokens: Pair | list[Pair]
    ) -> None:
        self._batch, self._layer, self._step, self._tokens = batch, layer, step, tokens

    @property
    def dtype(self) -> mx.Dtype:
        """The raw tokens' dtype. Models read it from their keys or values."""
        return self._batch.spec.layers[self._layer].dtype

    def astype(self, dtype: mx.Dtype) -> "PendingAttention":
        """Returns itself. Some models ask for attention in float32, and all sums here are in float32."""
        return self

    def attend(self, queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
        """`[B, n_heads, L, key_dim]` to `[B, n_heads, L, value_dim]` in the queries' dtype.

        Queries of another dtype are cast to the layer's, which the kernels are made for.
        """
        if queries.dtype != self.dtype:
            return self.attend(queries.astype(self.dtype), scale, sinks).astype(queries.dtype)
        if isinstance(self._step, DecodeStep):
            assert isinstance(self._tokens, tuple)
            return self._batch.attend_decode(self._layer, self._step, self._tokens, queries, scale, sinks)
        assert isinstance(self._tokens, list)
        return self._batch.attend_prefill(self._layer, self._step, self._tokens, queries, scale, sinks)


class _Shared:
    """A batch, its current step, and the batches that the leader derived from it."""

    def __init__(self, batch: CacheBatch) -> None:
        self.batch = batch
        self.n_steps = 0
        self.step: DecodeStep | PrefillStep | None = None
        self.before: list[int] = []
        self.trimmed = 0
        self.derived: dict[Any, weakref.ref[_Shared]] = {}
        self._offsets: list[int] | None = None
        self._position: int | mx.array = 0

    def position(self, offsets: list[int]) -> int | mx.array:
        """The offsets in the form that models take, made once for all layers of a step."""
        before = self._offsets
        if offsets != before:
            self._offsets = offsets
            if len(offsets) == 1:
                self._position = offsets[0]
            elif before is not None and steps_on_device() and offsets == [offset + 1 for offset in before]:
                self._position = self._position + constant((1,))
            else:
                self._position = resident(mx.array(offsets, dtype=mx.int32))
        return self._position

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        other = _Shared(self.batch.select(range(self.batch.n_rows)))
        other.n_steps = self.n_steps
        memo[id(self)] = other
        return other

    def follow(self, key: Any) -> "_Shared":
        derived = self.derived[key]() if key in self.derived else None
        if derived is None:
            raise RuntimeError("a layer's cache was used before the first layer's; layers must be visited in order")
        return derived


class PagedKVCache:
    """One layer of a rotating compressed cache, in the form that mlx-lm's models and BatchGenerator use.

    Create a session's layers with `PagedKVCache.layers(spec)`. As in all of mlx-lm, `merge` and `extract` give
    independent caches, `extend` empties its argument, and only the attention that consumes its result may follow
    `update_and_fetch`, which raises PoolExhausted when the pool is full.
    """

    def __init__(self, shared: _Shared, layer: int) -> None:
        self._shared = shared
        self._layer = layer
        self._n_steps = shared.n_steps

    @classmethod
    def layers(cls, spec: CacheSpec) -> list["PagedKVCache"]:
        """The layers of a spec in a new, empty session of one row."""
        shared = _Shared(CacheBatch(spec))
        return [cls(shared, layer) for layer in range(len(spec.layers))]

    @property
    def batch(self) -> CacheBatch:
        return self._shared.batch

    @property
    def _leads(self) -> bool:
        return self._layer == 0

    @property
    def offset(self) -> int | mx.array:
        """Position of the next token: an int for one row, else int32 `[B]`."""
        shared = self._shared
        return shared.position(shared.before if self._n_steps < shared.n_steps else shared.batch.offsets)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PendingAttention, PendingAttention]:
        """Store `[B, n_kv_heads, L, dim]` and return the handle for their attention, twice."""
        shared = self._shared
        if self._leads:
            shared.before = shared.batch.offsets
            shared.step = shared.batch.begin_step(keys.shape[2])
            shared.n_steps += 1
        self._n_steps += 1
        if self._n_steps != shared.n_steps or shared.step is None:
            raise RuntimeError("layers of a cache must be updated once per forward pass, in order")
        tokens: Pair | list[Pair]
        if isinstance(shared.step, DecodeStep):
            tokens = shared.batch.decode(self._layer, shared.step, keys, values)
        else:
            tokens = shared.batch.prefill(self._layer, shared.step, keys, values)
        pending = PendingAttention(shared.batch, self._layer, shared.step, tokens)
        return pending, pending

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """Tell the model that attention is causal; the cache masks by itself, with its own window if it has one.

        Raises ValueError for another window or a mask as an array, which this cache does not support.
        """
        spec = self._shared.batch.spec
        if return_array or window_size not in (None, spec.ring.max_size if spec.sliding else None):
            raise ValueError("a paged cache serves causal attention only, with the window that it is made for")
        return "causal" if N > 1 else None

    @property
    def state(self) -> list[mx.array]:
        """All arrays that a step may have left unevaluated."""
        shared = self._shared
        return [*shared.batch.raw[self._layer], *shared.batch.spec.pool.pages(self._layer)]

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's raw buffers, pages and key centres. Each row counts what it shares with others."""
        batch = self._shared.batch
        raw = sum(array.nbytes for array in batch.raw[self._layer])
        n_pages = sum(len(ring.pages) for ring in batch.rings)
        means = [ring.centre.means.get(self._layer) for ring in batch.rings if ring.centre is not None]
        centres = sum(mean.nbytes for mean in means if mean is not None)
        return raw + n_pages * batch.spec.pool.layer_nbytes(self._layer) + centres

    def empty(self) -> bool:
        return not any(self._shared.batch.offsets)

    def size(self) -> int:
        """Tokens that the next query of the longest row sees."""
        return max((ring.size() for ring in self._shared.batch.rings), default=0)

    def is_trimmable(self) -> bool:
        return all(ring.gone == 0 for ring in self._shared.batch.rings)

    def trim(self, n: int) -> int:
        """Drop the newest `n` tokens of every row, at most all of them. Returns their number."""
        shared = self._shared
        if self._leads:
            shared.trimmed = min([n, *shared.batch.offsets])
            shared.batch.trim(shared.trimmed)
        return shared.trimmed

    @classmethod
    def merge(cls, caches: Sequence["PagedKVCache"]) -> "PagedKVCache":
        """This layer of the batch of all the caches' rows."""
        sources = [cache._shared for cache in caches]
        key = ("merge", *(id(source) for source in sources))
        if caches[0]._leads:
            merged = _Shared(CacheBatch.merged([source.batch for source in sources]))
            sources[0].derived[key] = weakref.ref(merged)
        return cls(sources[0].follow(key), caches[0]._layer)

    def extend(self, other: "PagedKVCache") -> None:
        if self._leads:
            self._shared.batch.extend(other._shared.batch)

    def filter(self, batch_indices: Sequence[int]) -> None:
        if self._leads:
            self._shared.batch.keep_rows([int(i) for i in batch_indices])

    def extract(self, idx: int) -> "PagedKVCache":
        """This layer of an independent cache of row `idx`."""
        if self._leads:
            extracted = _Shared(self._shared.batch.select([idx]))
            self._shared.derived[("extract", idx)] = weakref.ref(extracted)
        return PagedKVCache(self._shared.follow(("extract", idx)), self._layer)

    def prepare(
        self,
        *,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
        left_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce a right-padded prompt. Raises ValueError for left padding."""
        if left_padding is not None and any(left_padding):
            raise ValueError("a paged cache takes right-padded prompts, not left-padded ones")
        if self._leads and lengths is not None:
            self._shared.batch.prepare(lengths)

    def finalize(self) -> None:
        if self._leads:
            self._shared.batch.finalize()
