"""Executes a captured kernel on the CPU and says what is wrong with it."""

import struct
import subprocess
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tests.metal import errors
from tests.metal.arrays import NUMPY, input_buffer
from tests.metal.capture import Array, Kernel
from tests.metal.report import readable
from tests.metal.rewrite import buffer_order, executable
from tests.metal.toolchain import Mode, build, execute

Order = Literal["forward", "reverse", "random"]
_ORDERS: dict[Order, int] = {"forward": 0, "reverse": 1, "random": 2}
_MAX_SHARED = {"metal": 32768, "cuda": 49152}
_PRELUDE = {"metal": "prelude.h", "cuda": "cuda/prelude.h"}
_MAGIC = 0x4D54
_INPUT, _OUTPUT, _WRITABLE = 0, 1, 2
_EXITS: dict[int, type[errors.HarnessError]] = {
    70: errors.DivergedError,
    71: errors.MemoryFaultError,
    72: errors.CompileError,
    73: errors.MemoryFaultError,
    74: errors.RaceError,
}


def run(
    kernel: Kernel,
    inputs: Sequence[Any],
    *,
    mode: Mode = "plain",
    order: Order = "forward",
    seed: int = 0,
    fill: int = 0xFF,
    writable: Sequence[str] = (),
    allow_unwritten: bool = False,
    timeout: float = 60.0,
) -> list[npt.NDArray[Any]]:
    """The kernel's outputs; bfloat16 as uint16, in and out.

    `inputs` are numpy or MLX arrays of the shapes and types the kernel was captured with. Outputs and threadgroup
    memory hold `fill` in every byte before (0xFF: NaN, -1). Threads run in `order` from one meeting to the next, and so
    do threadgroups. Writing to an input is an error unless `writable` names it. "asan" also checks shifts, indices and
    alignment. "tsan" finds races within a threadgroup; those between threadgroups are for `run_orders`. Raises a
    HarnessError, or ValueError for inputs of another shape or type.
    """
    outputs = _launch(kernel, inputs, mode, order, seed, fill, writable, timeout)
    if not allow_unwritten and fill == 0xFF and any(_filled(o, fill).any() for o in outputs):
        # Only what keeps another fill too was not written: -1 may well be an answer.
        again = _launch(kernel, inputs, mode, order, seed, 0x5A, writable, timeout)
        for described, first, second in zip(kernel.outputs, outputs, again, strict=True):
            unwritten = _filled(first, fill) & _filled(second, 0x5A)
            if unwritten.any():
                raise errors.UnwrittenError(_unwritten_text(kernel, described, unwritten))
    return outputs


def run_orders(
    kernel: Kernel,
    inputs: Sequence[Any],
    *,
    seeds: Sequence[int] = (1,),
    writable: Sequence[str] = (),
    timeout: float = 60.0,
) -> list[npt.NDArray[Any]]:
    """The kernel's outputs, after they came out bit for bit the same forward, in reverse and in random orders.

    The orders also differ in what uninitialised memory holds. Finds missing barriers, without ThreadSanitizer too.
    """
    outputs = run(kernel, inputs, writable=writable, timeout=timeout)
    tries: list[tuple[Order, int]] = [("reverse", 0), *(("random", seed) for seed in seeds)]
    for order, seed in tries:
        other = _launch(kernel, inputs, "plain", order, seed, 0x5A, writable, timeout)
        for described, first, second in zip(kernel.outputs, outputs, other, strict=True):
            differ = _bits(first) != _bits(second)
            if differ.any():
                raise errors.OrderError(
                    f"{kernel.name}: {int(differ.sum())} of {differ.size} elements of {described.name} come out "
                    f"differently with threads in {order} order, the first at {_index(differ)}: a barrier is missing, "
                    "or memory is read before it is written"
                )
    return outputs


def _launch(
    kernel: Kernel,
    inputs: Sequence[Any],
    mode: Mode,
    order: Order,
    seed: int,
    fill: int,
    writable: Sequence[str],
    timeout: float,
) -> list[npt.NDArray[Any]]:
    if int(np.prod(kernel.threadgroup)) > 1024:
        raise errors.CompileError(f"{kernel.name}: threadgroup {kernel.threadgroup} has more than 1024 threads")
    if min(*kernel.grid, *kernel.threadgroup) < 1:
        raise errors.LaunchError(
            f"{kernel.name}: grid {kernel.grid} in threadgroups {kernel.threadgroup} has no threads"
        )
    try:
        program = build(executable(kernel).text, mode, (_PRELUDE[kernel.language],), kernel.language)
    except errors.CompileError as error:
        raise errors.CompileError(f"{kernel.name}: {error}") from error
    dispatch = _dispatch(kernel, inputs, order, seed, fill, writable)
    try:
        done = execute(program, dispatch, timeout)
    except subprocess.TimeoutExpired as error:
        raise errors.HarnessError(f"{kernel.name}: not done after {timeout:g} s") from error
    said = done.stderr.decode(errors="replace")
    if done.returncode:
        kind = _EXITS.get(done.returncode, errors.MemoryFaultError if done.returncode < 0 else errors.HarnessError)
        raise kind(
            f"{kernel.name}: exit status {done.returncode} ({mode}, {order} order)\n{readable(said, kernel, program)}"
        )
    return _outputs(kernel, done.stdout)


def _dispatch(
    kernel: Kernel, inputs: Sequence[Any], order: Order, seed: int, fill: int, writable: Sequence[str]
) -> bytes:
    """The dispatch as runtime.cpp reads it: struct Dispatch, then struct Buffer for each, then the inputs' bytes."""
    if len(inputs) != len(kernel.inputs):
        raise ValueError(f"{kernel.name}: {len(kernel.inputs)} inputs expected, got {len(inputs)}")
    given = {
        a.name: (a, *input_buffer(a, value, kernel.contiguous)) for a, value in zip(kernel.inputs, inputs, strict=True)
    }
    outputs = {a.name: a for a in kernel.outputs}
    order_of_buffers = buffer_order(kernel)
    heads, bodies = [], []
    for kind, name in order_of_buffers:
        if kind == "output":
            size = np.dtype(NUMPY[outputs[name].dtype]).itemsize
            nbytes = size * int(np.prod(outputs[name].shape))
        else:
            described, data, strides = given[name]
            size = np.dtype(NUMPY[described.dtype]).itemsize
            if kind != "input":
                data, size = _info(kind, described, strides, kernel.language)
            nbytes = len(data)
            bodies.append(data)
        label = name if kind in ("input", "output") else f"{name}_{kind}"
        role = _OUTPUT if kind == "output" else _WRITABLE if kind == "input" and name in writable else _INPUT
        heads.append(struct.pack("<IIQ64s", role, size, nbytes, label.encode()[:63]))
    head = struct.pack(
        "<6I3I3II",
        *(_MAGIC, _ORDERS[order], seed, fill, kernel.language == "cuda", _MAX_SHARED[kernel.language]),
        *kernel.grid,
        *(min(t, g) for t, g in zip(kernel.threadgroup, kernel.grid, strict=True)),
        len(order_of_buffers),
    )
    return b"".join([head, *heads, *bodies])


def _info(kind: str, described: Array, strides: tuple[int, ...], language: str) -> tuple[bytes, int]:
    """What a kernel gets for X_shape, X_strides and X_ndim, and an element's size. CUDA's arrays are of fixed size."""
    if kind == "ndim":
        return struct.pack("<i", len(described.shape)), 4
    numbers = np.array(described.shape if kind == "shape" else strides, np.int32 if kind == "shape" else np.int64)
    if language == "cuda":
        numbers = np.concatenate([numbers, np.full(10 - numbers.size, -1, numbers.dtype)])
    return numbers.tobytes(), numbers.itemsize


def _outputs(kernel: Kernel, data: bytes) -> list[npt.NDArray[Any]]:
    outputs, at = [], 0
    for described in kernel.outputs:
        dtype = np.dtype(NUMPY[described.dtype])
        count = int(np.prod(described.shape))
        outputs.append(np.frombuffer(data, dtype, count, at).reshape(described.shape).copy())
        at += count * dtype.itemsize
    return outputs


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def _filled(values: npt.NDArray[Any], fill: int) -> npt.NDArray[np.bool_]:
    """Which elements hold nothing but the fill."""
    return np.asarray(_bits(values) == int.from_bytes(bytes([fill]) * values.itemsize, "little"))


def _index(where: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def _unwritten_text(kernel: Kernel, described: Array, unwritten: npt.NDArray[np.bool_]) -> str:
    return (
        f"{kernel.name}: {int(unwritten.sum())} of {unwritten.size} elements of output {described.name} were never "
        f"written, the first at {_index(unwritten)}"
    )
