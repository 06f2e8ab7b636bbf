"""The launches of a decode step: kernels for its sizes, prepared once per step for all layers of a kind."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import prod
from typing import NamedTuple

import mlx.core as mx

from kernels.attention.page_tables import RowIndex
from kernels.codec.layout import PAGE
from kernels.fused.kernel_text import Constants, Language, kernel
from kernels.fused.profiles import PROFILES, Profile
from kernels.lanes.base import LaneShape, Pages, coded_page_arrays

WARPS = 4
"""Simdgroups per threadgroup in every kernel."""
THREADS = 32 * WARPS
MAX_SPLITS = max(profile.max_splits for profile in PROFILES.values())
MAX_QUERIES = 8
"""Most query tokens per row in one step."""

MAX_TABLE_BITS = 4
"""Codes of more bits have equally spaced levels, which kernels compute (sources/shapes.h)."""

_TILE = 8
_AT_FIRST = -1
"""Every word of a new workspace: the start of its counters, and NaN in a part that was not written."""
_SHARED_BYTES = 48 << 10
"""Shared memory of one CUDA threadgroup without opting in to more."""


def code_constants(shape: LaneShape) -> Constants:
    """The constants of every kernel that reads or writes pages."""
    return (
        ("DK", shape.key_dim),
        ("DV", shape.value_dim),
        ("KP", int(2 * shape.key_bits)),
        ("VP", int(2 * shape.value_bits)),
        ("KV_HEADS", shape.n_kv_heads),
        ("WARPS", WARPS),
    )


@dataclass(frozen=True, slots=True)
class _Kernels:
    """The kernels of a step."""

    attend: Callable[..., list[mx.array]]
    merge: Callable[..., list[mx.array]] | None
    """None if attend merges too."""
    groups: int
    """Groups of query rows per KV head."""
    raw_blocks: int
    """Blocks of raw tokens per row."""


class Launch(NamedTuple):
    """A step's kernels with all inputs except a layer's own arrays."""

    attend: Callable[..., list[mx.array]]
    merge: Callable[..., list[mx.array]] | None
    shared: tuple[mx.array, ...]
    no_pages: Pages | None
    """Placeholder if no row has pages."""
    constants: tuple[mx.array, ...]


class StepLauncher:
    """Makes the launches for decode steps of one kind of layer.

    `two_tables`: keys and values have the same width but different codebooks.
    """

    def __init__(self, language: Language, shape: LaneShape, profile: Profile, *, two_tables: bool) -> None:
        self._language, self._shape, self._profile, self._two_tables = language, shape, profile, two_tables
        self._for_sizes = cache(self._make)

    def attend(self, dtype: mx.Dtype, rows: RowIndex, constants: mx.array, *, has_sinks: bool) -> Launch:
        """The kernels of a step, with the inputs that all layers share. `constants` is as in shapes.h."""
        s, n_pages, n_rows = self._shape, rows.index.n_pages, len(rows.offsets)
        step = self._for_sizes(dtype, rows.n_queries, rows.keep, rows.window_slots, rows.max_size, has_sinks)
        n_groups = n_rows * s.n_kv_heads * step.groups
        n_splits = self._profile.splits(n_pages, n_groups, step.raw_blocks)
        lead = (n_rows, s.n_heads, rows.n_queries)
        parts_shape, out_shape = (*lead, step.raw_blocks + n_splits, s.value_dim + 4), (*lead, s.value_dim)
        raw_shapes = [(n_rows, s.n_kv_heads, rows.keep + rows.window_slots, dim) for dim in (s.key_dim, s.value_dim)]
        merged, threadgroup = step.merge is None, (THREADS, 1, 1)
        attend = partial(
            step.attend,
            grid=(THREADS * n_splits, s.n_kv_heads * step.groups, n_rows),
            threadgroup=threadgroup,
            output_shapes=[out_shape if merged else parts_shape, *raw_shapes],
            output_dtypes=[dtype if merged else mx.float32, dtype, dtype],
        )
        fixed: tuple[mx.array, ...] = (constants,)
        if merged:
            # The kernel writes counters and parts here. Layers of a step run one after another; steps may overlap.
            n_words = -(-n_groups // 4) * 4 + prod(parts_shape)
            fixed = (*fixed, mx.full((n_words,), _AT_FIRST, dtype=mx.int32))
        shared = rows.table if n_pages else self._no_pages[0], rows.rows
        no_pages = None if n_pages else self._no_pages[1]
        if step.merge is None:
            return Launch(attend, None, shared, no_pages, fixed)
        merge = partial(
            step.merge,
            grid=(THREADS, -(-n_rows * s.n_heads * rows.n_queries // WARPS), 1),
            threadgroup=threadgroup,
            output_shapes=[out_shape],
            output_dtypes=[dtype],
        )
        return Launch(attend, merge, shared, no_pages, fixed)

    @cached_property
    def _no_pages(self) -> tuple[mx.array, Pages]:
        """A table and a page that no kernel reads. Not empty: an empty array has another type in Metal."""
        table, pages = (
            mx.zeros((1, 1), dtype=mx.int32),
            [mx.zeros((1, *s), dtype=d) for s, d in coded_page_arrays(self._shape)],
        )
        mx.eval(table, pages)
        return table, tuple(pages)

    def _make(
        self, dtype: mx.Dtype, n_queries: int, keep: int, slots: int, max_size: int | None, has_sinks: bool
    ) -> _Kernels:
        if n_queries > MAX_QUERIES:
            raise ValueError(f"a step has 1 to {MAX_QUERIES} query tokens a row, not {n_queries}")
        s = self._shape
        needed = -(-s.n_repeats * n_queries // _TILE)
        tiles = min(needed, self._most_tiles)
        raw_blocks = -(-keep // PAGE) + slots // PAGE
        attend: Constants = (
            ("T", dtype),
            *code_constants(s),
            ("NT", tiles),
            ("REPEATS", s.n_repeats),
            ("L", n_queries),
            ("TWO_TABLES", self._two_tables),
            ("KEEP", keep),
            ("SLOTS", slots),
            ("SPAN", 0 if max_size is None else max_size - keep),
        )
        groups = -(-needed // tiles)
        # Three threadgroups fit a multiprocessor if a thread's part of output and page is small.
        bounds = (THREADS, 3 if tiles == 1 and max(s.key_dim, s.value_dim) <= 128 else 1)
        merging: Constants = (("MAX_PARTS", MAX_SPLITS + raw_blocks),)
        sinks = "_sinks" if has_sinks else ""
        if self._language == "cuda":
            whole = kernel(f"attend_merged{sinks}", self._language, (*attend, *merging), bounds)
            return _Kernels(whole, None, groups, raw_blocks)
        merge: Constants = (
            ("T", dtype),
            ("DK", s.key_dim),
            ("DV", s.value_dim),
            ("L", n_queries),
            ("N_HEADS", s.n_heads),
            ("RAW_BLOCKS", raw_blocks),
            ("WARPS", WARPS),
            *merging,
        )
        return _Kernels(
            kernel("attend", self._language, (*attend, *merging), bounds),
            kernel(f"merge{sinks}", self._language, merge),
            groups,
            raw_blocks,
        )

    @cached_property
    def _most_tiles(self) -> int:
        """Most tiles of 8 query rows per threadgroup.

        All query heads of a KV head share a decoded page, within the limits of fast memory and registers.
        """
        if self._language == "metal":
            return 1  # the output takes a register for each of 8 queries and 8 dims
        s = self._shape
        widths = {bits for bits in (s.key_bits, s.value_bits) if bits <= MAX_TABLE_BITS}
        tables = sum(128 << int(2 * bits) for bits in widths) * (1 + self._two_tables)
        output = 4 * (WARPS if s.value_dim <= 128 else 2) * _TILE * (s.value_dim + 4)
        by_memory = (_SHARED_BYTES - 8 * WARPS * _TILE - max(tables, output)) // (6 * _TILE * s.key_dim)
        return max(1, min(by_memory, 256 // s.value_dim))
