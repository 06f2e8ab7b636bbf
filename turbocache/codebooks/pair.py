"""Codebooks for pairs of coordinates, and how they were computed.

After the rotation, coordinates are independent N(0, 1) up to their row's scale. Scalar levels lose by the shape of
their cells: squares whose corners are nearly empty. A table of 2**(2 * bits) points in the plane has cells close to
hexagons and spends no point on corners. Its rate may be a half: 32 points are 2.5 bits a coordinate, 128 are 3.5.
Distortion at high rates, in units of 4**-bits: 2.72 for scalar levels (Panter and Dite 1951), 2.02 for points in the
plane (Zador 1982 with the hexagon's moment).

Every table is its own mirror image about the origin, so its mean is exactly 0. It is sorted by x, then by y: entries i
and n - 1 - i are opposite. Any rotation of a table serves as well, so each is turned until its error is smallest along
(1, 1): values of neighbouring tokens are correlated (0.2 in tiny-recall), and attention adds up their errors. Values
are float16-exact, so that every backend reads the same numbers.

`python -m turbocache.codebooks.pair` prints `pair_tables.py` (in about ten minutes).
"""

import math
from functools import cache

import numpy as np

from turbocache.codebooks.pair_tables import PAIR_HALVES

PAIR_BITS = tuple(sorted(PAIR_HALVES))
"""Bits a coordinate for which there is a table."""

_FAR = 12.0
"""The density of N(0, 1) counts as zero beyond this."""


@cache
def pair_levels(bits: float) -> np.ndarray:
    """The table of a pair code, float32 `[2**(2 * bits), 2]`, float16-exact, read-only, in units of N(0, 1).

    Raises ValueError for bits without a table.
    """
    if bits not in PAIR_HALVES:
        raise ValueError(f"no pair codebook of {bits:g} bits; there are {', '.join(f'{b:g}' for b in PAIR_BITS)}")
    half = np.array(PAIR_HALVES[bits], dtype=np.float16).astype(np.float32)  # written with float16's digits
    levels = np.concatenate([half, -half[::-1]])
    levels.flags.writeable = False
    return levels


def pair_distortion(levels: np.ndarray) -> float:
    """Mean squared error a coordinate of nearest-entry coding of two independent N(0, 1)."""
    return float(np.trace(error_covariance(levels))) / 2


def error_covariance(levels: np.ndarray) -> np.ndarray:
    """Covariance `[2, 2]` of the error of nearest-entry coding of two independent N(0, 1)."""
    levels = np.asarray(levels, dtype=np.float64)
    mass, first = cell_moments(levels)
    crossed = levels.T @ first
    return np.asarray(np.eye(2) - crossed - crossed.T + levels.T @ (levels * mass[:, None]))


def cell_moments(levels: np.ndarray, n_cells: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Probability `[n]` and first moment `[n, 2]` of the first `n_cells` (default all) nearest-entry cells of `levels`.

    By the divergence theorem these are integrals over a cell's edges. With the outward normal (u, v) of each edge and
    the normal density f and distribution F in one dimension,

        mass = sum of u * integral of F(x) f(y),    first = - sum of (u, v) * integral of f(x) f(y)

    The second has a closed form. The first uses Gauss-Legendre quadrature (absolute error below 1e-10).
    """
    levels = np.asarray(levels, dtype=np.float64)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    cells = range(len(levels) if n_cells is None else n_cells)
    mass, first = np.zeros(len(cells)), np.zeros((len(cells), 2))
    for cell in cells:
        normals, distances, low, high = _edges(levels, cell)
        across = normal_density(distances) * (_below(high) - _below(low))
        first[cell] = -(normals * across[:, None]).sum(axis=0)
        along = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * nodes
        x = distances[:, None] * normals[:, :1] - along * normals[:, 1:]
        y = distances[:, None] * normals[:, 1:] + along * normals[:, :1]
        integrals = (_below(x) * normal_density(y)) @ weights * (high - low) / 2
        mass[cell] = (normals[:, 0] * integrals).sum()
    return mass, first


def _edges(levels: np.ndarray, cell: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A cell's edges: outward normals `[m, 2]`, distances from the origin, and where they begin and end on their lines.

    The border of the half plane at x = _FAR closes cells that are open to the right. F(x) f(y) vanishes elsewhere.
    """
    away = np.delete(levels, cell, axis=0) - levels[cell]
    lengths = np.linalg.norm(away, axis=1)
    normals = np.concatenate([away / lengths[:, None], [[1.0, 0.0]]])
    middles = (np.delete(levels, cell, axis=0) + levels[cell]) / 2
    distances = np.append((middles * normals[:-1]).sum(axis=1), _FAR)
    # Line i is d_i n_i + t (turned n_i); it lies within line k's side where t * slope <= room.
    slopes = normals[:, :1] * normals[:, 1] - normals[:, 1:] * normals[:, 0]
    room = distances - distances[:, None] * (normals @ normals.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = room / slopes
    reach = math.sqrt(2) * _FAR
    high = np.where(slopes > 1e-14, at, reach).min(axis=1).clip(-reach, reach)
    low = np.where(slopes < -1e-14, at, -reach).max(axis=1).clip(-reach, reach)
    outside = ((np.abs(slopes) <= 1e-14) & (room < -1e-12)).any(axis=1)  # beyond a parallel line
    real = (high > low) & ~outside
    return normals[real], distances[real], low[real], high[real]


def normal_density(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(-x * x / 2) / math.sqrt(2 * math.pi))


_erf = np.frompyfunc(math.erf, 1, 1)


def _below(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.asarray(_erf(x / math.sqrt(2)), dtype=np.float64)


# --- the search ---


def search_pairs(bits: float, n_starts: int | None = None, seed: int = 0) -> np.ndarray:
    """The best table found for `bits`, float32 `[2**(2 * bits), 2]`, float16-exact, symmetric and sorted.

    Lloyd's iteration (Linde, Buzo and Gray 1980) of half a table and its mirror image over a grid in the half plane,
    with decreasing noise, from random starts. Exact cell moments then polish the best two.
    """
    n = round(2 ** (2 * bits))
    n_starts = n_starts or min(100, 6400 // n)
    rng = np.random.Generator(np.random.PCG64([seed, n]))
    points, weights = _grid(step=min(0.08, 0.68 / math.sqrt(n)))
    candidates = []
    for start in range(n_starts):
        half = rng.normal(size=(n // 2, 2)) * math.sqrt(2)  # the best density of points is f^(1/2), that is N(0, 2)
        noise = 0.4 / math.sqrt(n) * (1 + start % 3)
        for step in range(400):
            half = _lloyd_step(half, points, weights)
            if step < 300:
                half = half + rng.normal(size=half.shape) * noise * (1 - step / 300) ** 2
        candidates.append((_grid_distortion(half, points, weights), start, half))
    polished = [_polish(half) for _, _, half in sorted(candidates, key=lambda entry: entry[:2])[:2]]
    return min(polished, key=pair_distortion)


def _grid(step: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of a square grid in the half plane x > 0 and their shares of the density."""
    x, y = np.arange(step / 2, 5.6, step), np.arange(step / 2 - 5.6, 5.6, step)
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    squared = (points * points).sum(axis=1)
    points, weights = points[squared < 5.6**2], np.exp(-squared[squared < 5.6**2] / 2)
    return points.astype(np.float32), weights / weights.sum()


def _nearest(half: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    table = np.concatenate([half, -half]).astype(np.float32)
    return table, (points @ table.T - (table * table).sum(axis=1) / 2).argmax(axis=1)


def _lloyd_step(half: np.ndarray, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Move every entry to the mean of its cell. An entry whose cell is empty moves half-way to the origin."""
    n = len(half)
    _, codes = _nearest(half, points)
    signs = np.where(codes < n, 1.0, -1.0)
    mass = np.bincount(codes % n, weights, n)
    sums = [np.bincount(codes % n, weights * signs * points[:, axis], n) for axis in (0, 1)]
    means = np.stack(sums, axis=1) / np.maximum(mass, 1e-30)[:, None]
    return np.where(mass[:, None] > 0, means, half / 2)


def _grid_distortion(half: np.ndarray, points: np.ndarray, weights: np.ndarray) -> float:
    table, codes = _nearest(half, points)
    return float(((points - table[codes]) ** 2).sum(axis=1) @ weights) / 2


def _polish(half: np.ndarray, n_steps: int = 100) -> np.ndarray:
    """Over-relaxed Lloyd steps with exact cells, then the rotation, then rounding to float16."""
    for _ in range(n_steps):
        mass, first = cell_moments(np.concatenate([half, -half]), len(half))
        half = half + 1.7 * (first / mass[:, None] - half)
    half = half @ _turn(np.concatenate([half, -half])).T
    half = half.astype(np.float16).astype(np.float32)
    table = np.concatenate([half, -half])
    return table[np.lexsort((table[:, 1], table[:, 0]))]


def _turn(table: np.ndarray) -> np.ndarray:
    """The rotation `[2, 2]` that turns the axis of the smallest error to (1, 1)."""
    _, axes = np.linalg.eigh(error_covariance(table))
    angle = math.pi / 4 - math.atan2(axes[1, 0], axes[0, 0])
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _print_tables() -> None:
    print('"""Frozen codebooks for pairs of N(0, 1), made by `python -m turbocache.codebooks.pair`."""\n')
    print("# First half of each table by bits a coordinate, sorted; the other half mirrors it.")
    print("PAIR_HALVES: dict[float, tuple[tuple[float, float], ...]] = {")
    for bits in (2, 2.5, 3, 3.5, 4):
        print(f"    {bits:g}: (")
        levels = search_pairs(bits)
        for x, y in levels[: len(levels) // 2].astype(np.float16):
            print(f"        ({np.format_float_positional(x, trim='-')}, {np.format_float_positional(y, trim='-')}),")
        print("    ),", flush=True)
    print("}")


if __name__ == "__main__":
    _print_tables()
