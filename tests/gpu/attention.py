"""Attention over pages against MLX's fp16 attention: chains of calls in one graph, medians, one run."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.attention.page_tables import RowIndex
from kernels.codec.layout import PAGE
from kernels.fused.profiles import Profile
from kernels.lanes.base import LaneShape, StepInputs
from tests.gpu.lanes import fused

CHAIN = 32
KEEP, WINDOW = 64, 128


@dataclass(frozen=True)
class Case:
    """Rows of equal length, with the speed that must be and the one aimed at, over MLX's."""

    n_tokens: int
    key_bits: float
    value_bits: float
    must: float | None = None
    aim: float | None = None
    n_rows: int = 1
    n_heads: int = 32
    n_kv_heads: int = 8
    dim: int = 128

    @property
    def label(self) -> str:
        rows = f"{self.n_rows} rows x " if self.n_rows > 1 else ""
        return f"k{self.key_bits:g}v{self.value_bits:g}, {rows}{self.n_tokens:,} tokens"


CASES = (
    Case(131072, 4, 4, 2.0, 3.0),
    Case(32768, 4, 4, 1.3, 2.0),
    Case(4096, 4, 4, 0.9, 1.2),
    Case(131072, 8, 4, 1.4, 2.0),
    Case(131072, 6, 4, 1.7, 2.6),
    Case(131072, 5, 4),
    Case(131072, 6, 5),
    Case(16384, 4, 4, 1.8, 3.0, n_rows=8),
)


def chain_microseconds(step: Callable[[mx.array], mx.array], queries: mx.array, repeats: int = 15) -> float:
    """Median time of one call among `CHAIN` that depend on each other in one graph."""

    def chain() -> mx.array:
        x = queries
        for _ in range(CHAIN):
            x = step(x)
        return x

    for _ in range(3):
        mx.eval(chain())
    times = []
    for _ in range(repeats):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(chain())
        times.append((time.perf_counter() - start) / CHAIN * 1e6)
    return statistics.median(times)


def step_of(case: Case, profile: Profile | None = None) -> tuple[Callable[[mx.array], mx.array], int]:
    """One call of the fused attention, and the bytes that it has to read."""
    shape = LaneShape(case.n_heads, case.n_kv_heads, case.dim, case.dim, case.key_bits, case.value_bits)
    lanes = fused(shape)
    lanes.profile = profile or lanes.profile
    n_pages = (case.n_tokens - KEEP - WINDOW) // PAGE
    total = n_pages * case.n_rows
    pages = [
        mx.random.randint(0, 2**31 - 1, (total, *s)).astype(d)
        if d == mx.uint32
        else mx.random.uniform(0.5, 1.5, (total, *s)).astype(d)
        for s, d in lanes.page_arrays()
    ]
    order = np.array(mx.random.permutation(total)).tolist()
    rows = RowIndex(
        tuple(tuple(order[r * n_pages : (r + 1) * n_pages]) for r in range(case.n_rows)),
        (KEEP + n_pages * PAGE + WINDOW,) * case.n_rows,
        (0,) * case.n_rows,
        1,
        KEEP,
        WINDOW + PAGE,
        None,
    )
    keys, values, raw_keys, raw_values = (
        mx.random.normal((case.n_rows, case.n_kv_heads, n, case.dim)).astype(mx.float16)
        for n in (1, 1, KEEP + WINDOW + PAGE, KEEP + WINDOW + PAGE)
    )
    tokens, raw = (keys, values), (raw_keys, raw_values)
    mx.eval(pages, tokens, raw, rows.table, rows.rows)
    n_bytes = sum(p.nbytes for p in pages) + sum(r.nbytes for r in raw)

    def run(q: mx.array) -> mx.array:
        return lanes.attend_step(StepInputs(q, tokens, raw, tuple(pages), rows, case.dim**-0.5, None))[0]

    return run, n_bytes


def mlx_step(case: Case) -> Callable[[mx.array], mx.array]:
    keys, values = (
        mx.random.normal((case.n_rows, case.n_kv_heads, case.n_tokens, case.dim)).astype(mx.float16) for _ in range(2)
    )
    mx.eval(keys, values)
    return lambda q: mx.fast.scaled_dot_product_attention(q, keys, values, scale=case.dim**-0.5)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy: the ceiling of everything here."""
    x = mx.zeros((1 << 30,), dtype=mx.uint8)
    one = mx.array(1, dtype=mx.uint8)
    times = []
    for _ in range(8):
        mx.eval(x)
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(x + one)
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(times)


def run(case: Case, bandwidth: float) -> dict[str, Any]:
    queries = mx.random.normal((case.n_rows, case.n_heads, 1, case.dim)).astype(mx.float16)
    step, n_bytes = step_of(case)
    ours = chain_microseconds(step, queries)
    theirs = chain_microseconds(mlx_step(case), queries)
    again = chain_microseconds(step, queries)
    ours = min(ours, again)
    bound = n_bytes / bandwidth * 1e6
    return {
        "case": case.label,
        "fused_us": ours,
        "mlx_fp16_us": theirs,
        "speed": theirs / ours,
        "must": case.must,
        "aim": case.aim,
        "byte_bound_us": bound,
        "of_bound": bound / ours,
    }
