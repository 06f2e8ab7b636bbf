"""The fallback: the same codec read by MLX's own quantised matrix products, so it runs wherever MLX runs.

Levels are equally spaced, so a code c stands for `low + step * c`, which MLX's affine lanes compute inside the
product; the row's scale is applied to scores and to probabilities instead. Compared with `mx.quantize`, which keeps a
scale and a bias for each group, a row keeps one float16: the bytes of a page are those of the reference layout.

Page bytes, for each KV head: key codes packed along the page's tokens (`[key_dim, PAGE]`: the product over the head
dim is then the fast one of MLX's two forms), value codes packed along the head dim, padded to a multiple of 32 codes,
key scales and value scales `[PAGE]` in float16.
"""

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np

from kernels.lanes import CodebookKind, Codebooks, LaneShape, PageIndex, Pages
from kernels.layout import PAGE, pack, words_for
from kernels.reference import quantise

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (128, 64, 32)


class _Grid:
    """Equally spaced levels as MLX's affine lanes see them. Raises ValueError for any other codebook."""

    def __init__(self, levels: np.ndarray) -> None:
        steps = np.diff(levels)
        if not np.allclose(steps, steps[0], rtol=1e-4):
            raise ValueError("the packed lanes need equally spaced levels")
        self.step, self.low, self.n_levels = float(steps.mean()), float(levels[0]), len(levels)

    def nearest(self, units: mx.array) -> tuple[mx.array, mx.array]:
        """Coordinates to codes and levels by rounding, which costs a tenth of a search."""
        codes = mx.clip(mx.round((units - self.low) / self.step), 0, self.n_levels - 1)
        return codes.astype(mx.uint32), self.low + self.step * codes

    def affine(self, words: mx.array, n_groups: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Scales and biases for words `[..., rows, n_words]`, shape `[..., rows, n_groups]`."""
        shape = (*words.shape[:-1], n_groups)
        return mx.full(shape, self.step, dtype=dtype), mx.full(shape, self.low, dtype=dtype)


class PackedLanes:
    """`Lanes` on `mx.quantized_matmul` and `mx.dequantize`. Any head dims; 2, 3, 4, 5, 6 and 8 bits."""

    name: ClassVar[str] = "packed"
    codebook: ClassVar[CodebookKind] = "uniform"

    def __init__(self, shape: LaneShape, codebooks: Codebooks) -> None:
        reason = self.unsupported(shape)
        if reason:
            raise ValueError(reason)
        self.shape = shape
        self._keys, self._values = _Grid(codebooks.keys), _Grid(codebooks.values)
        self._value_pad = -shape.value_dim % 32
        padded = shape.value_dim + self._value_pad
        self._value_group = next(g for g in _GROUPS if padded % g == 0)
        self._value_groups = padded // self._value_group
        self._value_words = words_for(padded, shape.value_bits)

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        for what, bits in (("keys", shape.key_bits), ("values", shape.value_bits)):
            if bits not in _BITS:
                return f"MLX's quantised products have no {bits}-bit lanes (for {what}); there are {_BITS}"
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
        key_codes, key_scales = quantise(keys, self._keys.nearest, unbiased=True)
        value_codes, value_scales = quantise(values, self._values.nearest, unbiased=False)
        value_codes = mx.pad(value_codes, [(0, 0)] * (value_codes.ndim - 1) + [(0, self._value_pad)])
        return (
            pack(key_codes.swapaxes(-1, -2), self.shape.key_bits),
            pack(value_codes, self.shape.value_bits),
            key_scales,
            value_scales,
        )

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        key_words, value_words, key_scales, value_scales = pages
        s = self.shape
        keys = mx.dequantize(key_words, *self._keys.affine(key_words, 1, dtype), group_size=PAGE, bits=s.key_bits)
        values = mx.dequantize(
            value_words,
            *self._values.affine(value_words, self._value_groups, dtype),
            group_size=self._value_group,
            bits=s.value_bits,
        )
        keys = (keys * key_scales[..., None, :].astype(dtype)).swapaxes(-1, -2)
        return keys, values[..., : s.value_dim] * value_scales[..., None].astype(dtype)

    def attend(
        self,
        queries: mx.array,
        raw_keys: mx.array,
        raw_values: mx.array,
        pages: Pages,
        index: PageIndex,
        mask: mx.array | None,
        sinks: mx.array | None,
    ) -> mx.array:
        n_rows, n_heads, _, key_dim = queries.shape
        n_kv_heads, n_repeats = self.shape.n_kv_heads, n_heads // self.shape.n_kv_heads
        grouped = queries.reshape(n_rows, n_kv_heads, n_repeats, key_dim)
        raw_keys, raw_values = raw_keys.astype(mx.float32), raw_values.astype(mx.float32)
        scores = grouped @ raw_keys.swapaxes(-1, -2)
        if index.n_pages:
            scores = mx.concatenate([self._page_scores(grouped, pages, index), scores], axis=-1)
        if mask is not None:
            scores = mx.where(mask, scores, -mx.inf)
        if sinks is not None:
            column = sinks.astype(mx.float32).reshape(1, n_kv_heads, n_repeats, 1)
            column = mx.broadcast_to(column, (*scores.shape[:-1], 1))
            weights = mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]
        else:
            weights = mx.softmax(scores, axis=-1)
        n_paged = index.n_pages * PAGE
        out = weights[..., n_paged:] @ raw_values
        if n_paged:
            out = out + self._page_values(weights[..., :n_paged], pages, index)
        return out.reshape(n_rows, n_heads, 1, self.shape.value_dim)

    def _page_scores(self, grouped: mx.array, pages: Pages, index: PageIndex) -> mx.array:
        """`[B, n_kv_heads, n_repeats, key_dim]` against every page: `[B, n_kv_heads, n_repeats, P * PAGE]`."""
        words, scales = mx.take(pages[0], index.flat, axis=0), mx.take(pages[2], index.flat, axis=0)
        each = mx.take(grouped, index.row_of, axis=0)
        scores = mx.quantized_matmul(
            each,
            words,
            *self._keys.affine(words, 1, each.dtype),
            transpose=False,
            group_size=PAGE,
            bits=self.shape.key_bits,
        )
        scores = scores * scales[:, :, None, :]
        if index.ragged:
            scores = mx.take(scores, index.dense.reshape(-1), axis=0)
        n_rows, n_kv_heads, n_repeats, _ = grouped.shape
        scores = scores.reshape(n_rows, index.n_pages, n_kv_heads, n_repeats, PAGE)
        return scores.transpose(0, 2, 3, 1, 4).reshape(n_rows, n_kv_heads, n_repeats, -1)

    def _page_values(self, weights: mx.array, pages: Pages, index: PageIndex) -> mx.array:
        """`[B, n_kv_heads, n_repeats, P * PAGE]` times every page's values: `[B, n_kv_heads, n_repeats, value_dim]`."""
        n_rows, n_kv_heads, n_repeats, _ = weights.shape
        words, scales = mx.take(pages[1], index.flat, axis=0), mx.take(pages[3], index.flat, axis=0)
        weights = weights.reshape(n_rows, n_kv_heads, n_repeats, index.n_pages, PAGE).transpose(0, 3, 1, 2, 4)
        weights = weights.reshape(n_rows * index.n_pages, n_kv_heads, n_repeats, PAGE)
        if index.ragged:
            weights = mx.take(weights, index.place_in_dense, axis=0)
        out = mx.quantized_matmul(
            weights * scales[:, :, None, :],
            words,
            *self._values.affine(words, self._value_groups, weights.dtype),
            transpose=False,
            group_size=self._value_group,
            bits=self.shape.value_bits,
        )[..., : self.shape.value_dim]
        if n_rows == 1:
            return out.sum(axis=0, keepdims=True)
        return (index.membership @ out.reshape(out.shape[0], -1)).reshape(n_rows, *out.shape[1:])
