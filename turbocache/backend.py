"""Backends: their lanes, their candidates for the probe, and the choice for a loaded model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import mlx.core as mx

from kernels.lanes import CodebookKind, Codebooks, Lanes, LaneShape
from kernels.packed import PackedLanes
from kernels.parts import PartedLanes
from kernels.probe import BackendUnavailable, Candidate, probe
from kernels.reference import ReferenceLanes
from kernels.verdict import Backend, LayerUse, ReasonCode
from turbocache.codebook import levels_for
from turbocache.plan import LayerGeometry, LayerPlan
from turbocache.presets import Preset

__all__ = [
    "BACKENDS",
    "LANES",
    "Backend",
    "BackendUnavailable",
    "choose_backend",
    "lane_shape",
    "lanes_for",
    "make_lanes",
]


class LanesClass(Protocol):
    """A class of lanes: what it reads, what it refuses, and how one is made."""

    codebook: CodebookKind

    def unsupported(self, shape: LaneShape, /) -> str | None: ...

    def __call__(self, shape: LaneShape, codebooks: Codebooks, /) -> Lanes: ...


LANES: dict[str, LanesClass] = {"packed": PackedLanes, "reference": ReferenceLanes}
"""Implemented lanes by backend name; the fused ones join them here."""

BACKENDS = ("metal", "cuda", "packed", "reference")
"""In the order in which `auto` tries them; it never takes the last."""

FUSED = {"metal": "Metal", "cuda": "CUDA"}
"""Backends with kernels of their own, and the names of the devices that they need."""

DEVICES: dict[str, Callable[[], bool]] = {"metal": mx.metal.is_available, "cuda": mx.cuda.is_available}


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


def lanes_for(backend: Backend | str, shape: LaneShape, dtype: mx.Dtype) -> Lanes:
    """Lanes for a layer of this shape and dtype, as the probe's verdict has them, or whole ones of a named backend."""
    if isinstance(backend, str):
        return make_lanes(backend, shape)
    verdict = backend.verdict(LayerUse(shape, dtype))
    lanes = make_lanes(verdict.lanes, shape)
    return PartedLanes(lanes, verdict.expanded) if verdict.expanded else lanes


def choose_backend(requested: str, plans: Sequence[LayerPlan], preset: Preset) -> Backend:
    """Probe this machine for the layers that will be compressed.

    With nothing to compress (preset `off`, or no layer that can be) there is nothing to probe, and the answer says so.
    Raises BackendUnavailable as `probe` does.
    """
    geometries = [plan.geometry for plan in plans if plan.geometry is not None]
    uses = [LayerUse(lane_shape(geometry, preset), geometry.dtype) for geometry in geometries]
    backend = probe(requested, [_candidate(name) for name in BACKENDS], uses if preset.compressed else ())
    if not preset.compressed:
        reason = "preset off: pages hold keys and values as they are, no codec runs"
    elif not uses:
        reason = "no layer of this model can be compressed"
    else:
        return backend
    return replace(backend, reason=reason, code="nothing_to_compress", checks=(), fallbacks=())


def _candidate(name: str) -> Candidate:
    missing: tuple[ReasonCode, str] | None = None
    if name in FUSED and not DEVICES[name]():
        missing = "no_device", f"no {FUSED[name]} device"
    elif name not in LANES:
        missing = "not_in_this_version", f"fused {FUSED[name]} kernels are not part of this version"
    if missing:
        return Candidate(name, _unreachable, _unreachable, missing)
    return Candidate(
        name,
        build=lambda shape: make_lanes(name, shape),
        oracle=lambda shape: make_lanes("reference", shape, LANES[name].codebook),
        unsupported=LANES[name].unsupported,
        fused=name in FUSED,
        shared=name != "packed",
    )


def _unreachable(shape: LaneShape) -> Lanes:
    raise LookupError(f"there are no lanes to build for {shape}")
