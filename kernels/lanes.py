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

Pages = tuple[mx.array, ...]
"""The arrays of one layer's pages, each `[n_pages, ...]`, in the order of `Lanes.page_arrays`."""

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
    """Which pages each of `B` rows reads, row after row, without padding.

    `tables[b]` lists row b's page ids, oldest first. `flat` is their concatenation `[T]`; `dense` is `[B, P]`, the
    place in `flat` of row b's p-th page (rows with fewer than P pages repeat place 0 and must be masked).
    """

    tables: tuple[tuple[int, ...], ...]

    @property
    def n_rows(self) -> int:
        return len(self.tables)

    @cached_property
    def n_pages(self) -> int:
        """P: the longest table."""
        return max((len(t) for t in self.tables), default=0)

    @cached_property
    def ragged(self) -> bool:
        return any(len(t) != self.n_pages for t in self.tables)

    @cached_property
    def flat(self) -> mx.array:
        return mx.array([page for table in self.tables for page in table], dtype=mx.int32)

    @cached_property
    def row_of(self) -> mx.array:
        """Row of each place in `flat`, int32 `[T]`."""
        return mx.array([row for row, table in enumerate(self.tables) for _ in table], dtype=mx.int32)

    @cached_property
    def dense(self) -> mx.array:
        starts = np.cumsum([0, *(len(t) for t in self.tables)])
        place = np.zeros((self.n_rows, self.n_pages), dtype=np.int32)
        for row, table in enumerate(self.tables):
            place[row, : len(table)] = np.arange(starts[row], starts[row + 1])
        return mx.array(place)

    @cached_property
    def place_in_dense(self) -> mx.array:
        """For each place in `flat` its place in the flattened `[B * P]` table, int32 `[T]`."""
        return mx.array(
            [row * self.n_pages + p for row, table in enumerate(self.tables) for p in range(len(table))], dtype=mx.int32
        )

    @cached_property
    def membership(self) -> mx.array:
        """1 where a place of `flat` belongs to a row, float32 `[B, T]`: a sum over places by row is one product."""
        return (self.row_of[None, :] == mx.arange(self.n_rows)[:, None]).astype(mx.float32)


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
        mask: mx.array | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Decode attention of one query token per row over its pages and its raw tokens.

        `queries` `[B, n_heads, 1, key_dim]`, float32 and already scaled; `raw_keys`/`raw_values`
        `[B, n_kv_heads, S, dim]`; `pages` the whole pool; `mask` bool `[B, 1, 1, P * PAGE + S]`, pages first, or None
        when everything is visible; `sinks` `[n_heads]` extra logits without a value, or None. Returns float32
        `[B, n_heads, 1, value_dim]`.
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
    mask: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """`Lanes.attend` by expanding every page and calling MLX's attention: the definition of correct."""
    keys, values = raw_keys, raw_values
    if index.n_pages:
        table = index.flat[index.dense]
        page_keys, page_values = gather_expanded(lanes, pages, table, raw_keys.dtype)
        keys = mx.concatenate([page_keys, raw_keys], axis=2)
        values = mx.concatenate([page_values, raw_values], axis=2)
    queries = queries.astype(keys.dtype)
    sinks = sinks if sinks is None else sinks.astype(keys.dtype)
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask, sinks=sinks)
    return out.astype(mx.float32)
