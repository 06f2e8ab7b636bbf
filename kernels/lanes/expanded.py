"""Lanes of which only some parts can be trusted: what attends wrongly is done over expanded pages instead."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import ClassVar

import mlx.core as mx

from kernels.attention.masks import Mask, MaskForm
from kernels.attention.page_tables import PageIndex, RowIndex
from kernels.lanes.base import (
    AttentionPath,
    CodebookKind,
    Lanes,
    LaneShape,
    Pages,
    Pair,
    attend_expanded,
    attend_step_masked,
)


class PartedLanes:
    """`Lanes` that store and expand pages as `lanes` do, and attend as they do except for the parts in `expanded`
    (`attend`, `attend_step`): these expand every page and attend in MLX operations. Correct whenever `encode` and
    `expand` are; slower, with a scratch of one layer's pages.
    """

    name: ClassVar[str] = "parted"
    codebook: ClassVar[CodebookKind] = "none"

    def __init__(self, lanes: Lanes, expanded: Collection[str]) -> None:
        self.shape = lanes.shape
        self.lanes = lanes
        self._expanded = frozenset(expanded)
        self.masks = MaskForm() if "attend" in expanded else lanes.masks

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        return None

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        return self.lanes.page_arrays()

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        return self.lanes.encode(keys, values)

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        return self.lanes.expand(pages, dtype)

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
        if "attend" in self._expanded:
            return attend_expanded(self.expand, queries, raw_keys, raw_values, pages, index, mask, scale, sinks)
        return self.lanes.attend(queries, raw_keys, raw_values, pages, index, mask, scale, sinks)

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
        if "attend_step" in self._expanded:
            attend = partial(attend_expanded, self.expand)
            return attend_step_masked(attend, queries, tokens, raw, pages, rows, scale, sinks)
        return self.lanes.attend_step(queries, tokens, raw, pages, rows, scale, sinks)

    def path(self, n_tokens: int | None) -> AttentionPath:
        part = "attend_step" if n_tokens is None else "attend"
        return "expanded" if part in self._expanded else self.lanes.path(n_tokens)
