"""Masks of attention over a chunk, in the form in which a backend takes them fastest."""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from kernels.attention.softmax import causal_mask

Mask = mx.array | Literal["causal"] | None

_FEW = 4
"""Up to here, less one, MLX's attention on CUDA is its own kernel, which plans nothing."""
_LEAST_QUERIES, _LEAST_KEYS = 64, 256
_QUERY_SIZES, _KEY_SIZES = 1, 4
"""Sizes in each doubling: what is too much of keys costs more."""


@dataclass(frozen=True, slots=True)
class MaskForm:
    """`added`: as numbers, 0 or -inf in the queries' dtype, instead of bools. `rounded`: for rounded numbers of queries
    and keys, where attention has to be planned for each pair of them. What is too much is hidden.
    """

    added: bool = False
    rounded: bool = False

    def of(self, mask: Mask, n_queries: int, n_keys: int, dtype: mx.Dtype) -> Mask:
        """A mask `[B, 1, n_queries, n_keys]`, `causal` (the queries' own keys are the last ones) or None in this form:
        of bools or of `dtype`, `[B, 1, L, S]` with L and S at least as large.
        """
        if self.rounded and n_queries >= _FEW:
            if mask is None:
                mask = mx.ones((1, 1, n_queries, n_keys), dtype=mx.bool_)
            elif isinstance(mask, str):
                mask = causal_mask(n_queries, n_keys)
            more_queries = rounded_up(n_queries, _LEAST_QUERIES, _QUERY_SIZES) - n_queries
            more_keys = rounded_up(n_keys, _LEAST_KEYS, _KEY_SIZES) - n_keys
            mask = mx.pad(mask, [(0, 0), (0, 0), (0, more_queries), (0, more_keys)])
        if self.added and isinstance(mask, mx.array):
            mask = mx.where(mask, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
        return mask


def rounded_up(n: int, least: int, n_sizes: int) -> int:
    """The next of the sizes `least`, `2 * least`, ..., of which there are at most `n_sizes` in each doubling."""
    step = max(least, (1 << ((n - 1).bit_length() - 1)) // n_sizes) if n > 1 else least
    return -(-n // step) * step


def roomy(tokens: mx.array, n: int) -> mx.array:
    """Tokens `[B, heads, S, dim]` with zeros behind them, `[B, heads, n, dim]`."""
    more = n - tokens.shape[2]
    return mx.pad(tokens, [(0, 0), (0, 0), (0, more), (0, 0)]) if more else tokens
