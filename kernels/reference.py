"""The codec in plain MLX operations: the definition of correct for every other backend.

A row (one token of one KV head, rotated) x of `dim` coordinates becomes codes c and one scale a, read back as
x' = a * levels[c] and rotated back. The levels are those of N(0, 1), which is what the coordinates of u look like:

    u = x sqrt(dim) / |x|,  c_i = argmin_j |u_i - levels[j]|,  r = levels[c]
    keys:    a = |x|^2 / <r, x>          so that <x', x> = |x|^2: inner products have no bias (EDEN, arXiv 2604.18555)
    values:  a = <r, x> / <r, r>         the least-squares scale

Page bytes, layout 2 (kernels/layout.py has the bit streams), for each KV head:

    key codes     uint32 [PAGE, words_for(key_dim, key_bits)]         a stream per token along the head dim
    value codes   uint32 [value_dim, words_for(PAGE, value_bits)]     a stream per dim along the page's tokens
    key scales    float16 [PAGE]                                      clamped to the largest finite value
    value scales  float16 [PAGE]

Source: TurboQuant, arXiv 2504.19874, algorithm 1 (TQ_mse), with the scales above instead of the plain norm.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np

from kernels.lanes import (
    AttentionPath,
    CodebookKind,
    Codebooks,
    LaneShape,
    Mask,
    PageIndex,
    Pages,
    RowIndex,
    attend_expanded,
    attend_step_masked,
)
from kernels.layout import PAGE, pack, unpack, words_for
from kernels.rotation import Rotation

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
    """Rotated rows `[..., dim]` to nearest-level codes `[..., dim]` (uint32) and scales `[...]` (float16).

    `unbiased` takes the key scale, else the value scale. A zero row gets scale 0; a row with NaN or infinity gets a
    NaN or clamped scale and affects no other row. The scale's relative error is float16's, at most 2**-11 for scales
    above 6e-5; a scale is about the root mean square of its row.
    """
    rows = rows.astype(mx.float32)
    norms = mx.linalg.norm(rows, axis=-1, keepdims=True)
    # Divided first: the root of the dimension would take the largest rows past float32.
    units = rows / mx.maximum(norms, 1e-30) * math.sqrt(rows.shape[-1])
    codes, read_back = nearest(units)
    along = (read_back * units).sum(axis=-1)
    scales = rows.shape[-1] / along if unbiased else along / (read_back * read_back).sum(axis=-1)
    norms = norms.squeeze(-1)
    scales = mx.where(norms == 0, 0.0, mx.minimum(norms / math.sqrt(rows.shape[-1]) * scales, _FLOAT16_MAX))
    return codes, scales.astype(mx.float16)


class ReferenceLanes:
    """`Lanes` in plain MLX operations, for any head dim, any codebook and 1 to 8 bits."""

    name: ClassVar[str] = "reference"
    codebook: ClassVar[CodebookKind] = "lloyd_max"

    def __init__(self, shape: LaneShape, codebooks: Codebooks) -> None:
        self.shape = shape
        self._key_rotation, self._value_rotation = Rotation(shape.key_dim), Rotation(shape.value_dim)
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
            ((s.n_kv_heads, s.value_dim, words_for(PAGE, s.value_bits)), mx.uint32),
            ((s.n_kv_heads, PAGE), mx.float16),
            ((s.n_kv_heads, PAGE), mx.float16),
        ]

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        keys, values = self._key_rotation.apply(keys), self._value_rotation.apply(values)
        key_codes, key_scales = quantise(keys, nearest_level(self._key_levels), unbiased=True)
        value_codes, value_scales = quantise(values, nearest_level(self._value_levels), unbiased=False)
        return (
            pack(key_codes, self.shape.key_bits),
            pack(value_codes.swapaxes(-1, -2), self.shape.value_bits),
            key_scales,
            value_scales,
        )

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        keys, values = self.expand_rotated(pages)
        return self._key_rotation.inverse(keys).astype(dtype), self._value_rotation.inverse(values).astype(dtype)

    def expand_rotated(self, pages: Pages) -> tuple[mx.array, mx.array]:
        """`expand` without rotating back, in float32: the codes' levels times their scales."""
        key_words, value_words, key_scales, value_scales = pages
        keys = mx.take(self._key_levels, unpack(key_words, self.shape.key_dim, self.shape.key_bits))
        values = mx.take(self._value_levels, unpack(value_words, PAGE, self.shape.value_bits)).swapaxes(-1, -2)
        return keys * key_scales[..., None].astype(mx.float32), values * value_scales[..., None].astype(mx.float32)

    def attend(
        self,
        queries: mx.array,
        raw_keys: mx.array,
        raw_values: mx.array,
        pages: Pages,
        index: PageIndex,
        mask: Mask,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        return attend_expanded(self.expand, queries, raw_keys, raw_values, pages, index, mask, scale, sinks)

    def attend_step(
        self,
        queries: mx.array,
        raw_keys: mx.array,
        raw_values: mx.array,
        pages: Pages,
        rows: RowIndex,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        return attend_step_masked(self, queries, raw_keys, raw_values, pages, rows, scale, sinks)

    def path(self, n_tokens: int | None) -> AttentionPath:
        return "expanded"
