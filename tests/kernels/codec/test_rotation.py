import hashlib

import mlx.core as mx
import numpy as np
import pytest
from scipy import stats

from kernels.codec.rotation import Rotation

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
ODD_DIMS = (1, 2, 3, 5, 7, 24, 33, 72, 100, 127, 160)


def matrix_of(dim: int) -> np.ndarray:
    return np.array(Rotation(dim).apply(mx.eye(dim))).astype(np.float64)


@pytest.mark.parametrize("dim", [*HEAD_DIMS, *ODD_DIMS])
def test_is_orthogonal(dim: int) -> None:
    matrix = matrix_of(dim)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=2e-6)


@pytest.mark.parametrize("dim", [*HEAD_DIMS, *ODD_DIMS])
def test_inverse_undoes_it_and_inner_products_stay(dim: int) -> None:
    rng = np.random.default_rng(dim)
    x, y = (rng.normal(size=(2, 3, 5, dim)).astype(np.float32) for _ in range(2))
    rotation = Rotation(dim)
    turned_x, turned_y = rotation.apply(mx.array(x)), rotation.apply(mx.array(y))
    np.testing.assert_allclose(np.array(rotation.inverse(turned_x)), x, atol=1e-5)
    np.testing.assert_allclose(np.array((turned_x * turned_y).sum(axis=-1)), (x * y).sum(axis=-1), atol=1e-4)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_mixes_every_coordinate_into_every_other(dim: int) -> None:
    """Also across the blocks of a head dim that is not a power of two, in parts of comparable size."""
    magnitudes = np.abs(matrix_of(dim)) * dim**0.5
    # m blocks: 2 sqrt(m) / m off the diagonal blocks, (m - 2) sqrt(m) / m on it; 1 and 1 for m = 1.
    n_blocks = dim // (dim & -dim)
    assert magnitudes.min() > 0.57
    assert magnitudes.max() < max(1.01, n_blocks**0.5 * (1 - 2 / n_blocks) + 0.01, 2 / n_blocks**0.5 + 0.01)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("shape", ["one coordinate", "two coordinates", "constant", "constant and noise"])
def test_makes_strange_vectors_look_gaussian(dim: int, shape: str) -> None:
    """Many vectors of one shape: their coordinates' second and fourth moments are near those of N(0, 1/dim)."""
    rng = np.random.default_rng(1)
    rows = np.zeros((400, dim))
    if shape == "one coordinate":
        rows[np.arange(400), rng.integers(0, dim, 400)] = 1
    elif shape == "two coordinates":
        rows[np.arange(400), rng.integers(0, dim, 400)] += 1
        rows[np.arange(400), rng.integers(0, dim, 400)] += 0.5
    elif shape == "constant":
        rows += 1
    else:
        rows += 1 + 0.3 * rng.normal(size=rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    turned = np.array(Rotation(dim).apply(mx.array(rows.astype(np.float32)))).astype(np.float64) * dim**0.5
    assert (turned**2).mean() == pytest.approx(1, abs=1e-4)
    # A Hadamard matrix spreads one coordinate evenly (moment 1, flatter than a Gaussian's 3), never into a peak.
    assert (turned**4).mean() < 6
    assert np.abs(turned).max() < 5
    before = (rows * dim**0.5) ** 4
    if shape in ("one coordinate", "two coordinates"):
        assert before.mean() > 15 > (turned**4).mean()


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_generic_vectors_become_normal(dim: int) -> None:
    rng = np.random.default_rng(2)
    rows = np.exp(rng.normal(size=(300, dim)))  # positive, heavy-tailed
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    turned = np.array(Rotation(dim).apply(mx.array(rows.astype(np.float32)))) * dim**0.5
    assert stats.kstest(turned.reshape(-1), "norm").statistic < 0.05
    assert stats.kstest((rows * dim**0.5).reshape(-1), "norm").statistic > 0.2


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_computes_in_float32(dtype: mx.Dtype) -> None:
    """A float16 key of norm 1e5 must not overflow on the way."""
    x = (mx.random.normal((4, 128), key=mx.random.key(0)) * 8000).astype(dtype)
    turned = Rotation(128).apply(x)
    assert turned.dtype == mx.float32
    want = np.array(x.astype(mx.float32)).astype(np.float64) @ matrix_of(128)
    np.testing.assert_allclose(np.array(turned), want, rtol=1e-4, atol=0.5)


def test_the_seed_is_part_of_the_format() -> None:
    assert not np.array_equal(matrix_of(64), np.array(Rotation(64, seed=1).apply(mx.eye(64))))
    np.testing.assert_array_equal(matrix_of(64), matrix_of(64))


def test_signs_are_frozen() -> None:
    """Another stream of signs would read stored caches wrongly. A Hadamard matrix's first column is constant, so the
    first coordinates of the rotated unit vectors show the signs.
    """
    digests = {}
    for dim in (64, 128):
        signs = np.sign(matrix_of(dim)[:, 0]).astype(np.int8)
        digests[dim] = hashlib.sha256(signs.tobytes()).hexdigest()[:16]
    assert digests == {64: "bb36080f3ffa3d16", 128: "2a8eb6bce2fbc795"}


def test_refuses_empty_vectors() -> None:
    with pytest.raises(ValueError, match="positive dimension, not 0"):
        Rotation(0)
