"""Softmax, and attention in MLX operations for the CPU, where MLX has no fused attention.

MLX's CPU exponential calls the C library for each element. It takes 12 ns (measured), most of attention's time. A
polynomial in MLX operations takes 1 to 2 ns if the arrays fit the processor's cache, so long chunks are cut into
tiles.
"""

import itertools
from collections.abc import Sequence
from functools import reduce

import mlx.core as mx

from kernels.attention.device import on_cpu

_LOG2_E = 1.4426950408889634
_ROUNDING = 12582912.0  # 1.5 * 2**23: adding it rounds a float32 to an integer, held in the low bits
_LOWEST = -1e30
_UNDERFLOW = -60.0
"""Weights this far below the top are 1e-26 of it, which float32 can't see in a sum. Smaller ones times a value would be
subnormal numbers, with which a processor takes 5 to 10 times as long for the product (measured: 46 ms instead of 10 for
289 tokens of 9 heads).
"""
# 2**f on [-1/2, 1/2], interpolated through the Chebyshev nodes. Relative error below 3e-7 in float32.
_POLYNOMIAL = (1.33908634e-3, 9.67603192e-3, 5.55035711e-2, 0.240221075, 0.693147188, 1.00000008)
_FEW = 1 << 12
"""MLX's own softmax is as fast for fewer elements."""
_TILE = 1 << 19
"""Scores per tile: 2 MiB of float32."""
_FEW_ROWS = 8
"""Up to this number `product` takes rows one at a time."""


def product(x: mx.array, y: mx.array) -> mx.array:
    """`x` `[B, H, R, K]` @ `y` `[B, H, K, N]`.

    On the CPU few rows are multiplied one by one. A BLAS starts its threads for each small product of matrices, but not
    for a vector. On two cores, waiting for the threads takes 5 us on a quiet machine and 70 us on a busy one. 4 rows of
    8 sessions over 256 tokens took 0.14 ms instead of 0.2 to 1.2 ms.
    """
    if on_cpu() and 1 < x.shape[2] <= _FEW_ROWS:
        return (x[:, :, :, None] @ y[:, :, None]).squeeze(3)
    return x @ y


def _power(x: mx.array, top: mx.array) -> tuple[mx.array, mx.array]:
    """2**fraction and the shifted exponent of e**(x - top), for `exp_below`."""
    scaled = mx.maximum(x - top, _UNDERFLOW) * _LOG2_E
    shifted = scaled + _ROUNDING
    fraction = scaled - (shifted - _ROUNDING)
    power = fraction * _POLYNOMIAL[0] + _POLYNOMIAL[1]
    for coefficient in _POLYNOMIAL[2:]:
        power = power * fraction + coefficient
    return power, shifted


def _raise(power: mx.array, shifted: mx.array) -> mx.array:
    return power + mx.left_shift(shifted, mx.array(23, dtype=mx.int32))


# One pass each if MLX finds a C++ compiler at run time, else one operation after another.
_power_compiled = mx.compile(_power, shapeless=True)
_raise_compiled = mx.compile(_raise, shapeless=True)


def exp_below(x: mx.array, top: mx.array) -> mx.array:
    """e**(x - top) for float32 `x` at most `top` (broadcast), never below e**-60. NaN stays NaN.

    On the CPU the relative error is below 1e-6 plus 6e-8 |x - top|.
    """
    if not on_cpu():
        return mx.exp(mx.maximum(x - top, _UNDERFLOW))
    power, shifted = _power_compiled(x, top)
    raised: mx.array = _raise_compiled(power.view(mx.int32), shifted.view(mx.int32))
    return raised.view(mx.float32)


def _total(x: mx.array) -> mx.array:
    """Sum over the last axis, kept as 1. On the CPU a product with ones takes a quarter of the time."""
    return x @ mx.ones((x.shape[-1], 1)) if on_cpu() else x.sum(axis=-1, keepdims=True)


Masked = tuple[mx.array, mx.array | None]
"""Scores `[B, n_kv_heads, n_repeats, L, keys]` and a bool mask that broadcasts against them, or None."""


def softmax_weights(parts: Sequence[Masked], sinks: mx.array | None) -> tuple[list[mx.array], mx.array | float]:
    """Softmax over the keys of all parts together, without the division (see `normalise`).

    Returns each part's weights, and their total `[B, n_kv_heads, n_repeats, L, 1]`, or 1 if they already add up to it.
    Masked keys weigh at most 1e-26 of the others. `sinks` `[n_heads]` are logits that count only in the total.
    """
    scores = [part if mask is None else mx.where(mask, part, _LOWEST) for part, mask in parts]
    if sinks is None and (sum(part.size for part in scores) < _FEW or not on_cpu()):
        ends = list(itertools.accumulate(part.shape[-1] for part in scores))
        weights = mx.softmax(mx.concatenate(scores, axis=-1) if len(scores) > 1 else scores[0], axis=-1)
        return list(mx.split(weights, ends[:-1], axis=-1)), 1.0
    tops = [part.max(axis=-1, keepdims=True) for part in scores]
    if sinks is not None:
        sinks = sinks.astype(mx.float32).reshape(1, *scores[0].shape[1:3], 1, 1)
        tops.append(sinks)
    top = reduce(mx.maximum, tops)
    raised = [exp_below(part, top) for part in scores]
    totals = [_total(part) for part in raised]
    if sinks is not None:
        totals.append(exp_below(sinks, top))
    return raised, reduce(mx.add, totals)


def normalise(out: mx.array, total: mx.array | float) -> mx.array:
    """Weighted values divided by the total of `softmax_weights`."""
    return out if isinstance(total, float) else out / total


def causal_mask(n_queries: int, n_keys: int) -> mx.array:
    """Bool `[1, 1, n_queries, n_keys]`. The last `n_queries` keys are the queries' own."""
    return (mx.arange(n_keys) <= mx.arange(n_keys - n_queries, n_keys)[:, None])[None, None]


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`; on the CPU, the same in tiles of queries.

    `queries` `[B, n_heads, L, dim]`, `keys` and `values` `[B, n_kv_heads, K, dim]`; `mask` bool `[B, 1, L, K]`,
    "causal" or None. Returns the queries' dtype, `[B, n_heads, L, value_dim]`.
    """
    if not on_cpu() or queries.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    n_rows, n_heads, n_queries, dim = queries.shape
    n_kv_heads, n_keys = keys.shape[1], keys.shape[2]
    grouped = (queries * scale).reshape(n_rows, n_kv_heads, n_heads // n_kv_heads, n_queries, dim)
    if isinstance(mask, str):
        mask = causal_mask(n_queries, n_keys) if n_queries > 1 else None
    transposed, per_tile = keys.swapaxes(-1, -2), max(1, _TILE // (n_rows * n_heads * n_keys))
    tiles = []
    for start in range(0, n_queries, per_tile):
        tile = grouped[:, :, :, start : start + per_tile]
        shape = tile.shape[:-1]
        scores = product(tile.flatten(2, 3), transposed).reshape(*shape, n_keys)
        seen = None if mask is None else mask[:, :, None, start : start + per_tile]
        (weights,), total = softmax_weights([(scores, seen)], sinks)
        tiles.append(normalise(product(weights.flatten(2, 3), values).reshape(*shape, -1), total))
    return mx.concatenate(tiles, axis=3).flatten(1, 2)
