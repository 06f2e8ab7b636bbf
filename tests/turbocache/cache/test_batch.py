"""Whatever happens to a batch, each query's attention is that of a dense oracle over the tokens it may see, each in the
form (raw, or as its page gives it back) that the query's position calls for."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.codec.layout import PAGE
from kernels.lanes.base import CodebookKind
from tests.oracles import (
    BlockCodec,
    Heads,
    Paged,
    attend_dense,
    extended,
    extracted,
    filtered,
    make_spec,
    merged,
    raw_positions,
    rotated_codec,
)
from turbocache.cache.batch import CacheBatch
from turbocache.cache.pool import PoolExhausted
from turbocache.cache.ring import RingConfig
from turbocache.cache.steps import DecodeStep
from turbocache.codebooks.scalar import levels_for, zooms_for

LAYERS = (Heads(4, 2, 16, 8), Heads(3, 1, 8, 16))
"""Two layers that differ in everything."""

RINGS = (
    RingConfig(0, 0, 64),
    RingConfig(0, 0, 101),
    RingConfig(3, 64, 131),
    RingConfig(3, 0, 200),
    RingConfig(64, 128, 300),
    RingConfig(64, 64, None),
    RingConfig(0, 128, 192),
)

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.one_of(st.just(1), st.integers(1, 230))),
        st.tuples(st.just("decode"), st.sampled_from([2, 9, 66])),
        st.tuples(st.just("padded"), st.tuples(st.integers(0, 2**16), st.sampled_from([32, 100, 1 << 20]))),
        st.tuples(st.just("trim"), st.integers(0, 2**16)),
        st.tuples(st.just("filter"), st.integers(0, 2**16)),
        st.tuples(st.just("extend"), st.integers(0, 200)),
        st.tuples(st.just("extract"), st.integers(0, 2**16)),
        st.tuples(st.just("merge"), st.integers(0, 200)),
    ),
    min_size=2,
    max_size=7,
)


def new_row(batch: Paged, n: int) -> Paged:
    fresh = Paged.session(batch.layers, batch.spec, batch.rng, codecs=batch.codecs, tolerance=batch.tolerance)
    if n:
        fresh.append(n)
    return fresh


def apply(batch: Paged, name: str, argument: object) -> Paged:
    """One operation on the batch, as mlx-lm's generator would do it; returns the batch to go on with."""
    dice = np.random.default_rng(argument if isinstance(argument, int) else 0)
    n_rows = len(batch.rows)
    if name == "append":
        assert isinstance(argument, int)
        batch.append(argument)
    elif name == "decode":
        assert isinstance(argument, int)
        for _ in range(argument):
            batch.append(1)
    elif name == "padded":
        assert isinstance(argument, tuple)
        seed, chunk = argument
        lengths = np.random.default_rng(seed).integers(0, 180, size=n_rows)
        lengths[seed % n_rows] = max(lengths.max(), 1)
        batch.append_padded([int(n) for n in lengths], chunk)
    elif name == "trim":
        most = min(row.offset for row in batch.rows)
        n = int(dice.integers(0, min(most, 150) + 1))
        if all(ring.can_trim_to(ring.offset - n) for ring in batch.views[0].batch.rings):
            batch.trim(n)
        else:
            with pytest.raises(ValueError, match="have rotated out"):
                batch.trim(n)
    elif name == "filter":
        kept = sorted(dice.choice(n_rows, size=int(dice.integers(1, n_rows + 1)), replace=False).tolist())
        filtered(batch, kept)
    elif name == "extend" and n_rows < 4:
        assert isinstance(argument, int)
        extended(batch, merged([new_row(batch, argument)]))
    elif name == "extract":
        assert isinstance(argument, int)
        alone = extracted(batch, argument % n_rows)
        alone.append(1)
        alone.append(PAGE + 3)
        if alone.views[0].batch.can_trim_to(alone.rows[0].offset - 5):
            alone.trim(5)
            alone.append(2)
    elif name == "merge" and n_rows < 4:
        assert isinstance(argument, int)
        batch = merged([batch, new_row(batch, argument)])
    batch.spec.check_integrity()
    return batch


def run(batch: Paged, steps: list[tuple[str, object]]) -> None:
    spec = batch.spec
    for name, argument in steps:
        batch = apply(batch, name, argument)
    batch.append(1)
    assert batch.n_compared > 0
    del batch
    gc.collect()
    assert spec.pool.n_used == 0


@settings(max_examples=45)
@given(ring=st.sampled_from(RINGS), steps=operations, seed=st.integers(0, 2**16))
def test_attention_sees_exactly_the_tokens_it_should(
    ring: RingConfig, steps: list[tuple[str, object]], seed: int
) -> None:
    spec = make_spec(ring, LAYERS, n_pages=500, initial=3)
    run(Paged.session(LAYERS, spec, np.random.default_rng(seed)), steps)


@pytest.mark.parametrize(
    "ring", [RingConfig(0, 0), RingConfig(3, 64), RingConfig(64, 128), RingConfig(3, 0, 150)], ids=str
)
@pytest.mark.parametrize("cut", [1, 20, 64, 101, 130, 231])
def test_after_a_trim(ring: RingConfig, cut: int) -> None:
    """Cuts into the window, into a page, at a page's edge, through several pages; refused if something has rotated."""
    spec = make_spec(ring, LAYERS, n_pages=20)
    session = Paged.session(LAYERS, spec, np.random.default_rng(cut))
    session.append(280)
    session.append(15)
    if ring.max_size is not None and cut > 18:
        with pytest.raises(ValueError, match="128 have rotated out"):
            session.trim(cut)
        return
    session.trim(cut)
    for n in (1, 1, 70, 1):
        session.append(n)
    spec.check_integrity()


def codecs_of(
    layers: tuple[Heads, ...], kind: CodebookKind, key_bits: float, value_bits: float
) -> list[tuple[BlockCodec, BlockCodec]]:
    def codec(dim: int, bits: float, *, unbiased: bool) -> BlockCodec:
        return rotated_codec(levels_for(kind, bits), dim, unbiased=unbiased, zooms=zooms_for(kind, bits))

    made = []
    for heads in layers:
        keys, values = codec(heads.key_dim, key_bits, unbiased=True), codec(heads.value_dim, value_bits, unbiased=False)
        made.append((keys, values))
    return made


@pytest.mark.parametrize(
    ("backend", "kind", "bits", "name"),
    [
        ("reference", "pair", 2, "k2v2"),
        ("packed", "uniform", 2, "k2v2"),
        ("reference", "pair", 2.5, "turbo2_5"),
    ],
)
@pytest.mark.parametrize("ring", [RingConfig(3, 64, 220), RingConfig(0, 0, None), RingConfig(64, 128, 300)], ids=str)
def test_each_token_is_read_in_the_form_its_position_calls_for(
    backend: str, kind: CodebookKind, bits: float, name: str, ring: RingConfig
) -> None:
    """The same with a codec at two bits, where the forms are far apart. A coordinate that lies on a boundary to within
    float32 may fall to either side, which moves an output by less than the tolerance; one token in the wrong form
    moves it by several times that.
    """
    layers = (Heads(4, 2, 64, 32),)
    spec = make_spec(ring, layers, n_pages=200, preset_name=name, backend=backend)
    codecs = codecs_of(layers, kind, bits, bits)
    script: list[tuple[str, object]] = [
        ("append", 150),
        ("decode", 70),
        ("append", 200),
        ("trim", 4),  # 101 tokens: into a page
        ("append", 90),
        ("merge", 133),
        ("padded", (5, 100)),
        ("decode", 66),
        ("extract", 0),
        ("filter", 1),
        ("append", 64),
        ("trim", 1),
        ("decode", 3),
    ]
    run(Paged.session(layers, spec, np.random.default_rng(0), codecs=codecs, tolerance=5e-4), script)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "name"), [("packed", "k4v4"), ("reference", "k4v4"), ("reference", "turbo3_5")])
@pytest.mark.parametrize("ring", [RingConfig(3, 64, 200), RingConfig(64, 0, None)], ids=str)
def test_results_do_not_depend_on_how_a_prefill_is_cut(backend: str, name: str, ring: RingConfig) -> None:
    """The same tokens in different chunks: the same page contents bit for bit, the same outputs to within float32 (the
    packed lanes compute short chunks from whole bytes, which costs two digits).
    """
    layers = (Heads(4, 2, 64, 64),)
    n = 517
    rng = np.random.default_rng(1)
    q, k, v = (mx.array(rng.normal(size=(1, heads, n, 64)).astype(np.float32)) for heads in (4, 2, 2))
    results = []
    for cut in ([n], [1] * n, [64] * 8 + [5], [100, 1, 1, 200, 3, 150, 62], [3, 61, 64, 128, 128, 133], [516, 1]):
        spec = make_spec(ring, layers, n_pages=50, preset_name=name, backend=backend)
        batch = CacheBatch(spec)
        outs, start = [], 0
        for length in cut:
            here = slice(start, start + length)
            step = batch.begin_step(length)
            if length == 1:
                tokens = batch.decode(0, step, k[:, :, here], v[:, :, here])  # type: ignore[arg-type]
                outs.append(batch.attend_decode(0, step, tokens, q[:, :, here], 0.125, None))  # type: ignore[arg-type]
            else:
                bodies = batch.prefill(0, step, k[:, :, here], v[:, :, here])  # type: ignore[arg-type]
                outs.append(batch.attend_prefill(0, step, bodies, q[:, :, here], 0.125, None))  # type: ignore[arg-type]
            mx.eval(outs[-1], batch.raw)
            start += length
        pages = [np.array(array)[list(batch.rings[0].pages)] for array in spec.pool.pages(0)]
        raw_at = raw_positions(batch.rings[0]) >= 0
        raw = [np.array(array)[:, :, raw_at] for array in batch.raw[0]]
        results.append((pages, raw, np.array(mx.concatenate(outs, axis=2)), batch.rings[0]))
    pages, raw, out, ring_state = results[0]
    assert len(pages[0]) > 0
    for other_pages, other_raw, other_out, other_ring in results[1:]:
        assert (other_ring.offset, other_ring.gone, other_ring.flushed) == (n, ring_state.gone, ring_state.flushed)
        for a, b in zip([*pages, *raw], [*other_pages, *other_raw], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(other_out, out, atol=3e-4 if backend == "packed" else 2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_rows_of_a_batch_are_as_they_are_alone(backend: str) -> None:
    layers = (Heads(4, 2, 64, 64),)
    ring = RingConfig(3, 64, 250)
    rng = np.random.default_rng(2)
    lengths = [40, 333, 1, 129]
    n_decode = 70
    q, k, v = (rng.normal(size=(4, heads, 333 + n_decode, 64)).astype(np.float32) for heads in (4, 2, 2))

    def outputs(rows: list[int]) -> list[np.ndarray]:
        spec = make_spec(ring, layers, n_pages=60, preset_name="k4v4", backend=backend)
        batch = CacheBatch(spec, len(rows))
        longest = max(lengths[row] for row in rows)
        batch.prepare([lengths[row] for row in rows])
        step = batch.begin_step(longest)
        tokens = [mx.array(x[rows, :, :longest]) for x in (q, k, v)]
        bodies = batch.prefill(0, step, *tokens[1:])  # type: ignore[arg-type]
        chunk = np.array(batch.attend_prefill(0, step, bodies, tokens[0], 0.125, None))  # type: ignore[arg-type]
        batch.finalize()
        columns = []
        for i in range(n_decode):
            here = [
                mx.array(np.stack([x[row, :, lengths[row] + i : lengths[row] + i + 1] for row in rows]))
                for x in (q, k, v)
            ]
            step = batch.begin_step(1)
            new = batch.decode(0, step, *here[1:])  # type: ignore[arg-type]
            columns.append(np.array(batch.attend_decode(0, step, new, here[0], 0.125, None)))  # type: ignore[arg-type]
        decoded = np.concatenate(columns, axis=2)
        return [np.concatenate([chunk[i, :, : lengths[row]], decoded[i]], axis=1) for i, row in enumerate(rows)]

    together = outputs([0, 1, 2, 3])
    for row in range(4):
        np.testing.assert_allclose(together[row], outputs([row])[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_a_token_is_kept_however_often_its_layer_attends(backend: str, times: int) -> None:
    """Attention stores a step's tokens. Layers that do not attend keep theirs as well, and further layers may attend
    to a step again."""
    rng = np.random.default_rng(7)
    layers = (Heads(4, 2, 64, 64),)
    q, k, v = (mx.array(rng.normal(size=(2, heads, 210, 64)).astype(np.float32)) for heads in (4, 2, 2))
    batches = [CacheBatch(make_spec(RingConfig(3, 64, 150), layers, 20, "k4v4", backend), 2) for _ in range(2)]
    for i in range(210):
        outs = []
        for batch, attends in zip(batches, (1, 1 if i % 5 else times), strict=True):
            here = slice(i, i + 1)
            step = batch.begin_step(1)
            assert isinstance(step, DecodeStep)
            tokens = batch.decode(0, step, k[:, :, here], v[:, :, here])
            outs.append([batch.attend_decode(0, step, tokens, q[:, :, here], 0.125, None) for _ in range(attends)])
        mx.eval(outs)
        for out in outs[1]:
            np.testing.assert_array_equal(np.array(out), np.array(outs[0][0]))
    for one, other in zip(*(batch.raw[0] for batch in batches), strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    assert batches[0].rings[0].pages


def test_a_fork_is_independent() -> None:
    spec = make_spec(RingConfig(3, 64, 220), LAYERS, n_pages=60)
    one = Paged.session(LAYERS, spec, np.random.default_rng(3))
    one.append(300)
    two = extracted(one, 0)
    before = [[np.array(x) for x in pair] for pair in two.views[0].batch.raw]
    shared = set(one.views[0].batch.rings[0].pages)
    assert set(two.views[0].batch.rings[0].pages) == shared
    assert spec.pool.n_used == len(shared)
    one.append(70)
    one.trim(20)
    one.append(5)
    for pair, was in zip(two.views[0].batch.raw, before, strict=True):
        for array, old in zip(pair, was, strict=True):
            np.testing.assert_array_equal(np.array(array), old)
    two.append(130)
    spec.check_integrity()
    one.append(3)
    del one
    two.append(1)
    spec.check_integrity()


@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_trimming_into_a_page_keeps_attention_over_the_rest(backend: str) -> None:
    """Before and after the cut the same query over the same remaining tokens, all of them in pages or as pages had
    them, gives the same answer."""
    layers = (Heads(4, 2, 64, 64),)
    spec = make_spec(RingConfig(0, 0, None), layers, n_pages=60, preset_name="k3v3", backend=backend)
    rng = np.random.default_rng(4)
    q = mx.array(rng.normal(size=(1, 4, 1, 64)).astype(np.float32))
    k, v = (mx.array(rng.normal(size=(1, 2, 257, 64)).astype(np.float32)) for _ in range(2))
    batch = CacheBatch(spec)
    step = batch.begin_step(257)
    batch.prefill(0, step, k, v)  # type: ignore[arg-type]
    mx.eval(batch.raw)
    cut = 3 * PAGE + 20
    lanes = spec.layers[0].lanes
    keys, values = (
        np.array(x)
        for x in lanes.expand(tuple(a[mx.array(batch.rings[0].pages)] for a in spec.pool.pages(0)), mx.float32)
    )
    batch.trim(257 - cut)
    assert batch.offsets == [cut]
    assert len(batch.rings[0].pages) == 3
    raw_keys, raw_values = (np.array(x) for x in batch.raw[0])
    np.testing.assert_allclose(raw_keys[0, :, :20], keys[3, :, :20], atol=1e-6)
    np.testing.assert_allclose(raw_values[0, :, :20], values[3, :, :20], atol=1e-6)
    step = batch.begin_step(1)
    tokens = batch.decode(0, step, k[:, :, :1], v[:, :, :1])  # type: ignore[arg-type]
    got = np.array(batch.attend_decode(0, step, tokens, q, 0.125, None))[0, :, 0]  # type: ignore[arg-type]
    seen_k = np.concatenate([*(keys[i].swapaxes(0, 1) for i in range(4))])[:cut]
    seen_v = np.concatenate([*(values[i].swapaxes(0, 1) for i in range(4))])[:cut]
    seen_k = np.concatenate([seen_k, np.array(k[0, :, :1]).swapaxes(0, 1)])
    seen_v = np.concatenate([seen_v, np.array(v[0, :, :1]).swapaxes(0, 1)])
    want = attend_dense(np.array(q)[0, :, 0], seen_k, seen_v, 0.125)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("columns", [1, 90])
def test_exhaustion_leaves_the_batch_as_it_was(columns: int) -> None:
    spec = make_spec(RingConfig(0, 0, 192), LAYERS, n_pages=4)
    batch = Paged.session(LAYERS, spec, np.random.default_rng(5))
    batch.append(2 * PAGE)
    other = Paged.session(LAYERS, spec, np.random.default_rng(6))
    other.append(3 * PAGE + 1)
    assert spec.pool.n_free == 0
    state = [[np.array(x) for x in pair] for pair in batch.views[0].batch.raw]
    with pytest.raises(PoolExhausted):
        batch.append(columns)
    assert batch.views[0].batch.offsets == [2 * PAGE]
    for pair, was in zip(batch.views[0].batch.raw, state, strict=True):
        for array, old in zip(pair, was, strict=True):
            np.testing.assert_array_equal(np.array(array), old)
    spec.check_integrity()
    del other
    gc.collect()
    batch.append(columns)
    batch.append(1)


def test_exhaustion_within_a_padded_prompt_does_not_shorten_the_next_one() -> None:
    """The generator drops the prompt (its `finalize` never comes) and goes on with other rows."""
    spec = make_spec(RingConfig(0, 0, 192), LAYERS, n_pages=4)
    batch = merged([Paged.session(LAYERS, spec, np.random.default_rng(5)) for _ in range(2)])
    with pytest.raises(PoolExhausted):
        batch.append_padded([10, 6 * PAGE])
    filtered(batch, [0])
    batch.append(20)
    assert batch.views[0].batch.offsets == [20]
    batch.append(1)


def test_caches_of_different_specs_do_not_mix() -> None:
    specs = [make_spec(RingConfig(0, 0, 64), LAYERS, n_pages=4) for _ in range(2)]
    with pytest.raises(ValueError, match="one process-wide spec"):
        CacheBatch.merged([CacheBatch(spec) for spec in specs])


def test_bytes_are_those_of_the_arrays() -> None:
    spec = make_spec(RingConfig(3, 64, 220), LAYERS, n_pages=60)
    batch = CacheBatch(spec, 2)
    per_token = 4 * (2 * (16 + 8) + 1 * (8 + 16))
    assert spec.raw_token_nbytes == per_token
    assert spec.raw_nbytes == per_token * (3 + 64 + 64)
    assert batch.raw_nbytes == 2 * spec.raw_nbytes
    assert batch.shadow_nbytes == 0
    assert spec.pool.page_nbytes == per_token * PAGE


def test_rotations_are_counted() -> None:
    spec = make_spec(RingConfig(0, 0, 128), LAYERS, n_pages=60)
    batch = Paged.session(LAYERS, spec, np.random.default_rng(0))
    batch.append(128)
    assert spec.rotated_pages == 0
    for _ in range(70):
        batch.append(1)
    assert spec.rotated_pages == 1
    batch.append(300)
    assert spec.rotated_pages == batch.views[0].batch.rings[0].gone == (498 + 1 - 128) // PAGE


def test_close_gives_everything_back() -> None:
    spec = make_spec(RingConfig(0, 0, 128), LAYERS, n_pages=60)
    batch = Paged.session(LAYERS, spec, np.random.default_rng(0))
    batch.append(300)
    inner = batch.views[0].batch
    inner.close()
    assert spec.pool.n_used == 0
    assert inner.n_rows == 0
    assert inner.raw_nbytes == 0
