import mlx.core as mx
import numpy as np
import pytest

from kernels.codec.codes import Code, down_columns, nearest_pair
from kernels.codec.layout import words_for

rng = np.random.default_rng(21)


def nearest_by_definition(coordinates: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes of `[..., m]` by the squared distances to every entry, in float64."""
    parts = coordinates.astype(np.float64).reshape(*coordinates.shape[:-1], -1, 1, table[0].size)
    return np.asarray(((parts - table.reshape(len(table), -1)) ** 2).sum(axis=-1).argmin(axis=-1))


@pytest.mark.parametrize("n", [16, 32, 128, 256])
def test_pairs_get_their_nearest_entry(n: int) -> None:
    table = rng.normal(size=(n, 2)).astype(np.float32)
    coordinates = (rng.normal(size=(3, 50, 40)) * 1.5).astype(np.float32)
    codes, read = nearest_pair(mx.array(table))(mx.array(coordinates))
    assert codes.dtype == mx.uint32
    assert codes.shape == (3, 50, 20)
    np.testing.assert_array_equal(np.array(codes), nearest_by_definition(coordinates, table))
    np.testing.assert_array_equal(np.array(read), table[np.array(codes)].reshape(coordinates.shape))


def test_a_tie_between_pairs_goes_to_the_lower_code_and_what_is_not_finite_counts_as_0() -> None:
    table = mx.array([[-1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [1.0, 0.0]])
    pairs = mx.array([0.0, 0.0, 0.5, 0.5, 0.5, -0.5, 9.0, 8.0, float("nan"), 1.0, 0.0, float("nan"), mx.inf, 1.0])
    codes, _ = nearest_pair(table)(pairs)
    assert codes.tolist() == [0, 2, 1, 3, 2, 0, 2]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scalar_codes_are_the_pair_code_of_their_product(bits: int) -> None:
    """The same stream and the same coordinates, whether a codebook is given as levels or as points."""
    levels = np.sort(rng.normal(size=1 << bits)).astype(np.float32)
    product = np.stack(np.meshgrid(levels, levels, indexing="xy"), axis=-1).reshape(-1, 2)  # entry c0 | c1 << bits
    coordinates = mx.array(rng.normal(size=(20, 64)).astype(np.float32))
    streams, reads = [], []
    for table in (levels, product):
        code = Code(table, bits)
        codes, read = code.nearest(coordinates)
        streams.append(np.array(code.pack(codes)))
        reads.append(np.array(read))
        np.testing.assert_array_equal(np.array(code.read(code.pack(codes), 64)), reads[-1])
    np.testing.assert_array_equal(*streams)
    np.testing.assert_array_equal(*reads)


@pytest.mark.parametrize("bits", [2, 2.5, 3, 3.5, 4])
@pytest.mark.parametrize("n", [2, 64, 80, 126, 128])
def test_pair_codes_survive_packing_into_the_words_of_their_rate(bits: float, n: int) -> None:
    table = rng.normal(size=(round(2 ** (2 * bits)), 2)).astype(np.float32)
    code, codes = Code(table, bits), rng.integers(0, len(table), size=(5, n // 2))
    words = code.pack(mx.array(codes))
    assert words.shape == (5, words_for(n, bits))
    assert words_for(n, bits) == -(-n * round(2 * bits) // 64)
    np.testing.assert_array_equal(np.array(code.read(words, n)), table[codes].reshape(5, n))


def test_a_search_down_columns_pairs_neighbours_of_a_column() -> None:
    table = rng.normal(size=(32, 2)).astype(np.float32)
    rows = rng.normal(size=(2, 8, 5)).astype(np.float32)
    codes, read = down_columns(nearest_pair(mx.array(table)))(mx.array(rows))
    want = nearest_by_definition(rows.swapaxes(1, 2), table)
    np.testing.assert_array_equal(np.array(codes), want)
    for column in range(5):
        np.testing.assert_array_equal(np.array(read)[1, 2:4, column], table[want[1, column, 1]])


@pytest.mark.parametrize(
    ("shape", "bits", "said"),
    [((8,), 4, "8 levels is not one of 4 bits, which needs 16"), ((16, 2), 2.5, "16 pairs is not one of 2.5 bits"),
     ((16, 3), 2, "16 pairs"), ((6,), 2.5, "6 levels is not one of 2.5 bits")],
)  # fmt: skip
def test_tables_of_the_wrong_size_are_refused(shape: tuple[int, ...], bits: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Code(np.zeros(shape), bits)
