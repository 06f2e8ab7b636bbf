"""TurboQuant's two-stage code for keys (TQ_prod): a code of one bit less, and the signs of a projected residual.

For a rotated key x of `dim` coordinates, let x' be what b - 1 bits give back (least-squares scale) and r = x - x':

    z = sign(S r)                  one bit per coordinate; |r| is stored as float16
    x is read as x' + c |r| S^T z

S is a random orthonormal matrix, and c = 1 / (dim E|u_1|) for u uniform on the unit sphere. For large dim, c is
sqrt(pi / 2) / sqrt(dim), less about 1 / (4 dim) of it. Then inner products with any query have no bias over the
choice of S: E[S^T sign(S r)] = r / (c |r|). The paper's gaussian S needs c = sqrt(pi / 2) / dim and has larger errors.

Source: TurboQuant, arXiv 2504.19874, algorithm 2; QJL, arXiv 2406.03482. Only these lanes read the code. It exists for
comparisons: the unbiased scale of kernels/lanes/reference.py has smaller errors at the same bits and needs no second
stream.

Page arrays: those of layout 2 at b - 1 bits, then for each KV head

    signs           uint32 [PAGE, words_for(key_dim, 1)]      bit 1 for z = +1, a stream per token along the head dim
    residual norms  float16 [PAGE]
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np

from kernels.codec.layout import PAGE, pack, unpack, words_for
from kernels.lanes.base import Codebooks, LaneShape, Pages, Pair, coded_page_arrays
from kernels.lanes.reference import ReferenceLanes, quantise

SKETCH_SEED = 0x7043
"""Part of the stored format, as the rotation's seed is."""


class QjlShape(LaneShape):
    """A shape whose keys have the two-stage code. `key_bits` counts the sign's bit."""

    __slots__ = ()

    @property
    def widths(self) -> str:
        return f"{super().widths}_qjl"

    @property
    def without_sign(self) -> LaneShape:
        """The shape of the first stage, which the codebooks are for."""
        heads, dims = (self.n_heads, self.n_kv_heads), (self.key_dim, self.value_dim)
        return LaneShape(*heads, *dims, self.key_bits - 1, self.value_bits)


def sketch(dim: int, seed: int = SKETCH_SEED) -> np.ndarray:
    """The projection S, float64 `[dim, dim]`: uniform over the orthonormal matrices."""
    q, r = np.linalg.qr(np.random.Generator(np.random.PCG64(seed)).normal(size=(dim, dim)))
    return np.asarray(q * np.sign(np.diag(r)))


def sketch_constant(dim: int) -> float:
    """c: with it, c |r| S^T sign(S r) is an unbiased estimate of r."""
    mean = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)  # of |u_1|
    return 1 / (dim * mean)


class QjlLanes(ReferenceLanes):
    """The reference with two-stage keys. Codebooks are those of `QjlShape.without_sign`."""

    name: ClassVar[str] = "reference"

    def __init__(self, shape: QjlShape, codebooks: Codebooks) -> None:
        super().__init__(shape.without_sign, codebooks)
        self._first_stage = self.shape
        self.shape = shape
        self._sketch = mx.array(sketch(shape.key_dim).astype(np.float32))
        self._constant = sketch_constant(shape.key_dim)

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        heads = self.shape.n_kv_heads
        signs = (heads, PAGE, words_for(self.shape.key_dim, 1)), mx.uint32
        return [*coded_page_arrays(self._first_stage), signs, ((heads, PAGE), mx.float16)]

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        _, value_words, _, value_scales = super().encode(keys, values)
        keys = self._key_rotation.apply(keys)
        codes, scales = quantise(keys, self._keys.nearest, unbiased=False)
        words = self._keys.pack(codes)
        residual = keys - self._keys.read(words, self.shape.key_dim) * scales[..., None].astype(mx.float32)
        signs = pack((residual @ self._sketch.T > 0).astype(mx.uint32), 1)
        return words, value_words, scales, value_scales, signs, mx.linalg.norm(residual, axis=-1).astype(mx.float16)

    def expand_rotated(self, pages: Pages) -> Pair:
        keys, values = super().expand_rotated(pages[:4])
        signs = unpack(pages[4], self.shape.key_dim, 1).astype(mx.float32) * 2 - 1
        norms = pages[5][..., None].astype(mx.float32)
        return keys + self._constant * norms * (signs @ self._sketch), values
