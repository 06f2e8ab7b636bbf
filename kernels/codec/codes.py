"""Codes: find the nearest entry of a codebook, look entries up, and pack codes into streams.

A codebook in units of N(0, 1) is a table of either

    [n]      sorted levels, one code a coordinate (scalar code, n = 2**bits)
    [n, 2]   points, one code for a pair of neighbouring coordinates (pair code, n = 2**(2 * bits); half bits possible)

Everything runs along the last axis: pair code i stands for coordinates 2i and 2i + 1. Two scalar codes are also the
pair code c0 | c1 << bits, so the same kernels read the streams of both kinds.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from kernels.codec.layout import pack, unpack

Nearest = Callable[[mx.array], tuple[mx.array, mx.array]]
"""Coordinates `[..., m]` to codes (uint32, `[..., m]` or `[..., m / 2]`) and their entries (float32, `[..., m]`)."""


class Code:
    """A codebook at `bits` a coordinate. Raises ValueError for a table of the wrong size."""

    def __init__(self, table: np.ndarray, bits: float) -> None:
        needed = 2 ** (bits * table.ndim)
        if table.ndim > 2 or table.shape[1:] not in ((), (2,)) or len(table) != needed:
            kind = "levels" if table.ndim == 1 else "pairs"
            raise ValueError(f"a codebook of {len(table)} {kind} is not one of {bits:g} bits, which needs {needed:g}")
        self.table = mx.array(table.astype(np.float32))
        self.range_end = range_end(table)
        self.width = round(bits * table.ndim)
        self.nearest = nearest_level(self.table) if table.ndim == 1 else nearest_pair(self.table)

    def pack(self, codes: mx.array) -> mx.array:
        """Codes of `n` coordinates to words `[..., words_for(n, bits)]`, uint32."""
        return pack(codes, self.width)

    def read(self, words: mx.array, n: int) -> mx.array:
        """Words to the `n` coordinates, float32 `[..., n]`."""
        return entries(self.table, unpack(words, n // self.table.ndim, self.width))


def range_end(table: np.ndarray) -> float | None:
    """Where the outermost cells of a grid end, for codebooks of 32 levels or more, or None for smaller ones.

    Encoding scales each row so that its largest coordinate lies there. With that many levels, the best equally spaced
    levels for a row end where the row ends. Mean squared error for Gaussian rows of 64, 128 and 256 coordinates, in
    units of 1e-4: 5.7, 6.7 and 7.6 at 6 bits, where Lloyd-Max levels have 6.4.
    """
    if table.ndim != 1 or len(table) < 32:
        return None
    return float(table[-1] - table[-2]) * len(table) / 2


def down_columns(nearest: Nearest) -> Nearest:
    """The same search along m in `[..., m, n]`.

    Codes come in the order of their streams, `[..., n, m]` or `[..., n, m / 2]`; entries in that of the coordinates.
    """

    def search(units: mx.array) -> tuple[mx.array, mx.array]:
        codes, read = nearest(units.swapaxes(-1, -2))
        return codes, read.swapaxes(-1, -2)

    return search


def entries(table: mx.array, codes: mx.array) -> mx.array:
    """Codes `[..., m]` to coordinates `[..., m]`, or `[..., 2 * m]` for a pair code."""
    read = mx.take(table, codes, axis=0)
    return read if table.ndim == 1 else read.flatten(-2)


def nearest_level(levels: mx.array) -> Nearest:
    """Search in sorted `levels`, float32 `[2**bits]`. Ties go to the lower code."""
    boundaries = (levels[1:] + levels[:-1]) / 2

    def search(units: mx.array) -> tuple[mx.array, mx.array]:
        codes = mx.zeros(units.shape, dtype=mx.int32)
        step = levels.size // 2
        while step:  # binary search for the number of boundaries below each coordinate
            codes = codes + step * (units > mx.take(boundaries, codes + (step - 1)))
            step //= 2
        return codes.astype(mx.uint32), mx.take(levels, codes)

    return search


def nearest_pair(table: mx.array) -> Nearest:
    """Search in a table of pairs, float32 `[n, 2]`, by trying one after the other. Ties go to the lower code.

    Memory stays at a few times the input's. Next to a border, squared differences are far more accurate than a matrix
    product's |c|^2 - 2 <c, u>. NaN and infinity count as 0, so that a broken row does not spoil its pair.
    """
    points: list[list[float]] = np.array(table).tolist()

    def search(units: mx.array) -> tuple[mx.array, mx.array]:
        units = mx.where(mx.isfinite(units), units, 0.0)
        x, y = (mx.contiguous(units[..., i::2]) for i in (0, 1))
        codes, best = mx.zeros(x.shape, dtype=mx.uint32), mx.full(x.shape, mx.inf, dtype=mx.float32)
        for code, (at_x, at_y) in enumerate(points):
            squared = mx.square(x - at_x) + mx.square(y - at_y)
            codes = mx.where(squared < best, mx.array(code, dtype=mx.uint32), codes)
            best = mx.minimum(best, squared)
        return codes, entries(table, codes)

    return search
