"""Conditioning of keys: a constant that dominates a head's keys is taken off them as they enter the cache.

Key projections with large biases (Qwen2 and 2.5) give keys k = c + u with |c| far above |u|. A codec spends its bits on
c, which says nothing, because every query meets the same <q, c> in all its scores and softmax does not see a constant.
So a row keeps k - m instead, raw tokens and pages alike, m being the mean of the row's first keys: queries, kernels and
outputs stay as they are, and a decode step pays one subtraction in the layers that need it.

    m_h = mean over the first `RingConfig.raw_slots` positions of k_h
    conditioned if |m_h|^2 > CENTRE_ABOVE * mean |k_h - m_h|^2, else m_h = 0           (by row, layer and KV head)

These are the positions that a row holds raw when its first page falls due, however its tokens came, so what is taken
off does not depend on how a prompt is cut. An extra logit (attention sinks) is not shifted with the scores: layers that
have one are not conditioned.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

CENTRE_ABOVE = 4.0
"""The squared mean, in units of the mean squared deviation, above which a head's keys are centred.

Over 256 tokens ordinary heads have 0.5 to 2.5, because slow rotary pairs have not turned yet, and planted biases of
Qwen's size 1,900 to 3,700. Centring an ordinary head costs a little (k4v4 on tiny-recall: KL divergence 0.0008 to
0.0009); a constant that is left in costs more from a ratio of 1 on (0.0013, at 4 0.0028, at 8 0.0046).
"""


class KeyCentre:
    """What is taken off the keys of one row: by layer `[1, n_kv_heads, 1, key_dim]` in the dtype of its raw keys, zero
    for heads that are not conditioned.

    Made when the row's first page falls due, filled layer by layer in that pass, and shared by the row's forks: it is
    part of what their pages mean.
    """

    __slots__ = ("_n_heads", "means")

    def __init__(self) -> None:
        self.means: dict[int, mx.array] = {}
        self._n_heads: int | None = None

    @classmethod
    def known(cls, means: dict[int, mx.array], n_heads: int) -> "KeyCentre":
        """One that was settled before, such as a file's."""
        centre = cls()
        centre.means, centre._n_heads = dict(means), n_heads
        return centre

    @property
    def nbytes(self) -> int:
        return sum(mean.nbytes for mean in self.means.values())

    def measure(self, layer: int, keys: mx.array, above: float) -> mx.array:
        """Decide for one layer over the row's first keys `[1, n_kv_heads, n, key_dim]`. Returns the layer's mean."""
        exact = keys.astype(mx.float32)
        mean = exact.mean(axis=2, keepdims=True)
        spread = mx.square(exact - mean).sum(axis=-1, keepdims=True).mean(axis=2, keepdims=True)
        dominates = mx.square(mean).sum(axis=-1, keepdims=True) > above * spread  # False where keys are NaN
        self.means[layer] = mx.where(dominates, mean, 0.0).astype(keys.dtype)
        return self.means[layer]

    def settle(self) -> None:
        """Forget the layers that need nothing, so that they cost nothing. Waits for the device, once a row."""
        if self._n_heads is not None:
            return
        centred = [mx.any(mean != 0, axis=-1).sum() for mean in self.means.values()]
        counts = np.array(mx.stack(centred)) if centred else np.zeros(0, dtype=int)
        self.means = {layer: self.means[layer] for layer, n in zip(self.means, counts, strict=True) if n}
        self._n_heads = int(counts.sum())

    @property
    def n_heads(self) -> int:
        """KV heads that are conditioned, over all layers; settles."""
        self.settle()
        return self._n_heads or 0


class RowCentres:
    """The centres of a batch's rows by layer, as one array each: made again when rows change, not with every step."""

    def __init__(self) -> None:
        self._rows: list[KeyCentre | None] = []
        self._arrays: dict[int, mx.array] = {}

    def update(self, rows: Sequence[KeyCentre | None]) -> None:
        """The batch has these rows now. Call before a step is planned, never while one is under way."""
        for centre in rows:
            if centre is not None:
                centre.settle()
        if len(rows) == len(self._rows) and all(a is b for a, b in zip(rows, self._rows, strict=True)):
            return
        self._rows, self._arrays = list(rows), {}
        for layer in {layer for centre in rows if centre is not None for layer in centre.means}:
            parts = [None if centre is None else centre.means.get(layer) for centre in rows]
            nothing = mx.zeros_like(next(part for part in parts if part is not None))
            self._arrays[layer] = mx.concatenate([nothing if part is None else part for part in parts])

    def of(self, layer: int) -> mx.array | None:
        """`[B, n_kv_heads, 1, key_dim]`, or None when no row has anything taken off in this layer."""
        return self._arrays.get(layer)

    def decide(self, layer: int, deciding: dict[int, KeyCentre], raw_keys: mx.array, above: float) -> mx.array:
        """Measure the centres of some rows of a decode step, whose raw buffers `[B, n_kv_heads, n, key_dim]` hold the
        first n positions in order. Returns the buffers with these rows centred.
        """
        shifts = [mx.zeros_like(raw_keys[:1, :, :1])] * raw_keys.shape[0]
        for row, centre in deciding.items():
            shifts[row] = centre.measure(layer, raw_keys[row : row + 1], above)
        shift = mx.concatenate(shifts)
        known = self.of(layer)
        self._arrays[layer] = shift if known is None else known + shift
        return raw_keys - shift
