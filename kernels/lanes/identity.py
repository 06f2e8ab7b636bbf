"""Pages that hold keys and values as they are: the `off` preset, and the baseline for tests of paging."""

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx

from kernels.codec.layout import PAGE
from kernels.lanes.base import Lanes, LaneShape, Pages, Pair


class IdentityLanes(Lanes):
    """`Lanes` without a codec, in the dtype of the model's cache. The shape's bits are ignored."""

    name: ClassVar[str] = "identity"

    def __init__(self, shape: LaneShape, dtype: mx.Dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        heads = self.shape.n_kv_heads
        return [((heads, PAGE, self.shape.key_dim), self.dtype), ((heads, PAGE, self.shape.value_dim), self.dtype)]

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        return keys.astype(self.dtype), values.astype(self.dtype)

    def expand(self, pages: Pages, dtype: mx.Dtype) -> Pair:
        keys, values = pages
        return keys.astype(dtype), values.astype(dtype)
