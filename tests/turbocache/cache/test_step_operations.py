"""What a decode step adds to a layer, in MLX operations: their cost on the host rules at short contexts."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.codec.layout import PAGE
from kernels.fused.lanes import MetalLanes
from kernels.lanes.base import Codebooks, LaneShape
from turbocache.cache.batch import CacheBatch
from turbocache.cache.conditioning import KeyCentre
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import RingConfig
from turbocache.cache.spec import CacheSpec, CompressedLayer
from turbocache.codebooks.scalar import levels_for

SHAPE = LaneShape(8, 2, 64, 64, 4, 4)


def make_batch(n_rows: int, n_pages: int) -> CacheBatch:
    """Rows in the middle of a page, as if they had taken their tokens in."""
    lanes = MetalLanes(SHAPE, Codebooks(levels_for("pair", 4), levels_for("pair", 4)))
    pool = PagePool([lanes], 64)
    batch = CacheBatch(CacheSpec(RingConfig(64, 128), pool, (CompressedLayer(lanes, mx.float16),)), n_rows)
    for row, ring in enumerate(batch.rings):
        ring.append_pages(pool.take(n_pages))
        ring.offset = ring.window_start + 128 + 3 + row
    return batch


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize(("n_rows", "n_pages"), [(1, 0), (1, 5), (4, 5)])
def test_cache_and_attention_are_two_operations(n_rows: int, n_pages: int, centred: bool) -> None:
    """Attend, which stores as well, and merge; and a subtraction in a layer where a row's keys are centred."""
    batch = make_batch(n_rows, n_pages)
    for row, ring in enumerate(batch.rings):
        ring.centre = KeyCentre()
        if centred and row == n_rows // 2:
            ring.centre.means[0] = mx.ones((1, 2, 1, 64), dtype=mx.float16)
    step = batch.begin_step(1)
    made: list[str] = []

    def note(record: dict[str, Any]) -> None:
        if record["type"] == "primitive":
            made.append(record["name"])

    def layer(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        tokens = batch.decode(0, step, keys, values)
        return batch.attend_decode(0, step, tokens, queries, 0.125, None)

    rng = np.random.default_rng(0)
    queries = mx.array(rng.normal(size=(n_rows, 8, 1, 64))).astype(mx.float16)
    keys, values = (mx.array(rng.normal(size=(n_rows, 2, 1, 64))).astype(mx.float16) for _ in range(2))
    # What a step shares with all layers is there before them.
    mx.eval(step.rows.rows, step.rows.table if n_pages else [], batch.raw)
    mx.eval(batch._centres.of(0) if centred else [])
    mx.export_function(note, layer, queries, keys, values)
    want = ["CustomKernel"] * 2 + ["Subtract"] * centred
    assert sorted(made) == want, made
    assert len(batch.rings[0].pages) == n_pages
    assert batch.rings[0].window_start == 64 + PAGE * n_pages
