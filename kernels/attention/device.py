"""The device that MLX computes on, and arrays in its own memory."""

from functools import cache

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX computes on its CPU backend."""
    return bool(mx.default_device().type == mx.cpu)


def resident(array: mx.array) -> mx.array:
    """A copy of a host array in the device's own memory, if that is separate.

    On CUDA, arrays made from Python numbers lie in memory that is shared with the host. Each read of a kernel then
    crosses the bus, and a kernel that follows its inputs waits for several reads (measured on one H200: 20 us of 29).
    """
    return array + mx.array(0, dtype=array.dtype) if mx.cuda.is_available() else array


@cache
def steps_on_device() -> bool:
    """Whether to increment integers on the device instead of sending them with every step.

    On CUDA, a new host array of more than 8 bytes may take a buffer that the device has used. MLX then copies it to
    shared memory and waits (measured on one H200: 80 us of a decode step's 1,650).
    """
    return bool(mx.cuda.is_available())


@cache
def constant(numbers: tuple[int, ...]) -> mx.array:
    """int32 numbers, kept on the device."""
    array = resident(mx.array(numbers, dtype=mx.int32))
    mx.eval(array)
    return array
