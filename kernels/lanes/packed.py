"""The fallback: MLX's own quantised matrix products read the codes, so it runs wherever MLX runs.

Tokens are rotated as in the reference. Levels are equally spaced, so a code c stands for `low + step * c`, which MLX
computes inside the product. The row's scale is applied to scores and probabilities. `mx.quantize` keeps a scale and a
bias per group; here a row keeps one float16, so a page has as many bytes as in the reference layout.

Page bytes, for each KV head:

    key codes     `[key_dim, PAGE]`, packed along the page's tokens, so that MLX's product takes its fast form
    value codes   packed along the head dim, padded to a multiple of 32 codes
    scales        key scales and value scales `[PAGE]` in float16
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar

import mlx.core as mx
import numpy as np

from kernels.attention.device import on_cpu
from kernels.attention.page_tables import PageIndex
from kernels.attention.softmax import causal_mask, normalise, product, softmax_weights
from kernels.codec.codes import range_end
from kernels.codec.layout import PAGE, pack, words_for
from kernels.codec.rotation import Rotation
from kernels.lanes.base import (
    AttentionPath,
    ChunkInputs,
    CodebookKind,
    Codebooks,
    Lanes,
    LaneShape,
    Pages,
    Pair,
    StepInputs,
    store_tokens,
)
from kernels.lanes.reference import quantise

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (128, 64, 32)

_FEW_TOKENS = 48
"""Longer chunks expand the pages once, which is then cheaper than reading them packed. Measured on a CPU over 4,096
tokens: 24.5 ms packed and 28.3 ms expanded for 48 tokens, 88 and 85 ms for 128. From 64 tokens on, rotating queries and
chunk instead of the expanded pages made no measurable difference.
"""


class _Grid:
    """Equally spaced levels as MLX's affine products read them. Raises ValueError for any other codebook."""

    def __init__(self, levels: np.ndarray) -> None:
        steps = np.diff(levels)
        if not np.allclose(steps, steps[0], rtol=1e-4):
            raise ValueError("the packed lanes need equally spaced levels")
        self.step, self.low, self.n_levels = float(steps.mean()), float(levels[0]), len(levels)
        self.bits = self.n_levels.bit_length() - 1
        self.range_end = range_end(levels)

    def nearest(self, units: mx.array) -> tuple[mx.array, mx.array]:
        """Coordinates to codes and levels by rounding, in a tenth of a search's time."""
        codes = mx.clip(mx.round((units - self.low) / self.step), 0, self.n_levels - 1)
        # NaN may become any integer. The mask keeps it out of its neighbours' bits.
        return codes.astype(mx.uint32) & (self.n_levels - 1), self.low + self.step * codes

    def affine(self, shape: tuple[int, ...], dtype: mx.Dtype) -> Pair:
        """Constant scales and biases for MLX."""
        return mx.full(shape, self.step, dtype=dtype), mx.full(shape, self.low, dtype=dtype)

    def product(self, x: mx.array, words: mx.array, bits: int, group: int) -> mx.array:
        """`x` `[..., R, K]` times the levels of `words` `[..., K, n_words]`, float32 `[..., R, 32 * n_words / bits]`.

        Uses MLX's quantised product, except on the CPU, where MLX decodes the codes again for every row of `x`.
        """
        if on_cpu():
            return self._product_of_bytes(x, words, bits) if 8 % bits == 0 else self._product_of_codes(x, words, bits)
        groups = (*words.shape[:-1], words.shape[-1] * 32 // bits // group)
        scales, biases = self.affine(groups, x.dtype)
        return mx.quantized_matmul(x, words, scales, biases, transpose=False, group_size=group, bits=bits)

    def _product_of_bytes(self, x: mx.array, words: mx.array, bits: int) -> mx.array:
        """The same product from whole bytes.

        With u_k = byte >> (k * bits), the k-th code of a byte is c_k = u_k - 2**bits * u_(k+1). So x @ c_k is the
        difference of two plain products. Bytes become floats in order; the interleaving in `mx.dequantize` is slow on a
        CPU. The products are larger than their difference, so float32 loses a digit or two. Centring u_k on 0 keeps the
        loss small, and the differences are then the levels in units of the step.
        """
        x, above, codes = x * self.step, None, []
        for u in reversed(_shifted_bytes(bits)(words.view(mx.uint8))):
            here = product(x, u)
            codes.append(here if above is None else here - (1 << bits) * above)
            above = here
        return mx.stack(codes[::-1], axis=-1).flatten(-2) if len(codes) > 1 else codes[0]

    def _product_of_codes(self, x: mx.array, words: mx.array, bits: int) -> mx.array:
        """The same product for codes that cross bytes.

        n codes fill n_bytes bytes. The k-th codes of all groups are one factor, so each code is read from at most two
        arrays of bytes, in order.
        """
        n_bytes = math.lcm(bits, 8) // 8
        in_bytes = words.view(mx.uint8)
        codes = _crossing_codes(bits)(*(in_bytes[..., i::n_bytes] for i in range(n_bytes)))
        return mx.stack([product(x * self.step, c) for c in codes], axis=-1).flatten(-2)


@cache
def _crossing_codes(bits: int) -> Callable[..., tuple[mx.array, ...]]:
    """The i-th bytes of all groups, for each i, to their k-th codes as float32, centred on 0, for each k."""

    def read(*in_bytes: mx.array) -> tuple[mx.array, ...]:
        codes = []
        for first in range(0, 8 * len(in_bytes), bits):
            byte, shift = divmod(first, 8)
            code = mx.right_shift(in_bytes[byte], mx.array(shift, dtype=mx.uint8))
            if shift + bits > 8:
                code = code | mx.left_shift(in_bytes[byte + 1], mx.array(8 - shift, dtype=mx.uint8))
            codes.append((code & ((1 << bits) - 1)).astype(mx.float32) - ((1 << bits) - 1) / 2)
        return tuple(codes)

    compiled: Callable[..., tuple[mx.array, ...]] = mx.compile(read, shapeless=True)
    return compiled


@cache
def _shifted_bytes(bits: int) -> Callable[[mx.array], tuple[mx.array, ...]]:
    """Bytes to all their u_k as float32, centred on 0. One pass if MLX can compile it."""

    def shift(in_bytes: mx.array) -> tuple[mx.array, ...]:
        shifted = [mx.right_shift(in_bytes, mx.array(k, dtype=mx.uint8)) if k else in_bytes for k in range(0, 8, bits)]
        return tuple(u.astype(mx.float32) - (255 >> k) / 2 for u, k in zip(shifted, range(0, 8, bits), strict=True))

    compiled: Callable[[mx.array], tuple[mx.array, ...]] = mx.compile(shift, shapeless=True)
    return compiled


class PackedLanes(Lanes):
    """`Lanes` on `mx.quantized_matmul` and `mx.dequantize`. Any head dims; 2, 3, 4, 5, 6 and 8 bits."""

    name: ClassVar[str] = "packed"
    codebook: ClassVar[CodebookKind] = "uniform"

    def __init__(self, shape: LaneShape, codebooks: Codebooks) -> None:
        super().__init__(shape, codebooks)
        self._key_rotation, self._value_rotation = Rotation(shape.key_dim), Rotation(shape.value_dim)
        self._keys, self._values = _Grid(codebooks.keys), _Grid(codebooks.values)
        self._zooms = codebooks.key_zooms, codebooks.value_zooms
        self._value_pad = -shape.value_dim % 32
        padded = shape.value_dim + self._value_pad
        self._value_group = next(g for g in _GROUPS if padded % g == 0)
        self._value_groups = padded // self._value_group
        self._value_words = words_for(padded, shape.value_bits)

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        for what, bits in (("keys", shape.key_bits), ("values", shape.value_bits)):
            if bits not in _BITS:
                return f"MLX's quantised products have no {bits:g}-bit lanes (for {what}); there are {_BITS}"
        return None

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        s = self.shape
        return [
            ((s.n_kv_heads, s.key_dim, words_for(PAGE, s.key_bits)), mx.uint32),
            ((s.n_kv_heads, PAGE, self._value_words), mx.uint32),
            ((s.n_kv_heads, PAGE), mx.float16),
            ((s.n_kv_heads, PAGE), mx.float16),
        ]

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        keys, values = self._key_rotation.apply(keys), self._value_rotation.apply(values)
        key_codes, key_scales = quantise(
            keys, self._keys.nearest, unbiased=True, zooms=self._zooms[0], end=self._keys.range_end
        )
        value_codes, value_scales = quantise(
            values, self._values.nearest, unbiased=False, zooms=self._zooms[1], end=self._values.range_end
        )
        value_codes = mx.pad(value_codes, [(0, 0)] * (value_codes.ndim - 1) + [(0, self._value_pad)])
        return (
            pack(key_codes.swapaxes(-1, -2), self._keys.bits),
            pack(value_codes, self._values.bits),
            key_scales,
            value_scales,
        )

    def expand(self, pages: Pages, dtype: mx.Dtype) -> Pair:
        keys, values = self.expand_rotated(pages)
        return self._key_rotation.inverse(keys).astype(dtype), self._value_rotation.inverse(values).astype(dtype)

    def expand_rotated(self, pages: Pages) -> Pair:
        """`expand` without the inverse rotation: levels times scales, in float32."""
        key_words, value_words, key_scales, value_scales = pages
        s = self.shape
        key_affine = self._keys.affine((*key_words.shape[:-1], 1), mx.float32)
        value_affine = self._values.affine((*value_words.shape[:-1], self._value_groups), mx.float32)
        keys = mx.dequantize(key_words, *key_affine, group_size=PAGE, bits=self._keys.bits)
        values = mx.dequantize(value_words, *value_affine, group_size=self._value_group, bits=self._values.bits)
        keys = (keys * key_scales[..., None, :].astype(mx.float32)).swapaxes(-1, -2)
        return keys, values[..., : s.value_dim] * value_scales[..., None].astype(mx.float32)

    def attend(self, chunk: ChunkInputs) -> mx.array:
        n_tokens, n_raw = chunk.queries.shape[2], chunk.raw[0].shape[2]
        if n_tokens > _FEW_TOKENS:
            return super().attend(chunk)
        page_mask: mx.array | None = None
        raw_mask: mx.array | None = None
        if isinstance(chunk.mask, str):  # causal among the raw tokens; every page is older
            raw_mask = causal_mask(n_tokens, n_raw)
        elif chunk.mask is not None:
            page_mask, raw_mask = mx.split(chunk.mask, [chunk.page_index.n_pages * PAGE], axis=-1)
        return self._attend_packed(chunk, page_mask, raw_mask)

    def attend_step(self, step: StepInputs) -> tuple[mx.array, Pair]:
        queries, tokens, raw, pages, rows, scale, sinks = step
        keys, values = stored = store_tokens(tokens, raw, rows)
        live = keys[:, :, : rows.n_raw], values[:, :, : rows.n_raw]
        chunk = ChunkInputs(queries, live, pages, rows.index, None, scale, sinks)
        return self._attend_packed(chunk, rows.page_mask, rows.raw_mask), stored

    def path(self, n_tokens: int | None) -> AttentionPath:
        return "packed" if n_tokens is None or n_tokens <= _FEW_TOKENS else "expanded"

    def _attend_packed(self, chunk: ChunkInputs, page_mask: mx.array | None, raw_mask: mx.array | None) -> mx.array:
        """One softmax over raw tokens and pages, with a mask for each part instead of the chunk's.

        Raw tokens meet the queries as they are. Pages meet them rotated, and their part of the output is rotated back.
        """
        queries, raw, pages, index, _, scale, sinks = chunk
        n_rows, n_heads, n_tokens, key_dim = queries.shape
        n_kv_heads, n_repeats = self.shape.n_kv_heads, n_heads // self.shape.n_kv_heads
        # One product has a row for each query head of the KV head and each token.
        grouped = queries.astype(mx.float32).reshape(n_rows, n_kv_heads, n_repeats * n_tokens, key_dim) * scale
        keys, values = raw[0].astype(mx.float32), raw[1].astype(mx.float32)
        parts = [(product(grouped, keys.swapaxes(-1, -2)), raw_mask)]
        if index.n_pages:
            parts.append((self._page_scores(self._key_rotation.apply(grouped), pages, index), page_mask))
        shape = (n_rows, n_kv_heads, n_repeats, n_tokens)
        masked = [(x.reshape(*shape, -1), None if seen is None else seen[:, :, None]) for x, seen in parts]
        weights, total = softmax_weights(masked, sinks)
        out = product(weights[0].flatten(2, 3), values)
        if index.n_pages:
            out = out + self._value_rotation.inverse(self._page_values(weights[1].flatten(2, 3), pages, index))
        out = normalise(out.reshape(*shape, -1), total).reshape(n_rows, n_heads, n_tokens, self.shape.value_dim)
        return out.astype(queries.dtype)

    def _page_scores(self, grouped: mx.array, pages: Pages, index: PageIndex) -> mx.array:
        """Scores of queries `[B, n_kv_heads, R, key_dim]` with every page: `[B, n_kv_heads, R, P * PAGE]`."""
        words, scales = self._gather(pages[0], index), self._gather(pages[2], index)
        words = words.swapaxes(2, 3).flatten(-2)  # [B, n_kv_heads, key_dim, P * words]
        scores = self._keys.product(grouped, words, self._keys.bits, PAGE)
        return scores * scales.flatten(-2)[:, :, None]

    def _page_values(self, weights: mx.array, pages: Pages, index: PageIndex) -> mx.array:
        """Values weighted by `[B, n_kv_heads, R, P * PAGE]`: `[B, n_kv_heads, R, value_dim]`."""
        words, scales = self._gather(pages[1], index).flatten(2, 3), self._gather(pages[3], index)
        weights = weights * scales.flatten(-2)[:, :, None]
        out = self._values.product(weights, words, self._values.bits, self._value_group)[..., : self.shape.value_dim]
        return out if index.pageless is None else mx.where(index.pageless, 0.0, out)

    def _gather(self, array: mx.array, index: PageIndex) -> mx.array:
        """The rows' pages of `[n_pages, n_kv_heads, ...]`, as `[B, n_kv_heads, P, ...]`."""
        return mx.take(array.flatten(0, 1), index.heads(self.shape.n_kv_heads), axis=0)
