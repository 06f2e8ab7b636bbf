"""Lanes that fail on demand, in the place of fused kernels that are not to be had on every machine."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import mlx.core as mx

from kernels.fused.profiles import MissingDeviceKey
from kernels.lanes.base import (
    AttentionPath,
    ChunkInputs,
    CodebookKind,
    Codebooks,
    LaneShape,
    Pair,
    StepInputs,
    attend_step_expanded,
)
from kernels.lanes.reference import ReferenceLanes
from kernels.probe.probe import Candidate
from kernels.probe.trials import SPEED_TOKENS
from turbocache.backend import make_lanes
from turbocache.backends import BACKENDS, BackendSpec
from turbocache.codebooks.scalar import levels_for, zooms_for

COMPILER = "[metal::Device] Unable to build metal library from source\nprogram_source:12:3: error: use of " + "x" * 5000
MANY = SPEED_TOKENS // 64


class FakeFused(ReferenceLanes):
    """What a fused backend looks like from outside: correct, and quick where it is timed."""

    name: ClassVar[str] = "cuda"
    codebook: ClassVar[CodebookKind] = "pair"

    def attend_step(self, step: StepInputs) -> tuple[mx.array, Pair]:
        if step.rows.index.n_pages >= MANY:
            queries = step.queries
            return mx.zeros((*queries.shape[:-1], self.shape.value_dim), dtype=queries.dtype), step.raw
        return attend_step_expanded(super().expand, step)

    def path(self, n_tokens: int | None) -> AttentionPath:
        return "fused" if n_tokens is None else "expanded"


Fault = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""Given a method and its arguments: what it does instead."""


def compile_error(method: Any, arguments: Any) -> Any:
    raise RuntimeError(COMPILER)


def exception(method: Any, arguments: Any) -> Any:
    raise RuntimeError("launch failed")


def wrong(method: Any, arguments: Any) -> Any:
    """Two per cent off."""
    result = method(*arguments)
    if isinstance(result, mx.array):
        return result * 1.02
    return tuple(x if x.dtype == mx.uint32 else x * mx.array(1.02, dtype=x.dtype) for x in result)


def nan(method: Any, arguments: Any) -> Any:
    return method(*arguments) * mx.nan


def slow(method: Any, arguments: Any) -> Any:
    time.sleep(0.05)
    return method(*arguments)


def in_dtype(dtype: mx.Dtype, fault: Fault) -> Fault:
    """The fault only where queries, keys or expanded pages are of this dtype."""

    def choose(method: Any, arguments: Any) -> Any:
        first = arguments[0]
        if isinstance(first, ChunkInputs | StepInputs):
            actual = first.queries.dtype
        else:
            actual = arguments[1] if isinstance(first, tuple) else first.dtype
        return fault(method, arguments) if actual == dtype else method(*arguments)

    return choose


def where_timed(fault: Fault) -> Fault:
    """The fault only in a decode step as long as those that are timed."""

    def choose(method: Any, arguments: Any) -> Any:
        return fault(method, arguments) if arguments[0].rows.index.n_pages >= MANY else method(*arguments)

    return choose


def where_odd(fault: Fault) -> Fault:
    """The fault only in a chunk over a number of raw tokens that the probe does not try."""

    def choose(method: Any, arguments: Any) -> Any:
        return fault(method, arguments) if arguments[0].raw[0].shape[2] % 64 else method(*arguments)

    return choose


def faulty(part: str, fault: Fault) -> type[FakeFused]:
    """`FakeFused` with a fault in one method; where that stores tokens as well, only its answer is at fault."""

    def method(self: Any, *arguments: Any) -> Any:
        kept = []

        def right(*args: Any) -> Any:
            result = getattr(FakeFused, part)(self, *args)
            if part != "attend_step":
                return result
            kept.append(result[1])
            return result[0]

        result = fault(right, arguments)
        return (result, *kept) if kept else result

    return type("Faulty", (FakeFused,), {part: method})


class KeyIsMissing(FakeFused):
    """Wants to know something that the device does not tell."""

    def __init__(self, shape: LaneShape, codebooks: Codebooks) -> None:
        raise MissingDeviceKey("the device's info has no 'architecture'")


def refusing(refused: LaneShape) -> type[FakeFused]:
    """`FakeFused` that does not support one shape."""

    def unsupported(cls: Any, shape: LaneShape) -> str | None:
        return f"no kernel for head dim {shape.key_dim}" if shape == refused else None

    return type("Refusing", (FakeFused,), {"unsupported": classmethod(unsupported)})


def with_lanes(name: str, lanes: Any) -> BackendSpec:
    """The row of a backend on a machine that has its device, with these lanes."""
    return replace(BACKENDS[name], lanes=lambda: lanes, available=lambda: True)


def candidate(name: str, lanes: Any, **options: Any) -> Candidate:
    """A fused candidate with these lanes, whose pages have the reference's bytes unless told otherwise."""

    def build(shape: LaneShape) -> Any:
        keys, values = (levels_for(lanes.codebook, bits) for bits in (shape.key_bits, shape.value_bits))
        zooms = (zooms_for(lanes.codebook, bits) for bits in (shape.key_bits, shape.value_bits))
        return lanes(shape, Codebooks(keys, values, *zooms))

    def oracle(shape: LaneShape) -> Any:
        return make_lanes("reference", shape, lanes.codebook)

    options = {"fused": True, "shared": True} | options
    return Candidate(name, build, oracle, unsupported=lanes.unsupported, **options)
