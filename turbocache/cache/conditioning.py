"""Conditioning of keys: a constant that dominates a head's keys is subtracted as they enter the cache.

Key projections with large biases (Qwen2 and 2.5) give keys k = c + u with |c| far above |u|. A codec spends its bits on
c, which carries no information: all scores of a query contain the same <q, c>, and softmax ignores a constant. So a row
stores k - m, in raw tokens and pages, where m is the mean of the row's first keys. Queries, kernels and outputs do not
change. A decode step pays one subtraction in the layers that need it.

    m_h = mean over the first `RingConfig.raw_slots` positions of k_h
    conditioned if |m_h|^2 > CENTRE_ABOVE * mean |k_h - m_h|^2, else m_h = 0           (by row, layer and KV head)

A row holds these positions raw when its first page is due, however its tokens arrived. So m does not depend on how a
prompt is split into chunks. An extra logit (attention sinks) does not shift with the scores, so layers that have one
are not conditioned.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

CENTRE_ABOVE = 1.0
"""The squared mean, in units of the mean squared deviation, above which a head's keys are centred.

Heads of pretrained models have 0.5 to 4, planted biases of Qwen's size 1,900 to 3,700. KL divergence of k4v4 by this
threshold (2,560 tokens of WikiText-2, scored from 512; the first two models requantised to 4 bits, on a GPU):

                    4         1.5       1         0.5       0
    SmolLM2-135M    0.0079    0.0052    0.0041    0.0040    0.0040
    Gemma 3 270M    0.0173    0.0043    0.0043    0.0043    0.0043
    tiny-recall     0.00082             0.00082   0.00091   0.00091

Below 1, a head's mean is mostly that of slow rotary pairs, which turn away from it later in the text.
"""


class KeyCentre:
    """What is subtracted from the keys of one row.

    Made when the row's first page is due and filled layer by layer in that pass. Forks of the row share it, because
    their pages depend on it.
    """

    __slots__ = ("_n_heads", "means")

    def __init__(self, means: Mapping[int, mx.array] | None = None, n_heads: int | None = None) -> None:
        """Without arguments not settled yet. A file restores a settled one, with its number of conditioned heads."""
        self.means = dict(means or {})
        """By layer `[1, n_kv_heads, 1, key_dim]` in the dtype of the raw keys; 0 for heads without conditioning."""
        self._n_heads = n_heads

    @property
    def nbytes(self) -> int:
        return sum(mean.nbytes for mean in self.means.values())

    def measure(self, layer: int, keys: mx.array, above: float) -> mx.array:
        """Measure one layer's centre over the row's first keys `[1, n_kv_heads, n, key_dim]`, and return it."""
        exact = keys.astype(mx.float32)
        mean = exact.mean(axis=2, keepdims=True)
        spread = mx.square(exact - mean).sum(axis=-1, keepdims=True).mean(axis=2, keepdims=True)
        dominates = mx.square(mean).sum(axis=-1, keepdims=True) > above * spread  # False where keys are NaN
        self.means[layer] = mx.where(dominates, mean, 0.0).astype(keys.dtype)
        return self.means[layer]

    def settle(self) -> None:
        """Drop the layers without conditioned heads. Waits for the device, once a row."""
        if self._n_heads is not None:
            return
        centred = [mx.any(mean != 0, axis=-1).sum() for mean in self.means.values()]
        counts = np.array(mx.stack(centred)) if centred else np.zeros(0, dtype=int)
        self.means = {layer: self.means[layer] for layer, n in zip(self.means, counts, strict=True) if n}
        self._n_heads = int(counts.sum())

    @property
    def n_heads(self) -> int:
        """Conditioned KV heads over all layers. Settles."""
        self.settle()
        return self._n_heads or 0


class RowCentres:
    """The centres of a batch's rows, one array for each layer. Made again only when rows change."""

    def __init__(self) -> None:
        self._rows: list[KeyCentre | None] = []
        self._arrays: dict[int, mx.array] = {}

    def update(self, rows: Sequence[KeyCentre | None]) -> None:
        """Set the batch's rows. Call before a step is planned, never during one."""
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
        """`[B, n_kv_heads, 1, key_dim]`, or None when no row has a centre in this layer."""
        return self._arrays.get(layer)

    def decide(self, layer: int, deciding: dict[int, KeyCentre], raw_keys: mx.array, above: float) -> mx.array:
        """Measure the centres of the rows `deciding` in a decode step. Returns the buffers with these rows centred.

        `raw_keys` is `[B, n_kv_heads, n, key_dim]`; these rows hold their first n positions in order.
        """
        shifts = [mx.zeros_like(raw_keys[:1, :, :1])] * raw_keys.shape[0]
        for row, centre in deciding.items():
            shifts[row] = centre.measure(layer, raw_keys[row : row + 1], above)
        shift = mx.concatenate(shifts)
        known = self.of(layer)
        self._arrays[layer] = shift if known is None else known + shift
        return raw_keys - shift
