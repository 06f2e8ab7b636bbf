"""From a loaded model, a backend and settings to the process's cache: the spec that every session shares."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from kernels.identity import IdentityLanes
from kernels.lanes import Codebooks, Lanes, LaneShape
from kernels.packed import PackedLanes
from kernels.reference import ReferenceLanes
from turbocache import seam
from turbocache.batch import CacheSpec, CompressedLayer
from turbocache.codebook import levels_for
from turbocache.plan import LayerGeometry, LayerPlan
from turbocache.pool import PagePool
from turbocache.presets import Preset
from turbocache.ring import RingConfig
from turbocache.rotation import NoRotation, Rotation
from turbocache.view import PagedKVCache

LANES: dict[str, type[ReferenceLanes] | type[PackedLanes]] = {"packed": PackedLanes, "reference": ReferenceLanes}
"""Implemented backends by name; `metal` and `cuda` join them here."""


def lane_shape(geometry: LayerGeometry, preset: Preset) -> LaneShape:
    """A layer's geometry with a preset's code widths (16 bits stand for "as is")."""
    return LaneShape(
        geometry.n_heads,
        geometry.n_kv_heads,
        geometry.key_dim,
        geometry.value_dim,
        preset.key_bits or 16,
        preset.value_bits or 16,
    )


def make_lanes(backend: str, shape: LaneShape) -> Lanes:
    """Lanes of a backend with the codebooks it reads. Raises ValueError for shapes that it does not support."""
    kind = LANES[backend]
    keys = levels_for(kind.codebook, shape.key_bits, shape.key_dim)
    return kind(shape, Codebooks(keys, levels_for(kind.codebook, shape.value_bits, shape.value_dim)))


def compressed_layer(geometry: LayerGeometry, preset: Preset, backend: str) -> CompressedLayer:
    """Storage of one layer: the backend's lanes behind a rotation, or pages as they are for `off`."""
    shape = lane_shape(geometry, preset)
    if not preset.compressed:
        return CompressedLayer(IdentityLanes(shape, geometry.dtype), NoRotation(), NoRotation(), geometry.dtype)
    return CompressedLayer(
        make_lanes(backend, shape), Rotation(geometry.key_dim), Rotation(geometry.value_dim), geometry.dtype
    )


class CacheStore:
    """Makes sessions' caches. One per process, used by the thread that owns MLX."""

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[LayerPlan],
        preset: Preset,
        backend: str,
        ring: RingConfig,
        n_pages: int,
    ) -> None:
        self._model = model
        self.plans = list(plans)
        self.preset = preset
        layers = tuple(
            compressed_layer(plan.geometry, preset, backend) for plan in plans if plan.geometry is not None
        )
        self.spec = CacheSpec(ring, PagePool([layer.lanes for layer in layers], n_pages), layers)
        seam.install()

    def new_cache(self) -> list[Any]:
        """An empty session's prompt cache: a view per compressed layer, mlx-lm's own caches for the others."""
        native = make_prompt_cache(self._model)
        views = iter(PagedKVCache.layers(self.spec))
        return [next(views) if plan.compressed else cache for plan, cache in zip(self.plans, native, strict=True)]


def compressed_views(cache: Sequence[Any]) -> list[PagedKVCache]:
    """The compressed layers among a prompt cache's layers."""
    return [layer for layer in cache if isinstance(layer, PagedKVCache)]


def evaluate(cache: Sequence[Any]) -> None:
    """Wait until a prompt cache holds arrays instead of graphs."""
    mx.eval([layer.state for layer in cache])
