"""KVarN (arXiv 2606.03458) written from its description, as a cache to compare presets with.

A tile is `GROUP` consecutive tokens of one KV head, whole in the head's dims. Keys and values get the same steps, in
float32:

1. A Walsh-Hadamard rotation along the dims.
2. Variance normalisation. x_ij = x_ij / (r_i c_j), where r and c make the deviations of all rows alike, and those of
   all columns. They are found by turns, in logarithms, 16 times: ln c_j += ln std(column j), then
   ln r_i += ln std(row i). Kept are the factors of the round with the least imbalance, max std / min std of the columns
   plus that of the rows.
3. Rounding to the nearest of 2**bits steps from the smallest to the largest number of each row:
   s = (max - min) / (2**bits - 1), code = round((x - min) / s).

A row is a channel in a tile of keys, and a token in a tile of values. Step and minimum are stored times r, so a tile
reads x'_ij = (code_ij * step_i + low_i) * c_j, rotated back. For each KV head a tile holds, at head dim D:

    key codes      D streams of GROUP codes        value codes     GROUP streams of D codes
    step, low      float16 [D] each                step, low       float16 [GROUP] each
    c              float16 [GROUP], of tokens      c               float16 [D], of channels

So a key has 32 / GROUP + 16 / D bits a number beside its codes, and a value 32 / D + 16 / GROUP.

The authors' code clips ln r and ln c to at least -0.3. Then tiles whose deviation is below 0.74 stay as they are, which
depends on the scale of a model's values. Here a tile is first divided by its own deviation, and nothing is clipped.
Without the clip, c would drift where rows have means, because both deviations can't be 1 then. So after each round the
mean of ln c moves to ln r, which changes no product. The squared errors of both forms differ by less than 2 % on
SmolLM2-135M, Gemma 3 270M and tiny-recall (512 tokens, 4 and 2 bits).

Tokens that do not fill a tile stay raw, as the paper has them. A sink and a window stay raw as well, so that rows
compare with presets of the same sizes.
"""

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx

from kernels.attention.softmax import attention
from kernels.codec.layout import pack, unpack
from turbocache.cache.ring import RingConfig
from turbocache.cache.view import PendingAttention
from turbocache.evaluation.compared import ComparedLayer, PendingAnswer

GROUP = 128
ROUNDS = 16
RAW_BITS = 16
"""Tiles of this width hold tokens as they are: for tests of the cache."""

_LEAST = 1e-3
"""Smaller deviations count as this, so that constant rows have a logarithm."""
_TINY = 1e-10

Tiles = tuple[mx.array, ...]
"""Arrays of tiles, each `[n_kv_heads, n_tiles, ...]`."""


def normalise(tiles: mx.array, rounds: int = ROUNDS) -> tuple[mx.array, mx.array, mx.array]:
    """Divide tiles `[..., R, C]` by factors of their rows and columns until all deviations are alike.

    Returns the quotient, the rows' factors `[..., R, 1]` and the columns' `[..., 1, C]`, float32.
    """
    tiles = tiles.astype(mx.float32)
    whole = mx.maximum(mx.sqrt(mx.var(tiles, axis=(-2, -1), keepdims=True)), _TINY)
    tiles = tiles / whole
    log_rows, log_columns = mx.zeros_like(tiles[..., :1]), mx.zeros_like(tiles[..., :1, :])
    best_rows, best_columns, least = log_rows, log_columns, _imbalance(tiles)
    for _ in range(rounds):
        log_columns = log_columns + _log_deviation(tiles * mx.exp(-log_rows - log_columns), axis=-2)
        log_rows = log_rows + _log_deviation(tiles * mx.exp(-log_rows - log_columns), axis=-1)
        drift = log_columns.mean(axis=-1, keepdims=True)
        log_rows, log_columns = log_rows + drift, log_columns - drift
        imbalance = _imbalance(tiles * mx.exp(-log_rows - log_columns))
        better = imbalance <= least  # never for NaN, when factors overflow
        best_rows, best_columns = mx.where(better, log_rows, best_rows), mx.where(better, log_columns, best_columns)
        least = mx.minimum(least, imbalance)
    return tiles * mx.exp(-best_rows - best_columns), whole * mx.exp(best_rows), mx.exp(best_columns)


def _deviation(tiles: mx.array, axis: int) -> mx.array:
    return mx.sqrt(mx.var(tiles, axis=axis, keepdims=True, ddof=1))


def _log_deviation(tiles: mx.array, axis: int) -> mx.array:
    return mx.log(mx.maximum(_deviation(tiles, axis), _LEAST))


def _imbalance(tiles: mx.array) -> mx.array:
    """`[..., 1, 1]`, 2 at best."""
    spread = [
        deviation.max(axis=(-2, -1), keepdims=True) / mx.maximum(deviation.min(axis=(-2, -1), keepdims=True), _TINY)
        for deviation in (_deviation(tiles, axis) for axis in (-2, -1))
    ]
    return spread[0] + spread[1]


class Codec(Protocol):
    """Stores tiles of keys, or of values."""

    def encode(self, tokens: mx.array) -> Tiles:
        """`[n_kv_heads, n_tiles, GROUP, dim]` of any float type to arrays."""

    def decode(self, tiles: Tiles) -> mx.array:
        """Arrays back to `[n_kv_heads, n_tiles, GROUP, dim]`."""


class Raw:
    """Keeps tokens as they are."""

    def encode(self, tokens: mx.array) -> Tiles:
        return (tokens,)

    def decode(self, tiles: Tiles) -> mx.array:
        return tiles[0]


class Kvarn:
    """Tiles of `bits` bits a number, 1 to 8. `by_channel` for keys: rows of a tile are channels, else tokens."""

    def __init__(self, bits: int, by_channel: bool) -> None:
        self._bits, self._by_channel = bits, by_channel

    def encode(self, tokens: mx.array) -> Tiles:
        """Returns words uint32 `[.., R, words_for(C, bits)]`, then float16 steps `[.., R]`, lows `[.., R]` and columns'
        factors `[.., C]`. Raises ValueError for a dim that is not a power of two.
        """
        tiles, rows, columns = normalise(self._turned(_rotated(tokens)))
        low = tiles.min(axis=-1, keepdims=True)
        last = 2**self._bits - 1
        step = mx.maximum((tiles.max(axis=-1, keepdims=True) - low) / last, _TINY)
        codes = mx.clip(mx.round((tiles - low) / step), 0, last).astype(mx.uint32)
        factors = (step * rows).squeeze(-1), (low * rows).squeeze(-1), columns.squeeze(-2)
        return pack(codes, self._bits), *(factor.astype(mx.float16) for factor in factors)

    def decode(self, tiles: Tiles) -> mx.array:
        """Float32."""
        words, step, low, columns = tiles
        codes = unpack(words, columns.shape[-1], self._bits).astype(mx.float32)
        step, low, columns = (factor.astype(mx.float32) for factor in (step, low, columns))
        return _rotated(self._turned((codes * step[..., None] + low[..., None]) * columns[..., None, :]))

    def _turned(self, tiles: mx.array) -> mx.array:
        return tiles.swapaxes(-1, -2) if self._by_channel else tiles


def codec(bits: int, by_channel: bool) -> Codec:
    """The codec of a width: 1 to 8, or `RAW_BITS`."""
    return Raw() if bits == RAW_BITS else Kvarn(bits, by_channel)


def _rotated(tokens: mx.array) -> mx.array:
    """The Hadamard transform along the dims, which undoes itself."""
    dim = tokens.shape[-1]
    if dim & (dim - 1):
        raise ValueError(f"the Hadamard rotation needs a power of two as head dim, not {dim}")
    return mx.hadamard_transform(tokens.astype(mx.float32))


class KvarnLayer(ComparedLayer):
    """One layer's cache for one row: tiles, and the raw tokens before and behind them.

    Positions of n tokens (start = keep + group * n_tiles): sink [0, keep), tiles [keep, start), raw [start, n). A query
    at position q reads the tiles that end before its newest `window` tokens and all other tokens raw, so chunks do not
    change results. If the ring has a `max_size`, as sliding windows do, a query sees its newest `max_size` tokens, and
    tiles that no later query sees are dropped. The arrays have no unused slots.
    """

    def __init__(self, ring: RingConfig, keys: Codec, values: Codec, group: int = GROUP) -> None:
        self._ring, self._codecs, self._group = ring, (keys, values), group
        self._offset = 0
        self._n_tiles = 0
        self._gone = 0
        """The first tiles, which are dropped."""
        self._raw: list[mx.array] = []
        """Keys and values `[1, n_kv_heads, n, dim]`: the sink, then what follows the tiles."""
        self._tiles: list[Tiles] = []
        """Of keys and of values, without the dropped ones. Empty before the first tile."""

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def state(self) -> tuple[list[mx.array], list[Tiles]]:
        return self._raw, self._tiles

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[PendingAttention, PendingAttention]:
        first, n_tokens = self._offset, keys.shape[2]
        raw = [
            mx.concatenate([held, new], axis=2)
            for held, new in zip(self._raw or [keys[:, :, :0], values[:, :, :0]], (keys, values), strict=True)
        ]
        before = self._n_tiles
        self._offset += n_tokens
        self._store(raw)
        pending = PendingAnswer(keys.dtype, self._answer(raw, self._mask(first, before)))
        return pending, pending

    def _store(self, raw: list[mx.array]) -> None:
        """Move tokens that the newest query does not read raw from `raw` to tiles."""
        keep, group = self._ring.keep, self._group
        n_new = (self._offset - 1 - keep - self._ring.window) // group - self._n_tiles
        self._raw = raw
        if n_new <= 0:
            return
        end = keep + group * n_new
        new = [
            codec.encode(tokens[0, :, keep:end].reshape(tokens.shape[1], n_new, group, -1))
            for codec, tokens in zip(self._codecs, raw, strict=True)
        ]
        if self._tiles:
            new = [
                tuple(mx.concatenate([held, more], axis=1) for held, more in zip(*pair, strict=True))
                for pair in zip(self._tiles, new, strict=True)
            ]
        self._tiles = new
        self._n_tiles += n_new
        self._raw = [mx.concatenate([tokens[:, :, :keep], tokens[:, :, end:]], axis=2) for tokens in raw]

    def _drop(self) -> None:
        """Drop the tiles that no later query sees."""
        if self._ring.max_size is None:
            return
        hidden = self._offset - self._ring.max_size + 1 - self._ring.keep
        n = min(self._n_tiles, hidden // self._group) - self._gone
        if n > 0:
            self._tiles = [tuple(array[:, n:] for array in tiles) for tiles in self._tiles]
            self._gone += n

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """A causal mask; the cache masks by its own window. Raises ValueError for other masks."""
        return super().make_mask(N, return_array, None if window_size == self._ring.max_size else window_size)

    def _mask(self, first: int, n_before: int) -> mx.array:
        """Bool `[1, 1, L, n]` over the tiles held and the raw tokens, for queries from position `first` on. `n_before`
        tiles were there before them, so the raw tokens continue behind these.
        """
        keep, group = self._ring.keep, self._group
        query = mx.arange(first, self._offset)[:, None]
        readable = (query - keep - self._ring.window) // group  # negative: no tile
        n_sink = min(keep, self._offset)
        raw = mx.concatenate([mx.arange(n_sink), mx.arange(keep + group * n_before, max(keep, self._offset))])
        sees_raw = (raw <= query) & ((raw < keep) | ((raw - keep) // group >= readable))
        tiles = mx.arange(self._gone * group, self._n_tiles * group)
        mask = mx.concatenate([tiles // group < readable, sees_raw], axis=1)
        if self._ring.max_size is not None:
            mask = mask & (mx.concatenate([tiles + keep, raw]) > query - self._ring.max_size)
        return mask[None, None]

    def _answer(self, raw: list[mx.array], mask: mx.array) -> Callable[[mx.array, float, mx.array | None], mx.array]:
        def attend(queries: mx.array, scale: float, sinks: mx.array | None) -> mx.array:
            keys, values = (self._expanded(i, tokens) for i, tokens in enumerate(raw))
            sinks = None if sinks is None else sinks.astype(keys.dtype)
            out = attention(queries.astype(keys.dtype), keys, values, scale, mask, sinks).astype(queries.dtype)
            self._drop()
            return out

        return attend

    def _expanded(self, which: int, raw: mx.array) -> mx.array:
        """Keys (0) or values (1) of all tiles and raw tokens, `[1, n_kv_heads, n, dim]` in the raw tokens' dtype."""
        if not self._tiles:
            return raw
        tokens = self._codecs[which].decode(self._tiles[which]).flatten(1, 2)[None]
        return mx.concatenate([tokens.astype(raw.dtype), raw], axis=2)
