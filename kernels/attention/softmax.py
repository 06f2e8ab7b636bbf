"""Attention's softmax and its plain form on the CPU, where MLX has no fused attention and a slow exponential.

MLX's CPU exponential calls the C library for each element (12 ns measured), which makes it most of an attention. A
polynomial in MLX operations takes 1 to 2 ns, as long as the arrays stay in the processor's cache; so long chunks go
through in tiles.
"""

import itertools
from collections.abc import Sequence
from functools import reduce

import mlx.core as mx

from kernels.attention.device import on_cpu

_LOG2_E = 1.4426950408889634
_ROUNDING = 12582912.0  # 1.5 * 2**23: adding it to a float32 rounds to an integer, which its low bits then hold
_LOWEST = -1e30
_UNDERFLOW = -86.0
# 2**f on [-1/2, 1/2]: the interpolation through the Chebyshev nodes, relative error below 3e-7 in float32.
_POLYNOMIAL = (1.33908634e-3, 9.67603192e-3, 5.55035711e-2, 0.240221075, 0.693147188, 1.00000008)
_FEW = 1 << 12
"""Below this many elements MLX's own softmax is as fast."""
_TILE = 1 << 19
"""Scores at a time: 2 MiB of float32."""
_FEW_ROWS = 8
"""Up to here `product` takes rows one at a time."""


def product(x: mx.array, y: mx.array) -> mx.array:
    """`x` `[B, H, R, K]` @ `y` `[B, H, K, N]`.

    On the CPU a batch of products of few rows is taken row by row: a BLAS starts its threads for each small product of
    matrices, but not for one of a vector. Waiting for them costs 5 microseconds on a quiet machine with two cores and
    70 on a busy one; 4 rows of 8 sessions over 256 tokens took 0.14 ms in place of 0.2 to 1.2.
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


# One pass each where MLX finds a C++ compiler at run time, else operation by operation.
_power_compiled = mx.compile(_power, shapeless=True)
_raise_compiled = mx.compile(_raise, shapeless=True)


def exp_below(x: mx.array, top: mx.array) -> mx.array:
    """e**(x - top) for float32 `x` at most `top` (broadcast), never below e**-86. NaN stays NaN.

    On the CPU with a relative error below 1e-6 plus 6e-8 |x - top|.
    """
    if not on_cpu():
        return mx.exp(mx.maximum(x - top, _UNDERFLOW))
    power, shifted = _power_compiled(x, top)
    raised: mx.array = _raise_compiled(power.view(mx.int32), shifted.view(mx.int32))
    return raised.view(mx.float32)


def _total(x: mx.array) -> mx.array:
    """Sum over the last axis, which stays. On the CPU as a product with ones: a quarter of the time."""
    return x @ mx.ones((x.shape[-1], 1)) if on_cpu() else x.sum(axis=-1, keepdims=True)


Masked = tuple[mx.array, mx.array | None]
"""Scores `[B, n_kv_heads, n_repeats, L, keys]` and a bool mask that broadcasts against them, or None."""


def weigh(parts: Sequence[Masked], sinks: mx.array | None) -> tuple[list[mx.array], mx.array | float]:
    """Softmax over the keys of all parts together, without its division: each part's weights, and their total
    `[B, n_kv_heads, n_repeats, L, 1]` (or 1 when they add up to that already).

    What a mask hides weighs at most 1e-37 of the rest. `sinks` `[n_heads]` are logits that count in the total and
    weigh nothing.
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


def divided(out: mx.array, total: mx.array | float) -> mx.array:
    """What `weigh` left to be done."""
    return out if isinstance(total, float) else out / total


def causal_mask(n_queries: int, n_keys: int) -> mx.array:
    """The last `n_queries` keys are the queries' own: bool `[1, 1, n_queries, n_keys]`."""
    return (mx.arange(n_keys) <= mx.arange(n_keys - n_queries, n_keys)[:, None])[None, None]


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`, on the CPU computed in tiles of queries.

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
        (weights,), total = weigh([(scores, seen)], sinks)
        tiles.append(divided(product(weights.flatten(2, 3), values).reshape(*shape, -1), total))
    return mx.concatenate(tiles, axis=3).flatten(1, 2)
