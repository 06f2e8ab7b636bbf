"""The probe's checks of a candidate's lanes: each part, with every form of input that a cache can give it.

Inputs are random. The reference is always computed on the CPU in float32, so that no device judges itself.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, TypeVar

import mlx.core as mx
import numpy as np

from kernels.attention.masks import Mask
from kernels.attention.page_tables import PageIndex, RowIndex
from kernels.codec.layout import PAGE
from kernels.lanes.base import ChunkInputs, Lanes, LaneShape, Pages, Pair, StepInputs, attend_expanded, store_tokens

T = TypeVar("T")

Part = Literal["device", "shape", "encode", "expand", "attend", "attend_step", "speed", "answer"]
"""The subject of a check. `device` and `shape`: whether it can be tried at all. `answer`: the warm-up of a whole model,
which the server runs when everything else has passed.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest errors that pass: max |actual - reference| / max |reference| of a part's result."""

    expand: float
    attend_step: float
    attend: float


LIMITS = {
    # Results have 24 bits, and expanding takes few operations: 1e-6. In attention, matrix units may hold decoded values
    # and probabilities in half precision (as TF32 in MLX's own products). Measured: 4e-4.
    mx.float32: Limits(expand=1e-4, attend_step=2e-3, attend=2e-3),
    # 11 bits: rounding the result costs 5e-4 of a value. MLX's attention also rounds scores, probabilities and sums.
    # Measured on a CPU: 1.9e-3.
    mx.float16: Limits(expand=1e-3, attend_step=4e-3, attend=4e-3),
    # 8 bits: rounding the result costs 4e-3 of a value. MLX's attention over a chunk differs by 1.5e-2.
    mx.bfloat16: Limits(expand=8e-3, attend_step=1.6e-2, attend=3e-2),
}
"""By the dtype of the model's keys and queries. One wrong token among a few hundred costs more than 4e-2."""

ENCODE_LIMIT = 1e-2
"""Largest |actual - reference| / |reference| over all decoded pages, in the Euclidean norm. It holds for every dtype,
because inputs are the same numbers and arithmetic is float32. A coordinate just between two levels may go either way,
which costs 5e-4 each. A row just between two zooms costs 5e-3, one wrong token among a thousand 3e-2.
"""

SPEED_TOKENS = 4096
SLOWEST = 1.25
"""A candidate's decode step over `SPEED_TOKENS` tokens of one row may take at most this many times the baseline's."""

_N_PAGES = 6
_CALLS = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """A trial's outcome. It passes when `error` is at most `limit` (NaN is not)."""

    error: float
    limit: float
    microseconds: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def _rows(
    tables: tuple[tuple[int, ...], ...],
    offsets: tuple[int, ...],
    first: tuple[int, ...] | None = None,
    *,
    n_queries: int = 1,
    keep: int = 4,
    max_size: int | None = None,
    pinned: tuple[int, ...] = (),
    skip: tuple[int, ...] = (),
) -> RowIndex:
    first = first or (0,) * len(tables)
    return RowIndex(tables, offsets, first, n_queries, keep, 2 * PAGE, max_size, pinned=pinned, skip=skip)


def steps() -> dict[str, RowIndex]:
    """Decode steps in every state of a ring, over a pool of `_N_PAGES` pages and windows of 128 slots."""
    ragged = ((2, 0, 5), (1,), (), (3, 4, 1, 0, 2))  # the third row is still in its sink
    offsets = (4 + 3 * PAGE + 63, 4 + PAGE + 127, 2, 4 + 5 * PAGE + 64)
    return {
        "one row": _rows(((0, 1, 2),), (4 + 3 * PAGE + 40,)),
        "ragged": _rows(ragged, offsets),
        "rotated": _rows(((4, 0, 5, 2), (1, 3, 5, 0)), (761, 520), (7, 3), max_size=291),
        "hidden": _rows(((4, 0, 5, 2), (1, 3, 5, 0)), (761, 520), (7, 3), max_size=291, pinned=(2, 0), skip=(9, 50)),
        "wrapped": _rows(((0, 1, 2),), (4 + 3 * PAGE + 99,)),
        "no sink": _rows(((5, 4),), (2 * PAGE + 20,), keep=0),
        "no pages": _rows(((), ()), (9, 2)),
        "several queries": _rows(((1, 3), (0,)), (4 + 2 * PAGE + 30, 4 + PAGE + 60), n_queries=4),
        "sinks": _rows(ragged, offsets),
    }


class Trial:
    """Compares one candidate's lanes with reference lanes (`oracle`, same codebooks) in one dtype.

    `shared`: both have the same page bytes, so each part is checked on the reference's pages. Otherwise the lanes' own
    pages are used, and `encode` checks what they expand to.
    """

    def __init__(self, lanes: Lanes, oracle: Lanes, dtype: mx.Dtype, *, shared: bool) -> None:
        self.lanes, self.oracle, self.dtype, self.shared = lanes, oracle, dtype, shared
        self._shape = lanes.shape
        self._limits = LIMITS[dtype]
        self._judge = oracle if shared else lanes

    def parts(self) -> Iterator[tuple[Part, str, Callable[[], Measured]]]:
        """Part, form and check. If one part fails, later ones may be pointless."""
        yield "encode", "", self.encode
        yield "expand", "", self.expand
        yield "attend", "few tokens", partial(self.attend, 5, ((0, 2, 1), (3,)))
        yield "attend", "chunk", partial(self.attend, PAGE, ((0, 2, 1),))
        yield "attend", "no pages", partial(self.attend, 5, ((),))
        for name, rows in steps().items():
            yield "attend_step", name, partial(self.attend_step, rows, name == "sinks")

    def encode(self) -> Measured:
        pages, microseconds = timed(lambda: self.lanes.encode(*self._blocks))
        arrays = [((_N_PAGES, *shape), dtype) for shape, dtype in self.lanes.page_arrays()]
        if [(page.shape, page.dtype) for page in pages] != arrays:
            return Measured(float("inf"), ENCODE_LIMIT, microseconds)
        with mx.stream(mx.cpu):
            actual = self._judge.expand(pages, mx.float32)
            expected = self.oracle.expand(self._oracle_pages, mx.float32)
            differences = [_norm(g - w) for g, w in zip(actual, expected, strict=True)]
            error = max(difference / _norm(w) for difference, w in zip(differences, expected, strict=True))
            return Measured(error, ENCODE_LIMIT, microseconds)

    def expand(self) -> Measured:
        actual, microseconds = timed(lambda: self.lanes.expand(self._pages, self.dtype))
        with mx.stream(mx.cpu):
            expected = self._judge.expand(self._pages, mx.float32)
            error = max(self._error(g, w) for g, w in zip(actual, expected, strict=True))
        return Measured(error, self._limits.expand, microseconds)

    def attend(self, n_tokens: int, tables: tuple[tuple[int, ...], ...]) -> Measured:
        """A prefill chunk: causal over one row, or with a mask over two rows of three pages and one page."""
        index, n_rows = PageIndex(tables), len(tables)
        queries, keys, values = random_step(self._shape, self.dtype, 20, n_rows, n_tokens, n_raw=2 * PAGE)
        mask: Mask = "causal"
        if n_rows == 2:
            columns = mx.arange(5 * PAGE)
            visible = mx.stack([columns >= 5, (columns < PAGE) | (columns >= 3 * PAGE)])[:, None, None]
            mask = mx.repeat(visible, n_tokens, axis=2)
        chunk = ChunkInputs(queries, (keys, values), self._pages, index, mask, self._shape.key_dim**-0.5, None)
        actual, microseconds = timed(lambda: self.lanes.attend(chunk))
        with mx.stream(mx.cpu):
            q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
            expected = attend_expanded(self._judge.expand, chunk._replace(queries=q, raw=(k, v)))
            return Measured(self._error(actual, expected), self._limits.attend, microseconds)

    def attend_step(self, rows: RowIndex, with_sinks: bool = False) -> Measured:
        n_rows, n_raw = len(rows.tables), rows.keep + rows.window_slots
        # Slots that no query may see hold random numbers too, as do those of the step's own tokens.
        queries, keys, values = random_step(self._shape, self.dtype, 30, n_rows, rows.n_queries, n_raw)
        tokens = random_step(self._shape, self.dtype, 33, n_rows, rows.n_queries, rows.n_queries)[1:]
        sinks = mx.linspace(-1, 2, self._shape.n_heads).astype(self.dtype) if with_sinks else None
        step = StepInputs(queries, tokens, (keys, values), self._pages, rows, self._shape.key_dim**-0.5, sinks)
        (actual, kept), microseconds = timed(lambda: self.lanes.attend_step(step))
        with mx.stream(mx.cpu):
            stored = store_tokens(tokens, step.raw, rows)
            k, v = (x[:, :, : rows.n_raw].astype(mx.float32) for x in stored)
            chunk = ChunkInputs(
                queries.astype(mx.float32), (k, v), step.pages, rows.index, rows.mask, step.scale, sinks
            )
            expected = attend_expanded(self._judge.expand, chunk)
            error = self._error(actual, expected)
            if not all(bool(mx.array_equal(a, b)) for a, b in zip(kept, stored, strict=True)):
                error = float("inf")
        return Measured(error, self._limits.attend_step, microseconds)

    def _error(self, actual: mx.array, expected: mx.array) -> float:
        if actual.shape != expected.shape or actual.dtype != self.dtype:
            return float("inf")
        return float(np.array(mx.abs(actual.astype(mx.float32) - expected).max() / mx.abs(expected).max()))

    @cached_property
    def _blocks(self) -> tuple[mx.array, mx.array]:
        """Keys and values of `_N_PAGES` pages; one token of the first head is all zeros."""
        heads = (_N_PAGES, self._shape.n_kv_heads, PAGE)
        token = mx.arange(_N_PAGES * self._shape.n_kv_heads * PAGE).reshape(*heads, 1) != 5
        return (
            (_normal(1, *heads, self._shape.key_dim) * token).astype(self.dtype),
            (_normal(2, *heads, self._shape.value_dim) * token).astype(self.dtype),
        )

    @cached_property
    def _oracle_pages(self) -> Pages:
        with mx.stream(mx.cpu):
            pages = self.oracle.encode(*(x.astype(mx.float32) for x in self._blocks))
            mx.eval(pages)
        return pages

    @cached_property
    def _pages(self) -> Pages:
        return self._oracle_pages if self.shared else self.lanes.encode(*self._blocks)


def random_step(
    shape: LaneShape, dtype: mx.Dtype, seed: int, n_rows: int, n_tokens: int, n_raw: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries `[n_rows, n_heads, n_tokens, key_dim]`, raw keys and raw values `[n_rows, n_kv_heads, n_raw, dim]`."""
    return (
        _normal(seed, n_rows, shape.n_heads, n_tokens, shape.key_dim).astype(dtype),
        _normal(seed + 1, n_rows, shape.n_kv_heads, n_raw, shape.key_dim).astype(dtype),
        _normal(seed + 2, n_rows, shape.n_kv_heads, n_raw, shape.value_dim).astype(dtype),
    )


def decode_microseconds(lanes: Lanes, dtype: mx.Dtype) -> float:
    """Time of one decode step over `SPEED_TOKENS` tokens of one row: the best of several rounds.

    Each round has several calls in one graph, so that the host's time for an evaluation does not hide the device's.
    """
    shape, n_pages = lanes.shape, SPEED_TOKENS // PAGE
    blocks = [_normal(40 + i, 4, shape.n_kv_heads, PAGE, d) for i, d in enumerate((shape.key_dim, shape.value_dim))]
    encoded = lanes.encode(*(x.astype(dtype) for x in blocks))
    pages = tuple(mx.concatenate([array] * (n_pages // 4)) for array in encoded)
    # Each call has its own step: independent calls may run at the same time, and a step has one workspace.
    tables = (tuple(range(n_pages)),)
    steps = [RowIndex(tables, (PAGE + SPEED_TOKENS + PAGE,), (0,), 1, PAGE, 2 * PAGE, None) for _ in range(_CALLS)]
    raw, tokens = (random_step(shape, dtype, 50 + n, 1, 1, n)[1:] for n in (3 * PAGE, 1))
    queries = [random_step(shape, dtype, 60 + i, 1, 1, 1)[0] for i in range(_CALLS)]
    mx.eval(pages, raw, tokens, queries)
    scale = shape.key_dim**-0.5

    def calls() -> list[tuple[mx.array, Pair]]:
        return [
            lanes.attend_step(StepInputs(q, tokens, raw, pages, rows, scale, None))
            for q, rows in zip(queries, steps, strict=True)
        ]

    mx.eval(calls())
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(calls())
        rounds.append(time.perf_counter() - start)
    return min(rounds) / _CALLS * 1e6


def timed(run: Callable[[], T], repeats: int = 3) -> tuple[T, float]:
    """The evaluated result, and the median time of a call in microseconds after a first call."""
    mx.eval(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        mx.eval(result)
        times.append(time.perf_counter() - start)
    return result, sorted(times)[repeats // 2] * 1e6


def _normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _norm(x: mx.array) -> float:
    return float(np.array(mx.linalg.norm(x)))
