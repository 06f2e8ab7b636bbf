"""Cases for the fused kernels: lanes that run in the harness, steps over random pages, and oracles in float64 numpy."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels.attention.page_tables import RowIndex
from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from kernels.fused import kernel_text
from kernels.fused.lanes import CudaLanes, FusedLanes, MetalLanes
from kernels.lanes.base import Codebooks, LaneShape, Pages, StepInputs
from tests.metal import Kernel, Launches, Mode, emulate, run, why_not
from tests.oracles import attend_dense, visible_positions
from turbocache.codebooks.scalar import levels_for

Array = np.ndarray
Language = kernel_text.Language
LANES: dict[Language, type[FusedLanes]] = {"metal": MetalLanes, "cuda": CudaLanes}

WRITABLE = ("workspace",)
"""Inputs that a kernel may write to."""


@dataclass(frozen=True)
class Setting:
    """What is fixed when kernels are compiled."""

    name: str
    key_bits: float
    value_bits: float
    key_dim: int = 64
    value_dim: int = 64
    n_kv_heads: int = 2
    n_repeats: int = 2
    dtype: mx.Dtype = mx.float16
    n_queries: int = 1
    keep: int = 4
    window_slots: int = 128
    max_size: int | None = None
    has_sinks: bool = False

    @property
    def shape(self) -> LaneShape:
        heads = self.n_kv_heads * self.n_repeats
        return LaneShape(heads, self.n_kv_heads, self.key_dim, self.value_dim, self.key_bits, self.value_bits)

    @property
    def scale(self) -> float:
        return float(self.key_dim**-0.5)

    def lanes(self, language: Language) -> FusedLanes:
        return LANES[language](self.shape, Codebooks(codebook(self.key_bits), codebook(self.value_bits)))


# Every width for keys and for values, every head dim, every type, from 1 to 8 queries, with and without each option.
SETTINGS = (
    Setting("k4v4", 4, 4, 128, 128, n_repeats=4),
    Setting("k8v4", 8, 4, n_kv_heads=1, dtype=mx.bfloat16, n_queries=3, keep=0, has_sinks=True),
    Setting("k2v3", 2, 3, 80, 64, n_repeats=3, dtype=mx.float32, n_queries=2, keep=70, max_size=70 + 100),
    Setting("k2.5v2.5", 2.5, 2.5, 96, 96, n_kv_heads=1, n_repeats=7, n_queries=8, window_slots=192),
    Setting("k3.5v3.5", 3.5, 3.5, 256, 256, n_kv_heads=1, dtype=mx.bfloat16, max_size=4 + 64, has_sinks=True),
    Setting("k3v2", 3, 2, 192, 128, n_kv_heads=1, n_repeats=16, n_queries=2),
    Setting("k4v8", 4, 8, 64, 80, n_repeats=1, dtype=mx.float32, keep=0),
    Setting("k6v4", 6, 4, 128, 64, n_kv_heads=1, n_repeats=3),
    Setting("k5v6", 5, 6, 80, 96, n_kv_heads=1, n_repeats=2, dtype=mx.bfloat16, n_queries=2),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


def codebook(bits: float) -> Array:
    """Levels of N(0, 1), `[2**bits]`; for half bits of pairs of coordinates, `[2**pair_bits, 2]`."""
    return levels_for("lloyd_max", bits)


@cache
def pairs_of(bits: float) -> Array:
    """The two levels of every pair code, float64 `[2**pair_bits, 2]`."""
    levels = codebook(bits).astype(np.float64)
    if levels.ndim == 2:
        return levels
    codes = np.arange(levels.size**2)
    return np.stack([levels[codes % levels.size], levels[codes // levels.size]], axis=1)


def need(mode: Mode) -> None:
    if reason := why_not(mode):
        pytest.skip(reason)


@contextmanager
def emulated(runner: Callable[[Kernel, Sequence[Any]], list[Any]] | Mode = "plain") -> Iterator[Launches]:
    """Inside, lanes made anew launch their kernels in the harness."""
    kernel_text.kernel.cache_clear()
    try:
        if isinstance(runner, str):
            runner = partial(run, mode=runner, writable=WRITABLE)
        with emulate(runner) as launches:
            yield launches
    finally:
        kernel_text.kernel.cache_clear()


# --- pages ---


def codes_of(words: Array, n: int, bits: int) -> Array:
    """The first `n` codes of little-endian bit streams, uint32 `[..., W]` to `[..., n]`."""
    streams = np.unpackbits(np.ascontiguousarray(words, dtype="<u4").view(np.uint8), axis=-1, bitorder="little")
    codes = streams[..., : n * bits].reshape(*words.shape[:-1], n, bits)
    return np.asarray((codes.astype(np.int64) << np.arange(bits)).sum(axis=-1))


def read_back(pages: Sequence[Array], setting: Setting) -> tuple[Array, Array]:
    """The levels that pages hold, without their scales: float64 `[n_pages, n_kv_heads, PAGE, dim]`, rotated basis."""
    key_words, value_words = pages[0], pages[1]
    keys = pairs_of(setting.key_bits)[codes_of(key_words, setting.key_dim // 2, int(2 * setting.key_bits))]
    values = pairs_of(setting.value_bits)[codes_of(value_words, PAGE // 2, int(2 * setting.value_bits))]
    keys = keys.reshape(*keys.shape[:-2], setting.key_dim)
    return keys, values.reshape(*values.shape[:-2], PAGE).swapaxes(-1, -2)


@cache
def rotation_matrix(dim: int) -> Array:
    """Rows in the model's basis times this are in the rotated one."""
    return np.array(Rotation(dim).apply(mx.eye(dim)), dtype=np.float64)


def expanded(pages: Sequence[Array], setting: Setting) -> tuple[Array, Array]:
    """Pages as tokens in the model's basis, float64."""
    keys, values = read_back(pages, setting)
    keys = keys * pages[2].astype(np.float64)[..., None] @ rotation_matrix(setting.key_dim).T
    return keys, values * pages[3].astype(np.float64)[..., None] @ rotation_matrix(setting.value_dim).T


def random_pages(setting: Setting, n_pages: int, rng: np.random.Generator) -> list[Array]:
    """Pages of any bits and scales of all sizes. The last page is nobody's: its scales are NaN."""
    lanes = setting.lanes("metal")
    words = [rng.integers(0, 1 << 32, (n_pages, *s), dtype=np.uint32) for s, _ in lanes.page_arrays()[:2]]
    scales = [
        (10 ** rng.uniform(-2, 0.5, (n_pages, *s)) * rng.choice([1, 1, 0], (n_pages, *s))).astype(np.float16)
        for s, _ in lanes.page_arrays()[2:]
    ]
    for scale in scales:
        scale[-1] = np.nan
    return [*words, *scales]


# --- steps ---


@dataclass(frozen=True)
class Step:
    """One decode step as numpy arrays (float32 with the type's values): what `attend_step` gets, its raw buffers with
    the step's own tokens in them.
    """

    setting: Setting
    rows: RowIndex
    queries: Array
    raw_keys: Array
    raw_values: Array
    pages: list[Array]
    sinks: Array | None

    def slots(self, row: int) -> Array:
        """Where the step's own tokens of a row lie."""
        s, at = self.setting, self.rows.offsets[row] + np.arange(self.setting.n_queries)
        return np.where(at < s.keep, at, s.keep + (at - s.keep) % s.window_slots)

    def attend(self, lanes: FusedLanes) -> Array:
        """`lanes`' answer, float64 `[B, n_heads, L, value_dim]`. Tokens must be in their slots afterwards, which were
        NaN before, and all other slots as they were.
        """
        dtype, n_rows = self.setting.dtype, len(self.rows.offsets)
        raw = [x.copy() for x in (self.raw_keys, self.raw_values)]
        tokens = [np.stack([x[b][:, self.slots(b)] for b in range(n_rows)]) for x in raw]
        for x in raw:
            for b in range(n_rows):
                x[b][:, self.slots(b)] = np.nan
        queries, keys, values, *before = (mx.array(x).astype(dtype) for x in (self.queries, *tokens, *raw))
        pages: Pages = tuple(mx.array(x) for x in self.pages)
        sinks = None if self.sinks is None else mx.array(self.sinks).astype(dtype)
        buffers = before[0], before[1]
        step = StepInputs(queries, (keys, values), buffers, pages, self.rows, self.setting.scale, sinks)
        out, after = lanes.attend_step(step)
        assert out.dtype == dtype
        for got, want in zip(after, (self.raw_keys, self.raw_values), strict=True):
            np.testing.assert_array_equal(np.array(got.astype(mx.float32)), want)
        return np.array(out.astype(mx.float32)).astype(np.float64)

    def expected(self) -> Array:
        """The answer by definition."""
        setting, rows = self.setting, self.rows
        keys, values = expanded(self.pages, setting)
        out = np.empty((*self.queries.shape[:3], setting.value_dim))
        for b, (table, offset, first) in enumerate(zip(rows.tables, rows.offsets, rows.first, strict=True)):
            start = setting.keep + PAGE * first
            window = start + PAGE * len(table)
            n_pinned, skip = (rows.pinned[b], rows.skip[b]) if rows.pinned else (0, 0)
            pinned = start + np.arange(PAGE * n_pinned)  # not where they lie, but in the table's order
            for i in range(setting.n_queries):
                seen = visible_positions(offset + i, setting.keep, setting.max_size)
                paged = seen[(seen >= start + pinned.size + skip) & (seen < window)]
                raw = seen[(seen < setting.keep) | (seen >= window)]
                complete = rows.pinned or paged.size + raw.size == seen.size
                assert complete, "the case itself: a position in sight is nowhere"
                paged = np.concatenate([pinned, paged])
                slots = np.where(raw < setting.keep, raw, setting.keep + (raw - setting.keep) % setting.window_slots)
                page, token = np.array(table, dtype=int)[(paged - start) // PAGE], (paged - start) % PAGE
                k = np.concatenate([keys[page, :, token], self.raw_keys[b, :, slots]])
                v = np.concatenate([values[page, :, token], self.raw_values[b, :, slots]])
                out[b, :, i] = attend_dense(self.queries[b, :, i], k, v, setting.scale, self.sinks)
        return out


def rounded(x: Array, dtype: mx.Dtype) -> Array:
    return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32))


def make_step(
    setting: Setting, lengths: Sequence[tuple[int, int]], seed: int, hidden: Sequence[tuple[int, int]] = ()
) -> Step:
    """A step of rows of given lengths, (whole blocks behind the sink, tokens in the window before the step).

    Blocks out of sight for every query have no page. What no query may see is NaN: raw slots, and pages of others. A
    row of 0 blocks whose window is smaller than the sink is still filling the sink. `hidden`: for each row the most
    pages that are pinned, and the tokens that are hidden behind them.
    """
    rng = np.random.default_rng(seed)
    s, n_rows = setting, len(lengths)
    offsets = [s.keep + PAGE * blocks + window for blocks, window in lengths]
    first = [0] * n_rows
    if s.max_size is not None:
        first = [
            min(n, max(0, (offset + 1 - s.max_size) // PAGE)) for (n, _), offset in zip(lengths, offsets, strict=True)
        ]
    counts = [blocks - f for (blocks, _), f in zip(lengths, first, strict=True)]
    ids = iter(rng.permutation(sum(counts)))
    tables = tuple(tuple(int(next(ids)) for _ in range(n)) for n in counts)
    pinned = tuple(min(n, max(0, len(table) - 1)) for (n, _), table in zip(hidden, tables, strict=bool(hidden)))
    skip = tuple(n if table else 0 for (_, n), table in zip(hidden, tables, strict=bool(hidden)))
    rows = RowIndex(
        tables,
        tuple(offsets),
        tuple(first),
        s.n_queries,
        s.keep,
        s.window_slots,
        s.max_size,
        pinned=pinned,
        skip=skip,
    )

    heads = s.n_kv_heads * s.n_repeats
    queries = rounded(2 * rng.normal(size=(n_rows, heads, s.n_queries, s.key_dim)), s.dtype)
    raw = [
        rounded(rng.normal(size=(n_rows, s.n_kv_heads, s.keep + s.window_slots, d)), s.dtype)
        for d in (s.key_dim, s.value_dim)
    ]
    for b, offset in enumerate(offsets):
        window = s.keep + PAGE * (first[b] + counts[b])
        held = np.arange(window, offset + s.n_queries)
        empty = np.ones(s.keep + s.window_slots, dtype=bool)
        empty[: min(s.keep, offset + s.n_queries)] = False
        empty[s.keep + (held - s.keep) % s.window_slots] = False
        for x in raw:
            x[b][:, empty] = np.nan
    sinks = rounded(rng.normal(size=heads), s.dtype) if s.has_sinks else None
    return Step(s, rows, queries, raw[0], raw[1], random_pages(s, sum(counts) + 1, rng), sinks)


def row_lengths(setting: Setting) -> st.SearchStrategy[tuple[int, int]]:
    """One row: empty and one-token windows, wrapped rings, rows that are still in their sink, rows of many blocks."""
    most = setting.window_slots - setting.n_queries
    windows = st.one_of(st.sampled_from([0, 1, most]), st.integers(0, most))
    started = st.tuples(st.integers(0, 9), windows)
    return st.one_of(started, st.tuples(st.just(0), st.integers(-setting.keep, 0))) if setting.keep else started


def tolerance(setting: Setting, language: Language) -> float:
    """Of an output, relative to the largest one: the type's rounding, and float16 weights and queries on CUDA.

    A query in float16 is off by up to 2^-11, which moves a score of 6 by 3e-3, and its weight by as much.
    """
    rounding = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}[setting.dtype]
    return rounding + (3e-3 if language == "cuda" else 0.0)
