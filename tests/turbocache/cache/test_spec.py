"""Counting which way attention went: a few integers a step, whatever the number of layers."""

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from kernels.lanes.base import AttentionPath, LaneShape
from tests.oracles import Heads, make_spec
from turbocache.backend import make_lanes
from turbocache.cache.ring import RingConfig
from turbocache.cache.spec import PATHS, PathCounts
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam

SHAPE = LaneShape(4, 2, 64, 64, 4, 4)


def test_counts_follow_the_lanes_and_the_number_of_tokens() -> None:
    packed, reference = make_lanes("packed", SHAPE), make_lanes("reference", SHAPE)
    counts = PathCounts([packed, packed, reference])
    counts.add(None)
    counts.add(5)
    assert counts.totals == {"packed": 4, "expanded": 2}
    counts.add(500)
    assert counts.totals == {"packed": 4, "expanded": 5}
    assert set(counts.totals) <= set(PATHS)


def test_lanes_are_asked_once_for_each_kind_of_step() -> None:
    asked: list[int | None] = []

    class Lanes(type(make_lanes("reference", SHAPE))):  # type: ignore[misc]
        def path(self, n_tokens: int | None) -> AttentionPath:
            asked.append(n_tokens)
            return "fused"

    counts = PathCounts([Lanes.__new__(Lanes)] * 3)
    for _ in range(100):
        counts.add(None)
        counts.add(7)
    assert asked == [None] * 3 + [7] * 3
    assert counts.totals == {"fused": 600}


def test_a_batch_counts_rows_of_prefill_and_steps_of_decode() -> None:
    heads = Heads(4, 2, 64, 64)
    spec = make_spec(RingConfig(4, 64, None), [heads, heads], 8, "k4v4", "packed")
    views = PagedKVCache.layers(spec)
    for n in (100, 3, 1, 1):
        for view in views:
            q, kv = mx.ones((1, 4, n, 64)), mx.ones((1, 2, n, 64))
            mx.eval(seam.attention(q, *view.update_and_fetch(kv, kv), view, scale=1.0, mask=None))
    # 100 tokens are expanded, 3 tokens are read packed; two decode steps.
    assert spec.paths.totals == {"expanded": 2, "packed": 6}


def test_native_attention_is_counted_at_the_seam() -> None:
    q, kv = mx.ones((1, 4, 1, 16)), mx.ones((1, 2, 3, 16))
    before = seam.native_calls()
    seam.attention(q, kv, kv, KVCache(), scale=1.0, mask=None)
    seam.attention(q, kv, kv, None, scale=1.0, mask=None)  # no cache: not a layer that decodes
    assert seam.native_calls() == before + 1
