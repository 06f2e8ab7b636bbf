"""TurboQuant's two-stage code for keys (TQ_prod): a code of one bit less, and signs of a projection of what it leaves.

For a rotated key x of `dim` coordinates, x' what (b - 1) bits give back (least-squares scale), r = x - x':

    z = sign(S r), one bit a coordinate, and |r| as float16
    x is read as x' + c |r| S^T z

Inner products have no bias over the choice of S, whatever the query: E[S^T sign(S r)] = r / (c |r|). So c belongs to
the kind of S, and the constant of one kind with the projection of the other is off by about the root of dim:

    gaussian     entries of N(0, 1)            c = sqrt(pi / 2) / dim
    orthonormal  a random orthonormal matrix   c = 1 / (dim E|u_1|), u on the unit sphere: sqrt(pi / 2) / sqrt(dim) for
                                               large dim, 1 / (4 dim) less exactly

Source: TurboQuant, arXiv 2504.19874, algorithm 2; QJL, arXiv 2406.03482. An option for comparisons, read by these lanes
only: the unbiased scale of kernels/lanes/reference.py has smaller errors at the same bits and needs no second stream.

Page arrays: those of layout 2 at b - 1 bits, then for each KV head

    signs           uint32 [PAGE, words_for(key_dim, 1)]      bit 1 for z = +1, a stream per token along the head dim
    residual norms  float16 [PAGE]
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import mlx.core as mx
import numpy as np

from kernels.codec.layout import PAGE, pack, unpack, words_for
from kernels.lanes.base import Codebooks, LaneShape, Pages, coded_page_arrays
from kernels.lanes.reference import ReferenceLanes, quantise

SketchKind = Literal["gaussian", "orthonormal"]

SKETCH_SEED = 0x7043
"""Part of the stored format, as the rotation's."""


def sketch(kind: SketchKind, dim: int, seed: int = SKETCH_SEED) -> np.ndarray:
    """The projection S, float64 `[dim, dim]`; an orthonormal one is uniform over all of them."""
    gaussian = np.random.Generator(np.random.PCG64(seed)).normal(size=(dim, dim))
    if kind == "gaussian":
        return gaussian
    q, r = np.linalg.qr(gaussian)
    return np.asarray(q * np.sign(np.diag(r)))


def sketch_constant(kind: SketchKind, dim: int) -> float:
    """c, by which S^T sign(S r) |r| is an unbiased estimate of r."""
    if kind == "gaussian":
        return math.sqrt(math.pi / 2) / dim
    mean = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)  # of |u_1|
    return 1 / (dim * mean)


class QjlLanes(ReferenceLanes):
    """The reference with two-stage keys. `shape.key_bits` counts the sign; codebooks of the keys have one bit less."""

    name: ClassVar[str] = "reference"

    def __init__(self, shape: LaneShape, codebooks: Codebooks, kind: SketchKind = "orthonormal") -> None:
        self._stored = replace(shape, key_bits=shape.key_bits - 1, qjl=False)
        super().__init__(self._stored, codebooks)
        self.shape = shape
        self._sketch = mx.array(sketch(kind, shape.key_dim).astype(np.float32))
        self._constant = sketch_constant(kind, shape.key_dim)

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        heads = self.shape.n_kv_heads
        signs = (heads, PAGE, words_for(self.shape.key_dim, 1)), mx.uint32
        return [*coded_page_arrays(self._stored), signs, ((heads, PAGE), mx.float16)]

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        _, value_words, _, value_scales = super().encode(keys, values)
        keys = self._key_rotation.apply(keys)
        codes, scales = quantise(keys, self._keys.nearest, unbiased=False)
        words = self._keys.pack(codes)
        left = keys - self._keys.read(words, self.shape.key_dim) * scales[..., None].astype(mx.float32)
        signs = pack((left @ self._sketch.T > 0).astype(mx.uint32), 1)
        return words, value_words, scales, value_scales, signs, mx.linalg.norm(left, axis=-1).astype(mx.float16)

    def expand_rotated(self, pages: Pages) -> tuple[mx.array, mx.array]:
        keys, values = super().expand_rotated(pages[:4])
        signs = unpack(pages[4], self.shape.key_dim, 1).astype(mx.float32) * 2 - 1
        norms = pages[5][..., None].astype(mx.float32)
        return keys + self._constant * norms * (signs @ self._sketch), values
