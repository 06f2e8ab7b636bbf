"""Where arrays lie."""

import mlx.core as mx


def resident(array: mx.array) -> mx.array:
    """An array made from Python's numbers, copied into the device's own memory where that is another one.

    On CUDA such arrays lie in memory that is shared with the host: each read of a kernel goes over the bus, and a
    kernel that follows its inputs from one to the next waits for several (measured on one H200: 20 us of 29).
    """
    return array + mx.array(0, dtype=array.dtype) if mx.cuda.is_available() else array
