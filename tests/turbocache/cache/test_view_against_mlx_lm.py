"""The ring with uncompressed pages against mlx-lm's own rotating caches, through the same seam with the same inputs.

What is compared with what:

- Everything is compared with a dense float64 oracle of "the first `keep` tokens and the latest `max_size - keep`".
- With keep = 0, mlx-lm's RotatingKVCache has the same meaning, whatever the lengths of the appends: it returns
  max_size + L - 1 entries after an append of L tokens past the wrap and masks them down to max_size for each query.
- With keep > 0 it has that meaning for appends of one token, and for longer ones as long as nothing has rotated. Past
  that it loses its sink: the mask of a long append is a sliding window over the entries, so later queries of the
  chunk don't see the sink (`test_mlx_lm_hides_the_sink_within_a_chunk`). There only the oracle counts.
- mlx-lm's batch form knows no keep, so batches are compared with keep = 0. Its `extract` and `merge` are used as they
  are. Padding is random for both; outputs in the padding are not compared.
"""

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, RotatingKVCache

from kernels.codec.layout import PAGE
from tests.oracles import Heads, attend_dense, make_spec, visible_positions
from turbocache.cache.ring import RingConfig
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam

HEADS = Heads(4, 2, 16, 8)
SCALE = 0.25
TOLERANCE = 3e-6

Cache = Any


def inputs(rng: np.random.Generator, n_rows: int, n: int) -> tuple[mx.array, mx.array, mx.array]:
    shapes = ((n_rows, 4, n, 16), (n_rows, 2, n, 16), (n_rows, 2, n, 8))
    q, k, v = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes)
    return q, k, v


def through_mlx_lm(cache: Cache, q: mx.array, k: mx.array, v: mx.array) -> np.ndarray:
    """As a model's attention layer does it."""
    mask = cache.make_mask(q.shape[2], return_array=False, window_size=None)
    keys, values = cache.update_and_fetch(k, v)
    out = seam.attention(q, keys, values, cache, scale=SCALE, mask=mask)
    mx.eval(out, cache.state)
    return np.array(out)


def paged(ring: RingConfig) -> PagedKVCache:
    return PagedKVCache.layers(make_spec(ring, [HEADS], n_pages=100))[0]


SCHEDULES = {
    "one token at a time": [1] * 330,
    "one long prompt": [700, 1, 1, 1],
    "long prompt, long chunks past the wrap": [150, 1, 100, 300, 1, 2, 65, 1],
    "short chunks": [7] * 60,
    "pages exactly": [64] * 7 + [1, 63, 1],
    "random": [int(n) for n in np.random.default_rng(0).choice([1, 1, 1, 2, 17, 64, 129], size=40)],
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(("window", "max_size"), [(0, 64), (64, 128), (0, 101), (64, 190), (128, 257)])
def test_rotation_without_a_sink(window: int, max_size: int, schedule: list[int]) -> None:
    rng = np.random.default_rng(1)
    ours, theirs = paged(RingConfig(0, window, max_size)), RotatingKVCache(max_size)
    for n in schedule:
        q, k, v = inputs(rng, 1, n)
        np.testing.assert_allclose(
            through_mlx_lm(ours, q, k, v), through_mlx_lm(theirs, q, k, v), atol=TOLERANCE, rtol=0
        )
        assert ours.offset == theirs.offset
        assert ours.size() == theirs.size()


@pytest.mark.parametrize(("keep", "window", "max_size"), [(3, 0, 70), (64, 64, 200), (4, 128, 211)])
def test_rotation_with_a_sink_token_by_token(keep: int, window: int, max_size: int) -> None:
    rng = np.random.default_rng(2)
    ours, theirs = paged(RingConfig(keep, window, max_size)), RotatingKVCache(max_size, keep=keep)
    for n in [keep + 20, 30] + [1] * (max_size + 100):  # the two chunks fit, so nothing has rotated yet
        q, k, v = inputs(rng, 1, n)
        np.testing.assert_allclose(
            through_mlx_lm(ours, q, k, v), through_mlx_lm(theirs, q, k, v), atol=TOLERANCE, rtol=0
        )


def test_mlx_lm_hides_the_sink_within_a_chunk() -> None:
    """The reason for the third rule above: ours sees the sink, mlx-lm's does not, for all but the first query."""
    keep, max_size, n = 3, 70, 8
    rng = np.random.default_rng(3)
    ours, theirs = paged(RingConfig(keep, 0, max_size)), RotatingKVCache(max_size, keep=keep)
    parts = [inputs(rng, 1, 50), inputs(rng, 1, 40), inputs(rng, 1, n)]
    for part in parts:
        a, b = through_mlx_lm(ours, *part), through_mlx_lm(theirs, *part)
    q, k, v = (np.concatenate([np.array(part[i]) for part in parts], axis=2)[0] for i in range(3))
    for column in range(n):
        position = 90 + column
        at = visible_positions(position, keep, max_size)
        want = attend_dense(q[:, position], k[:, at].swapaxes(0, 1), v[:, at].swapaxes(0, 1), SCALE)
        np.testing.assert_allclose(a[0, :, column], want, atol=TOLERANCE)
        assert (np.abs(b[0, :, column] - want).max() < TOLERANCE) == (column == 0)


def test_without_a_limit_it_is_the_plain_cache() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = paged(RingConfig(64, 64, None)), KVCache()
    for n in [30, 100, 1, 1, 200, *[1] * 70]:
        q, k, v = inputs(rng, 1, n)
        np.testing.assert_allclose(
            through_mlx_lm(ours, q, k, v), through_mlx_lm(theirs, q, k, v), atol=TOLERANCE, rtol=0
        )
    assert ours.is_trimmable()
    assert theirs.is_trimmable()
    assert ours.trim(250) == theirs.trim(250) == 250
    for n in [1, 80, 1]:
        q, k, v = inputs(rng, 1, n)
        np.testing.assert_allclose(
            through_mlx_lm(ours, q, k, v), through_mlx_lm(theirs, q, k, v), atol=TOLERANCE, rtol=0
        )
    assert ours.trim(10_000) == theirs.trim(10_000)
    assert ours.empty()
    assert ours.offset == 0


def test_trimming_before_the_wrap() -> None:
    """mlx-lm's rotating cache may be trimmed while it is not full; ours also afterwards, as far as tokens are there."""
    rng = np.random.default_rng(5)
    ours, theirs = paged(RingConfig(0, 64, 257)), RotatingKVCache(257)
    for n, trimmed in [(200, 90), (50, 3), (1, 0), (1, 1), (80, 0), (15, 30), (300, 0), (1, 0)]:
        q, k, v = inputs(rng, 1, n)
        np.testing.assert_allclose(
            through_mlx_lm(ours, q, k, v), through_mlx_lm(theirs, q, k, v), atol=TOLERANCE, rtol=0
        )
        if trimmed:
            assert theirs.is_trimmable()
            assert ours.is_trimmable()
            assert ours.trim(trimmed) == theirs.trim(trimmed) == trimmed
    assert not theirs.is_trimmable()
    assert not ours.is_trimmable()


class Pair:
    """The same batch in both forms. `theirs` is mlx-lm's batch cache."""

    def __init__(self, ours: Cache, theirs: Cache, rng: np.random.Generator) -> None:
        self.ours, self.theirs, self.rng = ours, theirs, rng

    @classmethod
    def merged(cls, pairs: list["Pair"], rng: np.random.Generator) -> "Pair":
        ours, theirs = [p.ours for p in pairs], [p.theirs for p in pairs]
        return cls(ours[0].merge(ours), theirs[0].merge(theirs), rng)

    @property
    def n_rows(self) -> int:
        return len(self.ours.batch.rings)

    def step(self, n: int, lengths: list[int] | None = None) -> None:
        q, k, v = inputs(self.rng, self.n_rows, n)
        a, b = through_mlx_lm(self.ours, q, k, v), through_mlx_lm(self.theirs, q, k, v)
        for row, length in enumerate(lengths or [n] * self.n_rows):
            np.testing.assert_allclose(a[row, :, :length], b[row, :, :length], atol=TOLERANCE, rtol=0)
        if lengths is None:
            self.offsets_agree()

    def padded(self, lengths: list[int], chunk: int = 1 << 20) -> None:
        for cache in (self.ours, self.theirs):
            cache.prepare(lengths=lengths, right_padding=[max(lengths) - n for n in lengths])
        left = list(lengths)
        while max(left):
            n = min(chunk, max(left))
            self.step(n, [min(n, m) for m in left])
            left = [m - min(n, m) for m in left]
        for cache in (self.ours, self.theirs):
            cache.finalize()

    def offsets_agree(self) -> None:
        theirs = np.array(self.theirs.offset).reshape(-1).tolist()
        assert np.array(self.ours.offset).reshape(-1).tolist() == theirs

    def filter(self, rows: list[int]) -> None:
        self.ours.filter(rows)
        self.theirs.filter(rows)

    def extract(self, row: int) -> "Pair":
        return Pair(self.ours.extract(row), self.theirs.extract(row), self.rng)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(("window", "max_size"), [(0, 101), (64, 190), (64, None)])
def test_batches(window: int, max_size: int | None, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A life in the generator: ragged prompts, decoding, rows that come and go, a second turn of an extracted row.
    Positions are counted on the host or, as on CUDA, on the device.
    """
    monkeypatch.setattr("turbocache.cache.view.steps_on_device", lambda: on_device)
    rng = np.random.default_rng(6)
    spec = make_spec(RingConfig(0, window, max_size), [HEADS], n_pages=200)

    def fresh() -> Pair:
        theirs = KVCache() if max_size is None else RotatingKVCache(max_size)
        return Pair(PagedKVCache.layers(spec)[0], theirs, rng)

    batch = Pair.merged([fresh(), fresh(), fresh()], rng)
    batch.padded([40, 133, 7])
    batch.offsets_agree()
    for _ in range(30):
        batch.step(1)
    batch.offsets_agree()
    second = Pair.merged([fresh(), fresh()], rng)
    second.padded([90, 100])
    second.step(1)
    batch.ours.extend(second.ours)
    batch.theirs.extend(second.theirs)
    assert batch.n_rows == 5
    for _ in range(70):
        batch.step(1)
    batch.offsets_agree()
    alone = batch.extract(1)
    alone.step(1)
    alone.step(66)
    batch.filter([0, 2, 3])
    for _ in range(40):
        batch.step(1)
    batch.offsets_agree()
    again = Pair.merged([alone, fresh()], rng)
    again.step(50)
    for _ in range(80):
        again.step(1)
    again.offsets_agree()
    spec.check_integrity()


def test_a_deep_copied_batch_goes_on_by_itself() -> None:
    """PromptProcessingBatch.split copies the whole list of caches and filters both halves."""
    layers = [HEADS, Heads(2, 1, 8, 8)]
    spec = make_spec(RingConfig(3, 64, 150), layers, n_pages=50)
    rng = np.random.default_rng(7)
    sessions = [PagedKVCache.layers(spec) for _ in range(3)]
    views = [sessions[0][i].merge([session[i] for session in sessions]) for i in range(2)]

    def step(caches: list[PagedKVCache], n: int, seed: int, rows: list[int]) -> list[np.ndarray]:
        outs = []
        for i, heads in enumerate(layers):
            local = np.random.default_rng(seed)
            shapes = (
                (heads.n_heads, heads.key_dim),
                (heads.n_kv_heads, heads.key_dim),
                (heads.n_kv_heads, heads.value_dim),
            )
            q, k, v = (mx.array(local.normal(size=(3, h, n, d))[rows].astype(np.float32)) for h, d in shapes)
            pending = caches[i].update_and_fetch(k, v)
            outs.append(np.array(seam.attention(q, *pending, caches[i], scale=SCALE, mask=None)))
        return outs

    step(views, 140, 0, [0, 1, 2])
    halves = copy.deepcopy(views)
    assert {view.batch for view in halves} != {view.batch for view in views}
    assert len({view.batch for view in halves}) == 1
    whole = copy.deepcopy(views)
    spec.check_integrity()
    for view in views:
        view.filter([0, 2])
    for view in halves:
        view.filter([1])
    for seed, n in ((1, 1), (2, 70), (3, 1)):
        together = step(whole, n, seed, [0, 1, 2])
        apart = zip(step(views, n, seed, [0, 2]), step(halves, n, seed, [1]), strict=True)
        for all_rows, (outer, middle) in zip(together, apart, strict=True):
            np.testing.assert_allclose(all_rows[[0, 2]], outer, atol=TOLERANCE)
            np.testing.assert_allclose(all_rows[[1]], middle, atol=TOLERANCE)
    spec.check_integrity()
    del views, halves, whole, view
    sessions.clear()
    assert spec.pool.n_used == 0
    assert rng is not None


def test_layers_must_be_visited_in_order() -> None:
    views = PagedKVCache.layers(make_spec(RingConfig(0, 0, None), [HEADS, HEADS], n_pages=4))
    _, k, v = inputs(np.random.default_rng(0), 1, 3)
    with pytest.raises(RuntimeError, match="in order"):
        views[1].update_and_fetch(k, v)
    fresh = PagedKVCache.layers(views[0].batch.spec)
    fresh[0].update_and_fetch(k, v)
    fresh[1].update_and_fetch(k, v)
    with pytest.raises(RuntimeError, match="in order"):
        fresh[1].update_and_fetch(k, v)
    with pytest.raises(RuntimeError, match="first layer"):
        fresh[1].extract(0)


def test_masks_that_it_cannot_serve_are_refused() -> None:
    view = paged(RingConfig(0, 0, None))
    assert view.make_mask(1) is None
    assert view.make_mask(5) == "causal"
    for refused in ({"window_size": 16}, {"return_array": True}):
        with pytest.raises(ValueError, match="causal attention only"):
            view.make_mask(5, **refused)
    with pytest.raises(ValueError, match="not left-padded"):
        view.prepare(left_padding=[0, 3])


def test_trim_of_what_has_rotated_out_is_refused() -> None:
    view = paged(RingConfig(0, 0, 64))
    _, k, v = inputs(np.random.default_rng(0), 1, 3 * PAGE)
    view.update_and_fetch(k, v)
    with pytest.raises(ValueError, match=r"can't go back 100 tokens from 192: 128 have rotated out"):
        view.trim(100)
    assert view.offset == 3 * PAGE


def test_mlx_lm_takes_the_view_for_an_ordinary_cache() -> None:
    """Attributes by which mlx-lm recognises quantised or convertible caches must not be there."""
    view = paged(RingConfig(0, 0, 64))
    assert not hasattr(view, "bits")
    assert not hasattr(view, "to_quantized")
    assert bool(view)
    assert base.create_attention_mask(mx.zeros((1, 4, 8)), view) == "causal"
