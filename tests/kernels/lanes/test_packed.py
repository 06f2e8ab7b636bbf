"""One paired test over the page codecs: `packed` must agree with `reference` on the same codebook, and both with
float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels.attention.page_tables import PageIndex
from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from kernels.lanes.base import ChunkInputs, Codebooks, Lanes, LaneShape, Mask
from kernels.lanes.packed import PackedLanes
from tests.oracles import attend_dense, quantise_row
from turbocache.backend import make_lanes
from turbocache.codebooks.scalar import levels_for, zooms_for

BITS = (2, 3, 4, 5, 6, 8)
DIMS = (64, 80, 96, 128, 192, 256)


def both(shape: LaneShape) -> tuple[Lanes, Lanes]:
    return make_lanes("packed", shape), make_lanes("reference", shape, "uniform")


def tokens_of(rng: np.random.Generator, n: int, shape: LaneShape) -> tuple[mx.array, mx.array]:
    def some(dim: int) -> mx.array:
        rows = rng.normal(size=(n, shape.n_kv_heads, PAGE, dim)) * rng.uniform(
            0.2, 3, size=(n, shape.n_kv_heads, PAGE, 1)
        )
        return mx.array(rows.astype(np.float32))

    return some(shape.key_dim), some(shape.value_dim)


def read_by_definition(tokens: mx.array, bits: int, *, unbiased: bool) -> np.ndarray:
    """In the rotated basis."""
    rows = np.array(Rotation(tokens.shape[-1]).apply(tokens)).reshape(-1, tokens.shape[-1])
    levels = levels_for("uniform", bits)
    read = [quantise_row(row, levels, unbiased=unbiased, zooms=zooms_for("uniform", bits)) for row in rows]
    return np.stack(read).reshape(tokens.shape)


def agree_but_for_ties(got: np.ndarray, want: np.ndarray, bits: int) -> None:
    """A coordinate on a boundary may get either level, a scale either of two float16 neighbours, a row either of two
    zooms that serve it equally well, which moves what is beyond the levels' ends; nothing else.
    """
    rms = np.linalg.norm(want, axis=-1, keepdims=True) / want.shape[-1] ** 0.5
    close = (np.abs(got - want) <= 1e-3 * (rms + np.abs(want))).all(axis=-1)
    assert close.mean() > 0.99
    gap = levels_for("uniform", bits)[-1] * 2 / ((1 << bits) - 1)
    assert (np.abs(got - want) <= 3 * gap * rms).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (128, 80), (192, 128), (96, 256), (40, 24)])
def test_encode_and_expand(bits: int, dims: tuple[int, int]) -> None:
    shape = LaneShape(4, 2, *dims, bits, BITS[-1 - BITS.index(bits)])
    keys, values = tokens_of(np.random.default_rng(bits), 3, shape)
    wants = (
        read_by_definition(keys, shape.key_bits, unbiased=True),
        read_by_definition(values, shape.value_bits, unbiased=False),
    )
    for lanes in both(shape):
        pages = lanes.encode(keys, values)
        assert [(p.shape[1:], p.dtype) for p in pages] == [(tuple(s), d) for s, d in lanes.page_arrays()]
        expanded = lanes.expand(pages, mx.float32)
        for got, want, width in zip(expanded, wants, (shape.key_bits, shape.value_bits), strict=True):
            agree_but_for_ties(np.array(Rotation(got.shape[-1]).apply(got)), want, width)


def test_pages_have_the_bytes_of_the_reference_layout() -> None:
    for dim in (64, 96, 128):
        sizes = [
            sum(int(np.prod(s)) * d.size for s, d in lanes.page_arrays())
            for lanes in both(LaneShape(8, 2, dim, dim, 4, 3))
        ]
        assert sizes[0] == sizes[1] == 2 * PAGE * (dim * 7 // 8 + 4)


def attend_case(
    rng: np.random.Generator,
    shape: LaneShape,
    tables: tuple[tuple[int, ...], ...],
    n_raw: int,
    n_tokens: int,
    *,
    mask_kind: str,
    with_sinks: bool,
) -> None:
    n_pages = max((page for table in tables for page in table), default=0) + 1
    keys, values = tokens_of(rng, n_pages, shape)
    index = PageIndex(tables)
    n_rows, n_paged, scale = len(tables), index.n_pages * PAGE, shape.key_dim**-0.5
    n_raw += n_tokens
    raw_keys = rng.normal(size=(n_rows, shape.n_kv_heads, n_raw, shape.key_dim)).astype(np.float32)
    raw_values = rng.normal(size=(n_rows, shape.n_kv_heads, n_raw, shape.value_dim)).astype(np.float32)
    queries = rng.normal(size=(n_rows, shape.n_heads, n_tokens, shape.key_dim)).astype(np.float32)
    sinks = rng.normal(size=(shape.n_heads,)).astype(np.float32) if with_sinks else None
    visible = np.ones((n_rows, n_tokens, n_paged + n_raw), dtype=bool)
    for row, table in enumerate(tables):
        visible[row, :, PAGE * len(table) : n_paged] = False
        for token in range(n_tokens):
            if mask_kind == "causal":
                visible[row, token, n_paged + n_raw - n_tokens + token + 1 :] = False
            elif mask_kind == "random":
                visible[row, token, : min(len(table) * PAGE, int(rng.integers(0, PAGE)))] = False
                visible[row, token, n_paged + int(rng.integers(1, n_raw + 1)) :] = False
    ragged = any(len(table) != index.n_pages for table in tables)
    mask: Mask = None if visible.all() else mx.array(visible[:, None])
    if mask_kind == "causal" and not ragged:
        mask = "causal"
    for lanes in both(shape):
        pages = lanes.encode(keys, values)
        page_keys, page_values = (np.array(x) for x in lanes.expand(pages, mx.float32))
        raw = mx.array(raw_keys), mx.array(raw_values)
        given_sinks = None if sinks is None else mx.array(sinks)
        out = lanes.attend(ChunkInputs(mx.array(queries), raw, pages, index, mask, scale, given_sinks))
        assert out.dtype == mx.float32
        assert out.shape == (n_rows, shape.n_heads, n_tokens, shape.value_dim)
        got = np.array(out)
        # On a CPU the packed lanes multiply whole bytes, whose products are up to 256 times larger than the result.
        tolerance = 1e-3 if lanes.name == "packed" and mx.default_device().type == mx.cpu else 3e-5
        for row, table in enumerate(tables):
            row_keys = [page_keys[page].swapaxes(0, 1) for page in table]
            row_values = [page_values[page].swapaxes(0, 1) for page in table]
            all_keys = np.concatenate([*row_keys, raw_keys[row].swapaxes(0, 1)])
            all_values = np.concatenate([*row_values, raw_values[row].swapaxes(0, 1)])
            for token in range(n_tokens):
                of_row = np.concatenate([visible[row, token, : PAGE * len(table)], visible[row, token, n_paged:]])
                want = attend_dense(queries[row, :, token], all_keys[of_row], all_values[of_row], scale, sinks)
                np.testing.assert_allclose(got[row, :, token], want, atol=tolerance, rtol=0)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    dims=st.tuples(st.sampled_from(DIMS), st.sampled_from(DIMS)),
    bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
    n_kv_heads=st.integers(1, 3),
    n_repeats=st.integers(1, 8),
    tables=st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=4).map(tuple),
    n_raw=st.integers(1, 40),
    n_tokens=st.sampled_from([1, 1, 2, 17, 48, 49]),
    mask_kind=st.sampled_from(["all", "causal", "random"]),
    with_sinks=st.booleans(),
)
@example(0, (64, 64), (4, 4), 2, 4, ((), ()), 5, 1, "random", True)
@example(1, (128, 96), (4, 3), 2, 1, ((3,), (), (0, 1, 2)), 7, 1, "random", False)
@example(2, (80, 192), (8, 2), 1, 8, ((0, 1), (1, 0)), 3, 1, "all", True)
@example(3, (64, 128), (4, 4), 2, 2, ((0, 1),), 3, 20, "causal", True)
@example(4, (64, 128), (2, 3), 2, 2, ((0, 1), (2,)), 3, 60, "causal", False)
def test_attend(
    seed: int,
    dims: tuple[int, int],
    bits: tuple[int, int],
    n_kv_heads: int,
    n_repeats: int,
    tables: tuple[tuple[int, ...], ...],
    n_raw: int,
    n_tokens: int,
    mask_kind: str,
    with_sinks: bool,
) -> None:
    """Ragged batches, rows without pages, pages in several rows, masks, attention sinks, unequal dims; one and several
    query tokens, on both sides of the length from which the packed lanes expand their pages.
    """
    shape = LaneShape(n_kv_heads * n_repeats, n_kv_heads, *dims, *bits)
    rng = np.random.default_rng(seed)
    attend_case(rng, shape, tables, n_raw, n_tokens, mask_kind=mask_kind, with_sinks=with_sinks)


@pytest.mark.parametrize("bits", BITS)
def test_attention_is_as_exact_as_float32_allows(bits: int) -> None:
    """The score's error relative to |q| |k|, for keys of any norm."""
    shape = LaneShape(8, 2, 128, 128, bits, bits)
    lanes = make_lanes("packed", shape)
    rng = np.random.default_rng(bits)
    keys = rng.normal(size=(8, 2, PAGE, 128)) * 10.0 ** rng.uniform(-2, 2, size=(8, 2, PAGE, 1))
    one_hot = np.zeros_like(keys)
    one_hot[..., 0] = 1  # an output's first coordinate is the sum of the weights of all pages
    pages = lanes.encode(mx.array(keys.astype(np.float32)), mx.array(one_hot.astype(np.float32)))
    read = np.array(lanes.expand(pages, mx.float32)[0]).astype(np.float64)
    for page in range(8):
        for token in (0, 13, 63):
            key = read[page, 0, token]
            query = key / (key @ key)
            queries = np.zeros((1, 8, 1, 128), dtype=np.float32)
            queries[0, :4] = query
            # Against one raw token of score 0 the weight of the page's token shows its score, which should be 1.
            visible = np.zeros((1, 1, 1, PAGE + 1), dtype=bool)
            visible[..., [token, PAGE]] = True
            raw = mx.zeros((1, 2, 1, 128))
            index, mask = PageIndex(((page,),)), mx.array(visible)
            out = lanes.attend(ChunkInputs(mx.array(queries), (raw, raw), pages, index, mask, 1.0, None))
            weight = float(out[0, 0, 0, 0]) / float(lanes.expand(pages, mx.float32)[1][page, 0, token, 0])
            assert np.log(weight / (1 - weight)) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("backend", ["packed", "reference"])
@pytest.mark.parametrize("bits", [(4, 4), (8, 3), (2, 6), (3, 5)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_token_stays_alone_in_its_page(backend: str, bits: tuple[int, int], bad: float) -> None:
    """With a code a coordinate; a pair code's other token has a test in test_reference."""
    lanes = make_lanes(backend, LaneShape(2, 2, 64, 64, *bits), "lloyd_max" if backend == "reference" else None)
    keys, values = (np.array(x) for x in tokens_of(np.random.default_rng(3), 1, lanes.shape))
    whole = [np.array(x) for x in lanes.expand(lanes.encode(mx.array(keys), mx.array(values)), mx.float32)]
    # Every place of a token within a packed word, and one coordinate or all of them.
    for token in (*range(17), 31, 32, 63):
        for coordinates in (slice(None), slice(5, 6)):
            broken = [keys.copy(), values.copy()]
            for x in broken:
                x[0, 1, token, coordinates] = bad
            pages = lanes.encode(*(mx.array(x) for x in broken))
            for got, want in zip(lanes.expand(pages, mx.float32), whole, strict=True):
                others = np.array(got)
                others[0, 1, token] = want[0, 1, token]
                np.testing.assert_array_equal(others, want)


@pytest.mark.parametrize("backend", ["packed", "reference"])
@pytest.mark.parametrize("tables", [((0,), (1,)), ((0, 1), (2,)), ((0,), ()), ((2,), (0, 1))])
def test_a_broken_page_stays_in_its_row(backend: str, tables: tuple[tuple[int, ...], ...]) -> None:
    """NaN in one session's values must not reach the other sessions of the batch."""
    shape = LaneShape(4, 2, 64, 64, 4, 4)
    lanes = make_lanes(backend, shape)
    rng = np.random.default_rng(5)
    keys, values = (np.array(x) for x in tokens_of(rng, 3, shape))
    values[0, :, 3] = np.nan
    pages = lanes.encode(mx.array(keys), mx.array(values))
    index = PageIndex(tables)
    n_paged = index.n_pages * PAGE
    visible = np.ones((2, 1, 1, n_paged + 4), dtype=bool)
    for row, table in enumerate(tables):
        visible[row, ..., PAGE * len(table) : n_paged] = False
    queries = mx.array(rng.normal(size=(2, 4, 1, 64)).astype(np.float32))
    raw = mx.array(rng.normal(size=(2, 2, 4, 64)).astype(np.float32))
    out = np.array(lanes.attend(ChunkInputs(queries, (raw, raw), pages, index, mx.array(visible), 0.125, None)))
    for row, table in enumerate(tables):
        assert np.isnan(out[row]).any() == (0 in table)


@pytest.mark.parametrize("bits", [1, 7])
def test_widths_without_mlx_lanes_are_refused_with_the_reason(bits: int) -> None:
    for shape, what in ((LaneShape(2, 2, 64, 64, bits, 4), "keys"), (LaneShape(2, 2, 64, 64, 4, bits), "values")):
        reason = PackedLanes.unsupported(shape)
        assert reason is not None
        assert f"no {bits}-bit lanes (for {what})" in reason
        with pytest.raises(ValueError, match=f"no {bits}-bit lanes"):
            make_lanes("packed", shape)


def test_levels_that_are_not_equally_spaced_are_refused() -> None:
    books = Codebooks(levels_for("lloyd_max", 4), levels_for("uniform", 4))
    with pytest.raises(ValueError, match="equally spaced"):
        PackedLanes(LaneShape(2, 2, 64, 64, 4, 4), books)
