"""Decode steps of one to eight query tokens, told in integers: every lane against float64, token by token."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention.page_tables import RowIndex
from kernels.codec.layout import PAGE
from kernels.lanes.base import Lanes, LaneShape, Pair, StepInputs
from kernels.lanes.identity import IdentityLanes
from kernels.lanes.packed import PackedLanes
from tests.oracles import attend_dense, visible_positions
from turbocache.backend import make_lanes

SHAPE = LaneShape(4, 2, 64, 32, 4, 4)


def lanes_of(name: str) -> Lanes:
    return IdentityLanes(SHAPE, mx.float32) if name == "identity" else make_lanes(name, SHAPE)


@dataclass
class Row:
    """One row's tokens by position as attention should see them, and what the step says about it."""

    keys: np.ndarray
    values: np.ndarray
    offset: int
    first: int
    table: tuple[int, ...]
    pinned: int
    skip: int


class Step:
    """Rows in random states that a ring can be in: pages anywhere in the pool, raw tokens in their slots, rubbish in
    every other slot.
    """

    def __init__(self, lanes: Lanes, rng: np.random.Generator, n_rows: int, n_queries: int, ring: tuple) -> None:
        self.keep, self.window, self.max_size = ring
        self.slots, self.n_queries = self.window + PAGE, n_queries
        free = rng.permutation(8 * n_rows)
        tokens = [rng.normal(size=(8 * n_rows, 2, PAGE, dim)).astype(np.float32) for dim in (64, 32)]
        self.pages = lanes.encode(*(mx.array(x) for x in tokens))
        read = [np.array(x).swapaxes(1, 2) for x in lanes.expand(self.pages, mx.float32)]
        shape = (n_rows, 2, self.keep + self.slots)
        self.raw = [np.full((*shape, dim), 1e4, dtype=np.float32) for dim in (64, 32)]
        self.tokens = [np.zeros((n_rows, 2, n_queries, dim), dtype=np.float32) for dim in (64, 32)]
        self.rows = []
        for row in range(n_rows):
            offset = int(rng.integers(0, 500))
            blocks = max(0, (offset - self.keep) // PAGE)
            fewest = max(0, -(-(offset + n_queries - self.keep - self.slots) // PAGE))
            flushed = int(rng.integers(fewest, blocks + 1)) if blocks > fewest else fewest
            oldest = self.keep if self.max_size is None else offset + 1 - (self.max_size - self.keep)
            gone = min(flushed, max(0, (oldest - self.keep) // PAGE))
            first = int(rng.integers(0, gone + 1))
            table, free = tuple(free[: flushed - first].tolist()), free[flushed - first :]
            pinned, skip = int(rng.integers(0, max(1, len(table)))), int(rng.integers(0, PAGE)) if table else 0
            end = offset + n_queries
            history = [rng.normal(size=(end, 2, dim)).astype(np.float32) for dim in (64, 32)]
            for known, page_tokens, raw, own in zip(history, read, self.raw, self.tokens, strict=True):
                for i, page in enumerate(table):
                    start = self.keep + PAGE * (first + i)
                    known[start : start + PAGE] = page_tokens[page]
                for p in (*range(min(self.keep, offset)), *range(self.keep + PAGE * flushed, offset)):
                    raw[row, :, self.slot(p)] = known[p]
                own[row] = known[offset:].swapaxes(0, 1)
            hidden = (pinned, skip) if row % 2 else (0, 0)
            self.rows.append(Row(history[0], history[1], offset, first, table, *hidden))

    def slot(self, position: int) -> int:
        return position if position < self.keep else self.keep + (position - self.keep) % self.slots

    def pairs(self, dtype: mx.Dtype = mx.float32) -> tuple[Pair, Pair]:
        """The step's tokens and the raw buffers before it."""
        keys, values, raw_keys, raw_values = (mx.array(x).astype(dtype) for x in (*self.tokens, *self.raw))
        return (keys, values), (raw_keys, raw_values)

    def stored(self) -> list[np.ndarray]:
        """The raw buffers after the step."""
        after = [x.copy() for x in self.raw]
        for raw, tokens in zip(after, self.tokens, strict=True):
            for b, row in enumerate(self.rows):
                for i in range(self.n_queries):
                    raw[b, :, self.slot(row.offset + i)] = tokens[b, :, i]
        return after

    def index(self) -> RowIndex:
        return RowIndex(
            tables=tuple(row.table for row in self.rows),
            offsets=tuple(row.offset for row in self.rows),
            first=tuple(row.first for row in self.rows),
            n_queries=self.n_queries,
            keep=self.keep,
            window_slots=self.slots,
            max_size=self.max_size,
            pinned=tuple(row.pinned for row in self.rows),
            skip=tuple(row.skip for row in self.rows),
        )

    def expected(self, queries: np.ndarray, scale: float, sinks: np.ndarray | None) -> np.ndarray:
        out = np.zeros((*queries.shape[:3], 32))
        for b, row in enumerate(self.rows):
            for i in range(self.n_queries):
                at = visible_positions(row.offset + i, self.keep, self.max_size)
                pages_start = self.keep + PAGE * row.first
                pinned_end = pages_start + PAGE * row.pinned
                at = np.union1d(at, np.arange(pages_start, pinned_end))
                at = at[(at < pinned_end) | (at >= pinned_end + row.skip)]
                out[b, :, i] = attend_dense(queries[b, :, i], row.keys[at], row.values[at], scale, sinks)
        return out


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    name=st.sampled_from(["identity", "reference", "packed"]),
    n_rows=st.integers(1, 4),
    n_queries=st.sampled_from([1, 1, 2, 5, 8]),
    keep=st.sampled_from([0, 3, 64]),
    window=st.sampled_from([0, 64, 128]),
    slack=st.sampled_from([None, 0, 37, 200]),
    with_sinks=st.booleans(),
)
def test_a_step_sees_exactly_the_tokens_it_should(
    seed: int, name: str, n_rows: int, n_queries: int, keep: int, window: int, slack: int | None, with_sinks: bool
) -> None:
    rng = np.random.default_rng(seed)
    max_size = None if slack is None else keep + window + PAGE + slack
    step = Step(lanes_of(name), rng, n_rows, n_queries, (keep, window, max_size))
    queries = rng.normal(size=(n_rows, 4, n_queries, 64)).astype(np.float32)
    sinks = rng.normal(size=(4,)).astype(np.float32) if with_sinks else None
    given_sinks = None if sinks is None else mx.array(sinks)
    index = step.index()
    inputs = StepInputs(mx.array(queries), *step.pairs(), step.pages, index, 0.125, given_sinks)
    out, raw = lanes_of(name).attend_step(inputs)
    assert out.dtype == mx.float32
    for got, want in zip(raw, step.stored(), strict=True):
        np.testing.assert_array_equal(np.array(got), want)
    tolerance = 1e-3 if name == "packed" and mx.default_device().type == mx.cpu else 3e-5
    np.testing.assert_allclose(np.array(out), step.expected(queries, 0.125, sinks), atol=tolerance, rtol=0)


def index_of(tables: tuple[tuple[int, ...], ...], **changes: Any) -> RowIndex:
    given: dict[str, Any] = {"offsets": (300,) * len(tables), "first": (1,) * len(tables), "n_queries": 1, "keep": 4}
    given |= {"window_slots": 192, "max_size": None} | changes
    return RowIndex(tables=tables, **given)


def test_arrays_of_a_step() -> None:
    index = index_of(((5, 3), (9,)), offsets=(300, 260), first=(1, 2))
    assert index.rows.tolist() == [[300, 1, 2, 0], [260, 2, 1, 0]]
    assert index.rows.dtype == index.table.dtype == mx.int32
    assert index.table[0].tolist() == [5, 3]
    assert index.table[1, 0].item() == 9


def test_the_page_table_is_made_again_only_when_it_changes() -> None:
    before = index_of(((5, 3), (9,)))
    same = index_of(((5, 3), (9,)), offsets=(301, 301), previous=before)
    assert same.table is before.table
    assert same.rows is not before.rows
    other = index_of(((5, 3, 1), (9,)), previous=same)
    assert other.table.tolist()[0] == [5, 3, 1]


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_rows_of_a_step_that_follows_another(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted further where only offsets have moved; made again after pages, rotation, other rows, or a jump."""
    monkeypatch.setattr("kernels.attention.page_tables.steps_on_device", lambda: on_device)
    tables = [((5, 3), (9,))] * 3 + [((5, 3, 1), (9,))] * 2 + [((3, 1), (9,))] * 2 + [((9,), (3, 1))] + [((9,),)] * 3
    first = [(1, 1)] * 5 + [(2, 1)] * 2 + [(1, 2)] + [(1,)] * 3
    offsets = [(300 + i, 260 + i) for i in range(7)] + [(267, 307), (268,), (269,), (271,)]
    previous, counted = None, 0
    for table, begun, offset in zip(tables, first, offsets, strict=True):
        step = index_of(table, offsets=offset, first=begun, previous=previous)
        counted += "_rows_before" in step.__dict__
        assert step.rows.tolist() == [[o, f, len(t), 0] for o, f, t in zip(offset, begun, table, strict=True)]
        previous = step
    assert counted == 5


def test_masks_are_made_only_where_something_is_hidden() -> None:
    full = index_of(((5, 3),), offsets=(4 + 64 * 3 + 191,))
    assert full.page_mask is full.raw_mask is full.mask is None
    assert full.n_raw == 4 + 192
    assert index_of(((5, 3),), offsets=(4 + 64 * 3 + 5,)).page_mask is None
    rotating = index_of(((5, 3),), offsets=(4 + 64 * 3 + 5,), max_size=4 + 5 + 1 + 60)
    assert rotating.page_mask is not None
    assert np.array(rotating.page_mask).sum() == 60
    assert index_of(((5, 3), (9,))).page_mask is not None
    assert index_of(((), ())).page_mask is None
    hiding = index_of(((5, 3),), offsets=(4 + 64 * 3 + 5,), pinned=(1,), skip=(10,))
    assert hiding.page_mask is not None
    assert np.flatnonzero(~np.array(hiding.page_mask)).tolist() == list(range(64, 74))


def test_rows_tell_where_the_hidden_tokens_end() -> None:
    before = index_of(((5, 3), (9,)), pinned=(1, 0), skip=(7, 0))
    assert before.rows[:, 3].tolist() == [71, 0]
    other = index_of(((5, 3), (9,)), offsets=(301, 301), pinned=(1, 0), skip=(8, 0), previous=before)
    assert other.rows[:, 3].tolist() == [72, 0]


@pytest.mark.parametrize("name", ["identity", "reference", "packed"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_outputs_have_the_queries_dtype(name: str, dtype: mx.Dtype) -> None:
    step = Step(lanes_of(name), np.random.default_rng(0), 2, 1, (3, 64, None))
    queries = mx.random.normal((2, 4, 1, 64)).astype(dtype)
    for raw in step.raw:
        raw.clip(-9, 9, out=raw)
    inputs = StepInputs(queries, *step.pairs(dtype), step.pages, step.index(), 0.125, None)
    out, kept = lanes_of(name).attend_step(inputs)
    assert {out.dtype, *(x.dtype for x in kept)} == {dtype}


def test_without_pages_nothing_is_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> mx.array:
        raise AssertionError("rotated")

    monkeypatch.setattr("kernels.codec.rotation.Rotation.apply", refuse)
    monkeypatch.setattr("kernels.codec.rotation.Rotation.inverse", refuse)
    for name in ("reference", "packed"):
        lanes = lanes_of(name)
        pages = tuple(mx.zeros((0, *shape), dtype) for shape, dtype in lanes.page_arrays())
        raw = mx.ones((1, 2, 196, 64)), mx.ones((1, 2, 196, 32))
        for n in (1, 60):
            index = index_of(((),), offsets=(20,), first=(0,), n_queries=n)
            tokens = mx.ones((1, 2, n, 64)), mx.ones((1, 2, n, 32))
            out, _ = lanes.attend_step(StepInputs(mx.ones((1, 4, n, 64)), tokens, raw, pages, index, 0.125, None))
            assert out.shape == (1, 4, n, 32)
    assert isinstance(lanes, PackedLanes)
