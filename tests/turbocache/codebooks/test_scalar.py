import math

import mlx.core as mx
import numpy as np
import pytest
from scipy import integrate

from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from kernels.lanes.base import CodebookKind, LaneShape
from turbocache.backend import make_lanes
from turbocache.codebooks.pair import PAIR_BITS, pair_distortion, pair_levels
from turbocache.codebooks.scalar import (
    GRID_BITS,
    MAX_BITS,
    gaussian_distortion,
    grid_step,
    levels_for,
    lloyd_max,
    uniform_step,
)
from turbocache.codebooks.scalar_tables import LLOYD_MAX, UNIFORM_STEP

PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
"""Mean squared error of the best scalar quantiser of N(0, 1) (Max 1960; TurboQuant, arXiv 2504.19874)."""

ALL_BITS = range(1, MAX_BITS + 1)
TABLE_BITS = range(1, GRID_BITS)


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def integrated_distortion(levels: np.ndarray) -> float:
    """By quadrature over each cell: nothing in common with the closed form under test."""
    edges = np.concatenate([[-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]])
    return sum(
        integrate.quad(lambda x, c=level: (x - c) ** 2 * density(x), low, high)[0]
        for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True)
    )


def sphere_distortion(levels: np.ndarray, dim: int) -> float:
    """`dim` times the squared error of one coordinate of a uniform unit vector, density ~ (1 - t^2)^((dim - 3) / 2)."""
    norm = math.exp(math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2)) / math.sqrt(math.pi)
    edges = [-1.0, *(levels[1:] + levels[:-1]) / 2, 1.0]
    return dim * sum(
        integrate.quad(lambda t, c=level: (t - c) ** 2 * norm * (1 - t * t) ** ((dim - 3) / 2), low, high)[0]
        for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True)
    )


def unit_levels(kind: str, bits: int) -> np.ndarray:
    return levels_for(kind, bits).astype(np.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_frozen_tables_are_what_the_code_computes(bits: int) -> None:
    np.testing.assert_allclose(LLOYD_MAX[bits], lloyd_max(bits), rtol=0, atol=1e-10)
    # The distortion is flat around its minimum, so a search by value finds the place to half the digits only.
    assert UNIFORM_STEP[bits] == pytest.approx(uniform_step(bits), rel=1e-6)


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_lloyd_max_satisfies_both_of_its_conditions(bits: int) -> None:
    """Each level is the mean of its cell under the density, by quadrature."""
    half = np.array(LLOYD_MAX[bits])
    levels = np.concatenate([-half[::-1], half])
    edges = np.concatenate([[-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]])
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        mass = integrate.quad(density, low, high, epsabs=0)[0]
        first = integrate.quad(lambda x: x * density(x), low, high, epsabs=0)[0]
        assert level == pytest.approx(first / mass, abs=2e-6)


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_uniform_step_is_the_best_one(bits: int) -> None:
    grid = np.arange(1 << bits) - ((1 << bits) - 1) / 2
    best = integrated_distortion(grid * UNIFORM_STEP[bits])
    for factor in (0.99, 1.01):
        assert integrated_distortion(grid * UNIFORM_STEP[bits] * factor) > best
    # Rounding to float16 costs next to nothing.
    assert best <= integrated_distortion(unit_levels("uniform", bits)) * (1 + 1e-9)
    assert integrated_distortion(unit_levels("uniform", bits)) < best * 1.0002


@pytest.mark.parametrize("kind", ["lloyd_max", "uniform"])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_distortion_in_closed_form_equals_the_integral(kind: str, bits: int) -> None:
    levels = unit_levels(kind, bits)
    assert gaussian_distortion(levels) == pytest.approx(integrated_distortion(levels), rel=1e-5)


@pytest.mark.parametrize(("bits", "published"), PUBLISHED.items())
def test_distortion_is_the_published_one(bits: int, published: float) -> None:
    assert gaussian_distortion(unit_levels("lloyd_max", bits)) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_the_uniform_codebook_is_worse_but_not_by_much(bits: int) -> None:
    best, uniform = (gaussian_distortion(unit_levels(kind, bits)) for kind in ("lloyd_max", "uniform"))
    assert best <= uniform <= best * (1 + 0.17 * (bits - 1)) + 1e-12


@pytest.mark.parametrize("bits", PUBLISHED)
def test_rotated_vectors_have_the_published_distortion(bits: int) -> None:
    """Random vectors through rotation, encode and expand at d = 128, judged in float64: the codes have the distortion
    of the density on the sphere, which is within 3 % of the Gaussian one, and the scales do what they are for.
    """
    dim = 128
    rng = np.random.default_rng(bits)
    rows = rng.normal(size=(16, 2, PAGE, dim)) * 3 + 0.5 * rng.normal(size=(16, 2, PAGE, 1))
    lanes = make_lanes("reference", LaneShape(2, 2, dim, dim, bits, bits), "lloyd_max")
    tokens = mx.array(rows.astype(np.float32))
    exact = np.array(tokens).astype(np.float64)
    squared = (exact**2).sum(axis=-1)
    pages = lanes.encode(tokens, tokens)
    keys, values = (np.array(x).astype(np.float64) for x in lanes.expand(pages, mx.float32))

    def error_of(read: np.ndarray) -> float:
        return float((((read - exact) ** 2).sum(axis=-1) / squared).mean())

    plain = values / np.array(pages[3]).astype(np.float64)[..., None] * (squared[..., None] / dim) ** 0.5
    on_sphere = sphere_distortion(unit_levels("lloyd_max", bits) / dim**0.5, dim)
    assert error_of(plain) == pytest.approx(on_sphere, rel=0.01)
    assert error_of(plain) == pytest.approx(PUBLISHED[bits], rel=0.03)
    cosine = (values * exact).sum(axis=-1) / np.sqrt((values**2).sum(axis=-1) * squared)
    assert error_of(values) == pytest.approx((1 - cosine**2).mean(), rel=0.003)
    assert error_of(keys) == pytest.approx((1 / cosine**2 - 1).mean(), rel=0.003)


@pytest.mark.parametrize("backend", ["reference", "packed"])
@pytest.mark.parametrize(("bits", "most"), [(5, 0.00275), (6, 0.00069), (8, 0.000044)])
def test_a_grid_that_fits_the_row_is_as_good_as_lloyd_max(backend: str, bits: int, most: float) -> None:
    """Values of 128 dims, random: the error of the best fixed levels is 0.0025 at 5 bits and 0.00064 at 6."""
    rng = np.random.default_rng(bits)
    rows = rng.normal(size=(8, 2, PAGE, 128)) * 3
    lanes = make_lanes(backend, LaneShape(2, 2, 128, 128, bits, bits))
    tokens = mx.array(rows.astype(np.float32))
    read = np.array(lanes.expand(lanes.encode(tokens, tokens), mx.float32)[1]).astype(np.float64)
    error = (((read - rows) ** 2).sum(axis=-1) / (rows**2).sum(axis=-1)).mean()
    assert error < most
    if bits < 8:
        half = lloyd_max(bits)
        assert error < 1.1 * gaussian_distortion(np.concatenate([-half[::-1], half]))


def mean_ratio(read: np.ndarray, keys: np.ndarray, queries: np.ndarray) -> tuple[float, float]:
    """Mean of <q, k'> / <q, k> and its standard error."""
    ratios = (queries * read).sum(axis=1) / (queries * keys).sum(axis=1)
    return float(ratios.mean()), float(ratios.std() / len(ratios) ** 0.5)


@pytest.mark.parametrize("bits", PAIR_BITS)
@pytest.mark.parametrize("dim", [80, 128])
def test_rotated_vectors_have_the_distortion_of_their_pair_code(bits: float, dim: int) -> None:
    """The same through pair codes, which are integrated for a Gaussian: within 3 % of that at these dims."""
    rng = np.random.default_rng(round(10 * bits))
    rows = rng.normal(size=(16, 2, PAGE, dim)) * 3 + 0.5 * rng.normal(size=(16, 2, PAGE, 1))
    lanes = make_lanes("reference", LaneShape(2, 2, dim, dim, bits, bits), "pair")
    tokens = mx.array(rows.astype(np.float32))
    squared = (rows**2).sum(axis=-1)
    pages = lanes.encode(tokens, tokens)
    keys, values = (np.array(x).astype(np.float64) for x in lanes.expand(pages, mx.float32))
    for read, scales in ((keys, pages[2]), (values, pages[3])):
        plain = read / np.array(scales).astype(np.float64)[..., None] * (squared[..., None] / dim) ** 0.5
        error = (((plain - rows) ** 2).sum(axis=-1) / squared).mean()
        assert error == pytest.approx(pair_distortion(pair_levels(bits)), rel=0.03)
    for read, least in ((keys, False), (values, True)):
        cosine = (read * rows).sum(axis=-1) / np.sqrt((read**2).sum(axis=-1) * squared)
        error = (((read - rows) ** 2).sum(axis=-1) / squared).mean()
        assert error == pytest.approx(((1 - cosine**2) if least else (1 / cosine**2 - 1)).mean(), rel=0.003)


@pytest.mark.parametrize("bits", PAIR_BITS)
def test_inner_products_with_keys_in_pairs_have_no_bias(bits: float) -> None:
    dim, n = 128, 128
    rng = np.random.default_rng(round(10 * bits) + 1)
    keys = rng.normal(size=(n, 1, PAGE, dim))
    queries = (0.5 * keys + 0.75**0.5 * rng.normal(size=keys.shape)).reshape(-1, dim)
    lanes = make_lanes("reference", LaneShape(1, 1, dim, dim, bits, bits), "pair")
    tokens = mx.array(keys.astype(np.float32))
    read = np.array(lanes.expand(lanes.encode(tokens, tokens), mx.float32)[0]).astype(np.float64)
    mean, error = mean_ratio(read.reshape(-1, dim), keys.reshape(-1, dim), queries)
    assert error < 0.01
    assert abs(mean - 1) < 4 * error


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("backend", "kind"), [("reference", "lloyd_max"), ("packed", "uniform")])
def test_inner_products_with_keys_have_no_bias(backend: str, kind: CodebookKind, bits: int) -> None:
    """Queries correlated with their keys: the mean ratio is 1 within four standard errors. With the plain norm in the
    place of the unbiased scale it is not: the same measurement finds the shrinkage.
    """
    dim, n = 128, 128
    rng = np.random.default_rng(40 + bits)
    keys = rng.normal(size=(n, 1, PAGE, dim))
    queries = (0.5 * keys + 0.75**0.5 * rng.normal(size=keys.shape)).reshape(-1, dim)
    tokens = mx.array(keys.astype(np.float32))
    lanes = make_lanes(backend, LaneShape(1, 1, dim, dim, bits, bits), kind)
    read = np.array(lanes.expand(lanes.encode(tokens, tokens), mx.float32)[0]).astype(np.float64).reshape(-1, dim)
    exact = keys.reshape(-1, dim)
    mean, error = mean_ratio(read, exact, queries)
    assert error < 0.01
    assert abs(mean - 1) < 4 * error

    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    rotation, levels = Rotation(dim), unit_levels(kind, bits) / dim**0.5
    units = np.array(rotation.apply(tokens)).astype(np.float64).reshape(-1, dim) / norms
    nearest = levels[np.abs(units[..., None] - levels).argmin(axis=-1)] * norms
    plain = np.array(rotation.inverse(mx.array(nearest.astype(np.float32)))).astype(np.float64)
    plain_mean, plain_error = mean_ratio(plain, exact, queries)
    assert 1 - plain_mean > 6 * plain_error
    assert 1 - plain_mean == pytest.approx(gaussian_distortion(unit_levels(kind, bits)), rel=0.2)


@pytest.mark.parametrize("kind", ["lloyd_max", "uniform"])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_levels_are_sorted_symmetric_float16_and_cannot_be_changed(kind: str, bits: int) -> None:
    levels = levels_for(kind, bits)  # type: ignore[arg-type]
    assert levels.dtype == np.float32
    assert levels.shape == (1 << bits,)
    assert (np.diff(levels) > 0).all()
    np.testing.assert_array_equal(levels, -levels[::-1])
    np.testing.assert_array_equal(levels, levels.astype(np.float16))
    if kind == "uniform" or bits >= GRID_BITS:
        np.testing.assert_array_equal(levels, (np.arange(1 << bits) - ((1 << bits) - 1) / 2) * grid_step(bits))
    with pytest.raises(ValueError, match="read-only"):
        levels[0] = 0


def test_pairs_are_where_the_kind_calls_for_them() -> None:
    for bits in PAIR_BITS:
        assert levels_for("pair", bits) is pair_levels(bits)
    for bits in (1, 5, 6, 7, 8):
        np.testing.assert_array_equal(levels_for("pair", bits), levels_for("lloyd_max", bits))
    for bits in (2.5, 3.5):
        assert levels_for("lloyd_max", bits) is pair_levels(bits)


def test_unknown_codebooks_are_refused() -> None:
    for kind, bits in (("lloyd_max", 0), ("uniform", 9), ("none", 4), ("uniform", 2.5), ("pair", 4.5)):
        with pytest.raises(ValueError, match="there are lloyd_max and uniform ones of 1 to 8"):
            levels_for(kind, bits)  # type: ignore[arg-type]
