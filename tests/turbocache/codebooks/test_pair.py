import numpy as np
import pytest
from scipy.spatial import KDTree

from turbocache.codebooks.pair import (
    PAIR_BITS,
    cell_moments,
    error_covariance,
    pair_distortion,
    pair_levels,
    search_pairs,
)
from turbocache.codebooks.scalar import gaussian_distortion, lloyd_max

DISTORTION = {2: 0.109535, 2.5: 0.0572736, 3: 0.0296980, 3.5: 0.0151819, 4: 0.0077450}
"""Mean squared error a coordinate of the frozen tables, for two independent N(0, 1)."""


def scalar_distortion(bits: int) -> float:
    half = lloyd_max(bits)
    return gaussian_distortion(np.concatenate([-half[::-1], half]))


def summed_covariance(levels: np.ndarray, step: float = 0.02) -> np.ndarray:
    """Of the error, by the midpoint rule and a k-d tree: nothing in common with the integrals under test."""
    axis = np.arange(-7 + step / 2, 7, step)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    weights = np.exp(-(points**2).sum(axis=1) / 2)
    _, nearest = KDTree(levels.astype(np.float64)).query(points)
    errors = points - levels[nearest]
    return np.asarray((errors * weights[:, None]).T @ errors / weights.sum())


@pytest.mark.parametrize("bits", PAIR_BITS)
def test_tables_are_symmetric_sorted_and_exact_in_float16(bits: float) -> None:
    levels = pair_levels(bits)
    assert levels.shape == (2 ** (2 * bits), 2)
    assert levels.dtype == np.float32
    np.testing.assert_array_equal(levels, levels.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(levels, -levels[::-1])
    assert [*map(tuple, levels)] == sorted(map(tuple, levels))
    assert len(set(map(tuple, levels))) == len(levels)
    with pytest.raises(ValueError, match="read-only"):
        levels[0] = 0


@pytest.mark.parametrize("bits", PAIR_BITS)
def test_errors_by_edges_equal_the_sum_over_the_plane(bits: float) -> None:
    levels = pair_levels(bits)
    covariance, summed = error_covariance(levels), summed_covariance(levels)
    # A coordinate's own error jumps at the borders, which the sum resolves to its step; the error of both does not.
    np.testing.assert_allclose(covariance, summed, atol=5e-3 * summed[0, 0])
    assert pair_distortion(levels) == pytest.approx(np.trace(summed) / 2, rel=2e-4)
    assert pair_distortion(levels) == pytest.approx(DISTORTION[bits], rel=1e-4)


@pytest.mark.parametrize("bits", PAIR_BITS)
def test_errors_of_neighbours_cancel_rather_than_add_up(bits: float) -> None:
    """The axis of the smallest error lies along (1, 1): both coordinates have the same error, and a product below 0."""
    covariance = error_covariance(pair_levels(bits))
    assert covariance[0, 0] == pytest.approx(covariance[1, 1], rel=2e-3)
    assert covariance[0, 1] < 1e-3 * covariance[0, 0]
    assert covariance[0, 1] == pytest.approx(
        np.diff(np.linalg.eigvalsh(covariance))[0] / -2, rel=0.05, abs=1e-3 * covariance[0, 0]
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_product_of_scalar_codebooks_has_their_distortion(bits: int) -> None:
    """Cells on a rectangular grid: many of their neighbours' borders are parallel, or meet in a corner."""
    half = lloyd_max(bits)
    levels = np.concatenate([-half[::-1], half])
    product = np.stack(np.meshgrid(levels, levels), axis=-1).reshape(-1, 2)
    assert pair_distortion(product) == pytest.approx(gaussian_distortion(levels), rel=1e-10)
    mass, first = cell_moments(product)
    assert mass.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(first / mass[:, None], product, atol=1e-9)  # Lloyd-Max levels are their cells' means


@pytest.mark.parametrize("bits", PAIR_BITS)
def test_every_entry_is_the_mean_of_its_cell(bits: float) -> None:
    levels = pair_levels(bits)
    mass, first = cell_moments(levels)
    assert mass.sum() == pytest.approx(1, abs=1e-12)
    off = np.linalg.norm(first / mass[:, None] - levels, axis=1)
    assert off.max() < 0.01
    # What is left to gain by moving the entries there.
    assert (mass * off**2).sum() / 2 < 1e-4 * pair_distortion(levels)


@pytest.mark.parametrize("bits", PAIR_BITS)
def test_pairs_beat_scalar_levels_and_the_channel_split_at_the_same_rate(bits: float) -> None:
    """The split gives half of the coordinates one bit more, so it has the mean of two distortions."""
    low, high = scalar_distortion(int(bits)), scalar_distortion(int(bits + 0.5))
    gain = 1 - pair_distortion(pair_levels(bits)) / ((low + high) / 2)
    assert gain > {2: 0.06, 2.5: 0.24, 3: 0.13, 3.5: 0.30, 4: 0.18}[bits]
    assert pair_distortion(pair_levels(bits)) > 4**-bits  # Shannon's bound


def test_a_short_search_comes_close_to_the_frozen_table() -> None:
    found = search_pairs(2, n_starts=3)
    assert pair_distortion(found) == pytest.approx(DISTORTION[2], rel=0.01)
    np.testing.assert_array_equal(found, -found[::-1])


def test_other_rates_are_refused() -> None:
    for bits in (1.5, 5):
        with pytest.raises(ValueError, match=r"no pair codebook of \d[.5]* bits; there are 2, 2.5, 3, 3.5, 4"):
            pair_levels(bits)
