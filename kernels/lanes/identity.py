"""Pages that hold keys and values as they are: the `off` preset, and the yardstick for everything about paging."""

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx

from kernels.attention.masks import Mask, MaskForm
from kernels.attention.page_tables import PageIndex, RowIndex
from kernels.codec.layout import PAGE
from kernels.lanes.base import (
    AttentionPath,
    CodebookKind,
    LaneShape,
    Pages,
    Pair,
    attend_expanded,
    attend_step_masked,
)


class IdentityLanes:
    """`Lanes` without a codec, in the dtype of the model's cache. Bits of the shape are ignored."""

    name: ClassVar[str] = "identity"
    codebook: ClassVar[CodebookKind] = "none"
    masks: ClassVar[MaskForm] = MaskForm()

    def __init__(self, shape: LaneShape, dtype: mx.Dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        return None

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        heads = self.shape.n_kv_heads
        return [((heads, PAGE, self.shape.key_dim), self.dtype), ((heads, PAGE, self.shape.value_dim), self.dtype)]

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        return keys.astype(self.dtype), values.astype(self.dtype)

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        keys, values = pages
        return keys.astype(dtype), values.astype(dtype)

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
        tokens: Pair,
        raw: Pair,
        pages: Pages,
        rows: RowIndex,
        scale: float,
        sinks: mx.array | None,
    ) -> tuple[mx.array, Pair]:
        return attend_step_masked(self.attend, queries, tokens, raw, pages, rows, scale, sinks)

    def path(self, n_tokens: int | None) -> AttentionPath:
        return "expanded"
