"""The lanes under test, for whatever GPU this is."""

import mlx.core as mx

from kernels.fused.lanes import CudaLanes, FusedLanes, MetalLanes
from kernels.lanes.base import Codebooks, LaneShape
from kernels.lanes.reference import ReferenceLanes
from turbocache.codebooks.scalar import levels_for


def codebooks(shape: LaneShape) -> Codebooks:
    return Codebooks(levels_for("pair", shape.key_bits), levels_for("pair", shape.value_bits))


def fused(shape: LaneShape) -> FusedLanes:
    kind = MetalLanes if mx.metal.is_available() else CudaLanes
    return kind(shape, codebooks(shape))


def reference(shape: LaneShape) -> ReferenceLanes:
    return ReferenceLanes(shape, codebooks(shape))
