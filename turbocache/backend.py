"""Backends: their lanes, their candidates for the probe, and the choice for a loaded model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import mlx.core as mx

from kernels.fused.lanes import CudaLanes, MetalLanes
from kernels.lanes.base import CodebookKind, Codebooks, Lanes, LaneShape
from kernels.lanes.expanded import ExpandedAttentionLanes
from kernels.lanes.packed import PackedLanes
from kernels.lanes.qjl import QjlLanes
from kernels.lanes.reference import ReferenceLanes
from kernels.probe.probe import BackendUnavailable, Candidate, probe, reason_of
from kernels.probe.verdict import Backend, Check, LayerUse, ReasonCode
from turbocache.codebooks.scalar import levels_for, zooms_for
from turbocache.mlxlm.plan import LayerGeometry, LayerPlan
from turbocache.presets import PROTECTED_BITS, Preset

__all__ = [
    "BACKENDS",
    "LANES",
    "Backend",
    "BackendUnavailable",
    "answered",
    "choose_backend",
    "lane_shape",
    "lanes_for",
    "make_lanes",
]


LANES: dict[str, type[Lanes]] = {
    "metal": MetalLanes,
    "cuda": CudaLanes,
    "packed": PackedLanes,
    "reference": ReferenceLanes,
}
"""The lanes of each backend."""

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
        preset.qjl,
    )


def make_lanes(backend: str, shape: LaneShape, codebook: CodebookKind | None = None) -> Lanes:
    """Lanes of a backend with the codebooks it reads, or with another kind of codebook that it can read.

    Raises ValueError for shapes that the backend does not support.
    """
    lanes, shape = LANES[backend], fitted(backend, shape)
    if reason := refusal(backend, shape):
        raise ValueError(reason)
    kind = codebook or lanes.codebook
    # An odd dim does not come out even in pairs; values pair tokens, of which a page has 64.
    key_kind: CodebookKind = "lloyd_max" if kind == "pair" and shape.key_dim % 2 else kind
    key_levels = levels_for(key_kind, shape.key_bits - shape.qjl)  # a QJL code's last bit has no level
    made = QjlLanes if shape.qjl else lanes
    zooms = zooms_for(kind, shape.key_bits), zooms_for(kind, shape.value_bits)
    return made(shape, Codebooks(key_levels, levels_for(kind, shape.value_bits), *zooms))


def refusal(backend: str, shape: LaneShape) -> str | None:
    """Why a backend can't take the shape, or None."""
    if shape.qjl and backend != "reference":
        return "QJL codes of keys are read by the reference lanes only (TURBOCACHE_BACKEND=reference)"
    return LANES[backend].unsupported(shape)


def fitted(backend: str, shape: LaneShape) -> LaneShape:
    """`shape`, or where the backend can't take its half bits, the same with keys rounded up and values down: no more
    bytes if both have halves, and keys are the ones that need the bits.
    """
    whole = replace(shape, key_bits=math.ceil(shape.key_bits), value_bits=math.floor(shape.value_bits))
    lanes = LANES[backend]
    return whole if whole != shape and lanes.unsupported(shape) and not lanes.unsupported(whole) else shape


def lanes_for(backend: Backend | str, shape: LaneShape, dtype: mx.Dtype) -> Lanes:
    """Lanes for a layer of this shape and dtype, as the probe's verdict has them, or whole ones of a named backend."""
    if isinstance(backend, str):
        return make_lanes(backend, shape)
    verdict = backend.verdict(LayerUse(shape, dtype))
    lanes = make_lanes(verdict.lanes, shape)
    return ExpandedAttentionLanes(lanes, verdict.expanded) if verdict.expanded else lanes


def layer_uses(plans: Sequence[LayerPlan], preset: Preset) -> list[LayerUse]:
    """What each compressed layer asks of a backend."""
    return [
        LayerUse(lane_shape(plan.geometry, preset.of_layer(i, len(plans))), plan.geometry.dtype)
        for i, plan in enumerate(plans)
        if plan.geometry is not None
    ]


def choose_backend(
    requested: str, plans: Sequence[LayerPlan], preset: Preset, failed: Mapping[str, Exception] | None = None
) -> Backend:
    """Probe this machine for the layers that will be compressed. `failed`: backends that were chosen before and could
    not answer, with what they raised.

    With nothing to compress (preset `off`, or no layer that can be) there is nothing to probe, and the answer says so.
    Raises BackendUnavailable as `probe` does.
    """
    uses = layer_uses(plans, preset)
    candidates = [_candidate(name, (failed or {}).get(name)) for name in BACKENDS]
    backend = probe(requested, candidates, uses if preset.compressed else ())
    if not preset.compressed:
        reason = "preset off: pages hold keys and values as they are, no codec runs"
    elif not uses:
        reason = "no layer of this model can be compressed"
    else:
        shapes = [use.shape for use in uses]
        said = [backend.reason, *_changed_widths(backend.name, shapes)]
        if preset.protect:
            said.append(
                f"the first and last {preset.protect} of {len(plans)} layers are stored at {PROTECTED_BITS} bits"
            )
        return replace(backend, reason="; ".join(said))
    return replace(backend, reason=reason, code="nothing_to_compress", checks=(), fallbacks=())


def _changed_widths(backend: str, shapes: Sequence[LaneShape]) -> list[str]:
    """What `fitted` did to the preset, in words."""
    said = []
    for shape in shapes:
        stored = fitted(backend, shape)
        if stored != shape:
            said.append(f"{shape.widths} is stored as {stored.widths}: {LANES[backend].unsupported(shape)}")
    return list(dict.fromkeys(said))


def answered(backend: Backend, seconds: float) -> Backend:
    """The backend with the check that a whole model's first answers are, which took so long."""
    check = Check(backend.name, "answer", "short and long prompts", True, None, seconds * 1e6)
    return replace(backend, checks=(*backend.checks, check))


def _candidate(name: str, failure: Exception | None) -> Candidate:
    missing: tuple[ReasonCode, str] | None = None
    if name in FUSED and not DEVICES[name]():
        missing = "no_device", f"no {FUSED[name]} device"
    elif failure is not None:
        code, reason = reason_of(failure)
        missing = code, f"its checks passed, but a first answer failed: {reason}"
    if missing:
        return Candidate(name, _unreachable, _unreachable, missing)
    return Candidate(
        name,
        build=lambda shape: make_lanes(name, shape),
        oracle=lambda shape: make_lanes("reference", fitted(name, shape), LANES[name].codebook),
        unsupported=lambda shape: refusal(name, fitted(name, shape)),
        fused=name in FUSED,
        shared=name != "packed",
    )


def _unreachable(shape: LaneShape) -> Lanes:
    raise LookupError(f"there are no lanes to build for {shape}")
