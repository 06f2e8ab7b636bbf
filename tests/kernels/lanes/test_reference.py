import mlx.core as mx
import numpy as np
import pytest

from kernels.codec.codes import nearest_level, range_end
from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from kernels.lanes.base import Codebooks, LaneShape
from kernels.lanes.reference import ReferenceLanes, quantise
from tests.oracles import quantise_page, quantise_row
from turbocache.backend import make_lanes
from turbocache.codebooks.scalar import levels_for

rng = np.random.default_rng(11)


def rows_of(dim: int, n: int = 512) -> np.ndarray:
    """Rows of very different norms, some of them strange."""
    rows = rng.normal(size=(n, dim)) * 10.0 ** rng.uniform(-3, 2, size=(n, 1))
    rows[0] = 0
    rows[1] = 1e2  # all coordinates alike
    rows[2] = 0
    rows[2, 0] = -3  # one coordinate only
    return rows.astype(np.float32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("unbiased", [True, False])
def test_quantise_follows_the_definition(bits: int, dim: int, unbiased: bool) -> None:
    levels = levels_for("lloyd_max", bits)
    rows = rows_of(dim)
    search = nearest_level(mx.array(levels))
    codes, scales = quantise(mx.array(rows), search, unbiased=unbiased, end=range_end(levels))
    assert codes.dtype == mx.uint32
    assert scales.dtype == mx.float16
    got = levels[np.array(codes)] * np.array(scales).astype(np.float64)[:, None]
    want = np.stack([quantise_row(row, levels, unbiased=unbiased) for row in rows])
    # A coordinate on a boundary may fall to either side; the float16 scale may round to either side.
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    close = np.isclose(got, want, rtol=2e-3, atol=1e-9).all(axis=1)
    assert close.mean() > 0.99
    assert (np.abs(got - want) <= norms / dim**0.5 * np.diff(levels).max() * 3 + 1e-9).all()


def test_a_tie_goes_to_the_lower_code() -> None:
    levels = mx.array([-3.0, -1.0, 1.0, 3.0])
    codes, read = nearest_level(levels)(mx.array([-2.0, 0.0, 2.0, -2.0001, 2.0001, -9.0, 9.0]))
    assert codes.tolist() == [0, 1, 2, 0, 3, 0, 3]
    assert read.tolist() == [-3.0, -1.0, 1.0, -3.0, 3.0, -3.0, 3.0]


def test_key_scale_makes_the_row_orthogonal_to_its_own_error_and_the_value_scale_minimises_it() -> None:
    levels = levels_for("lloyd_max", 3).astype(np.float64)
    rows = rng.normal(size=(256, 128)).astype(np.float32)
    search = nearest_level(mx.array(levels.astype(np.float32)))
    read = {}
    for unbiased in (True, False):
        codes, scales = quantise(mx.array(rows), search, unbiased=unbiased)
        read[unbiased] = levels[np.array(codes)] * np.array(scales).astype(np.float64)[:, None]
    squared = (rows.astype(np.float64) ** 2).sum(axis=1)
    assert np.abs((read[True] * rows).sum(axis=1) / squared - 1).max() < 1e-3  # float16's half step is 5e-4
    errors = {which: ((x - rows) ** 2).sum(axis=1) for which, x in read.items()}
    assert (errors[False] <= errors[True] * (1 + 1e-3)).all()
    assert (((read[False] - rows) * read[False]).sum(axis=1) / squared < 1e-3).all()


def test_scales_stop_at_the_largest_float16_and_zero_rows_stay_zero() -> None:
    lanes = make_lanes("reference", LaneShape(1, 1, 64, 64, 4, 4))
    tokens = np.ones((1, 1, PAGE, 64), dtype=np.float32)
    tokens[0, 0, 0] *= 1e6
    tokens[0, 0, 1] = 0
    for expanded in lanes.expand(lanes.encode(mx.array(tokens), mx.array(tokens)), mx.float32):
        read = np.array(expanded)
        assert np.isfinite(read).all()
        assert (read[0, 0, 1] == 0).all()
        assert (read[0, 0, 0] > 0).all()


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 2), (2.5, 3.5), (3, 4), (3.5, 2.5), (4, 3), (8, 2.5)])
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (40, 33)])
def test_pair_codes_follow_the_definition(dims: tuple[int, int], key_bits: float, value_bits: float) -> None:
    """Pages and back in float64, in the rotated basis. A pair on a border may get either entry, a scale either of two
    float16 neighbours.
    """
    shape = LaneShape(4, 2, *dims, key_bits, value_bits)
    lanes = make_lanes("reference", shape, "pair")
    tokens = [rows_of(dim, 3 * 2 * PAGE).reshape(3, 2, PAGE, dim) for dim in dims]
    pages = lanes.encode(*(mx.array(x) for x in tokens))
    assert [(p.shape[1:], p.dtype) for p in pages] == [(tuple(s), d) for s, d in lanes.page_arrays()]
    read = lanes.expand(pages, mx.float32)
    for i, (bits, unbiased) in enumerate(((key_bits, True), (value_bits, False))):
        rotation = Rotation(dims[i])
        got, exact = (np.array(rotation.apply(mx.array(x))).reshape(-1, PAGE, dims[i]) for x in (read[i], tokens[i]))
        want = np.stack([quantise_page(rows, levels_for("pair", bits), unbiased=unbiased) for rows in exact])
        rms = np.sqrt((exact.astype(np.float64) ** 2).mean(axis=-1, keepdims=True))
        close = (np.abs(got - want) <= 2e-3 * np.abs(want) + 1e-4 * rms + 1e-7).all(axis=-1)
        assert close.mean() > 0.985
        assert (np.abs(got - want) <= 2.5 * rms + 1e-6).all()


def test_a_broken_token_spoils_no_other() -> None:
    """Values pair two tokens in one code: a token of NaN or infinity must not make its neighbour so."""
    lanes = make_lanes("reference", LaneShape(1, 1, 64, 64, 2.5, 2.5))
    tokens = rng.normal(size=(1, 1, PAGE, 64)).astype(np.float32)
    good = [np.array(x) for x in lanes.expand(lanes.encode(mx.array(tokens), mx.array(tokens)), mx.float32)]
    broken = tokens.copy()
    broken[0, 0, 6], broken[0, 0, 21] = np.nan, np.inf
    read = [np.array(x) for x in lanes.expand(lanes.encode(mx.array(broken), mx.array(broken)), mx.float32)]
    others = np.setdiff1d(np.arange(PAGE), [6, 21])
    np.testing.assert_array_equal(read[0][0, 0, others], good[0][0, 0, others])
    unpaired = np.setdiff1d(others, [7, 20])
    np.testing.assert_array_equal(read[1][0, 0, unpaired], good[1][0, 0, unpaired])
    errors = np.square(read[1] - tokens)[0, 0, [7, 20]].mean(axis=-1)
    assert (errors < 0.2).all()


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_half_bits_take_their_part_of_the_bytes(bits: float) -> None:
    arrays = make_lanes("reference", LaneShape(8, 2, 128, 128, bits, bits)).page_arrays()
    assert sum(int(np.prod(shape)) * dtype.size for shape, dtype in arrays) == 2 * 2 * PAGE * (128 * bits / 8 + 2)


def test_pairs_of_an_odd_key_dim_are_refused_and_of_an_odd_value_dim_are_not() -> None:
    books = Codebooks(levels_for("pair", 2.5), levels_for("pair", 2.5))
    with pytest.raises(ValueError, match=r"a code of 2.5 bits stands for a pair of dims, and keys have 33"):
        ReferenceLanes(LaneShape(1, 1, 33, 64, 2.5, 2.5), books)
    ReferenceLanes(LaneShape(1, 1, 64, 33, 2.5, 2.5), books)


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (8, 3), (1, 1), (5, 7)])
def test_page_arrays_describe_what_encode_makes(key_bits: int, value_bits: int) -> None:
    lanes = make_lanes("reference", LaneShape(6, 2, 80, 96, key_bits, value_bits))
    pages = lanes.encode(mx.zeros((3, 2, PAGE, 80)), mx.zeros((3, 2, PAGE, 96)))
    assert [(p.shape[1:], p.dtype) for p in pages] == [(tuple(s), d) for s, d in lanes.page_arrays()]
    keys, values = lanes.expand(pages, mx.bfloat16)
    assert keys.shape == (3, 2, PAGE, 80)
    assert values.shape == (3, 2, PAGE, 96)
    assert keys.dtype == values.dtype == mx.bfloat16


def stream_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of one stream as uint32 words, by way of one large integer."""
    whole = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return np.array([(whole >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(codes) * bits // 32))])


@pytest.mark.parametrize(("key_bits", "value_bits"), [(4, 4), (8, 3), (5, 7)])
def test_pages_are_laid_out_as_documented(key_bits: int, value_bits: int) -> None:
    """Keys a stream per token along the head dim, values a stream per dim along the page's tokens."""
    lanes = make_lanes("reference", LaneShape(2, 2, 80, 96, key_bits, value_bits), "lloyd_max")
    tokens = [mx.array(rng.normal(size=(2, 2, PAGE, dim)).astype(np.float32)) for dim in (80, 96)]
    key_words, value_words, key_scales, value_scales = (np.array(x) for x in lanes.encode(*tokens))
    for x, words, scales, bits in zip(
        tokens, (key_words, value_words), (key_scales, value_scales), (key_bits, value_bits), strict=True
    ):
        rotated, levels = Rotation(x.shape[-1]).apply(x), levels_for("lloyd_max", bits)
        search = nearest_level(mx.array(levels))
        codes, want = quantise(rotated, search, unbiased=words is key_words, end=range_end(levels))
        np.testing.assert_array_equal(scales, np.array(want))
        streams = np.array(codes) if words is key_words else np.array(codes).swapaxes(-1, -2)
        for page, head, i in ((0, 0, 0), (1, 1, 7), (1, 0, 63), (0, 1, streams.shape[2] - 1)):
            np.testing.assert_array_equal(words[page, head, i], stream_of(streams[page, head, i], bits))


def test_codebooks_of_the_wrong_size_are_refused() -> None:
    books = Codebooks(levels_for("lloyd_max", 3), levels_for("lloyd_max", 4))
    with pytest.raises(ValueError, match="a codebook of 8 levels is not one of 4 bits, which needs 16"):
        ReferenceLanes(LaneShape(1, 1, 64, 64, 4, 4), books)
