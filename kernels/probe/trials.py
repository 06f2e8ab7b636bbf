"""What the probe tries on a candidate's lanes: each part, in every form that a cache can give it, on random data.

The reference is computed on the CPU in float32, whatever the device, so that a device never judges itself.
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
"""Everything that a check can be about. `device` and `shape`: can it be tried at all? `answer`: a whole model's, which
whoever serves it tries when the rest has passed.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest errors that pass: max |got - reference| / max |reference| of what a part returns."""

    expand: float
    attend_step: float
    attend: float


LIMITS = {
    # Results carry 24 bits, and expanding needs few operations: 1e-6. In attention matrix units may hold decoded values
    # and probabilities in half precision (as TF32 in MLX's own products), which was measured at 4e-4.
    mx.float32: Limits(expand=1e-4, attend_step=2e-3, attend=2e-3),
    # 11 bits: rounding the result is 5e-4 of a value. MLX's attention rounds scores, probabilities and sums as well:
    # 1.9e-3 measured on a CPU.
    mx.float16: Limits(expand=1e-3, attend_step=4e-3, attend=4e-3),
    # 8 bits: rounding the result is 4e-3 of a value, and MLX's attention over a chunk differs by 1.5e-2.
    mx.bfloat16: Limits(expand=8e-3, attend_step=1.6e-2, attend=3e-2),
}
"""By the dtype of the model's keys and queries. A wrong token among a few hundred is above 4e-2."""

ENCODE_LIMIT = 1e-2
"""Largest |got - reference| / |reference| over all pages read back, in the Euclidean norm, for every dtype: inputs are
the same numbers and arithmetic is float32. A coordinate just between two levels may go either way, which costs 5e-4
each, and a row just between two zooms 5e-3; one wrong token among a thousand costs 3e-2.
"""

SPEED_TOKENS = 4096
SLOWEST = 1.25
"""At `SPEED_TOKENS` tokens of one row a candidate's decode step may take this many times the fallback's, no more."""

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
) -> RowIndex:
    return RowIndex(tables, offsets, first or (0,) * len(tables), n_queries, keep, 2 * PAGE, max_size)


def steps() -> dict[str, RowIndex]:
    """Decode steps in every state of a ring, over a pool of `_N_PAGES` pages and windows of 128 slots."""
    ragged = ((2, 0, 5), (1,), (), (3, 4, 1, 0, 2))  # the third row is still in its sink
    offsets = (4 + 3 * PAGE + 63, 4 + PAGE + 127, 2, 4 + 5 * PAGE + 64)
    return {
        "one row": _rows(((0, 1, 2),), (4 + 3 * PAGE + 40,)),
        "ragged": _rows(ragged, offsets),
        "rotated": _rows(((4, 0, 5, 2), (1, 3, 5, 0)), (761, 520), (7, 3), max_size=291),
        "wrapped": _rows(((0, 1, 2),), (4 + 3 * PAGE + 99,)),
        "no sink": _rows(((5, 4),), (2 * PAGE + 20,), keep=0),
        "no pages": _rows(((), ()), (9, 2)),
        "several queries": _rows(((1, 3), (0,)), (4 + 2 * PAGE + 30, 4 + PAGE + 60), n_queries=4),
        "sinks": _rows(ragged, offsets),
    }


class Trial:
    """One candidate's lanes against the reference's `oracle` (on the same codebooks) in one dtype.

    `shared`: both have the same page bytes, so that each part can be judged on the reference's own pages; else the
    lanes' own pages are used, and what they expand to is judged with `encode`.
    """

    def __init__(self, lanes: Lanes, oracle: Lanes, dtype: mx.Dtype, *, shared: bool) -> None:
        self.lanes, self.oracle, self.dtype, self.shared = lanes, oracle, dtype, shared
        self._shape = lanes.shape
        self._limits = LIMITS[dtype]
        self._judge = oracle if shared else lanes

    def parts(self) -> Iterator[tuple[Part, str, Callable[[], Measured]]]:
        """Part, form and the trial itself, in the order in which a failure makes the later ones pointless."""
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
            got = self._judge.expand(pages, mx.float32)
            want = self.oracle.expand(self._oracle_pages, mx.float32)
            wrong = [_norm(g - w) for g, w in zip(got, want, strict=True)]
            error = max(got_norm / _norm(w) for got_norm, w in zip(wrong, want, strict=True))
            return Measured(error, ENCODE_LIMIT, microseconds)

    def expand(self) -> Measured:
        got, microseconds = timed(lambda: self.lanes.expand(self._pages, self.dtype))
        with mx.stream(mx.cpu):
            want = self._judge.expand(self._pages, mx.float32)
            error = max(self._error(g, w) for g, w in zip(got, want, strict=True))
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
        got, microseconds = timed(lambda: self.lanes.attend(chunk))
        with mx.stream(mx.cpu):
            q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
            want = attend_expanded(self._judge.expand, chunk._replace(queries=q, raw=(k, v)))
            return Measured(self._error(got, want), self._limits.attend, microseconds)

    def attend_step(self, rows: RowIndex, with_sinks: bool = False) -> Measured:
        n_rows, n_raw = len(rows.tables), rows.keep + rows.window_slots
        # Slots that no query may see hold random numbers as well, and so do those of the step's own tokens.
        queries, keys, values = random_step(self._shape, self.dtype, 30, n_rows, rows.n_queries, n_raw)
        tokens = random_step(self._shape, self.dtype, 33, n_rows, rows.n_queries, rows.n_queries)[1:]
        sinks = mx.linspace(-1, 2, self._shape.n_heads).astype(self.dtype) if with_sinks else None
        step = StepInputs(queries, tokens, (keys, values), self._pages, rows, self._shape.key_dim**-0.5, sinks)
        (got, kept), microseconds = timed(lambda: self.lanes.attend_step(step))
        with mx.stream(mx.cpu):
            stored = store_tokens(tokens, step.raw, rows)
            k, v = (x[:, :, : rows.n_raw].astype(mx.float32) for x in stored)
            chunk = ChunkInputs(
                queries.astype(mx.float32), (k, v), step.pages, rows.index, rows.mask, step.scale, sinks
            )
            want = attend_expanded(self._judge.expand, chunk)
            error = self._error(got, want)
            if not all(bool(mx.array_equal(a, b)) for a, b in zip(kept, stored, strict=True)):
                error = float("inf")
        return Measured(error, self._limits.attend_step, microseconds)

    def _error(self, got: mx.array, want: mx.array) -> float:
        if got.shape != want.shape or got.dtype != self.dtype:
            return float("inf")
        return float(np.array(mx.abs(got.astype(mx.float32) - want).max() / mx.abs(want).max()))

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
    """Time of one decode step over `SPEED_TOKENS` tokens of one row: the best of several rounds, each of several calls
    in one graph, so that what the host needs for an evaluation does not hide what the device does.
    """
    shape, n_pages = lanes.shape, SPEED_TOKENS // PAGE
    blocks = [_normal(40 + i, 4, shape.n_kv_heads, PAGE, d) for i, d in enumerate((shape.key_dim, shape.value_dim))]
    some = lanes.encode(*(x.astype(dtype) for x in blocks))
    pages = tuple(mx.concatenate([array] * (n_pages // 4)) for array in some)
    # A step for each call: calls that do not follow each other may run at once, and a step has one workspace.
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
    """A result, evaluated, and the median microseconds of getting it once it has been had."""
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
