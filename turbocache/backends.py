"""The table of backends. To add one, write its lanes class (kernels/lanes/base.py) and add a row here.

This module does not load MLX: settings and help texts use it. A row's functions load what they need.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.lanes.base import Lanes


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """One backend. Fused backends, those with a device, are timed against `FALLBACK` before they are chosen."""

    name: str
    lanes: "Callable[[], type[Lanes]]"
    """Imports and returns the lanes class."""
    device: str | None = None
    """The device that its own kernels need, as messages name it. None: MLX operations, which run everywhere."""
    available: Callable[[], bool] = lambda: True
    """Whether this machine has the device."""
    automatic: bool = True
    """Whether `auto` may choose it."""
    reference_pages: bool = True
    """Whether its pages have the bytes of the reference lanes."""

    @property
    def fused(self) -> bool:
        """Whether it has kernels of its own."""
        return self.device is not None


def _metal() -> "type[Lanes]":
    from kernels.fused.lanes import MetalLanes

    return MetalLanes


def _has_metal() -> bool:
    import mlx.core as mx

    return bool(mx.metal.is_available())


def _cuda() -> "type[Lanes]":
    from kernels.fused.lanes import CudaLanes

    return CudaLanes


def _has_cuda() -> bool:
    import mlx.core as mx

    return bool(mx.cuda.is_available())


def _packed() -> "type[Lanes]":
    from kernels.lanes.packed import PackedLanes

    return PackedLanes


def _reference() -> "type[Lanes]":
    from kernels.lanes.reference import ReferenceLanes

    return ReferenceLanes


FALLBACK = "packed"
"""Runs wherever MLX runs. Error messages recommend it."""

REFERENCE = "reference"
"""The definition of correct. The probe compares every other backend with it."""

BACKENDS = {
    spec.name: spec
    for spec in (
        BackendSpec("metal", _metal, device="Metal", available=_has_metal),
        BackendSpec("cuda", _cuda, device="CUDA", available=_has_cuda),
        BackendSpec(FALLBACK, _packed, reference_pages=False),
        BackendSpec(REFERENCE, _reference, automatic=False),
    )
}
"""By name, in the order in which `auto` tries them."""

CHOICES = ("auto", *BACKENDS)
"""What settings and commands accept."""


def one_of(default: str | None = None) -> str:
    """The accepted names for a help text: "auto, metal, ... or reference", with the default marked."""
    names = [f"{name} (the default)" if name == default else name for name in CHOICES]
    return f"{', '.join(names[:-1])} or {names[-1]}"
