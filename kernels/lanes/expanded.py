"""Lanes that keep another backend's pages but replace its attention where that failed the probe."""

from collections.abc import Collection, Sequence
from typing import ClassVar

import mlx.core as mx

from kernels.attention.masks import MaskForm
from kernels.lanes.base import AttentionPath, ChunkInputs, Lanes, Pages, Pair, StepInputs


class ExpandedAttentionLanes(Lanes):
    """Stores pages as `lanes` does. The methods in `expanded` (`attend`, `attend_step`) expand every page instead.

    Correct whenever `encode` and `expand` of `lanes` are. Slower, with one layer's pages as scratch memory.
    """

    name: ClassVar[str] = "expanded_attention"

    def __init__(self, lanes: Lanes, expanded: Collection[str]) -> None:
        self.shape = lanes.shape
        self.lanes = lanes
        self._expanded = frozenset(expanded)
        self.masks = MaskForm() if "attend" in expanded else lanes.masks

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        return self.lanes.page_arrays()

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        return self.lanes.encode(keys, values)

    def expand(self, pages: Pages, dtype: mx.Dtype) -> Pair:
        return self.lanes.expand(pages, dtype)

    def attend(self, chunk: ChunkInputs) -> mx.array:
        return super().attend(chunk) if "attend" in self._expanded else self.lanes.attend(chunk)

    def attend_step(self, step: StepInputs) -> tuple[mx.array, Pair]:
        return super().attend_step(step) if "attend_step" in self._expanded else self.lanes.attend_step(step)

    def path(self, n_tokens: int | None) -> AttentionPath:
        part = "attend_step" if n_tokens is None else "attend"
        return "expanded" if part in self._expanded else self.lanes.path(n_tokens)
