"""Masks for the attention of a chunk, in the form that is fastest on a backend."""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from kernels.attention.softmax import causal_mask

Mask = mx.array | Literal["causal"] | None

_CUDNN_FROM = 4
"""Chunks of fewer queries run MLX's own CUDA kernel. Longer ones run cuDNN, which builds a plan for each (L, S)."""
_LEAST_QUERIES, _LEAST_KEYS = 64, 256
_QUERY_SIZES, _KEY_SIZES = 1, 4
"""Sizes per doubling. Keys have more, because padding them costs more."""


@dataclass(frozen=True, slots=True)
class MaskForm:
    """The form of mask that a backend asks for. By default masks are bools of the exact size."""

    added: bool = False
    """Numbers to add, 0 or -inf in the queries' dtype, instead of bools."""
    rounded: bool = False
    """Round the numbers of queries and keys up, so that few pairs need a plan. The mask hides the padding."""

    def of(self, mask: Mask, n_queries: int, n_keys: int, dtype: mx.Dtype) -> Mask:
        """Convert a mask `[B, 1, n_queries, n_keys]`, "causal" (the last keys are the queries' own) or None.

        The result has bools or `dtype`, `[B, 1, L, S]` with L >= n_queries and S >= n_keys, or is "causal" or None.
        """
        if self.rounded and n_queries >= _CUDNN_FROM:
            if mask is None:
                mask = mx.ones((1, 1, n_queries, n_keys), dtype=mx.bool_)
            elif isinstance(mask, str):
                mask = causal_mask(n_queries, n_keys)
            more_queries = round_up(n_queries, _LEAST_QUERIES, _QUERY_SIZES) - n_queries
            more_keys = round_up(n_keys, _LEAST_KEYS, _KEY_SIZES) - n_keys
            mask = mx.pad(mask, [(0, 0), (0, 0), (0, more_queries), (0, more_keys)])
        if self.added and isinstance(mask, mx.array):
            mask = mx.where(mask, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
        return mask


def round_up(n: int, least: int, n_sizes: int) -> int:
    """`n` rounded up to a multiple of `least`, or of a larger step that leaves at most `n_sizes` sizes per doubling."""
    step = max(least, (1 << ((n - 1).bit_length() - 1)) // n_sizes) if n > 1 else least
    return -(-n // step) * step


def pad_tokens(tokens: mx.array, n: int) -> mx.array:
    """Tokens `[B, heads, S, dim]` padded with zeros to `[B, heads, n, dim]`."""
    more = n - tokens.shape[2]
    return mx.pad(tokens, [(0, 0), (0, 0), (0, more), (0, 0)]) if more else tokens
