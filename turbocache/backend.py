"""Backends: their lanes, their candidates for the probe, and the choice for a loaded model."""

from collections.abc import Sequence

import mlx.core as mx

from kernels.lanes import CodebookKind, Codebooks, Lanes, LaneShape
from kernels.packed import PackedLanes
from kernels.probe import Backend, BackendUnavailable, Candidate, ReasonCode, probe
from kernels.reference import ReferenceLanes
from turbocache.codebook import levels_for
from turbocache.plan import LayerGeometry, LayerPlan
from turbocache.presets import Preset

__all__ = ["BACKENDS", "LANES", "Backend", "BackendUnavailable", "choose_backend", "lane_shape", "make_lanes"]

LANES: dict[str, type[ReferenceLanes] | type[PackedLanes]] = {"packed": PackedLanes, "reference": ReferenceLanes}
"""Implemented lanes by backend name; the fused ones join them here."""

BACKENDS = ("metal", "cuda", "packed", "reference")
"""In the order in which `auto` tries them; it never takes the last."""


def lane_shape(geometry: LayerGeometry, preset: Preset) -> LaneShape:
    """A layer's geometry with a preset's code widths (16 stands for values stored as they are)."""
    return LaneShape(
        geometry.n_heads,
        geometry.n_kv_heads,
        geometry.key_dim,
        geometry.value_dim,
        preset.key_bits or 16,
        preset.value_bits or 16,
    )


def make_lanes(backend: str, shape: LaneShape, codebook: CodebookKind | None = None) -> Lanes:
    """Lanes of a backend with the codebooks it reads, or with another kind of codebook that it can read.

    Raises ValueError for shapes that the backend does not support.
    """
    lanes = LANES[backend]
    kind = codebook or lanes.codebook
    return lanes(shape, Codebooks(levels_for(kind, shape.key_bits), levels_for(kind, shape.value_bits)))


def choose_backend(requested: str, plans: Sequence[LayerPlan], preset: Preset) -> Backend:
    """Probe this machine for the layers that will be compressed.

    With nothing to compress (preset `off`, or no layer that can be) there is nothing to probe, and the answer says so.
    Raises BackendUnavailable as `probe` does.
    """
    geometries = [plan.geometry for plan in plans if plan.geometry is not None]
    shapes = [lane_shape(geometry, preset) for geometry in geometries] if preset.compressed else []
    backend = probe(requested, [_candidate(name) for name in BACKENDS], shapes)
    if not preset.compressed:
        reason = "preset off: pages hold keys and values as they are, no codec runs"
    elif not shapes:
        reason = "no layer of this model can be compressed"
    else:
        return backend
    return Backend(backend.name, requested, reason, backend.profile, backend.device)


def _candidate(name: str) -> Candidate:
    missing: tuple[ReasonCode, str]
    if name not in LANES:
        available = mx.metal.is_available() if name == "metal" else mx.cuda.is_available()
        label = {"metal": "Metal", "cuda": "CUDA"}[name]
        if available:
            missing = "not_in_this_version", f"fused {label} kernels are not part of this version"
        else:
            missing = "no_device", f"no {label} device"
        return Candidate(name, _unreachable, _unreachable, missing)
    return Candidate(
        name,
        build=lambda shape: make_lanes(name, shape),
        oracle=lambda shape: make_lanes("reference", shape, LANES[name].codebook),
    )


def _unreachable(shape: LaneShape) -> Lanes:
    raise LookupError(f"there are no lanes to build for {shape}")
