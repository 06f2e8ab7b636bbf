"""What all sessions of a process share: sizes, the page pool, how each layer is stored, and what is counted.

Layers with plain attention have one spec. So have the layers of each sliding window, because they keep other tokens.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

import mlx.core as mx

from kernels.codec.layout import PAGE
from kernels.lanes.base import AttentionPath, Lanes
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import PageRing, RingConfig

PATHS: tuple[str, ...] = ("fused", "packed", "expanded", "native")
"""All paths that attention takes. `PathCounts` counts all but the last: `mlxlm.seam` counts mlx-lm's own attention."""


class PathCounts:
    """How many layers have attended so far, by path. A layer's path depends only on its lanes and the step's tokens."""

    def __init__(self, layers: Sequence[Lanes]) -> None:
        self.totals: Counter[AttentionPath] = Counter()
        self._layers = tuple(layers)
        self._of_step: dict[int | None, Counter[AttentionPath]] = {}

    def add(self, n_tokens: int | None) -> None:
        """Count all layers for one row's chunk of `n_tokens`, or for the whole batch's decode step (None)."""
        if n_tokens not in self._of_step:
            self._of_step[n_tokens] = Counter(lanes.path(n_tokens) for lanes in self._layers)
        self.totals.update(self._of_step[n_tokens])


class LiveBatch(Protocol):
    """What a spec knows of a `CacheBatch` (turbocache/cache/batch.py)."""

    rings: list[PageRing]

    @property
    def shadow_nbytes(self) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CompressedLayer:
    """How one attention layer is stored."""

    lanes: Lanes
    dtype: mx.Dtype
    """Dtype of the raw tokens: the model's own cache dtype."""
    centre_above: float | None = None
    """Threshold for centring a head's keys (turbocache/cache/conditioning.py). None disables centring."""

    @property
    def n_values(self) -> int:
        """Numbers in one token's keys and values."""
        shape = self.lanes.shape
        return shape.n_kv_heads * (shape.key_dim + shape.value_dim)

    @property
    def token_nbytes(self) -> int:
        """Bytes of a raw token."""
        return self.n_values * self.dtype.size

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page."""
        return sum(prod(shape) * dtype.size for shape, dtype in self.lanes.page_arrays())


@dataclass(eq=False, slots=True)
class CacheSpec:
    """What all sessions share of layers that keep the same tokens. Only the counts change after it is made."""

    ring: RingConfig
    """Sizes of each session's ring."""
    pool: PagePool
    layers: tuple[CompressedLayer, ...]
    sliding: bool = False
    """Whether the layers have a sliding window, of `ring.max_size` tokens."""
    rotated_pages: int = 0
    """Pages that rotated out of all rings since the start."""
    live: "weakref.WeakSet[LiveBatch]" = field(default_factory=weakref.WeakSet)
    """Every batch that exists, at rest or running: the source for counting bytes and page owners."""
    paths: PathCounts = field(init=False)

    def __post_init__(self) -> None:
        self.paths = PathCounts([layer.lanes for layer in self.layers])

    @property
    def raw_token_nbytes(self) -> int:
        """Bytes of one raw token over all layers."""
        return sum(layer.token_nbytes for layer in self.layers)

    @property
    def fp16_page_nbytes(self) -> int:
        """Bytes of a page's tokens over all layers in a float16 cache, for comparison."""
        return PAGE * sum(layer.n_values * mx.float16.size for layer in self.layers)

    @property
    def rings(self) -> list[PageRing]:
        """Of all sessions, checkpoints and rows."""
        return [ring for batch in self.live for ring in batch.rings]

    def fp16_nbytes(self) -> int:
        """Bytes in a float16 cache of all tokens in pages (shared pages once) and of the raw tokens of all rings."""
        n_raw = sum(ring.n_raw for ring in self.rings)
        return (self.pool.n_used * PAGE + n_raw) * self.fp16_page_nbytes // PAGE

    @property
    def raw_nbytes(self) -> int:
        """Bytes of one session's sink and window over all layers."""
        return self.raw_token_nbytes * self.ring.raw_slots

    @property
    def centre_nbytes(self) -> int:
        """Upper bound of the bytes of one session's key centres."""
        centred = [layer for layer in self.layers if layer.centre_above is not None]
        return sum(layer.lanes.shape.n_kv_heads * layer.lanes.shape.key_dim * layer.dtype.size for layer in centred)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page's count equals its number of owners among the live batches."""
        self.pool.check_integrity(ring.pages for ring in self.rings)
