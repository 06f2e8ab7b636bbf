"""Lanes: one way of storing pages and attending over them. Every backend is a `Lanes` class with the same contract.

All keys, values, queries and outputs here are in the model's basis; whether pages hold rotated tokens is the lanes' own
affair. Nothing in this package knows the model or the session. Shapes use `B` rows, `n_heads` query heads, `n_kv_heads`
KV heads, `PAGE` tokens a page.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import mlx.core as mx
import numpy as np

from kernels.attention.masks import Mask, MaskForm
from kernels.attention.page_tables import PageIndex, RowIndex
from kernels.attention.softmax import attention
from kernels.codec.layout import PAGE, words_for

Pages = tuple[mx.array, ...]
"""The arrays of one layer's pages, each `[n_pages, ...]`, in the order of `Lanes.page_arrays`."""

CodebookKind = Literal["lloyd_max", "pair", "uniform", "none"]
"""`lloyd_max`: the best levels, and points for pairs of coordinates where a coordinate has a half bit. `pair`: points
from 2 to 4 bits, levels elsewhere. `uniform`: equally spaced levels, which affine integer products can read.
"""


@dataclass(frozen=True, slots=True)
class LaneShape:
    """What a layer stores: head counts, head dims and code widths. Widths are 1 to 8 bits, 2.5 and 3.5 among them.
    `qjl`: one of the keys' bits is the sign of a projection of what the others leave (kernels/lanes/qjl.py).
    """

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    key_bits: float
    value_bits: float
    qjl: bool = False

    @property
    def n_repeats(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def widths(self) -> str:
        """Such as `k4v3`: how presets are named."""
        return f"k{self.key_bits:g}v{self.value_bits:g}{'_qjl' if self.qjl else ''}"


@dataclass(frozen=True, slots=True)
class Codebooks:
    """Reconstruction levels of N(0, 1) for keys and for values, float32 with float16's values, each `[2**bits]` and
    sorted, or `[2**(2 * bits), 2]` for pairs of coordinates (kernels/codec/codes.py). Zooms are factors beside 1 that
    encoding tries on each row (kernels/lanes/reference.py).
    """

    keys: np.ndarray
    values: np.ndarray
    key_zooms: tuple[float, ...] = ()
    value_zooms: tuple[float, ...] = ()


Pair = tuple[mx.array, mx.array]
"""Keys and values of the same tokens, `[B, n_kv_heads, n, dim]` each."""

AttentionPath = Literal["fused", "packed", "expanded"]
"""How attention reads pages: in a kernel of its own, by products on packed codes, or expanded first."""


def coded_page_arrays(shape: LaneShape) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """`Lanes.page_arrays` of layout 2 (kernels/codec/layout.py): key codes, value codes, key scales, value scales."""
    heads = shape.n_kv_heads
    return [
        ((heads, PAGE, words_for(shape.key_dim, shape.key_bits)), mx.uint32),
        ((heads, shape.value_dim, words_for(PAGE, shape.value_bits)), mx.uint32),
        ((heads, PAGE), mx.float16),
        ((heads, PAGE), mx.float16),
    ]


class Lanes(Protocol):
    """One layer's storage and attention. Instances are immutable; the pool owns the arrays."""

    name: ClassVar[str]
    codebook: ClassVar[CodebookKind]
    shape: LaneShape

    @property
    def masks(self) -> MaskForm:
        """How `attend` likes its masks best. Plain ones it takes as well."""
        ...

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        """Why this backend can't take the shape, or None."""
        ...

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        """Shape (without the leading page axis) and dtype of each array that a page consists of."""
        ...

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        """`[N, n_kv_heads, PAGE, key_dim]` and `[N, n_kv_heads, PAGE, value_dim]` of any float type to the arrays of N
        pages.
        """
        ...

    def expand(self, pages: Pages, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """The arrays of N pages to keys and values in `dtype`, shapes as given to `encode`."""
        ...

    def attend(
        self,
        queries: mx.array,
        raw_keys: mx.array,
        raw_values: mx.array,
        pages: Pages,
        index: PageIndex,
        mask: Mask,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention of `L` query tokens per row over the row's pages and raw tokens.

        `queries` `[B, n_heads, L, key_dim]` in the model's dtype; `raw_keys`/`raw_values` `[B, n_kv_heads, S, dim]`;
        `pages` the whole pool; `mask` `[B, 1, L, P * PAGE + S]` with the pages first, in plain form or that of `masks`,
        or "causal" when the last L raw tokens are the queries' own and every page is older, or None when everything is
        visible; `scale` multiplies the products; `sinks` `[n_heads]` extra logits without a value, or None. Returns the
        queries' dtype, `[B, n_heads, L, value_dim]`.
        """
        ...

    def attend_step(
        self,
        queries: mx.array,
        tokens: Pair,
        raw: Pair,
        pages: Pages,
        rows: RowIndex,
        scale: float,
        sinks: mx.array | None,
    ) -> tuple[mx.array, Pair]:
        """`attend` for a decode step of L = 1 to 8 tokens per row, causal among themselves, without a mask: `rows` says
        where everything is. `tokens` are the step's own, n = L, and `raw` the whole raw buffers, n = keep +
        window_slots, of the same dtype; these may hold anything in the slots of `tokens`. Returns the output in the
        queries' dtype, and the raw buffers with the tokens in their slots; what was given stays as it is.
        """
        ...

    def path(self, n_tokens: int | None) -> AttentionPath:
        """How `attend` reads pages for `n_tokens` query tokens, or, for None, how `attend_step` does."""
        ...


def store_tokens(tokens: Pair, raw: Pair, rows: RowIndex) -> Pair:
    """The raw buffers with a step's tokens in their slots; all as in `Lanes.attend_step`."""
    keys, values = (
        mx.put_along_axis(kept, rows.slots(new.shape), new, axis=2) for new, kept in zip(tokens, raw, strict=True)
    )
    return keys, values


Expand = Callable[[Pages, mx.Dtype], tuple[mx.array, mx.array]]
"""`Lanes.expand`, or the same in another basis."""

Attend = Callable[[mx.array, mx.array, mx.array, Pages, PageIndex, Mask, float, mx.array | None], mx.array]
"""`Lanes.attend`."""


def gather_expanded(expand: Expand, pages: Pages, table: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Pages of `table` `[B, P]` as contiguous keys and values `[B, n_kv_heads, P * PAGE, dim]` in `dtype`."""
    n_rows, n_pages = table.shape
    chosen = tuple(mx.take(array, table.reshape(-1), axis=0) for array in pages)

    def lay_out(tokens: mx.array) -> mx.array:
        _, n_kv_heads, _, dim = tokens.shape
        tokens = tokens.reshape(n_rows, n_pages, n_kv_heads, PAGE, dim).transpose(0, 2, 1, 3, 4)
        return tokens.reshape(n_rows, n_kv_heads, n_pages * PAGE, dim)

    keys, values = expand(chosen, dtype)
    return lay_out(keys), lay_out(values)


def attend_expanded(
    expand: Expand,
    queries: mx.array,
    raw_keys: mx.array,
    raw_values: mx.array,
    pages: Pages,
    index: PageIndex,
    mask: Mask,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """`Lanes.attend` by expanding every page and attending in the plain way: the definition of correct."""
    keys, values = raw_keys, raw_values
    if index.n_pages:
        page_keys, page_values = gather_expanded(expand, pages, index.table, raw_keys.dtype)
        if index.pageless is not None:
            page_values = mx.where(index.pageless, 0.0, page_values)
        keys = mx.concatenate([page_keys, raw_keys], axis=2)
        values = mx.concatenate([page_values, raw_values], axis=2)
    sinks = sinks if sinks is None else sinks.astype(keys.dtype)
    return attention(queries.astype(keys.dtype), keys, values, scale, mask, sinks).astype(queries.dtype)


def attend_step_masked(
    attend: Attend,
    queries: mx.array,
    tokens: Pair,
    raw: Pair,
    pages: Pages,
    rows: RowIndex,
    scale: float,
    sinks: mx.array | None,
) -> tuple[mx.array, Pair]:
    """`Lanes.attend_step` in MLX operations: store, then `attend` with a mask."""
    stored = store_tokens(tokens, raw, rows)
    keys, values = (array[:, :, : rows.n_raw] for array in stored)
    return attend(queries, keys, values, pages, rows.index, rows.mask, scale, sinks), stored
