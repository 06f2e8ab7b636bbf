"""The codec in plain MLX operations: the definition of correct for every other backend.

A row (one token of one KV head, already rotated) x becomes codes c and one scale a, read back as x' = a * levels[c]:

    u = x / |x|,  c_i = argmin_j |u_i - levels[j]|,  r = levels[c]
    keys:    a = |x| / <r, u>            so that <x', x> = |x|^2: inner products have no bias (EDEN, arXiv 2604.18555)
    values:  a = |x| <r, u> / <r, r>     the least-squares scale

Page bytes, for each KV head and each of the PAGE tokens: key codes packed along the head dim (uint32 words), value
codes likewise, key scales and value scales (float16, clamped to its largest finite value).
Source: TurboQuant, arXiv 2504.19874, algorithm 1 (TQ_mse), with the scales above instead of the plain norm.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np

from kernels.lanes import CodebookKind, Codebooks, LaneShape, Mask, PageIndex, Pages, attend_expanded
from kernels.layout import PAGE, pack, unpack, words_for

_FLOAT16_MAX = 65504.0


Nearest = Callable[[mx.array], tuple[mx.array, mx.array]]
"""Coordinates `[..., dim]` to codes (uint32) and their levels (float32), same shape."""


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


def quantise(rows: mx.array, nearest: Nearest, *, unbiased: bool) -> tuple[mx.array, mx.array]:
    """Rows `[..., dim]` to nearest-level codes `[..., dim]` (uint32) and scales `[...]` (float16).

    `unbiased` takes the key scale, else the value scale. A zero row gets scale 0; a row with NaN or infinity gets a
    NaN or clamped scale and affects no other row. The scale's relative error is float16's, at most 2**-11 for scales
    above 6e-5.
    """
    rows = rows.astype(mx.float32)
    norms = mx.linalg.norm(rows, axis=-1, keepdims=True)
    units = rows / mx.maximum(norms, 1e-30)
    codes, read_back = nearest(units)
    along = (read_back * units).sum(axis=-1)
    scales = 1 / along if unbiased else along / (read_back * read_back).sum(axis=-1)
    norms = norms.squeeze(-1)
    scales = mx.where(norms == 0, 0.0, mx.minimum(norms * scales, _FLOAT16_MAX))
    return codes, scales.astype(mx.float16)


class ReferenceLanes:
    """`Lanes` in plain MLX operations, for any head dim, any codebook and 1 to 8 bits."""

    name: ClassVar[str] = "reference"
    codebook: ClassVar[CodebookKind] = "lloyd_max"

    def __init__(self, shape: LaneShape, codebooks: Codebooks) -> None:
        self.shape = shape
        self._key_levels = mx.array(codebooks.keys.astype(np.float32))
        self._value_levels = mx.array(codebooks.values.astype(np.float32))
        if self._key_levels.size != 1 << shape.key_bits or self._value_levels.size != 1 << shape.value_bits:
            raise ValueError(
                f"codebooks have {self._key_levels.size} and {self._value_levels.size} levels; "
                f"{shape.key_bits} and {shape.value_bits} bits need {1 << shape.key_bits} and {1 << shape.value_bits}"
            )

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        return None

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        s = self.shape
        return [
            ((s.n_kv_heads, PAGE, words_for(s.key_dim, s.key_bits)), mx.uint32),
            ((s.n_kv_heads, PAGE, words_for(s.value_dim, s.value_bits)), mx.uint32),
            ((s.n_kv_heads, PAGE), mx.float16),
            ((s.n_kv_heads, PAGE), mx.float16),
        ]

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        key_codes, key_scales = quantise(keys, nearest_level(self._key_levels), unbiased=True)
        value_codes, value_scales = quantise(values, nearest_level(self._value_levels), unbiased=False)
        return (
            pack(key_codes, self.shape.key_bits),
            pack(value_codes, self.shape.value_bits),
            key_scales,
            value_scales,
        )

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        key_words, value_words, key_scales, value_scales = pages
        s = self.shape

        def read(words: mx.array, scales: mx.array, dim: int, bits: int, levels: mx.array) -> mx.array:
            rows = mx.take(levels, unpack(words, dim, bits)) * scales[..., None].astype(mx.float32)
            return rows.astype(dtype)

        return (
            read(key_words, key_scales, s.key_dim, s.key_bits, self._key_levels),
            read(value_words, value_scales, s.value_dim, s.value_bits, self._value_levels),
        )

    def attend(
        self,
        queries: mx.array,
        raw_keys: mx.array,
        raw_values: mx.array,
        pages: Pages,
        index: PageIndex,
        mask: Mask,
        sinks: mx.array | None,
    ) -> mx.array:
        return attend_expanded(self, queries, raw_keys, raw_values, pages, index, mask, sinks)
