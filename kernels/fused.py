"""The fused lanes: encode, expand and attend in one kernel each, on Metal and on CUDA.

Page bytes are the reference's (kernels/reference.py); the kernels are described where their sources are. What is not
supported is refused by shape before anything is launched, and the layer then takes other lanes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from kernels.device import resident
from kernels.lanes import (
    AttentionPath,
    CodebookKind,
    Codebooks,
    LaneShape,
    Mask,
    PageIndex,
    Pages,
    RowIndex,
    coded_page_arrays,
)
from kernels.launch import Constants, Language, kernel
from kernels.layout import PAGE
from kernels.profiles import PROFILES, Profile, choose_profile
from kernels.rotation import Rotation

WARPS = 4
"""Simdgroups in a threadgroup of every kernel but merge."""
MAX_SPLITS = max(profile.max_splits for profile in PROFILES.values())
MAX_QUERIES = 8
"""Query tokens of a row that one step may have."""
LOG2_E = 1.4426950408889634

_BITS = (2, 2.5, 3, 3.5, 4, 8)
_TILE = 8
_THREADS = 32 * WARPS
_SHARED_BYTES = 48 << 10
"""Of one CUDA threadgroup, without asking for more."""
_NO_TABLE = np.zeros((8, 2), dtype=np.float16)


@cache
def device_profile() -> Profile:
    """This device's row of the table; the portable one where no kernel of ours belongs."""
    profile, _ = choose_profile(mx.device_info())
    return profile if profile.threadgroups else PROFILES["portable"]


def pair_table(levels: np.ndarray) -> np.ndarray:
    """A codebook as kernels read it: the two levels of every pair code, float16 `[2**pair_bits, 2]`.

    Scalar levels `[2**bits]` make the pair codes `c0 | c1 << bits`; a pair codebook is its own table.
    """
    if levels.ndim == 2:
        return levels.astype(np.float16)
    second, first = np.meshgrid(levels, levels, indexing="ij")
    return np.stack([first.ravel(), second.ravel()], axis=-1).astype(np.float16)


class FusedLanes:
    """`Lanes` on the kernels of one language. Subclasses name it."""

    name: ClassVar[str]
    language: ClassVar[Language]
    codebook: ClassVar[CodebookKind] = "pair"

    def __init__(self, shape: LaneShape, codebooks: Codebooks, profile: Profile | None = None) -> None:
        if reason := self.unsupported(shape):
            raise ValueError(reason)
        self.shape = shape
        self.profile = profile or device_profile()
        self._signs = [resident(Rotation(dim).signs) for dim in (shape.key_dim, shape.value_dim)]
        self._paired = [levels.ndim == 2 for levels in (codebooks.keys, codebooks.values)]
        self._tables = [
            resident(mx.array(_NO_TABLE if bits == 8 else pair_table(levels)))
            for bits, levels in ((shape.key_bits, codebooks.keys), (shape.value_bits, codebooks.values))
        ]
        # One table in fast memory serves both where it is the same.
        self._two_tables = shape.key_bits == shape.value_bits and not np.array_equal(codebooks.keys, codebooks.values)
        self._constants: dict[float, mx.array] = {}
        self._steps: dict[Any, _Step] = {}
        self._zeros: mx.array | None = None
        self._codes: Constants = (
            ("DK", shape.key_dim),
            ("DV", shape.value_dim),
            ("KP", int(2 * shape.key_bits)),
            ("VP", int(2 * shape.value_bits)),
            ("KV_HEADS", shape.n_kv_heads),
            ("WARPS", WARPS),
        )

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        """Why these kernels can't take the shape, or None."""
        for what, bits in (("keys", shape.key_bits), ("values", shape.value_bits)):
            if bits not in _BITS:
                return f"the fused kernels have no codes of {bits:g} bits (for {what}); there are {_BITS}"
        for what, dim in (("key", shape.key_dim), ("value", shape.value_dim)):
            if dim % 16 or not 16 <= dim <= 256:
                return f"the fused kernels take {what} dims that are multiples of 16 up to 256, not {dim}"
        if shape.n_heads % shape.n_kv_heads:
            return f"{shape.n_heads} query heads can't be shared out over {shape.n_kv_heads} KV heads"
        return None

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        return coded_page_arrays(self.shape)

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        n_pages, arrays = keys.shape[0], self.page_arrays()
        constants = (
            ("T", keys.dtype),
            *self._codes,
            ("KEY_PAIRED", self._paired[0]),
            ("VALUE_PAIRED", self._paired[1]),
        )
        return tuple(
            kernel("encode", self.language, constants)(
                inputs=[keys, values, *self._signs, *self._tables],
                grid=(_THREADS, self.shape.n_kv_heads, 2 * n_pages),
                threadgroup=(_THREADS, 1, 1),
                output_shapes=[(n_pages, *shape) for shape, _ in arrays],
                output_dtypes=[dtype for _, dtype in arrays],
            )
        )

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        return self.expand_rows(pages, mx.arange(pages[0].shape[0], dtype=mx.int32)[:, None], dtype)

    def expand_rows(self, pages: Pages, table: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The pages of `table`, int32 `[B, P]`, as keys and values `[B, n_kv_heads, P * PAGE, dim]` in `dtype`."""
        n_rows, n_pages = table.shape
        s = self.shape
        keys, values = kernel("expand", self.language, (("T", dtype), *self._codes))(
            inputs=[*pages, table, *self._signs, *self._tables],
            grid=(_THREADS * 4 * n_pages, s.n_kv_heads, 2 * n_rows),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(n_rows, s.n_kv_heads, n_pages * PAGE, dim) for dim in (s.key_dim, s.value_dim)],
            output_dtypes=[dtype, dtype],
        )
        return keys, values

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
        keys, values = raw_keys, raw_values
        if index.n_pages:
            page_keys, page_values = self.expand_rows(pages, index.table, raw_keys.dtype)
            if index.pageless is not None:
                page_values = mx.where(index.pageless, mx.array(0, dtype=page_values.dtype), page_values)
            keys = mx.concatenate([page_keys, raw_keys], axis=2)
            values = mx.concatenate([page_values, raw_values], axis=2)
        if isinstance(mask, mx.array) and self.language == "cuda":
            # MLX spreads a mask of bools over all heads there, in the queries' dtype: 4 GB for 2,048 queries and 32,768
            # keys of 32 heads. One that is added is read as it is.
            mask = mx.where(mask, 0.0, -mx.inf).astype(queries.dtype)
        sinks = sinks if sinks is None else sinks.astype(queries.dtype)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

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
        if queries.dtype != raw_keys.dtype:
            same = queries.astype(raw_keys.dtype)
            return self.attend_step(same, raw_keys, raw_values, pages, rows, scale, sinks).astype(queries.dtype)
        n_rows, n_heads, n_queries, _ = queries.shape
        n_kv_heads, value_dim, n_pages = self.shape.n_kv_heads, self.shape.value_dim, rows.index.n_pages
        step = self._step(queries.dtype, n_queries, rows.keep, rows.window_slots, rows.max_size, sinks is not None)
        n_splits = self.profile.splits(n_pages, n_rows * n_kv_heads * step.groups, step.raw_blocks)
        lead = (n_rows, n_heads, n_queries, step.raw_blocks + n_splits)
        step_inputs = [
            queries,
            raw_keys,
            raw_values,
            rows.table if n_pages else self._no_pages[0],
            rows.rows,
            *(pages if n_pages else self._no_pages[1]),
            self._signs[0],
            *self._tables,
            self._constant(scale * LOG2_E),
        ]
        merge_inputs = [self._constant(0.0) if sinks is None else sinks, self._signs[1]]
        out_shape = (n_rows, n_heads, n_queries, value_dim)
        grid = (_THREADS * n_splits, n_kv_heads * step.groups, n_rows)
        if step.merge is None:
            return step.attend(
                inputs=[*step_inputs, *merge_inputs, self._counters(n_rows * n_kv_heads * step.groups)],
                grid=grid,
                threadgroup=(_THREADS, 1, 1),
                output_shapes=[out_shape, (*lead, value_dim), (*lead, 2)],
                output_dtypes=[queries.dtype, mx.float32, mx.float32],
            )[0]
        parts = step.attend(
            inputs=step_inputs,
            grid=grid,
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(*lead, value_dim), (*lead, 2)],
            output_dtypes=[mx.float32, mx.float32],
        )
        return step.merge(
            inputs=[*parts, *merge_inputs],
            grid=(_THREADS, -(-n_rows * n_heads * n_queries // WARPS), 1),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[out_shape],
            output_dtypes=[queries.dtype],
        )[0]

    def path(self, n_tokens: int | None) -> AttentionPath:
        return "fused" if n_tokens is None else "expanded"

    def _counters(self, n: int) -> mx.array:
        """At least `n` counters at 0, which launches use and leave at 0. Launches of one layer never overlap."""
        if self._zeros is None or self._zeros.size < n:
            self._zeros = mx.zeros((max(n, 256),), dtype=mx.int32)
            mx.eval(self._zeros)
        return self._zeros

    @cached_property
    def _no_pages(self) -> tuple[mx.array, Pages]:
        """A table and a page that nobody reads: an empty array has another type in Metal."""
        table, pages = mx.zeros((1, 1), dtype=mx.int32), [mx.zeros((1, *s), dtype=d) for s, d in self.page_arrays()]
        mx.eval(table, pages)
        return table, tuple(pages)

    def _constant(self, value: float) -> mx.array:
        if value not in self._constants:
            self._constants[value] = resident(mx.array([value], dtype=mx.float32))
        return self._constants[value]

    def _step(
        self, dtype: mx.Dtype, n_queries: int, keep: int, slots: int, max_size: int | None, has_sinks: bool
    ) -> "_Step":
        key = (dtype, n_queries, keep, slots, max_size, has_sinks)
        if key not in self._steps:
            self._steps[key] = self._make_step(*key)
        return self._steps[key]

    def _make_step(
        self, dtype: mx.Dtype, n_queries: int, keep: int, slots: int, max_size: int | None, has_sinks: bool
    ) -> "_Step":
        if n_queries > MAX_QUERIES:
            raise ValueError(f"a step has 1 to {MAX_QUERIES} query tokens a row, not {n_queries}")
        s = self.shape
        needed = -(-s.n_repeats * n_queries // _TILE)
        tiles = min(needed, self._most_tiles)
        raw_blocks = -(-keep // PAGE) + slots // PAGE
        attend: Constants = (
            ("T", dtype),
            *self._codes,
            ("NT", tiles),
            ("REPEATS", s.n_repeats),
            ("L", n_queries),
            ("VALUE_TABLE", self._two_tables),
            ("KEEP", keep),
            ("SLOTS", slots),
            ("SPAN", 0 if max_size is None else max_size - keep),
        )
        groups = -(-needed // tiles)
        # Three threadgroups fit a multiprocessor where a thread's part of output and page is small enough.
        bounds = (_THREADS, 3 if tiles == 1 and max(s.key_dim, s.value_dim) <= 128 else 1)
        merging: Constants = (("HAS_SINKS", has_sinks), ("MAX_PARTS", MAX_SPLITS + raw_blocks))
        if self.language == "cuda":
            whole = kernel("attend_merged", self.language, (*attend, *merging, ("GROUPS", groups)), bounds)
            return _Step(whole, None, groups, raw_blocks)
        merge: Constants = (
            ("T", dtype),
            ("DV", s.value_dim),
            ("L", n_queries),
            ("N_HEADS", s.n_heads),
            ("RAW_BLOCKS", raw_blocks),
            ("WARPS", WARPS),
            *merging,
        )
        return _Step(
            kernel("attend", self.language, (*attend, *merging), bounds),
            kernel("merge", self.language, merge),
            groups,
            raw_blocks,
        )

    @cached_property
    def _most_tiles(self) -> int:
        """Tiles of 8 query rows that one threadgroup takes at most: all query heads of a KV head share a decoded page
        as far as fast memory and registers reach."""
        if self.language == "metal":
            return 1  # its output takes a register for each of 8 queries and 8 dims
        s = self.shape
        tables = sum(128 << int(2 * bits) for bits in {s.key_bits, s.value_bits} if bits != 8) * (1 + self._two_tables)
        output = 4 * (WARPS if s.value_dim <= 128 else 2) * _TILE * (s.value_dim + 4)
        by_memory = (_SHARED_BYTES - 8 * WARPS * _TILE - max(tables, output)) // (6 * _TILE * s.key_dim)
        return max(1, min(by_memory, 256 // s.value_dim))


@dataclass(frozen=True, slots=True)
class _Step:
    """The kernels of a step (`merge` None where attend does it), the groups that its query rows are cut into, and
    blocks of raw tokens.
    """

    attend: Callable[..., list[mx.array]]
    merge: Callable[..., list[mx.array]] | None
    groups: int
    raw_blocks: int


class MetalLanes(FusedLanes):
    name: ClassVar[str] = "metal"
    language: ClassVar[Language] = "metal"


class CudaLanes(FusedLanes):
    name: ClassVar[str] = "cuda"
    language: ClassVar[Language] = "cuda"
