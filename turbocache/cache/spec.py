"""What all sessions of a process share: sizes, the page pool, and how each layer is stored."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from kernels.codec.layout import PAGE
from kernels.lanes.base import Lanes
from turbocache.cache.paths import PathCounts
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import PageRing, RingConfig


class LiveBatch(Protocol):
    """What a spec knows of a `CacheBatch` (turbocache/cache/batch.py)."""

    rings: list[PageRing]

    @property
    def shadow_nbytes(self) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CompressedLayer:
    """How one attention layer is stored. `dtype` is that of the raw tokens: the model's own cache dtype. Keys are
    centred in heads whose mean dominates by `centre_above` (turbocache/cache/conditioning.py); None never does.
    """

    lanes: Lanes
    dtype: mx.Dtype
    centre_above: float | None = None


@dataclass(slots=True)
class RotationCount:
    """Pages that rotated out of rings since the start."""

    pages: int = 0
    tokens_per_page: int = PAGE


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What all sessions of a process share: ring sizes, the pool and the layers' storage.

    `live` knows every batch that exists, at rest or running, so that bytes and page owners can be counted; `paths`
    counts which way attention went.
    """

    ring: RingConfig
    pool: PagePool
    layers: tuple[CompressedLayer, ...]
    rotations: RotationCount = field(default_factory=RotationCount)
    live: "weakref.WeakSet[LiveBatch]" = field(default_factory=weakref.WeakSet)
    paths: PathCounts = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", PathCounts([layer.lanes for layer in self.layers]))

    @property
    def raw_token_nbytes(self) -> int:
        """Bytes of one raw token over all layers."""
        return sum(_token_values(layer) * layer.dtype.size for layer in self.layers)

    @property
    def fp16_page_nbytes(self) -> int:
        """Bytes of a page's tokens over all layers in a float16 cache, for comparison."""
        return PAGE * sum(_token_values(layer) * mx.float16.size for layer in self.layers)

    def fp16_nbytes(self, rings: Iterable[PageRing]) -> int:
        """Bytes in a float16 cache of all tokens in pages, shared ones once, and of the raw ones of `rings`."""
        n_raw = sum(ring.n_raw for ring in rings)
        return (self.pool.n_used * PAGE + n_raw) * self.fp16_page_nbytes // PAGE

    @property
    def raw_nbytes(self) -> int:
        """Bytes of one session's sink and window over all layers."""
        return self.raw_token_nbytes * self.ring.raw_slots

    @property
    def centre_nbytes(self) -> int:
        """Most bytes of what is taken off one session's keys."""
        centred = [layer for layer in self.layers if layer.centre_above is not None]
        return sum(layer.lanes.shape.n_kv_heads * layer.lanes.shape.key_dim * layer.dtype.size for layer in centred)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page's count is exactly its number of owners among the live batches."""
        self.pool.check_integrity(ring.pages for batch in self.live for ring in batch.rings)


def _token_values(layer: CompressedLayer) -> int:
    """Numbers in one token's keys and values."""
    shape = layer.lanes.shape
    return shape.n_kv_heads * (shape.key_dim + shape.value_dim)
