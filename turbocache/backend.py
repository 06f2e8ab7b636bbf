"""Backends: their lanes, their candidates for the probe, and the choice for a loaded model."""

import math
from collections.abc import Sequence
from dataclasses import replace

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
    lanes, shape = LANES[backend], fitted(backend, shape)
    kind = codebook or lanes.codebook
    # An odd dim does not come out even in pairs; values pair tokens, of which a page has 64.
    key_kind: CodebookKind = "lloyd_max" if kind == "pair" and shape.key_dim % 2 else kind
    return lanes(shape, Codebooks(levels_for(key_kind, shape.key_bits), levels_for(kind, shape.value_bits)))


def fitted(backend: str, shape: LaneShape) -> LaneShape:
    """`shape`, or where the backend can't take its half bits, the same with keys rounded up and values down: no more
    bytes if both have halves, and keys are the ones that need the bits.
    """
    whole = replace(shape, key_bits=math.ceil(shape.key_bits), value_bits=math.floor(shape.value_bits))
    lanes = LANES[backend]
    return whole if whole != shape and lanes.unsupported(shape) and not lanes.unsupported(whole) else shape


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
        return replace(backend, reason="; ".join([backend.reason, *_changed_widths(backend.name, shapes)]))
    return Backend(backend.name, requested, reason, backend.profile, backend.device)


def _changed_widths(backend: str, shapes: Sequence[LaneShape]) -> list[str]:
    """What `fitted` did to the preset, in words."""
    said = []
    for shape in shapes:
        stored = fitted(backend, shape)
        if stored != shape:
            asked, got = (f"k{s.key_bits:g}v{s.value_bits:g}" for s in (shape, stored))
            said.append(f"{asked} is stored as {got}: {LANES[backend].unsupported(shape)}")
    return list(dict.fromkeys(said))


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
        oracle=lambda shape: make_lanes("reference", fitted(name, shape), LANES[name].codebook),
    )


def _unreachable(shape: LaneShape) -> Lanes:
    raise LookupError(f"there are no lanes to build for {shape}")
