"""Lanes: how one layer's pages are stored and attended over. A backend is a `Lanes` class (vLLM: attention backend).

Keys, values, queries and outputs are in the model's basis. Whether pages hold rotated tokens is internal to the lanes.
Nothing in this package knows the model or the session. Shapes use `B` rows, `n_heads` query heads, `n_kv_heads` KV
heads and `PAGE` tokens per page.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from kernels.attention.masks import Mask, MaskForm
from kernels.attention.page_tables import PageIndex, RowIndex
from kernels.attention.softmax import attention
from kernels.codec.layout import PAGE, words_for

Pages = tuple[mx.array, ...]
"""The arrays of one layer's pages, each `[n_pages, ...]`, in the order of `Lanes.page_arrays`."""

Pair = tuple[mx.array, mx.array]
"""Keys and values of the same tokens, `[B, n_kv_heads, n, dim]` each."""

CodebookKind = Literal["lloyd_max", "pair", "uniform", "none"]
"""lloyd_max: levels with the least error, and points for pairs of coordinates at half bits.
pair: points for pairs from 2 to 4 bits, levels at other widths.
uniform: equally spaced levels, which affine integer products can read.
"""

AttentionPath = Literal["fused", "packed", "expanded"]
"""How attention reads pages: in a fused kernel, by products on packed codes, or expanded first."""


@dataclass(frozen=True, slots=True)
class LaneShape:
    """What one layer stores. Raises nothing: `Lanes.unsupported` checks it."""

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    key_bits: float
    """Bits per coordinate of a key: 1 to 8, or 2.5 or 3.5."""
    value_bits: float

    @property
    def n_repeats(self) -> int:
        """Query heads per KV head."""
        return self.n_heads // self.n_kv_heads

    @property
    def widths(self) -> str:
        """Such as `k4v3`: how presets are named."""
        return f"k{self.key_bits:g}v{self.value_bits:g}"


@dataclass(frozen=True, slots=True)
class Codebooks:
    """Reconstruction levels of N(0, 1): float32 arrays whose numbers float16 holds exactly.

    Each is `[2**bits]` and sorted, or `[2**(2 * bits), 2]` for pairs of coordinates (kernels/codec/codes.py).
    """

    keys: np.ndarray
    values: np.ndarray
    key_zooms: tuple[float, ...] = ()
    """Factors, besides 1, that encoding tries on each row (kernels/lanes/reference.py)."""
    value_zooms: tuple[float, ...] = ()


class ChunkInputs(NamedTuple):
    """What `Lanes.attend` reads: L query tokens per row, over the row's pages and raw tokens."""

    queries: mx.array
    """`[B, n_heads, L, key_dim]` in the model's dtype."""
    raw: Pair
    """Raw keys and values, `[B, n_kv_heads, S, dim]` each."""
    pages: Pages
    """The whole pool."""
    page_index: PageIndex
    mask: Mask
    """Bool `[B, 1, L, P * PAGE + S]`, pages first, or the form that `Lanes.masks` asks for.
    "causal": the last L raw tokens are the queries' own and every page is older. None: everything is visible.
    """
    scale: float
    """Multiplies the products."""
    sinks: mx.array | None
    """`[n_heads]`: extra logits without a value."""


class StepInputs(NamedTuple):
    """What `Lanes.attend_step` reads: a decode step of L = 1 to 8 tokens per row, causal among themselves."""

    queries: mx.array
    """`[B, n_heads, L, key_dim]` in the model's dtype."""
    tokens: Pair
    """The step's own keys and values, L of each, in the dtype of `raw`."""
    raw: Pair
    """The whole raw buffers: keep + window_slots tokens. The slots of `tokens` may hold anything."""
    pages: Pages
    """The whole pool."""
    rows: RowIndex
    """Where everything is."""
    scale: float
    sinks: mx.array | None


def coded_page_arrays(shape: LaneShape) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """`Lanes.page_arrays` of layout 2 (kernels/codec/layout.py): key codes, value codes, key scales, value scales."""
    heads = shape.n_kv_heads
    return [
        ((heads, PAGE, words_for(shape.key_dim, shape.key_bits)), mx.uint32),
        ((heads, shape.value_dim, words_for(PAGE, shape.value_bits)), mx.uint32),
        ((heads, PAGE), mx.float16),
        ((heads, PAGE), mx.float16),
    ]


class Lanes(ABC):
    """One layer's storage and attention. Instances are immutable; the pool owns the arrays.

    By default attention expands all pages first. A backend overrides what it does better.
    """

    name: ClassVar[str]
    codebook: ClassVar[CodebookKind] = "none"
    masks: MaskForm = MaskForm()
    """The form of mask that is fastest for `attend`, which takes plain masks too."""
    shape: LaneShape

    def __init__(self, shape: LaneShape, codebooks: Codebooks) -> None:
        """Raises ValueError for a shape that is not supported."""
        if reason := self.unsupported(shape):
            raise ValueError(reason)
        self.shape = shape

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        """Why this backend can't store the shape, or None."""
        return None

    @abstractmethod
    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        """Shape (without the leading page axis) and dtype of each array of a page."""

    @abstractmethod
    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        """`[N, n_kv_heads, PAGE, key_dim]` and `[N, n_kv_heads, PAGE, value_dim]` of any float type to N pages."""

    @abstractmethod
    def expand(self, pages: Pages, dtype: mx.Dtype) -> Pair:
        """N pages to keys and values in `dtype`, shapes as given to `encode`."""

    def attend(self, chunk: ChunkInputs) -> mx.array:
        """Attention of a prefill chunk. Returns the queries' dtype, `[B, n_heads, L, value_dim]`."""
        return attend_expanded(self.expand, chunk)

    def attend_step(self, step: StepInputs) -> tuple[mx.array, Pair]:
        """Attention of a decode step. Returns the output, as `attend` does, and the raw buffers with the step's tokens
        in their slots. The inputs are not changed.
        """
        return attend_step_expanded(self.expand, step)

    def path(self, n_tokens: int | None) -> AttentionPath:
        """How `attend` reads pages for `n_tokens` query tokens, or, for None, how `attend_step` does."""
        return "expanded"


def store_tokens(tokens: Pair, raw: Pair, rows: RowIndex) -> Pair:
    """The raw buffers with a step's tokens in their slots; shapes as in `StepInputs`."""
    keys, values = (
        mx.put_along_axis(kept, rows.slots(new.shape), new, axis=2) for new, kept in zip(tokens, raw, strict=True)
    )
    return keys, values


Expand = Callable[[Pages, mx.Dtype], Pair]
"""`Lanes.expand`, or the same in another basis."""


def gather_expanded(expand: Expand, pages: Pages, table: mx.array, dtype: mx.Dtype) -> Pair:
    """The pages of `table` `[B, P]` as contiguous keys and values, `[B, n_kv_heads, P * PAGE, dim]` in `dtype`."""
    n_rows, n_pages = table.shape
    chosen = tuple(mx.take(array, table.reshape(-1), axis=0) for array in pages)

    def lay_out(tokens: mx.array) -> mx.array:
        _, n_kv_heads, _, dim = tokens.shape
        tokens = tokens.reshape(n_rows, n_pages, n_kv_heads, PAGE, dim).transpose(0, 2, 1, 3, 4)
        return tokens.reshape(n_rows, n_kv_heads, n_pages * PAGE, dim)

    keys, values = expand(chosen, dtype)
    return lay_out(keys), lay_out(values)


def attend_expanded(expand: Expand, chunk: ChunkInputs) -> mx.array:
    """`Lanes.attend`: expand every page, then attend with MLX's operations. This is the definition of correct."""
    queries, (raw_keys, raw_values), pages, index, mask, scale, sinks = chunk
    keys, values = raw_keys, raw_values
    if index.n_pages:
        page_keys, page_values = gather_expanded(expand, pages, index.table, raw_keys.dtype)
        if index.pageless is not None:
            page_values = mx.where(index.pageless, 0.0, page_values)
        keys = mx.concatenate([page_keys, raw_keys], axis=2)
        values = mx.concatenate([page_values, raw_values], axis=2)
    sinks = sinks if sinks is None else sinks.astype(keys.dtype)
    return attention(queries.astype(keys.dtype), keys, values, scale, mask, sinks).astype(queries.dtype)


def attend_step_expanded(expand: Expand, step: StepInputs) -> tuple[mx.array, Pair]:
    """`Lanes.attend_step`: store the tokens, then `attend_expanded` with the step's mask."""
    queries, tokens, raw, pages, rows, scale, sinks = step
    keys, values = stored = store_tokens(tokens, raw, rows)
    live = keys[:, :, : rows.n_raw], values[:, :, : rows.n_raw]
    return attend_expanded(expand, ChunkInputs(queries, live, pages, rows.index, rows.mask, scale, sinks)), stored
