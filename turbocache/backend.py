"""From the table of backends (backends.py) to lanes for a layer, and to the probe's choice for a loaded model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx

from kernels.lanes.base import CodebookKind, Codebooks, Lanes, LaneShape
from kernels.lanes.expanded import ExpandedAttentionLanes
from kernels.lanes.qjl import QjlLanes, QjlShape
from kernels.probe.probe import BackendUnavailable, Candidate, probe, reason_of
from kernels.probe.verdict import Backend, Check, LayerUse, ReasonCode
from turbocache.backends import BACKENDS, FALLBACK, REFERENCE, BackendSpec
from turbocache.codebooks.scalar import levels_for, zooms_for
from turbocache.mlxlm.plan import LayerGeometry, LayerPlan
from turbocache.presets import PROTECTED_BITS, QJL_PRESET, Preset

__all__ = [
    "Backend",
    "BackendUnavailable",
    "choose_backend",
    "lane_shape",
    "lanes_for",
    "make_lanes",
    "with_warm_up_check",
]


def lane_shape(geometry: LayerGeometry, preset: Preset) -> LaneShape:
    """A layer's geometry with a preset's code widths; 16 bits mean values stored as they are."""
    kind = QjlShape if preset.name == QJL_PRESET else LaneShape
    return kind(
        geometry.n_heads,
        geometry.n_kv_heads,
        geometry.key_dim,
        geometry.value_dim,
        preset.key_bits or 16,
        preset.value_bits or 16,
    )


def make_lanes(backend: str, shape: LaneShape, codebook: CodebookKind | None = None) -> Lanes:
    """Lanes of a backend, with its own kind of codebook or another one that it can read.

    Raises ValueError for shapes that the backend does not support.
    """
    lanes, shape = BACKENDS[backend].lanes(), supported_widths(backend, shape)
    if reason := unsupported(backend, shape):
        raise ValueError(reason)
    kind = codebook or lanes.codebook
    made = QjlLanes if isinstance(shape, QjlShape) else lanes
    return made(shape, codebooks_for(kind, shape))


def codebooks_for(kind: CodebookKind, shape: LaneShape) -> Codebooks:
    """The codebooks of a kind for lanes of this shape."""
    if isinstance(shape, QjlShape):  # the sign has no level
        shape = shape.without_sign
    # An odd key dim can't be cut into pairs. Values pair tokens, and a page has 64.
    key_kind: CodebookKind = "lloyd_max" if kind == "pair" and shape.key_dim % 2 else kind
    levels = levels_for(key_kind, shape.key_bits), levels_for(kind, shape.value_bits)
    return Codebooks(*levels, zooms_for(kind, shape.key_bits), zooms_for(kind, shape.value_bits))


def codebooks_of(lanes: Lanes) -> Codebooks | None:
    """The codebooks that a layer's pages were encoded with, or None if pages hold no codes."""
    stored = lanes.lanes if isinstance(lanes, ExpandedAttentionLanes) else lanes
    return None if stored.codebook == "none" else codebooks_for(stored.codebook, stored.shape)


def unsupported(backend: str, shape: LaneShape) -> str | None:
    """Why a backend can't store the shape, or None."""
    if isinstance(shape, QjlShape) and backend != REFERENCE:
        return "QJL codes of keys are read by the reference lanes only (TURBOCACHE_BACKEND=reference)"
    return BACKENDS[backend].lanes().unsupported(shape)


def supported_widths(backend: str, shape: LaneShape) -> LaneShape:
    """`shape`, or with whole bits if the backend has no half bits: keys rounded up, values down.

    Keys need the bits more. If both widths have halves, the bytes stay the same.
    """
    whole = replace(shape, key_bits=math.ceil(shape.key_bits), value_bits=math.floor(shape.value_bits))
    lanes = BACKENDS[backend].lanes()
    return whole if whole != shape and lanes.unsupported(shape) and not lanes.unsupported(whole) else shape


def lanes_for(backend: Backend | str, shape: LaneShape, dtype: mx.Dtype) -> Lanes:
    """Lanes for a layer of this shape and dtype: those of the probe's verdict, or of a backend given by name."""
    if isinstance(backend, str):
        return make_lanes(backend, shape)
    verdict = backend.verdict(LayerUse(shape, dtype))
    lanes = make_lanes(verdict.lanes, shape)
    return ExpandedAttentionLanes(lanes, verdict.expanded) if verdict.expanded else lanes


def layer_uses(plans: Sequence[LayerPlan], preset: Preset) -> list[LayerUse]:
    """What each compressed layer needs from a backend."""
    return [
        LayerUse(lane_shape(plan.geometry, preset.of_layer(i, len(plans))), plan.geometry.dtype)
        for i, plan in enumerate(plans)
        if plan.geometry is not None
    ]


def choose_backend(
    requested: str, plans: Sequence[LayerPlan], preset: Preset, failed: Mapping[str, Exception] | None = None
) -> Backend:
    """Probe this machine for the layers that will be compressed.

    `failed`: backends that passed the probe before but failed the warm-up, with the exception. If there is nothing to
    compress (preset `off`, or no layer can be), nothing is probed and the reason says so. Raises BackendUnavailable as
    `probe` does.
    """
    uses = layer_uses(plans, preset)
    candidates = [_candidate(spec, (failed or {}).get(spec.name)) for spec in BACKENDS.values()]
    backend = probe(requested, candidates, uses if preset.compressed else ())
    if not preset.compressed:
        reason = "preset off: pages hold keys and values as they are, no codec runs"
    elif not uses:
        reason = "no layer of this model can be compressed"
    else:
        shapes = [use.shape for use in uses]
        reasons = [backend.reason, *_changed_widths(backend.name, shapes)]
        if preset.protect:
            reasons.append(
                f"the first and last {preset.protect} of {len(plans)} layers are stored at {PROTECTED_BITS} bits"
            )
        return replace(backend, reason="; ".join(reasons))
    return replace(backend, reason=reason, code="nothing_to_compress", checks=(), fallbacks=())


def _changed_widths(backend: str, shapes: Sequence[LaneShape]) -> list[str]:
    """A sentence for each shape that `supported_widths` changes."""
    changes = []
    for shape in shapes:
        stored = supported_widths(backend, shape)
        if stored != shape:
            changes.append(f"{shape.widths} is stored as {stored.widths}: {unsupported(backend, shape)}")
    return list(dict.fromkeys(changes))


def with_warm_up_check(backend: Backend, seconds: float) -> Backend:
    """The backend with one more check: the warm-up passed and took `seconds`."""
    check = Check(backend.name, "answer", "short and long prompts", True, None, seconds * 1e6)
    return replace(backend, checks=(*backend.checks, check))


def _candidate(spec: BackendSpec, failure: Exception | None) -> Candidate:
    name = spec.name
    missing: tuple[ReasonCode, str] | None = None
    if not spec.available():
        missing = "no_device", f"no {spec.device} device"
    elif failure is not None:
        code, reason = reason_of(failure)
        missing = code, f"its checks passed, but a first answer failed: {reason}"
    return Candidate(
        name,
        build=lambda shape: make_lanes(name, shape),
        oracle=lambda shape: make_lanes(REFERENCE, supported_widths(name, shape), spec.lanes().codebook),
        missing=missing,
        unsupported=lambda shape: unsupported(name, supported_widths(name, shape)),
        automatic=spec.automatic,
        baseline=name == FALLBACK,
        fused=spec.fused,
        shared=spec.reference_pages,
    )
