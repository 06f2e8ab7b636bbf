"""The two-stage code of keys: its estimate is unbiased, and its errors are those of the project's trials."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from kernels.lanes.base import Codebooks, LaneShape
from kernels.lanes.qjl import QjlLanes, QjlShape, sketch, sketch_constant
from kernels.lanes.reference import ReferenceLanes
from turbocache.codebooks.scalar import levels_for


def lanes_of(bits: float, dim: int = 128) -> QjlLanes:
    books = Codebooks(levels_for("lloyd_max", bits - 1), levels_for("lloyd_max", 4))
    return QjlLanes(QjlShape(4, 2, dim, 64, bits, 4), books)


def estimate(r: np.ndarray, projection: np.ndarray, constant: float) -> np.ndarray:
    """The paper's: c |r| S^T sign(S r)."""
    return np.asarray(constant * np.linalg.norm(r) * projection.T @ np.sign(projection @ r))


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_the_estimate_is_unbiased_over_projections(dim: int) -> None:
    rng = np.random.default_rng(dim)
    r, query = rng.normal(size=(2, dim))
    query = query + r  # correlated, as attention's are
    n = 40_000 // dim
    made = np.stack([estimate(r, sketch(dim, seed), sketch_constant(dim)) for seed in range(n)])
    for direction in (r, query):
        products = made @ direction
        error = products.mean() - r @ direction
        assert abs(error) < 4 * products.std() / n**0.5
        assert abs(error) < 0.04 * abs(r @ direction)


def test_constants() -> None:
    for dim in (64, 128, 256):
        assert sketch_constant(dim) == pytest.approx((np.pi / 2 / dim) ** 0.5, rel=1 / (3 * dim))
        assert sketch_constant(dim) != pytest.approx((np.pi / 2 / dim) ** 0.5, rel=1 / (5 * dim))
    s = sketch(80)
    np.testing.assert_allclose(s @ s.T, np.eye(80), atol=1e-12)


# FACTS of the project's trials: squared error of inner products times dim, query correlated 0.5 with the key.
@pytest.mark.parametrize(("bits", "error"), [(4, 0.0192), (3, 0.064)])
def test_errors_of_inner_products(bits: float, error: float) -> None:
    dim, n = 128, 16
    rng = np.random.default_rng(1)
    keys = rng.normal(size=(n, 2, PAGE, dim)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    other = rng.normal(size=keys.shape)
    other -= (other * keys).sum(axis=-1, keepdims=True) * keys
    queries = 0.5 * keys + 0.75**0.5 * other / np.linalg.norm(other, axis=-1, keepdims=True)
    values = mx.zeros((n, 2, PAGE, 64))
    lanes = lanes_of(bits)
    read = np.array(lanes.expand(lanes.encode(mx.array(keys), values), mx.float32)[0]).astype(np.float64)
    wrong = (queries * (read - keys)).sum(axis=-1)
    assert (wrong**2).mean() * dim == pytest.approx(error, rel=0.15)
    assert abs(wrong.mean()) < 5e-3  # with the other constant 0.1 or more
    plain = ReferenceLanes(
        LaneShape(4, 2, dim, 64, bits, 4), Codebooks(*[levels_for("lloyd_max", b) for b in (bits, 4)])
    )
    unbiased = np.array(plain.expand(plain.encode(mx.array(keys), values), mx.float32)[0])
    assert ((queries * (unbiased - keys)).sum(axis=-1) ** 2).mean() * dim < 0.5 * error


def test_pages_hold_what_the_definition_says() -> None:
    rng = np.random.default_rng(2)
    lanes = lanes_of(4, 64)
    tokens = [mx.array(rng.normal(size=(3, 2, PAGE, 64)).astype(np.float32)) for _ in range(2)]
    pages = lanes.encode(*tokens)
    assert [(p.shape[1:], p.dtype) for p in pages] == [(tuple(s), d) for s, d in lanes.page_arrays()]
    assert lanes.shape.key_bits == 4
    assert sum(p[0].nbytes for p in pages) == 2 * (PAGE * 64 * (4 + 4) // 8 + PAGE * 2 * 3)
    plain = ReferenceLanes(
        LaneShape(4, 2, 64, 64, 3, 4), Codebooks(levels_for("lloyd_max", 3), levels_for("lloyd_max", 4))
    )
    rotated = np.array(Rotation(64).apply(tokens[0])).astype(np.float64)
    levels = np.array(plain.expand_rotated(pages[:4])[0]).astype(np.float64)
    left = rotated - levels
    assert abs((left * levels).sum(axis=-1)).max() < 5e-2  # least squares
    got, values = (np.array(x) for x in lanes.expand_rotated(pages))
    want = np.array([estimate(r, sketch(64), sketch_constant(64)) for r in left.reshape(-1, 64)])
    close = np.isclose(got - levels, want.reshape(got.shape), rtol=2e-3, atol=2e-3).all(axis=-1)
    assert close.mean() > 0.99  # a projection near zero may have either sign
    np.testing.assert_array_equal(values, np.array(plain.expand_rotated(plain.encode(*tokens))[1]))
