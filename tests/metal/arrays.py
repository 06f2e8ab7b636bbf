"""MLX arrays and numpy arrays as the bytes of a buffer. numpy has no bfloat16: there it is uint16 of the same bits."""

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from tests.metal.capture import Array

NUMPY: dict[str, type[np.generic]] = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "float32": np.float32,
}


def to_numpy(value: Any) -> npt.NDArray[Any]:
    """An MLX array's elements; bfloat16 as uint16."""
    if isinstance(value, mx.array):
        return np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)
    return np.asarray(value)


def to_mlx(values: npt.NDArray[Any], dtype: str) -> mx.array:
    made = mx.array(np.ascontiguousarray(values))
    return made.view(mx.bfloat16) if dtype == "bfloat16" else made


def to_float64(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """The numbers that an array stands for."""
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def input_buffer(described: Array, value: Any, contiguous: bool) -> tuple[bytes, tuple[int, ...]]:
    """An input's bytes, from its first element to its last, and its strides in elements.

    Raises ValueError if it is not of the shape and type that the kernel was made for.
    """
    values = to_numpy(value)
    if values.shape != described.shape or values.dtype != NUMPY[described.dtype]:
        raise ValueError(
            f"input {described.name}: expected {described.dtype} {described.shape}, got {values.dtype} {values.shape}"
        )
    if contiguous or values.flags.c_contiguous or values.size == 0:
        values = np.ascontiguousarray(values)
        strides = tuple(s // values.itemsize for s in values.strides)
        return values.tobytes(), strides
    if any(s < 0 or s % values.itemsize for s in values.strides):
        raise ValueError(f"input {described.name}: strides {values.strides} are not those of an MLX array")
    strides = tuple(s // values.itemsize for s in values.strides)
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    flat = np.lib.stride_tricks.as_strided(values, (span,), (values.itemsize,), writeable=False)
    return flat.tobytes(), strides
