"""Lanes: one way of storing pages and attending over them. Every backend is a `Lanes` class with the same contract.

All keys, values and queries here are in the rotated basis; nothing in this package knows the rotation, the model or
the session. Shapes use `B` rows, `n_heads` query heads, `n_kv_heads` KV heads, `PAGE` tokens a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import mlx.core as mx
import numpy as np

from kernels.layout import PAGE
from kernels.softmax import attention

Pages = tuple[mx.array, ...]
"""The arrays of one layer's pages, each `[n_pages, ...]`, in the order of `Lanes.page_arrays`."""

Mask = mx.array | Literal["causal"] | None

CodebookKind = Literal["lloyd_max", "uniform", "none"]
"""`lloyd_max`: any sorted levels. `uniform`: equally spaced ones, which affine integer products can read."""


@dataclass(frozen=True, slots=True)
class LaneShape:
    """What a layer stores: head counts, head dims and code widths. Widths are 1 to 8 bits."""

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    key_bits: int
    value_bits: int

    @property
    def n_repeats(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True, slots=True)
class Codebooks:
    """Sorted reconstruction levels of unit vectors' coordinates, float32 `[2**bits]`, for keys and for values."""

    keys: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class PageIndex:
    """Which pages each of `B` rows reads: `tables[b]` lists row b's page ids, oldest first."""

    tables: tuple[tuple[int, ...], ...]

    @cached_property
    def n_pages(self) -> int:
        """P: the longest table."""
        return max((len(t) for t in self.tables), default=0)

    @cached_property
    def table(self) -> mx.array:
        """Page ids, int32 `[B, P]`. Shorter rows are filled up with a page of their own, which must be masked."""
        rows = [[*table, *[table[0] if table else 0] * (self.n_pages - len(table))] for table in self.tables]
        return mx.array(rows, dtype=mx.int32)

    @cached_property
    def pageless(self) -> mx.array | None:
        """Rows without a page, bool `[B, 1, 1, 1]`, or None when there is none among rows with pages. What `table`
        makes them read belongs to others, so its values must not even be multiplied by 0: they may be NaN.
        """
        return None if all(self.tables) else mx.array([not t for t in self.tables])[:, None, None, None]

    @cached_property
    def _by_head(self) -> dict[int, mx.array]:
        return {}

    def heads(self, n_kv_heads: int) -> mx.array:
        """`table` for arrays whose page and head axes are one: int32 `[B, n_kv_heads, P]`."""
        if n_kv_heads not in self._by_head:
            self._by_head[n_kv_heads] = self.table[:, None, :] * n_kv_heads + mx.arange(n_kv_heads)[None, :, None]
        return self._by_head[n_kv_heads]


class Lanes(Protocol):
    """One layer's storage and attention. Instances are immutable; the pool owns the arrays."""

    name: ClassVar[str]
    codebook: ClassVar[CodebookKind]
    shape: LaneShape

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        """Why this backend can't take the shape, or None."""
        ...

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        """Shape (without the leading page axis) and dtype of each array that a page consists of."""
        ...

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        """`[N, n_kv_heads, PAGE, key_dim]` and `[N, n_kv_heads, PAGE, value_dim]` to the arrays of N pages."""
        ...

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The arrays of N pages to keys and values in `dtype`, shapes as given to `encode`."""
        ...

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
        """Attention of `L` query tokens per row over the row's pages and raw tokens.

        `queries` `[B, n_heads, L, key_dim]`, float32 and already scaled; `raw_keys`/`raw_values`
        `[B, n_kv_heads, S, dim]`; `pages` the whole pool; `mask` bool `[B, 1, L, P * PAGE + S]` with the pages first,
        or "causal" when the last L raw tokens are the queries' own, or None when everything is visible; `sinks`
        `[n_heads]` extra logits without a value, or None. Returns float32 `[B, n_heads, L, value_dim]`.
        """
        ...


def gather_expanded(lanes: Lanes, pages: Pages, table: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Pages of `table` `[B, P]` as contiguous keys and values `[B, n_kv_heads, P * PAGE, dim]` in `dtype`."""
    n_rows, n_pages = table.shape
    chosen = tuple(mx.take(array, table.reshape(-1), axis=0) for array in pages)

    def lay_out(tokens: mx.array) -> mx.array:
        _, n_kv_heads, _, dim = tokens.shape
        tokens = tokens.reshape(n_rows, n_pages, n_kv_heads, PAGE, dim).transpose(0, 2, 1, 3, 4)
        return tokens.reshape(n_rows, n_kv_heads, n_pages * PAGE, dim)

    keys, values = lanes.expand(chosen, dtype)
    return lay_out(keys), lay_out(values)


def attend_expanded(
    lanes: Lanes,
    queries: mx.array,
    raw_keys: mx.array,
    raw_values: mx.array,
    pages: Pages,
    index: PageIndex,
    mask: Mask,
    sinks: mx.array | None,
) -> mx.array:
    """`Lanes.attend` by expanding every page and attending in the plain way: the definition of correct."""
    keys, values = raw_keys, raw_values
    if index.n_pages:
        page_keys, page_values = gather_expanded(lanes, pages, index.table, raw_keys.dtype)
        if index.pageless is not None:
            page_values = mx.where(index.pageless, 0.0, page_values)
        keys = mx.concatenate([page_keys, raw_keys], axis=2)
        values = mx.concatenate([page_values, raw_values], axis=2)
    sinks = sinks if sinks is None else sinks.astype(keys.dtype)
    return attention(queries.astype(keys.dtype), keys, values, mask, sinks).astype(mx.float32)
