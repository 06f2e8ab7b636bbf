"""Lanes: one way of storing pages and attending over them. Every backend is a `Lanes` class with the same contract.

All keys, values, queries and outputs here are in the model's basis; whether pages hold rotated tokens is the lanes' own
affair. Nothing in this package knows the model or the session. Shapes use `B` rows, `n_heads` query heads, `n_kv_heads`
KV heads, `PAGE` tokens a page.
"""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, cast

import mlx.core as mx
import numpy as np

from kernels.device import resident
from kernels.layout import PAGE, words_for
from kernels.masks import Mask, MaskForm
from kernels.softmax import attention

Pages = tuple[mx.array, ...]
"""The arrays of one layer's pages, each `[n_pages, ...]`, in the order of `Lanes.page_arrays`."""

CodebookKind = Literal["lloyd_max", "pair", "uniform", "none"]
"""`lloyd_max`: the best levels, and points for pairs of coordinates where a coordinate has a half bit. `pair`: points
from 2 to 4 bits, levels elsewhere. `uniform`: equally spaced levels, which affine integer products can read.
"""


@dataclass(frozen=True, slots=True)
class LaneShape:
    """What a layer stores: head counts, head dims and code widths. Widths are 1 to 8 bits, 2.5 and 3.5 among them.
    `qjl`: one of the keys' bits is the sign of a projection of what the others leave (kernels/qjl.py).
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    key_bits: float
    value_bits: float
    qjl: bool = False

    @property
    def n_repeats(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def widths(self) -> str:
        """Such as `k4v3`: how presets are named."""
        return f"k{self.key_bits:g}v{self.value_bits:g}{'_qjl' if self.qjl else ''}"


@dataclass(frozen=True, slots=True)
class Codebooks:
    """Reconstruction levels of N(0, 1) for keys and for values, float32 with float16's values, each `[2**bits]` and
    sorted, or `[2**(2 * bits), 2]` for pairs of coordinates (kernels/codes.py). Zooms are factors beside 1 that
    encoding tries on each row (kernels/reference.py).
    """

    keys: np.ndarray
    values: np.ndarray
    key_zooms: tuple[float, ...] = ()
    value_zooms: tuple[float, ...] = ()


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
        return resident(mx.array(rows, dtype=mx.int32))

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


@dataclass(frozen=True)
class RowIndex:
    """One decode step of `B` rows in integers, shared by all layers. Arrays are made when they are first asked for.

    `tables` are page ids, oldest first; `offsets` the positions of the rows' first queries; row b's pages hold blocks
    `first[b]`, `first[b] + 1`, ... Where a row's tokens lie:

        page `i` of the table, token t   position keep + PAGE * (first + i) + t
        raw slot s < keep                position s
        raw slot s >= keep               the position p from keep + PAGE * (first + n_pages) on, the window's start, for
                                         which s = keep + (p - keep) % window_slots

    The step's own tokens are in the raw slots already; window and step together have to fit into `window_slots`. Query
    i of a row is at q = offset + i and sees p if p <= q, and p < keep or p > q - (max_size - keep).

    `previous` is the step before, whose page table is kept if it is the same.
    """

    tables: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    first: tuple[int, ...]
    n_queries: int
    keep: int
    window_slots: int
    max_size: int | None
    previous: InitVar["RowIndex | None"] = None

    def __post_init__(self, previous: "RowIndex | None") -> None:
        if previous is not None and previous.tables == self.tables:
            self.__dict__["index"] = previous.index

    def slots(self, shape: tuple[int, ...]) -> mx.array:
        """Raw slots of the rows' first queries in the shape of their tokens `[B, n_kv_heads, 1, dim]`, int32."""
        key = "slots", shape
        if key not in self.launches:
            behind = [self.keep + (offset - self.keep) % self.window_slots for offset in self.offsets]
            slots = [o if o < self.keep else s for o, s in zip(self.offsets, behind, strict=True)]
            self.launches[key] = mx.broadcast_to(mx.array(slots, dtype=mx.int32)[:, None, None, None], shape)
        return cast(mx.array, self.launches[key])

    @cached_property
    def launches(self) -> dict[Any, Any]:
        """What lanes have worked out for this step, for all layers of their kind."""
        return {}

    @cached_property
    def index(self) -> PageIndex:
        return PageIndex(self.tables)

    @property
    def table(self) -> mx.array:
        """Page ids, int32 `[B, P]`; what follows a row's own pages means nothing."""
        return self.index.table

    @cached_property
    def rows(self) -> mx.array:
        """int32 `[B, 4]`: offset, first, number of pages, 0."""
        counts = zip(self.offsets, self.first, self.tables, strict=True)
        return resident(mx.array([[offset, first, len(table), 0] for offset, first, table in counts], dtype=mx.int32))

    @cached_property
    def page_mask(self) -> mx.array | None:
        """Which tokens of the pages each query sees, bool `[B, 1, L, P * PAGE]`; None when they all do."""
        starts, ends = self._page_bounds
        full = all(len(table) == self.index.n_pages for table in self.tables)
        if full and (self._oldest[:, -1] <= starts).all() and (ends <= self._queries[:, 0]).all():
            return None
        positions = starts[:, None] + np.arange(self.index.n_pages * PAGE)
        return mx.array(self._seen(positions, ends[:, None])[:, None])

    @cached_property
    def n_raw(self) -> int:
        """Raw slots from here on are empty in every row."""
        return int(np.flatnonzero(self._seen_raw.any(axis=(0, 1)))[-1]) + 1

    @cached_property
    def raw_mask(self) -> mx.array | None:
        """Which of the first `n_raw` raw slots each query sees, bool `[B, 1, L, n_raw]`; None when they all do."""
        seen = self._seen_raw[:, :, : self.n_raw]
        return None if seen.all() else mx.array(seen[:, None])

    @cached_property
    def mask(self) -> mx.array | None:
        """As `Lanes.attend` wants it: `page_mask` and `raw_mask` in one."""
        if self.page_mask is None and self.raw_mask is None:
            return None
        shape = (len(self.tables), 1, self.n_queries)
        parts = ((self.page_mask, self.index.n_pages * PAGE), (self.raw_mask, self.n_raw))
        return mx.concatenate([mx.ones((*shape, n), mx.bool_) if m is None else m for m, n in parts], axis=-1)

    @cached_property
    def _page_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First position of each row's pages, and of its window."""
        starts = self.keep + PAGE * np.array(self.first)
        return starts, starts + PAGE * np.array([len(table) for table in self.tables])

    @cached_property
    def _queries(self) -> np.ndarray:
        """Positions `[B, L]`."""
        return np.array(self.offsets)[:, None] + np.arange(self.n_queries)

    @cached_property
    def _oldest(self) -> np.ndarray:
        """First position behind the sink that each query sees, `[B, L]`."""
        return self._queries * 0 if self.max_size is None else self._queries + 1 - (self.max_size - self.keep)

    @cached_property
    def _seen_raw(self) -> np.ndarray:
        window, slots = self._page_bounds[1][:, None], np.arange(self.window_slots)
        sink = np.broadcast_to(np.arange(self.keep), (len(self.tables), self.keep))
        ring = window + (slots - (window - self.keep)) % self.window_slots
        return self._seen(np.concatenate([sink, ring], axis=1), np.iinfo(np.int64).max)

    def _seen(self, positions: np.ndarray, end: np.ndarray | int) -> np.ndarray:
        """`positions` `[B, n]` that lie before `end` and that each query sees, bool `[B, L, n]`."""
        at, queries = positions[:, None], self._queries[..., None]
        recent = (at < self.keep) | (at >= self._oldest[..., None])
        return np.asarray((at <= queries) & recent & (positions < end)[:, None])


AttentionPath = Literal["fused", "packed", "expanded"]
"""How attention reads pages: in a kernel of its own, by products on packed codes, or expanded first."""


def coded_page_arrays(shape: LaneShape) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """`Lanes.page_arrays` of layout 2 (kernels/layout.py): key codes, value codes, key scales, value scales."""
    heads = shape.n_kv_heads
    return [
        ((heads, PAGE, words_for(shape.key_dim, shape.key_bits)), mx.uint32),
        ((heads, shape.value_dim, words_for(PAGE, shape.value_bits)), mx.uint32),
        ((heads, PAGE), mx.float16),
        ((heads, PAGE), mx.float16),
    ]


class Lanes(Protocol):
    """One layer's storage and attention. Instances are immutable; the pool owns the arrays."""

    name: ClassVar[str]
    codebook: ClassVar[CodebookKind]
    shape: LaneShape

    @property
    def masks(self) -> MaskForm:
        """How `attend` likes its masks best. Plain ones it takes as well."""
        ...

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        """Why this backend can't take the shape, or None."""
        ...

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        """Shape (without the leading page axis) and dtype of each array that a page consists of."""
        ...

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        """`[N, n_kv_heads, PAGE, key_dim]` and `[N, n_kv_heads, PAGE, value_dim]` of any float type to the arrays of N
        pages.
        """
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
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of `L` query tokens per row over the row's pages and raw tokens.

        `queries` `[B, n_heads, L, key_dim]` in the model's dtype; `raw_keys`/`raw_values` `[B, n_kv_heads, S, dim]`;
        `pages` the whole pool; `mask` `[B, 1, L, P * PAGE + S]` with the pages first, in plain form or that of `masks`,
        or "causal" when the last L raw tokens are the queries' own and every page is older, or None when everything is
        visible; `scale` multiplies the products; `sinks` `[n_heads]` extra logits without a value, or None. Returns the
        queries' dtype, `[B, n_heads, L, value_dim]`.
        """
        ...

    def store(
        self, raw_keys: mx.array, raw_values: mx.array, keys: mx.array, values: mx.array, rows: RowIndex
    ) -> tuple[mx.array, mx.array]:
        """The raw buffers `[B, n_kv_heads, keep + window_slots, dim]` with each row's new token (`keys` and `values`
        `[B, n_kv_heads, 1, dim]` of the same dtype) in the slot of the row's offset. The given arrays stay as they are.
        """
        ...

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
        """`attend` for a decode step of 1 to 8 query tokens per row, causal among themselves, without a mask: `rows`
        says where everything is. `raw_keys`/`raw_values` `[B, n_kv_heads, keep + window_slots, dim]` are the whole raw
        buffers, the step's tokens included.
        """
        ...

    def path(self, n_tokens: int | None) -> AttentionPath:
        """How `attend` reads pages for `n_tokens` query tokens, or, for None, how `attend_step` does."""
        ...


def store_token(
    raw_keys: mx.array, raw_values: mx.array, keys: mx.array, values: mx.array, rows: RowIndex
) -> tuple[mx.array, mx.array]:
    """`Lanes.store` in MLX operations."""
    return (
        mx.put_along_axis(raw_keys, rows.slots(keys.shape), keys, axis=2),
        mx.put_along_axis(raw_values, rows.slots(values.shape), values, axis=2),
    )


Expand = Callable[[Pages, mx.Dtype], tuple[mx.array, mx.array]]
"""`Lanes.expand`, or the same in another basis."""


def gather_expanded(expand: Expand, pages: Pages, table: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Pages of `table` `[B, P]` as contiguous keys and values `[B, n_kv_heads, P * PAGE, dim]` in `dtype`."""
    n_rows, n_pages = table.shape
    chosen = tuple(mx.take(array, table.reshape(-1), axis=0) for array in pages)

    def lay_out(tokens: mx.array) -> mx.array:
        _, n_kv_heads, _, dim = tokens.shape
        tokens = tokens.reshape(n_rows, n_pages, n_kv_heads, PAGE, dim).transpose(0, 2, 1, 3, 4)
        return tokens.reshape(n_rows, n_kv_heads, n_pages * PAGE, dim)

    keys, values = expand(chosen, dtype)
    return lay_out(keys), lay_out(values)


def attend_expanded(
    expand: Expand,
    queries: mx.array,
    raw_keys: mx.array,
    raw_values: mx.array,
    pages: Pages,
    index: PageIndex,
    mask: Mask,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """`Lanes.attend` by expanding every page and attending in the plain way: the definition of correct."""
    keys, values = raw_keys, raw_values
    if index.n_pages:
        page_keys, page_values = gather_expanded(expand, pages, index.table, raw_keys.dtype)
        if index.pageless is not None:
            page_values = mx.where(index.pageless, 0.0, page_values)
        keys = mx.concatenate([page_keys, raw_keys], axis=2)
        values = mx.concatenate([page_values, raw_values], axis=2)
    sinks = sinks if sinks is None else sinks.astype(keys.dtype)
    return attention(queries.astype(keys.dtype), keys, values, scale, mask, sinks).astype(queries.dtype)


def attend_step_masked(
    lanes: Lanes,
    queries: mx.array,
    raw_keys: mx.array,
    raw_values: mx.array,
    pages: Pages,
    rows: RowIndex,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """`Lanes.attend_step` by the lanes' own `attend` and a mask."""
    raw_keys, raw_values = raw_keys[:, :, : rows.n_raw], raw_values[:, :, : rows.n_raw]
    return lanes.attend(queries, raw_keys, raw_values, pages, rows.index, rows.mask, scale, sinks)
