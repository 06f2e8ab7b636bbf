"""Which pages and tokens the rows of a batch read, as integers. All layers of a pass share them."""

from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import Any, cast

import mlx.core as mx
import numpy as np

from kernels.attention.device import constant, resident, steps_on_device
from kernels.codec.layout import PAGE


@dataclass(frozen=True)
class PageIndex:
    """Which pages each of `B` rows reads."""

    tables: tuple[tuple[int, ...], ...]
    """Page ids of each row, oldest first."""

    @cached_property
    def n_pages(self) -> int:
        """P: the length of the longest table."""
        return max((len(t) for t in self.tables), default=0)

    @cached_property
    def table(self) -> mx.array:
        """Page ids, int32 `[B, P]`. Shorter rows repeat a page of their own, which must be masked."""
        rows = [[*table, *[table[0] if table else 0] * (self.n_pages - len(table))] for table in self.tables]
        return resident(mx.array(rows, dtype=mx.int32))

    @cached_property
    def pageless(self) -> mx.array | None:
        """Rows without pages among rows with pages, bool `[B, 1, 1, 1]`, or None if there are none.

        `table` makes such a row read a page of another row. Multiplying its values by 0 is not enough: they may be NaN.
        """
        if self.n_pages == 0 or all(self.tables):
            return None
        return mx.array([not t for t in self.tables])[:, None, None, None]

    @cached_property
    def _by_head(self) -> dict[int, mx.array]:
        return {}

    def heads(self, n_kv_heads: int) -> mx.array:
        """`table` for arrays whose page and head axes are merged: int32 `[B, n_kv_heads, P]`."""
        if n_kv_heads not in self._by_head:
            self._by_head[n_kv_heads] = self.table[:, None, :] * n_kv_heads + mx.arange(n_kv_heads)[None, :, None]
        return self._by_head[n_kv_heads]


@dataclass(frozen=True)
class RowIndex:
    """One decode step of `B` rows as integers, shared by all layers. Each array is made at its first use.

    Where a row's tokens lie:

        page `i` < pinned of the table   older than every other page, and seen by every query
        page `i` of the table, token t   position keep + PAGE * (first + i) + t
        raw slot s < keep                position s
        raw slot s >= keep               the position p >= keep + PAGE * (first + n_pages), the window's start, with
                                         s = keep + (p - keep) % window_slots

    Window and step together must fit into `window_slots`. Query i of a row is at q = offset + i and sees p if
    p <= q, and p < keep or p > q - (max_size - keep). No query sees the first `skip` tokens of page `pinned`.
    """

    tables: tuple[tuple[int, ...], ...]
    """Page ids of each row, oldest first."""
    offsets: tuple[int, ...]
    """Position of each row's first query."""
    first: tuple[int, ...]
    """Row b's page i holds block `first[b] + i`, if it is not pinned."""
    n_queries: int
    keep: int
    window_slots: int
    max_size: int | None
    previous: InitVar["RowIndex | None"] = None
    """The step before. Its arrays are reused if only the offsets differ, by one each."""
    pinned: tuple[int, ...] = ()
    """Pages at the start of each row's table that every query sees. Empty: none in any row."""
    skip: tuple[int, ...] = ()
    """Hidden tokens, fewer than PAGE, at the start of each row's page `pinned`. Empty: none in any row."""

    def __post_init__(self, previous: "RowIndex | None") -> None:
        if previous is None or previous.tables != self.tables:
            return
        self.__dict__["index"] = previous.index
        moved = tuple(offset + 1 for offset in previous.offsets)
        same = (self.first, self.pinned, self.skip) == (previous.first, previous.pinned, previous.skip)
        if "rows" in previous.__dict__ and same and self.offsets == moved:
            self.__dict__["_rows_before"] = previous.rows

    def slots(self, shape: tuple[int, ...]) -> mx.array:
        """Raw slots of the step's tokens in their shape `[B, n_kv_heads, L, dim]`, int32."""
        key = "slots", shape
        if key not in self.launches:
            at = self._queries
            slots = np.where(at < self.keep, at, self.keep + (at - self.keep) % self.window_slots).astype(np.int32)
            self.launches[key] = mx.broadcast_to(mx.array(slots)[:, None, :, None], shape)
        return cast(mx.array, self.launches[key])

    @cached_property
    def launches(self) -> dict[Any, Any]:
        """Results that lanes keep for this step, shared by layers of the same kind."""
        return {}

    @cached_property
    def index(self) -> PageIndex:
        return PageIndex(self.tables)

    @property
    def table(self) -> mx.array:
        """Page ids, int32 `[B, P]`. Entries behind a row's own pages have no meaning."""
        return self.index.table

    @cached_property
    def rows(self) -> mx.array:
        """int32 `[B, 4]`: offset, first, number of pages, end of the hidden tokens: PAGE * pinned + skip."""
        if steps_on_device() and (before := self.__dict__.get("_rows_before")) is not None:
            return cast(mx.array, before + constant((1, 0, 0, 0)))
        counts = np.stack([self.offsets, self.first, [len(table) for table in self.tables], sum(self._hidden)], axis=1)
        return resident(mx.array(counts.astype(np.int32)))

    @cached_property
    def page_mask(self) -> mx.array | None:
        """Which tokens of the pages each query sees, bool `[B, 1, L, P * PAGE]`. None: all of them."""
        starts, ends = self._page_bounds
        pinned, skip = self._hidden
        full = all(len(table) == self.index.n_pages for table in self.tables) and not skip.any()
        if full and (self._oldest[:, -1] <= starts + pinned).all() and (ends <= self._queries[:, 0]).all():
            return None
        tokens = np.arange(self.index.n_pages * PAGE)
        positions, pinned, skip = starts[:, None] + tokens, pinned[:, None, None], skip[:, None, None]
        seen = self._seen(positions, ends[:, None]) & (tokens >= pinned + skip)
        return mx.array((seen | (tokens < pinned))[:, None])

    @cached_property
    def n_raw(self) -> int:
        """Number of raw slots up to the last one that any query sees."""
        return int(np.flatnonzero(self._seen_raw.any(axis=(0, 1)))[-1]) + 1

    @cached_property
    def raw_mask(self) -> mx.array | None:
        """Which of the first `n_raw` raw slots each query sees, bool `[B, 1, L, n_raw]`. None: all of them."""
        seen = self._seen_raw[:, :, : self.n_raw]
        return None if seen.all() else mx.array(seen[:, None])

    @cached_property
    def mask(self) -> mx.array | None:
        """`page_mask` and `raw_mask` in one, as `Lanes.attend` takes it."""
        if self.page_mask is None and self.raw_mask is None:
            return None
        shape = (len(self.tables), 1, self.n_queries)
        parts = ((self.page_mask, self.index.n_pages * PAGE), (self.raw_mask, self.n_raw))
        return mx.concatenate([mx.ones((*shape, n), mx.bool_) if m is None else m for m, n in parts], axis=-1)

    @cached_property
    def _page_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First position of each row's pages and of its window."""
        starts = self.keep + PAGE * np.array(self.first)
        return starts, starts + PAGE * np.array([len(table) for table in self.tables])

    @cached_property
    def _hidden(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens in each row's pinned pages, and hidden tokens behind them."""
        nothing = np.zeros(len(self.tables), dtype=np.int64)
        pinned = PAGE * np.array(self.pinned) if self.pinned else nothing
        return pinned, np.array(self.skip) if self.skip else nothing

    @cached_property
    def _queries(self) -> np.ndarray:
        """Positions `[B, L]`."""
        return np.array(self.offsets)[:, None] + np.arange(self.n_queries)

    @cached_property
    def _oldest(self) -> np.ndarray:
        """First position after the sink that each query sees, `[B, L]`."""
        return self._queries * 0 if self.max_size is None else self._queries + 1 - (self.max_size - self.keep)

    @cached_property
    def _seen_raw(self) -> np.ndarray:
        window, slots = self._page_bounds[1][:, None], np.arange(self.window_slots)
        sink = np.broadcast_to(np.arange(self.keep), (len(self.tables), self.keep))
        ring = window + (slots - (window - self.keep)) % self.window_slots
        return self._seen(np.concatenate([sink, ring], axis=1), np.iinfo(np.int64).max)

    def _seen(self, positions: np.ndarray, end: np.ndarray | int) -> np.ndarray:
        """Which `positions` `[B, n]` before `end` each query sees, bool `[B, L, n]`."""
        at, queries = positions[:, None], self._queries[..., None]
        recent = (at < self.keep) | (at >= self._oldest[..., None])
        return np.asarray((at <= queries) & recent & (positions < end)[:, None])
