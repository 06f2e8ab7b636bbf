"""The packed layout of codes of 1 to 8 bits in 32-bit words.

A row of `n` codes of `bits` bits is one little-endian bit stream. Code `i` is its bits `[i*bits, (i+1)*bits)`, and
stream bit `j` is bit `j % 32` of word `j // 32`. Zero bits fill the last word. A code stands for one coordinate, or for
two; then it has twice a coordinate's bits, which may be 2.5 or 3.5. For the widths of `mx.quantize` this is also MLX's
order, so MLX's quantised matrix products can read it.
"""

import math

import mlx.core as mx

from kernels.codec import PAGE as PAGE

LAYOUT_VERSION = 2
"""Raise it when bytes of an older version would be read differently."""

_WORD = 32


def words_for(n: int, bits: float) -> int:
    """Number of 32-bit words for the codes of `n` coordinates of `bits` bits."""
    return math.ceil(n * bits / _WORD)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes `[..., n]` (any integer type, each below `2**bits`) to words `[..., words_for(n, bits)]`, uint32.

    Raises ValueError for `bits` outside 1..8.
    """
    _check_bits(bits)
    *lead, n = codes.shape
    padding = -n % _WORD
    codes = codes.astype(mx.uint32)
    if padding:
        codes = mx.concatenate([codes, mx.zeros((*lead, padding), dtype=mx.uint32)], axis=-1)
    # 32 codes fill exactly `bits` words.
    groups = codes.reshape(*lead, (n + padding) // _WORD, _WORD)
    shifts = mx.arange(_WORD, dtype=mx.uint32) * bits % _WORD
    low = mx.left_shift(groups, shifts)
    words = []
    for word in range(bits):
        first, last = -(-_WORD * word // bits), -(-_WORD * (word + 1) // bits)  # codes that start in this word
        total = low[..., first:last].sum(axis=-1)
        carried = first * bits - _WORD * word  # bits of a code that starts in the word before
        if carried:
            total = total + mx.right_shift(groups[..., first - 1], mx.array(bits - carried, dtype=mx.uint32))
        words.append(total)
    packed = mx.stack(words, axis=-1).reshape(*lead, -1)
    return packed[..., : words_for(n, bits)]


def unpack(words: mx.array, n: int, bits: int) -> mx.array:
    """Words `[..., words_for(n, bits)]` back to codes `[..., n]`, uint32. Raises ValueError for a wrong word count."""
    _check_bits(bits)
    if words.shape[-1] != words_for(n, bits):
        raise ValueError(f"{n} codes of {bits} bits lie in {words_for(n, bits)} words, not in {words.shape[-1]}")
    mask = mx.array((1 << bits) - 1, dtype=mx.uint32)
    if _WORD % bits == 0:
        shifts = mx.arange(0, _WORD, bits, dtype=mx.uint32)
        codes = mx.right_shift(words[..., None], shifts).reshape(*words.shape[:-1], -1)
        return (codes & mask)[..., :n]
    starts = [i * bits for i in range(n)]
    word = mx.array([s // _WORD for s in starts])
    shift = mx.array([s % _WORD for s in starts], dtype=mx.uint32)
    spills = mx.array([s % _WORD + bits > _WORD for s in starts])
    following = mx.minimum(word + 1, words.shape[-1] - 1)
    low = mx.right_shift(mx.take(words, word, axis=-1), shift)
    # A shift by 32 is undefined. Codes that do not spill shift by 31, and the result is discarded.
    up = mx.where(spills, _WORD - shift.astype(mx.int32), 31).astype(mx.uint32)
    high = mx.where(spills, mx.left_shift(mx.take(words, following, axis=-1), up), mx.array(0, dtype=mx.uint32))
    return (low | high) & mask


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
