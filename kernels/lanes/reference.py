"""The codec in plain MLX operations: the definition of correct for every other backend.

A row x is one rotated token of one KV head, with `dim` coordinates. It becomes codes c and one scale a. It is read as
x' = a * levels[c], then rotated back. The levels are those of N(0, 1), because the coordinates of u look like it:

    u = x sqrt(dim) / |x|,  c_i = argmin_j |u_i - levels[j]|,  r = levels[c]      (u_i: a coordinate, or a pair)
    keys:    a = |x|^2 / <r, x>          so that <x', x> = |x|^2: inner products have no bias (EDEN, arXiv 2604.18555)
    values:  a = <r, x> / <r, r>         the least-squares scale

If codebooks have zooms z, encoding tries u and each z u, and keeps the c whose r has the smallest angle with u. From 5
bits on, levels are equally spaced and z = range_end(levels) / max |u_i|. Reading does not change, because a does not
depend on z.

Page bytes, layout 2 (kernels/codec/layout.py has the bit streams), for each KV head:

    key codes     uint32 [PAGE, words_for(key_dim, key_bits)]         a stream per token along the head dim
    value codes   uint32 [value_dim, words_for(PAGE, value_bits)]     a stream per dim along the page's tokens

A pair code stands for dims 2i and 2i + 1 of a key, or for one dim of the values of tokens 2t and 2t + 1.

    key scales    float16 [PAGE]                                      clamped to the largest finite value
    value scales  float16 [PAGE]

Source: TurboQuant, arXiv 2504.19874, algorithm 1 (TQ_mse), with the scales above instead of the plain norm.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx

from kernels.codec.codes import Code, Nearest, down_columns
from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from kernels.lanes.base import CodebookKind, Codebooks, Lanes, LaneShape, Pages, Pair, coded_page_arrays

_FLOAT16_MAX = 65504.0


def quantise(
    rows: mx.array, nearest: Nearest, *, unbiased: bool, zooms: Sequence[float] = (), end: float | None = None
) -> tuple[mx.array, mx.array]:
    """Rotated rows `[..., dim]` to codes of the nearest entries (uint32, in the order of `nearest`) and float16 scales
    `[...]`.

    `unbiased` selects the key scale, else the value scale. `end` is the codebook's `range_end`. A zero row gets scale
    0. A row with NaN or infinity gets a NaN or clamped scale and affects no other row. A scale is about the root mean
    square of its row. Its relative error is float16's: at most 2**-11 for scales above 6e-5.
    """
    rows = rows.astype(mx.float32)
    norms = mx.linalg.norm(rows, axis=-1, keepdims=True)
    # Divide first: times the root of the dimension, the largest rows would overflow float32.
    units = rows / mx.maximum(norms, 1e-30) * math.sqrt(rows.shape[-1])
    if end is not None:
        codes, levels = nearest(units * (end / mx.maximum(mx.abs(units).max(axis=-1, keepdims=True), 1e-30)))
    else:
        codes, levels = nearest(units * _best_zoom(units, zooms, nearest) if zooms else units)
    along = (levels * units).sum(axis=-1)
    scales = rows.shape[-1] / along if unbiased else along / mx.square(levels).sum(axis=-1)
    norms = norms.squeeze(-1)
    scales = mx.where(norms == 0, 0.0, mx.minimum(norms / math.sqrt(rows.shape[-1]) * scales, _FLOAT16_MAX))
    return codes, scales.astype(mx.float16)


def _best_zoom(units: mx.array, zooms: Sequence[float], nearest: Nearest) -> mx.array:
    """For each row the factor, 1 or one of `zooms`, whose levels have the smallest angle with the row: `[..., 1]`."""

    def fit(zoom: float) -> mx.array:
        levels = nearest(units * zoom)[1]
        along = (levels * units).sum(axis=-1, keepdims=True)
        return along * mx.abs(along) / mx.square(levels).sum(axis=-1, keepdims=True)

    best, most = mx.ones((*units.shape[:-1], 1)), fit(1.0)
    for zoom in zooms:
        here = fit(zoom)
        best, most = mx.where(here > most, zoom, best), mx.maximum(here, most)
    return best


class ReferenceLanes(Lanes):
    """`Lanes` in plain MLX operations, for any head dim and codebook. Pair codes need an even key dim."""

    name: ClassVar[str] = "reference"
    codebook: ClassVar[CodebookKind] = "pair"

    def __init__(self, shape: LaneShape, codebooks: Codebooks) -> None:
        super().__init__(shape, codebooks)
        self._key_rotation, self._value_rotation = Rotation(shape.key_dim), Rotation(shape.value_dim)
        self._keys, self._values = Code(codebooks.keys, shape.key_bits), Code(codebooks.values, shape.value_bits)
        self._zooms = codebooks.key_zooms, codebooks.value_zooms

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        if shape.key_bits % 1 and shape.key_dim % 2:
            return f"a code of {shape.key_bits:g} bits stands for a pair of dims, and keys have {shape.key_dim}"
        return None

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        return coded_page_arrays(self.shape)

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        keys, values = self._key_rotation.apply(keys), self._value_rotation.apply(values)
        key_codes, key_scales = quantise(
            keys, self._keys.nearest, unbiased=True, zooms=self._zooms[0], end=self._keys.range_end
        )
        down = down_columns(self._values.nearest)
        value_codes, value_scales = quantise(
            values, down, unbiased=False, zooms=self._zooms[1], end=self._values.range_end
        )
        return self._keys.pack(key_codes), self._values.pack(value_codes), key_scales, value_scales

    def expand(self, pages: Pages, dtype: mx.Dtype) -> Pair:
        keys, values = self.expand_rotated(pages)
        return self._key_rotation.inverse(keys).astype(dtype), self._value_rotation.inverse(values).astype(dtype)

    def expand_rotated(self, pages: Pages) -> Pair:
        """`expand` without the inverse rotation: levels times scales, in float32."""
        key_words, value_words, key_scales, value_scales = pages
        keys, values = self._keys.read(key_words, self.shape.key_dim), self._values.read(value_words, PAGE)
        values = values.swapaxes(-1, -2)
        return keys * key_scales[..., None].astype(mx.float32), values * value_scales[..., None].astype(mx.float32)
