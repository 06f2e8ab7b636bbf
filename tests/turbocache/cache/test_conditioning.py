"""Keys with a large constant part: it is taken off where it dominates, nothing else changes, and whatever happens to a
row its pages and raw tokens keep the same constant.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.codec.layout import PAGE
from kernels.lanes.base import CodebookKind, LaneShape
from kernels.lanes.identity import IdentityLanes
from tests.oracles import Heads, History, Paged, coded, extended, extracted, filtered, make_spec, merged
from tests.turbocache.cache.test_batch import RINGS, codecs_of
from turbocache.cache.batch import CacheBatch
from turbocache.cache.conditioning import CENTRE_ABOVE, KeyCentre, RowCentres
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import RingConfig
from turbocache.cache.spec import CacheSpec, CompressedLayer
from turbocache.mlxlm.plan import LayerGeometry
from turbocache.presets import preset
from turbocache.store import compressed_layer

LAYERS = (Heads(4, 2, 16, 8), Heads(3, 1, 8, 16))


def biases(layers: Sequence[Heads], seed: int) -> list[np.ndarray]:
    """For each layer a bias on three dims, of its first head only."""
    rng = np.random.default_rng(seed)
    made = []
    for heads in layers:
        bias = np.zeros((heads.n_kv_heads, heads.key_dim))
        bias[0, rng.choice(heads.key_dim, 3, replace=False)] = rng.choice([-1, 1], 3) * 30.0
        made.append(bias)
    return made


def exact_spec(ring: RingConfig, dtype: mx.Dtype = mx.float32) -> CacheSpec:
    """Pages without a codec, but with conditioning, so that attention over them is the dense one's."""
    layers = []
    for h in LAYERS:
        lanes = IdentityLanes(LaneShape(h.n_heads, h.n_kv_heads, h.key_dim, h.value_dim, 16, 16), dtype)
        layers.append(CompressedLayer(lanes, dtype, CENTRE_ABOVE))
    return CacheSpec(ring, PagePool([layer.lanes for layer in layers], 500, 3), tuple(layers))


def session(spec: CacheSpec, seed: int, bias: bool = True, **more: object) -> Paged:
    """A new row of random keys around a constant, or around zero."""
    layers = [Heads(s.n_heads, s.n_kv_heads, s.key_dim, s.value_dim) for s in (x.lanes.shape for x in spec.layers)]
    made = Paged.session(layers, spec, np.random.default_rng(seed), **more)
    made.rows[0].bias = biases(layers, seed) if bias else None
    return made


def centres(paged: Paged) -> list[KeyCentre | None]:
    return [ring.centre for ring in paged.views[0].batch.rings]


operations = st.lists(
    st.tuples(
        st.sampled_from(["append", "decode", "padded", "trim", "filter", "extend", "extract", "merge"]),
        st.integers(0, 2**16),
    ),
    min_size=2,
    max_size=6,
)


def apply(batch: Paged, name: str, dice: int) -> Paged:
    n_rows = len(batch.rows)
    if name == "append":
        batch.append(1 + dice % 230)
    elif name == "decode":
        for _ in range((2, 9, 66)[dice % 3]):
            batch.append(1)
    elif name == "padded":
        lengths = np.random.default_rng(dice).integers(0, 180, size=n_rows)
        lengths[dice % n_rows] = max(lengths.max(), 1)
        batch.append_padded([int(n) for n in lengths], (32, 100, 1 << 20)[dice % 3])
    elif name == "trim":
        n = dice % (min(row.offset for row in batch.rows) + 1)
        if all(ring.can_trim_to(ring.offset - n) for ring in batch.views[0].batch.rings):
            batch.trim(n)
    elif name == "filter":
        filtered(batch, [row for row in range(n_rows) if row != dice % n_rows] or [0])
    elif name in ("extend", "merge") and n_rows < 4:
        fresh = session(batch.spec, dice, bool(dice % 3), codecs=batch.codecs, tolerance=batch.tolerance)
        if dice % 200:
            fresh.append(dice % 200)
        if name == "merge":
            return merged([batch, fresh])
        extended(batch, merged([fresh]))
    elif name == "extract":
        alone = extracted(batch, dice % n_rows)
        alone.append(1)
        alone.append(PAGE + 3)
    return batch


@settings(max_examples=30)
@given(ring=st.sampled_from(RINGS), steps=operations, seed=st.integers(0, 2**16))
def test_attention_stays_what_it_is_whatever_happens_to_the_rows(
    ring: RingConfig, steps: list[tuple[str, int]], seed: int
) -> None:
    """Rows with and without a bias, each with its own constant. A token that kept another constant than its row's
    would change its scores by hundreds.
    """
    batch = session(exact_spec(ring), seed, tolerance=2e-3)
    batch.append(1 + seed % 230)
    for name, dice in steps:
        batch = apply(batch, name, dice)
        batch.spec.check_integrity()
    batch.append(1)
    assert batch.n_compared > 0


SCRIPT: list[tuple[str, int]] = [
    ("append", 149),
    ("decode", 2),  # the first page falls due in a decode step in some rings
    ("append", 199),
    ("trim", 3 + 64),
    ("merge", 133),
    ("decode", 2),
    ("extend", 3 * 66),  # a row without a bias
    ("padded", 5),
    ("extract", 0),
    ("decode", 2),
    ("filter", 1),
    ("append", 63),
    ("extract", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "kind"), [("reference", "pair"), ("packed", "uniform")])
@pytest.mark.parametrize("ring", [RingConfig(3, 64, 220), RingConfig(0, 0, None), RingConfig(64, 128, 400)], ids=str)
def test_pages_hold_keys_without_the_mean_of_the_first_tokens(
    backend: str, kind: CodebookKind, ring: RingConfig
) -> None:
    """With a codec: a page has the codes of the keys less the mean. One coordinate in a hundred thousand may lie
    between two levels, so tokens are counted here; attention is compared where pages are exact.
    """
    layers = (Heads(4, 2, 64, 32), Heads(3, 1, 32, 64))
    spec = make_spec(ring, layers, 200, "k4v4", backend)
    batch = session(spec, 1, codecs=codecs_of(layers, kind, 4, 4), tolerance=0.2)
    for name, dice in SCRIPT:
        batch = apply(batch, name, dice)
        for row, history in enumerate(batch.rows):
            for layer in range(len(layers)):
                assert share_of_right_keys(batch, row, layer, history) > 0.97
    assert {layer for centre in centres(batch) if centre for layer in centre.means} == {0, 1}


def share_of_right_keys(batch: Paged, row: int, layer: int, history: History) -> float:
    """Of a row's keys in pages, how many are the codec's of the keys less their centre."""
    ring, keep = batch.views[0].batch.rings[row], batch.spec.ring.keep
    if not ring.pages or batch.codecs is None:
        return 1.0
    chosen = tuple(array[mx.array(ring.pages)] for array in batch.spec.pool.pages(layer))
    got = np.array(batch.spec.layers[layer].lanes.expand(chosen, mx.float32)[0]).swapaxes(1, 2)
    right = []
    for page, read in enumerate(got):
        start = keep + PAGE * (ring.gone + page)
        centre = history.centre(layer, batch.spec.ring.raw_slots)
        want = coded(batch.codecs[layer][0], history.keys[layer][start : start + PAGE] - centre)
        right.append(np.isclose(read, want, atol=2e-3).all(axis=-1).mean())
    return float(np.mean(right))


@pytest.mark.parametrize("ring", [RingConfig(0, 0), RingConfig(3, 64, 220), RingConfig(64, 128)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_what_is_taken_off_does_not_depend_on_how_tokens_came(ring: RingConfig, dtype: mx.Dtype) -> None:
    n = ring.raw_slots + 150
    heads = LAYERS[0]
    rng = np.random.default_rng(0)
    k = rng.normal(size=(1, heads.n_kv_heads, n, heads.key_dim)) + biases(LAYERS, 0)[0][:, None]
    keys, values = mx.array(k).astype(dtype), mx.array(rng.normal(size=(1, 2, n, heads.value_dim))).astype(dtype)
    results = []
    for cut in ([n], [1] * n, [ring.raw_slots, n - ring.raw_slots], [ring.raw_slots - 1, 2, n - ring.raw_slots - 1]):
        layer = replace(exact_spec(ring, dtype).layers[0])
        spec = CacheSpec(ring, PagePool([layer.lanes], 100), (layer,))
        batch, start = CacheBatch(spec), 0
        for length in cut:
            step = batch.begin_step(length)
            new = keys[:, :, start : start + length], values[:, :, start : start + length]
            (batch.decode if length == 1 else batch.prefill)(0, step, *new)  # type: ignore[operator, arg-type]
            start += length
        batch.begin_step(1)
        centre = batch.rings[0].centre
        assert centre is not None
        pages = [np.array(x.astype(mx.float32))[list(batch.rings[0].pages)] for x in spec.pool.pages(0)]
        results.append((np.array(centre.means[0].astype(mx.float32)), pages))
    mean, pages = results[0]
    first = np.array(keys.astype(mx.float32))[:, :, : ring.raw_slots].astype(np.float64).mean(axis=2, keepdims=True)
    np.testing.assert_allclose(mean[:, :1], first[:, :1], rtol=1e-5 if dtype == mx.float32 else 4e-3, atol=4e-3)
    assert (mean[:, 1:] == 0).all()
    for other_mean, other_pages in results[1:]:
        np.testing.assert_array_equal(other_mean, mean)
        for a, b in zip(other_pages, pages, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("share", [0.8, 1.25])
def test_heads_are_chosen_by_their_mean_against_their_deviation(share: float) -> None:
    """One head on either side of the threshold, one of NaN, one of zeros."""
    rng = np.random.default_rng(3)
    keys = rng.normal(size=(1, 4, 512, 32)).astype(np.float32)
    keys -= keys.mean(axis=2, keepdims=True)
    spread = (keys[0, 0] ** 2).sum(axis=-1).mean()
    keys[0, 0, :, 5] += np.sqrt(share * CENTRE_ABOVE * spread)
    keys[0, 2, 7, 7] = np.nan
    keys[0, 3] = 0
    centre = KeyCentre()
    mean = np.array(centre.measure(6, mx.array(keys), CENTRE_ABOVE))
    assert mean.shape == (1, 4, 1, 32)
    assert (mean[0, 0] != 0).any() == (share > 1)
    assert (mean[0, 1:] == 0).all()
    assert centre.nbytes == 4 * 32 * 4
    assert centre.n_heads == (share > 1)
    assert set(centre.means) == ({6} if share > 1 else set())


def test_rows_without_a_centre_cost_nothing() -> None:
    """Only layers in which some row of the batch needs it have an array; it comes and goes with the rows."""
    ring = RingConfig(0, 0)
    spec = exact_spec(ring)
    plain, biased = session(spec, 1, bias=False), session(spec, 2)
    assert biased.rows[0].bias is not None
    biased.rows[0].bias[1][:] = 0
    for row in (plain, biased):
        row.append(PAGE + 1)
        row.append(1)
    assert [c.means.keys() for row in (plain, biased) for c in centres(row) if c] == [set(), {0}]
    batch = merged([plain, biased, plain])
    batch.append(1)
    array = batch.views[0].batch._centres.of(0)
    assert array is not None
    assert array.shape == (3, 2, 1, 16)
    assert [bool(mx.any(array[row] != 0)) for row in range(3)] == [False, True, False]
    assert batch.views[0].batch._centres.of(1) is None
    filtered(batch, [0, 2])
    batch.append(1)
    assert batch.views[0].batch._centres.of(0) is None


@pytest.mark.parametrize("ring", [RingConfig(0, 0), RingConfig(3, 64, 220)], ids=str)
def test_a_row_decides_while_another_has_decided(ring: RingConfig) -> None:
    """In a decode step, and in a chunk of a padded prompt."""
    rows = [session(exact_spec(ring), 10, tolerance=2e-3)]
    rows += [session(rows[0].spec, seed, bias, tolerance=2e-3) for seed, bias in ((11, True), (12, False))]
    for row, n in zip(rows, (ring.raw_slots + 1, ring.raw_slots - 1, ring.raw_slots - 1), strict=True):
        row.append(n)
    for chunk in (1, 3):
        batch = merged(rows)
        for _ in range(4):
            batch.append(1) if chunk == 1 else batch.append_padded([chunk, chunk, 1])
        decided = [None if centre is None else set(centre.means) for centre in centres(batch)]
        assert decided == [{0, 1}, {0, 1}, set()]


def test_arrays_of_centres_are_made_for_new_rows_only() -> None:
    one, two = KeyCentre(), KeyCentre()
    one.means[3] = mx.ones((1, 2, 1, 4))
    rows = RowCentres()
    rows.update([one, two, None])
    array = rows.of(3)
    rows.update([one, two, None])
    assert rows.of(3) is array
    rows.update([two])
    assert rows.of(3) is None


def test_forks_share_the_centre_and_an_empty_row_forgets_it() -> None:
    batch = session(exact_spec(RingConfig(3, 64)), 4, tolerance=2e-3)
    batch.append(300)
    alone = extracted(batch, 0)
    assert centres(alone)[0] is centres(batch)[0] is not None
    alone.trim(250)
    assert centres(alone)[0] is not None  # its raw tokens are centred
    alone.append(120)
    alone.trim(alone.rows[0].offset)
    assert centres(alone) == [None]
    alone.rows[0].bias = biases(LAYERS, 5)
    alone.append(200)
    batch.append(3)


def test_bytes_are_counted() -> None:
    spec = exact_spec(RingConfig(3, 64))
    assert spec.centre_nbytes == 4 * (2 * 16 + 8)
    batch = session(spec, 4, tolerance=2e-3)
    before = [view.nbytes for view in batch.views]
    batch.append(131)
    assert [view.nbytes for view in batch.views] == before
    batch.append(1)
    pages = [spec.pool.layer_nbytes(layer) for layer in range(2)]
    assert sum(pages) == spec.pool.page_nbytes
    want = [b + p + 4 * n for b, p, n in zip(before, pages, (2 * 16, 8), strict=True)]
    assert [view.nbytes for view in batch.views] == want
    plain = replace(spec, layers=tuple(replace(layer, centre_above=None) for layer in spec.layers))
    assert plain.centre_nbytes == 0


@pytest.mark.parametrize(
    ("geometry", "name", "condition", "above"),
    [
        (LayerGeometry(4, 2, 64, 64, mx.float32), "k4v4", True, CENTRE_ABOVE),
        (LayerGeometry(4, 2, 64, 64, mx.float32), "k4v4", False, None),
        (LayerGeometry(4, 2, 64, 64, mx.float32), "off", True, None),
        (LayerGeometry(4, 2, 64, 64, mx.float32, sinks=True), "k4v4", True, None),
    ],
)
def test_which_layers_are_conditioned(geometry: LayerGeometry, name: str, condition: bool, above: float | None) -> None:
    layer = compressed_layer(geometry, replace(preset(name), condition=condition), "reference")
    assert layer.centre_above == above


def test_layers_that_are_not_conditioned_keep_their_keys() -> None:
    spec = exact_spec(RingConfig(0, 0))
    spec = replace(spec, layers=tuple(replace(layer, centre_above=None) for layer in spec.layers))
    batch = session(spec, 6, tolerance=2e-3)
    batch.append(100)
    for _ in range(2):
        batch.append(1)
    raw_keys = np.array(batch.views[0].batch.raw[0][0])
    assert np.abs(raw_keys).max() > 25
