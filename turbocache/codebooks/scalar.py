"""Scalar codebooks for the coordinates of rotated vectors, and how they were computed.

After the rotation a coordinate of a unit vector in `dim` dimensions follows f(t) ~ (1 - t^2)^((dim - 3) / 2), which is
N(0, 1/dim) for the head dims in use (TurboQuant, arXiv 2504.19874, section 3.1). So one codebook for N(0, 1) per bit
width serves every head dim, and each row's scale includes the 1/sqrt(dim). Levels are rounded to float16, so that every
backend reads the same numbers.

`python -m turbocache.codebooks.scalar` prints `scalar_tables.py`. A test computes the tables again.
"""

import math
from functools import cache

import numpy as np

from kernels.lanes.base import CodebookKind
from turbocache.codebooks.pair import PAIR_BITS, normal_density, pair_levels
from turbocache.codebooks.scalar_tables import LLOYD_MAX, UNIFORM_STEP

MAX_BITS = 8
GRID_BITS = 5
"""From this width on every kind is the same grid, and encoding fits each row to it (kernels/codec/codes.py)."""


def _upper(x: np.ndarray) -> np.ndarray:
    """P(X > x) for X ~ N(0, 1), accurate far into the tail."""
    return np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in x])


def _half_cells(boundaries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, first and second moment of each cell between boundaries 0 = b_0 < b_1 < ... < infinity."""
    upper = np.append(_upper(boundaries), 0.0)
    density = np.append(normal_density(boundaries), 0.0)
    edge = np.append(boundaries * density[:-1], 0.0)
    mass = upper[:-1] - upper[1:]
    return mass, density[:-1] - density[1:], mass + edge[:-1] - edge[1:]


def gaussian_distortion(levels: np.ndarray) -> float:
    """Mean squared error of nearest-level coding of N(0, 1) by a symmetric codebook of unit scale."""
    half = np.asarray(levels, dtype=np.float64)[levels.size // 2 :]
    boundaries = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2])
    mass, first, second = _half_cells(boundaries)
    return float(2 * (second - 2 * half * first + half * half * mass).sum())


def lloyd_max(bits: int, tolerance: float = 1e-12) -> np.ndarray:
    """Positive half of the Lloyd-Max levels of N(0, 1), float64 `[2**(bits - 1)]`.

    Each level is the mean of its cell and each boundary the middle of two levels. Lloyd's iteration from a companded
    start, accelerated by Newton's method on the residual (the fixed point is unique for a log-concave density).
    """
    n = 1 << (bits - 1)
    # Panter-Dite: the optimal density of levels is f^(1/3), that is N(0, 3).
    quantiles = (np.arange(n) + 0.5) / n
    half = np.array([_normal_quantile(0.5 + q / 2) for q in quantiles]) * math.sqrt(3)
    half *= min(1.0, (2.0 + 0.45 * bits) / half[-1])
    for _ in range(200):
        residual, jacobian = _residual(half)
        step = np.linalg.solve(jacobian, residual)
        scale = 1.0
        while np.any(np.diff(np.concatenate([[0.0], half - scale * step])) <= 0):
            scale /= 2
        half = half - scale * step
        if np.abs(step).max() < tolerance:
            return half
    raise ArithmeticError(f"Lloyd-Max for {bits} bits did not settle")


def _residual(half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`levels - cell means` and its (tridiagonal) Jacobian."""
    n = half.size
    boundaries = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2])
    mass, first, _ = _half_cells(boundaries)
    mean = first / mass
    density = np.append(normal_density(boundaries), 0.0)
    lower = np.append(boundaries, 0.0)
    # d mean / d(lower boundary) and d mean / d(upper boundary) of each cell.
    by_lower = density[:-1] * (mean - lower[:-1]) / mass
    by_upper = density[1:] * (lower[1:] - mean) / mass
    by_lower[0] = 0.0
    jacobian = np.eye(n)
    for i in range(n):
        if i > 0:
            jacobian[i, i - 1] -= by_lower[i] / 2
            jacobian[i, i] -= by_lower[i] / 2
        if i < n - 1:
            jacobian[i, i] -= by_upper[i] / 2
            jacobian[i, i + 1] -= by_upper[i] / 2
    return half - mean, jacobian


def _normal_quantile(p: float) -> float:
    low, high = -40.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        if 0.5 * math.erfc(-middle / math.sqrt(2)) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def uniform_step(bits: int) -> float:
    """The spacing of `2**bits` equally spaced levels around 0 with the smallest mean squared error for N(0, 1)."""
    grid = np.arange(1 << bits) - ((1 << bits) - 1) / 2
    low, high = 1e-3, 4.0
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(200):  # golden section: the error has one minimum in the spacing
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if gaussian_distortion(grid * a) < gaussian_distortion(grid * b):
            high = b
        else:
            low = a
    return (low + high) / 2


def grid_step(bits: int) -> float:
    """The spacing of equally spaced levels, such that every level (c - (2**bits - 1) / 2) * step is a float16.

    From `GRID_BITS` on the cells cover -4 to 4. Below, it is `UNIFORM_STEP`, rounded: a level's count of half steps has
    `bits` binary digits, which leaves 11 - `bits` for the step. That raises the distortion by 0.01 %.
    """
    if bits >= GRID_BITS:
        return math.ldexp(8, -bits)
    mantissa, exponent = math.frexp(UNIFORM_STEP[bits])
    digits = 1 << (11 - bits)
    return math.ldexp(round(mantissa * digits) / digits, exponent)


def zooms_for(kind: CodebookKind, bits: float) -> tuple[float, ...]:
    """Factors other than 1 that encoding tries on a row for equally spaced levels (kernels/lanes/reference.py).

    Such levels fit a row best if they end where its coordinates end. At 4 bits this lowers the mean squared error of
    Gaussian rows by 9 % (128 coordinates) or 15 % (64). From `GRID_BITS` on, encoding fits the row's range instead.
    """
    return (0.8, 0.9, 1.1, 1.2) if kind == "uniform" and bits < GRID_BITS else ()


@cache
def levels_for(kind: CodebookKind, bits: float) -> np.ndarray:
    """Sorted levels of N(0, 1), float32 `[2**bits]`, float16-exact, read-only, or `pair_levels` for kinds with pairs.

    From `GRID_BITS` on all kinds are the grid, which needs no table. Raises ValueError for bits without a codebook and
    for the kind `none` (see `CodebookKind`).
    """
    if bits in PAIR_BITS and (kind == "pair" or (kind == "lloyd_max" and bits % 1)):
        return pair_levels(bits)
    if not 1 <= bits <= MAX_BITS or bits % 1 or kind == "none":
        raise ValueError(
            f"no {kind} codebook of {bits:g} bits; there are lloyd_max and uniform ones of 1 to {MAX_BITS}, "
            f"and pairs of {', '.join(f'{b:g}' for b in PAIR_BITS)}"
        )
    whole = int(bits)
    if kind != "uniform" and whole < GRID_BITS:
        half = np.array(LLOYD_MAX[whole])
    else:
        half = (np.arange(1 << (whole - 1)) + 0.5) * grid_step(whole)
    levels = np.concatenate([-half[::-1], half]).astype(np.float16).astype(np.float32)
    levels.flags.writeable = False
    return levels


def _print_tables() -> None:
    print('"""Frozen codebooks for N(0, 1), made by `python -m turbocache.codebooks.scalar`."""\n')
    print("# Positive half of the Lloyd-Max levels by bits; the other half mirrors it.")
    print("LLOYD_MAX: dict[int, tuple[float, ...]] = {")
    for bits in range(1, GRID_BITS):
        print(f"    {bits}: (")
        for level in lloyd_max(bits):
            print(f"        {level:.12f},")
        print("    ),")
    print("}\n\n# Spacing of the best equally spaced levels by bits.")
    print("UNIFORM_STEP: dict[int, float] = {")
    for bits in range(1, GRID_BITS):
        print(f"    {bits}: {uniform_step(bits):.12f},")
    print("}")


if __name__ == "__main__":
    _print_tables()
