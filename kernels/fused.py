"""The fused lanes: encode, expand and attend in one kernel each, on Metal and on CUDA.

Page bytes are the reference's (kernels/reference.py); the kernels are described where their sources are. What is not
supported is refused by shape before anything is launched, and the layer then takes other lanes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import prod
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import numpy as np

from kernels.device import resident
from kernels.index import PageIndex, RowIndex
from kernels.lanes import AttentionPath, CodebookKind, Codebooks, LaneShape, Pages, coded_page_arrays
from kernels.launch import Constants, Language, kernel
from kernels.layout import PAGE
from kernels.masks import Mask, MaskForm, roomy
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
_STORE_THREADS, _STORE_EACH = 256, 4
"""Threads of a threadgroup of store, and units of 16 bytes that each takes."""
_SLICE = 16
"""Tokens that one threadgroup of expand takes."""
_AT_FIRST = -1
"""In every word of a workspace: what its counters count from, and NaN as a part that nobody wrote."""
_SHARED_BYTES = 48 << 10
"""Of one CUDA threadgroup, without asking for more."""


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
    masks: ClassVar[MaskForm] = MaskForm()
    codebook: ClassVar[CodebookKind] = "pair"

    def __init__(self, shape: LaneShape, codebooks: Codebooks, profile: Profile | None = None) -> None:
        if reason := self.unsupported(shape):
            raise ValueError(reason)
        self.shape = shape
        self.profile = profile or device_profile()
        self._paired = [levels.ndim == 2 for levels in (codebooks.keys, codebooks.values)]
        self._codebooks = codebooks
        # One table in fast memory serves both where it is the same.
        self._two_tables = shape.key_bits == shape.value_bits and not np.array_equal(codebooks.keys, codebooks.values)
        self._constants: dict[float, mx.array] = {}
        self._steps: dict[Any, _Step] = {}
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
                inputs=[keys, values, self._constants_for(0.0)],
                grid=(_THREADS, self.shape.n_kv_heads, 2 * n_pages),
                threadgroup=(_THREADS, 1, 1),
                output_shapes=[(n_pages, *shape) for shape, _ in arrays],
                output_dtypes=[dtype for _, dtype in arrays],
            )
        )

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        return self.expand_rows(pages, mx.arange(pages[0].shape[0], dtype=mx.int32)[:, None], dtype)

    def expand_rows(
        self, pages: Pages, table: mx.array, dtype: mx.Dtype, raw: Sequence[mx.array] = ()
    ) -> tuple[mx.array, mx.array]:
        """The pages of `table`, int32 `[B, P]`, as keys and values `[B, n_kv_heads, P * PAGE, dim]` in `dtype`; behind
        them, if given, `raw` keys and values `[B, n_kv_heads, S, dim]` of that dtype.
        """
        n_rows, n_pages = table.shape
        s, n_raw = self.shape, raw[0].shape[2] if raw else 0
        n_slices = n_pages * PAGE // _SLICE + -(-n_raw // _SLICE)
        keys, values = kernel("expand_raw" if raw else "expand", self.language, (("T", dtype), *self._codes))(
            inputs=[*pages, table, self._constants_for(0.0), *raw],
            grid=(_THREADS * n_slices, s.n_kv_heads, 2 * n_rows),
            threadgroup=(_THREADS, 1, 1),
            output_shapes=[(n_rows, s.n_kv_heads, n_pages * PAGE + n_raw, dim) for dim in (s.key_dim, s.value_dim)],
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
        n_tokens, n_paged = queries.shape[2], index.n_pages * PAGE
        if isinstance(mask, mx.array):  # may be for more of both
            queries = roomy(queries, mask.shape[2])
            raw_keys, raw_values = (roomy(x, mask.shape[3] - n_paged) for x in (raw_keys, raw_values))
        keys, values = raw_keys, raw_values
        if index.pageless is not None:
            page_keys, page_values = self.expand_rows(pages, index.table, raw_keys.dtype)
            page_values = mx.where(index.pageless, mx.array(0, dtype=page_values.dtype), page_values)
            keys = mx.concatenate([page_keys, raw_keys], axis=2)
            values = mx.concatenate([page_values, raw_values], axis=2)
        elif index.n_pages:
            keys, values = self.expand_rows(pages, index.table, raw_keys.dtype, (raw_keys, raw_values))
        sinks = sinks if sinks is None else sinks.astype(queries.dtype)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return out[:, :, :n_tokens]

    def store(
        self, raw_keys: mx.array, raw_values: mx.array, keys: mx.array, values: mx.array, rows: RowIndex
    ) -> tuple[mx.array, mx.array]:
        key = self, raw_keys.dtype
        launch = rows.launches.get(key)
        if launch is None:
            launch = rows.launches[key] = self._store_launch(raw_keys.dtype, rows)
        stored = launch(inputs=[raw_keys, raw_values, keys, values, rows.rows])
        return stored[0], stored[1]

    def _store_launch(self, dtype: mx.Dtype, rows: RowIndex) -> Callable[..., list[mx.array]]:
        s, n_rows, n_slots = self.shape, len(rows.offsets), rows.keep + rows.window_slots
        constants: Constants = (
            ("T", dtype),
            ("DK", s.key_dim),
            ("DV", s.value_dim),
            ("KV_HEADS", s.n_kv_heads),
            ("KEEP", rows.keep),
            ("SLOTS", rows.window_slots),
            ("THREADS", _STORE_THREADS),
            ("PER_THREAD", _STORE_EACH),
        )
        units = n_slots * max(s.key_dim, s.value_dim) * dtype.size // 16
        chunks = -(-units // (_STORE_THREADS * _STORE_EACH))
        return partial(
            kernel("store", self.language, constants),
            grid=(_STORE_THREADS * chunks * s.n_kv_heads, n_rows, 2),
            threadgroup=(_STORE_THREADS, 1, 1),
            output_shapes=[(n_rows, s.n_kv_heads, n_slots, dim) for dim in (s.key_dim, s.value_dim)],
            output_dtypes=[dtype, dtype],
        )

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
        key = self, queries.dtype, scale, sinks is None
        launch = rows.launches.get(key)
        if launch is None:
            launch = rows.launches[key] = self._launch(queries.dtype, rows, scale, sinks is not None)
        inputs = [queries, raw_keys, raw_values, *launch.shared, *(launch.no_pages or pages), *launch.constants]
        if launch.merge is None:
            if sinks is not None:
                inputs.append(sinks)
            return launch.attend(inputs=inputs)[0]
        parts = launch.attend(inputs=inputs)
        return launch.merge(inputs=[*parts, *launch.constants, *(() if sinks is None else (sinks,))])[0]

    def _launch(self, dtype: mx.Dtype, rows: RowIndex, scale: float, has_sinks: bool) -> "_Launch":
        """The kernels of a step with its sizes and the inputs that all layers share."""
        s, n_pages, n_rows = self.shape, rows.index.n_pages, len(rows.offsets)
        step = self._step(dtype, rows.n_queries, rows.keep, rows.window_slots, rows.max_size, has_sinks)
        n_groups = n_rows * s.n_kv_heads * step.groups
        n_splits = self.profile.splits(n_pages, n_groups, step.raw_blocks)
        lead = (n_rows, s.n_heads, rows.n_queries)
        parts_shape, out_shape = (*lead, step.raw_blocks + n_splits, s.value_dim + 4), (*lead, s.value_dim)
        merged, threadgroup = step.merge is None, (_THREADS, 1, 1)
        attend = partial(
            step.attend,
            grid=(_THREADS * n_splits, s.n_kv_heads * step.groups, n_rows),
            threadgroup=threadgroup,
            output_shapes=[out_shape if merged else parts_shape],
            output_dtypes=[dtype if merged else mx.float32],
        )
        constants: tuple[mx.array, ...] = (self._constants_for(scale),)
        if merged:
            # Counters and room for parts, which the kernel writes to: a step's layers follow each other, steps may not.
            n_words = -(-n_groups // 4) * 4 + prod(parts_shape)
            constants = (*constants, mx.full((n_words,), _AT_FIRST, dtype=mx.int32))
        shared = rows.table if n_pages else self._no_pages[0], rows.rows
        no_pages = None if n_pages else self._no_pages[1]
        if step.merge is None:
            return _Launch(attend, None, shared, no_pages, constants)
        merge = partial(
            step.merge,
            grid=(_THREADS, -(-n_rows * s.n_heads * rows.n_queries // WARPS), 1),
            threadgroup=threadgroup,
            output_shapes=[out_shape],
            output_dtypes=[dtype],
        )
        return _Launch(attend, merge, shared, no_pages, constants)

    def path(self, n_tokens: int | None) -> AttentionPath:
        return "fused" if n_tokens is None else "expanded"

    @cached_property
    def _no_pages(self) -> tuple[mx.array, Pages]:
        """A table and a page that nobody reads: an empty array has another type in Metal."""
        table, pages = mx.zeros((1, 1), dtype=mx.int32), [mx.zeros((1, *s), dtype=d) for s, d in self.page_arrays()]
        mx.eval(table, pages)
        return table, tuple(pages)

    def _constants_for(self, scale: float) -> mx.array:
        """What never changes for layers with this attention scale, as uint32 words; shapes.h has the layout."""
        if scale not in self._constants:
            s, books = self.shape, self._codebooks
            signs = [np.array(Rotation(dim).signs) for dim in (s.key_dim, s.value_dim)]
            tables = [
                pair_table(levels).view(np.uint32).ravel()
                for bits, levels in ((s.key_bits, books.keys), (s.value_bits, books.values))
                if bits != 8
            ]
            floats = np.concatenate([[scale * LOG2_E, 0, 0, 0], *signs]).astype(np.float32)
            self._constants[scale] = resident(mx.array(np.concatenate([floats.view(np.uint32), *tables])))
        return self._constants[scale]

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
            ("TWO_TABLES", self._two_tables),
            ("KEEP", keep),
            ("SLOTS", slots),
            ("SPAN", 0 if max_size is None else max_size - keep),
        )
        groups = -(-needed // tiles)
        # Three threadgroups fit a multiprocessor where a thread's part of output and page is small enough.
        bounds = (_THREADS, 3 if tiles == 1 and max(s.key_dim, s.value_dim) <= 128 else 1)
        merging: Constants = (("MAX_PARTS", MAX_SPLITS + raw_blocks),)
        sinks = "_sinks" if has_sinks else ""
        if self.language == "cuda":
            whole = kernel(f"attend_merged{sinks}", self.language, (*attend, *merging), bounds)
            return _Step(whole, None, groups, raw_blocks)
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
        return _Step(
            kernel("attend", self.language, (*attend, *merging), bounds),
            kernel(f"merge{sinks}", self.language, merge),
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


class _Launch(NamedTuple):
    """A step's kernels with all but a layer's own arrays; `no_pages` stands in for pages where there are none."""

    attend: Callable[..., list[mx.array]]
    merge: Callable[..., list[mx.array]] | None
    shared: tuple[mx.array, ...]
    no_pages: Pages | None
    constants: tuple[mx.array, ...]


class MetalLanes(FusedLanes):
    name: ClassVar[str] = "metal"
    language: ClassVar[Language] = "metal"


class CudaLanes(FusedLanes):
    name: ClassVar[str] = "cuda"
    language: ClassVar[Language] = "cuda"
    # MLX makes numbers of bools there, once for each layer, and cuDNN plans each pair of lengths anew, which takes some
    # 40 ms: without rounding, every prompt that goes on from a cache would wait for that.
    masks: ClassVar[MaskForm] = MaskForm(added=True, rounded=True)
