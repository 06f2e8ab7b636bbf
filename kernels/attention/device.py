"""Where arrays lie."""

from functools import cache

import mlx.core as mx


def resident(array: mx.array) -> mx.array:
    """An array made from Python's numbers, copied into the device's own memory where that is another one.

    On CUDA such arrays lie in memory that is shared with the host: each read of a kernel goes over the bus, and a
    kernel that follows its inputs from one to the next waits for several (measured on one H200: 20 us of 29).
    """
    return array + mx.array(0, dtype=array.dtype) if mx.cuda.is_available() else array


@cache
def steps_on_device() -> bool:
    """Whether integers that grow by one with every step are better counted on the device than sent to it.

    On CUDA a new array of more than 8 bytes from the host may take a buffer that the device has used, which MLX then
    copies to shared memory and waits for (measured on one H200: 80 us, of a decode step's 1,650).
    """
    return bool(mx.cuda.is_available())


@cache
def constant(numbers: tuple[int, ...]) -> mx.array:
    """int32 numbers that lie on the device for good."""
    array = resident(mx.array(numbers, dtype=mx.int32))
    mx.eval(array)
    return array
