"""The fused kernels on this GPU against float64: codes, expansion and attention over many shapes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.attention.page_tables import RowIndex
from kernels.codec.layout import PAGE
from kernels.lanes.base import LaneShape, Pair, StepInputs, store_tokens
from tests.gpu.lanes import fused, reference

TYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
LIMITS = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-3}
"""Largest error relative to the largest value: the output's own rounding, and float16 in queries and weights."""


@dataclass(frozen=True)
class Case:
    """One layer's shape and one step's integers."""

    shape: LaneShape
    dtype: str = "float16"
    offsets: tuple[int, ...] = (700,)
    n_queries: int = 1
    keep: int = 64
    window: int = 128
    max_size: int | None = None
    sinks: bool = False

    @property
    def label(self) -> str:
        s = self.shape
        dims = f"{s.key_dim}" if s.key_dim == s.value_dim else f"{s.key_dim}/{s.value_dim}"
        more = "".join([f", max_size {self.max_size}" if self.max_size else "", ", sinks" if self.sinks else ""])
        return (
            f"k{s.key_bits:g}v{s.value_bits:g} {s.n_heads}/{s.n_kv_heads} x {dims} {self.dtype}, "
            f"offsets {'/'.join(map(str, self.offsets))}, L {self.n_queries}{more}"
        )


def cases() -> Iterator[Case]:
    base = LaneShape(8, 2, 128, 128, 4, 4)
    for bits in ((4, 4), (6, 4), (5, 6), (8, 4), (8, 8), (3, 3), (2, 2), (3.5, 3.5), (2.5, 2.5), (4, 2.5)):
        for dtype in TYPES:
            yield Case(replace(base, key_bits=bits[0], value_bits=bits[1]), dtype)
    for dims in ((64, 64), (80, 80), (96, 96), (192, 128), (256, 256), (128, 64)):
        for bits in ((4, 4), (6, 4), (5, 5), (8, 4), (3.5, 2)):
            yield Case(LaneShape(8, 2, *dims, *bits))
    for heads in ((4, 4), (12, 1), (32, 1), (16, 2)):
        yield Case(LaneShape(*heads, 128, 128, 4, 4))
    yield Case(base, offsets=(0,))
    yield Case(base, offsets=(1,))
    yield Case(base, offsets=(64,), n_queries=3)
    yield Case(base, offsets=(5000, 40, 300, 1111), sinks=True)
    yield Case(base, offsets=(5000, 1200), max_size=1024)
    for n_queries in (2, 5, 8):
        yield Case(base, offsets=(3000, 900), n_queries=n_queries, max_size=2048)
    yield Case(base, offsets=(20000,))


def row_index(case: Case) -> RowIndex:
    """The integers that the ring would give for sessions of `offsets` tokens."""
    tables, first, taken = [], [], 0
    for offset in case.offsets:
        newest = offset + case.n_queries - 1
        flushed = max(0, (offset - case.keep) // PAGE - case.window // PAGE)
        gone = 0
        if case.max_size is not None:
            gone = max(0, offset + 1 - (case.max_size - case.keep) - case.keep) // PAGE
        gone = min(gone, flushed)
        tables.append(tuple(range(taken, taken + flushed - gone)))
        first.append(gone)
        taken += flushed - gone
        assert newest - (case.keep + PAGE * flushed) < case.window + 2 * PAGE
    # One block more than the ring has, so that steps of several tokens always fit.
    return RowIndex(
        tuple(tables), case.offsets, tuple(first), case.n_queries, case.keep, case.window + 2 * PAGE, case.max_size
    )


def expected(case: Case, rows: RowIndex, arrays: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Attention in float64 over what the pages give back and the raw tokens: `[B, n_heads, L, value_dim]`."""
    s, out = case.shape, []
    for b, offset in enumerate(case.offsets):
        keys, values, positions = [], [], []
        start = case.keep + PAGE * rows.first[b]
        for i, page in enumerate(rows.tables[b]):
            keys.append(arrays["page_keys"][page])
            values.append(arrays["page_values"][page])
            positions.append(start + PAGE * i + np.arange(PAGE))
        window = start + PAGE * len(rows.tables[b])
        at = np.concatenate(
            [np.arange(min(case.keep, offset + case.n_queries)), np.arange(window, offset + case.n_queries)]
        ).astype(int)
        slots = np.where(at < case.keep, at, case.keep + (at - case.keep) % rows.window_slots)
        keys.append(arrays["raw_keys"][b][:, slots])
        values.append(arrays["raw_values"][b][:, slots])
        positions.append(at)
        k, v = (np.repeat(np.concatenate(x, axis=1), s.n_repeats, axis=0) for x in (keys, values))
        p = np.concatenate(positions)
        scores = np.einsum("hld,htd->hlt", arrays["queries"][b], k) * scale
        q = offset + np.arange(case.n_queries)[:, None]
        seen = p <= q
        if case.max_size is not None:
            seen &= (p < case.keep) | (p > q - (case.max_size - case.keep))
        scores = np.where(seen, scores, -np.inf)
        extra = arrays["sinks"][:, None, None] if case.sinks else np.full((s.n_heads, 1, 1), -np.inf)
        top = np.maximum(scores.max(-1, keepdims=True), extra)
        weights = np.exp(scores - top)
        out.append(np.einsum("hlt,htd->hld", weights, v) / (weights.sum(-1, keepdims=True) + np.exp(extra - top)))
    return np.stack(out)


def check(case: Case, seed: int = 0) -> dict[str, Any]:
    """Encode, expand and attend once; returns errors relative to the largest value."""
    s, dtype = case.shape, TYPES[case.dtype]
    lanes, oracle = fused(s), reference(s)
    rows = row_index(case)
    n_pages = max(1, sum(map(len, rows.tables)))
    rng = np.random.default_rng(seed)

    def draw(*shape: int, loud: float = 1.0) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32) * loud).astype(dtype)

    keys, values = draw(n_pages, s.n_kv_heads, PAGE, s.key_dim, loud=3), draw(n_pages, s.n_kv_heads, PAGE, s.value_dim)
    pages = lanes.encode(keys, values)
    want = oracle.expand(oracle.encode(keys.astype(mx.float32), values.astype(mx.float32)), mx.float32)
    own = oracle.expand(pages, mx.float32)
    slots = rows.keep + rows.window_slots
    n_rows = len(case.offsets)
    queries = draw(n_rows, s.n_heads, case.n_queries, s.key_dim)
    raw_keys, raw_values = (
        draw(n_rows, s.n_kv_heads, slots, s.key_dim, loud=3),
        draw(n_rows, s.n_kv_heads, slots, s.value_dim),
    )
    sinks = draw(s.n_heads) if case.sinks else None
    scale = s.key_dim**-0.5
    stored = raw_keys, raw_values
    tokens = own_tokens(stored, rows)
    # What lies in these tokens' slots must not be read.
    before = store_tokens((tokens[0] * mx.nan, tokens[1] * mx.nan), stored, rows)
    got, after = lanes.attend_step(StepInputs(queries, tokens, before, pages, rows, scale, sinks))
    stores = all(bool(mx.array_equal(a, b)) for a, b in zip(after, stored, strict=True))
    arrays = {
        name: np.array(x.astype(mx.float32), dtype=np.float64)
        for name, x in {
            "page_keys": own[0],
            "page_values": own[1],
            "queries": queries,
            "raw_keys": raw_keys,
            "raw_values": raw_values,
            "sinks": sinks if sinks is not None else mx.zeros(1),
        }.items()
    }
    right = expected(case, rows, arrays, scale)
    expanded = lanes.expand(pages, mx.float32)
    return {
        "case": case.label,
        # Codes on a boundary may differ by rounding, so encode is judged by what the rows are read back as.
        "encode": max(rms(a, b) for a, b in zip(own, want, strict=True)),
        "expand": max(relative(a, np.array(b, dtype=np.float64)) for a, b in zip(expanded, own, strict=True)),
        "attend": relative(got, right) if stores else math.inf,
        "limit": LIMITS[case.dtype],
    }


def own_tokens(raw: Pair, rows: RowIndex) -> Pair:
    """The step's own tokens, taken from raw buffers that hold them."""
    keys, values = (mx.take_along_axis(x, rows.slots((*x.shape[:2], rows.n_queries, x.shape[3])), axis=2) for x in raw)
    return keys, values


def relative(got: mx.array, want: np.ndarray) -> float:
    return float(np.abs(np.array(got.astype(mx.float32), dtype=np.float64) - want).max() / np.abs(want).max())


def rms(got: mx.array, want: mx.array) -> float:
    return float(mx.sqrt(mx.square(got - want).mean() / mx.square(want).mean()))


def run_all(every: int = 1) -> Iterator[dict[str, Any]]:
    """Every case (or each `every`-th one) as it is done; `passed` says whether its errors are within limits."""
    for case in list(cases())[::every]:
        try:
            result = check(case)
            result["passed"] = (
                result["attend"] <= result["limit"] and result["expand"] <= 1e-5 and result["encode"] <= 0.02
            )
        except Exception as error:
            result = {"case": case.label, "passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        yield result
