"""The fused lanes for Metal and CUDA: encode, expand and attend are one kernel each.

A page has the bytes of kernels/lanes/reference.py. The source files describe the kernels. Unsupported shapes are
refused before a launch, and the layer uses other lanes.
"""

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import mlx.core as mx
import numpy as np

from kernels.attention.device import resident
from kernels.attention.masks import MaskForm, pad_tokens
from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from kernels.fused.kernel_text import Language, kernel
from kernels.fused.profiles import PROFILES, Profile, choose_profile
from kernels.fused.step import MAX_TABLE_BITS, THREADS, StepLauncher, code_constants
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
    coded_page_arrays,
)

LOG2_E = 1.4426950408889634

_BITS = (2, 2.5, 3, 3.5, 4, 5, 6, 8)
_SLICE = 16
"""Tokens per threadgroup of the kernel expand."""


@cache
def device_profile() -> Profile:
    """This device's profile, or the portable one if the device's profile runs no kernels."""
    profile, _ = choose_profile(mx.device_info())
    return profile if profile.threadgroups else PROFILES["portable"]


def pair_table(levels: np.ndarray) -> np.ndarray:
    """A codebook in the form for kernels: the two levels of every pair code, float16 `[2**pair_bits, 2]`.

    Scalar levels `[2**bits]` give the pair codes `c0 | c1 << bits`. A pair codebook is already this table.
    """
    if levels.ndim == 2:
        return levels.astype(np.float16)
    second, first = np.meshgrid(levels, levels, indexing="ij")
    return np.stack([first.ravel(), second.ravel()], axis=-1).astype(np.float16)


class FusedLanes(Lanes):
    """`Lanes` on the kernels of one language, which a subclass names."""

    name: ClassVar[str]
    language: ClassVar[Language]
    codebook: ClassVar[CodebookKind] = "pair"

    def __init__(self, shape: LaneShape, codebooks: Codebooks, profile: Profile | None = None) -> None:
        super().__init__(shape, codebooks)
        self.profile = profile or device_profile()
        self._paired = [levels.ndim == 2 for levels in (codebooks.keys, codebooks.values)]
        self._codebooks = codebooks
        # Equal tables of the same width share fast memory.
        two_tables = shape.key_bits == shape.value_bits and not np.array_equal(codebooks.keys, codebooks.values)
        self._constants: dict[float, mx.array] = {}
        self._launcher = StepLauncher(self.language, shape, self.profile, two_tables=two_tables)
        self._codes = code_constants(shape)

    @classmethod
    def unsupported(cls, shape: LaneShape) -> str | None:
        """Why these kernels can't take the shape, or None."""
        for what, bits in (("keys", shape.key_bits), ("values", shape.value_bits)):
            if bits not in _BITS:
                return f"the fused kernels have no codes of {bits:g} bits (for {what}); there are {_BITS}"
        for what, dim in (("key", shape.key_dim), ("value", shape.value_dim)):
            if dim % 16 or not 16 <= dim <= 256:
                return f"the fused kernels take {what} dims that are multiples of 16 up to 256, not {dim}"
        if shape.n_heads % shape.n_kv_heads:
            return f"{shape.n_heads} query heads can't be divided by {shape.n_kv_heads} KV heads"
        return None

    def page_arrays(self) -> Sequence[tuple[tuple[int, ...], mx.Dtype]]:
        return coded_page_arrays(self.shape)

    def encode(self, keys: mx.array, values: mx.array) -> Pages:
        n_pages, arrays = keys.shape[0], self.page_arrays()
        constants = (
            ("T", keys.dtype),
            *self._codes,
            ("KEY_PAIRED", self._paired[0]),
            ("VALUE_PAIRED", self._paired[1]),
        )
        return tuple(
            kernel("encode", self.language, constants)(
                inputs=[keys, values, self._constants_for(0.0)],
                grid=(THREADS, self.shape.n_kv_heads, 2 * n_pages),
                threadgroup=(THREADS, 1, 1),
                output_shapes=[(n_pages, *shape) for shape, _ in arrays],
                output_dtypes=[dtype for _, dtype in arrays],
            )
        )

    def expand(self, pages: Pages, dtype: mx.Dtype) -> Pair:
        return self.expand_rows(pages, mx.arange(pages[0].shape[0], dtype=mx.int32)[:, None], dtype)

    def expand_rows(
        self, pages: Pages, table: mx.array, dtype: mx.Dtype, raw: Sequence[mx.array] = ()
    ) -> tuple[mx.array, mx.array]:
        """The pages of `table`, int32 `[B, P]`, as keys and values `[B, n_kv_heads, P * PAGE, dim]` in `dtype`.

        If given, `raw` keys and values `[B, n_kv_heads, S, dim]` of that dtype are appended.
        """
        n_rows, n_pages = table.shape
        s, n_raw = self.shape, raw[0].shape[2] if raw else 0
        n_slices = n_pages * PAGE // _SLICE + -(-n_raw // _SLICE)
        keys, values = kernel("expand_raw" if raw else "expand", self.language, (("T", dtype), *self._codes))(
            inputs=[*pages, table, self._constants_for(0.0), *raw],
            grid=(THREADS * n_slices, s.n_kv_heads, 2 * n_rows),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(n_rows, s.n_kv_heads, n_pages * PAGE + n_raw, dim) for dim in (s.key_dim, s.value_dim)],
            output_dtypes=[dtype, dtype],
        )
        return keys, values

    def attend(self, chunk: ChunkInputs) -> mx.array:
        queries, (raw_keys, raw_values), pages, index, mask, scale, sinks = chunk
        n_tokens, n_paged = queries.shape[2], index.n_pages * PAGE
        if isinstance(mask, mx.array):  # it may be larger than queries and keys
            queries = pad_tokens(queries, mask.shape[2])
            raw_keys, raw_values = (pad_tokens(x, mask.shape[3] - n_paged) for x in (raw_keys, raw_values))
        keys, values = raw_keys, raw_values
        if index.pageless is not None:
            page_keys, page_values = self.expand_rows(pages, index.table, raw_keys.dtype)
            page_values = mx.where(index.pageless, mx.array(0, dtype=page_values.dtype), page_values)
            keys = mx.concatenate([page_keys, raw_keys], axis=2)
            values = mx.concatenate([page_values, raw_values], axis=2)
        elif index.n_pages:
            keys, values = self.expand_rows(pages, index.table, raw_keys.dtype, (raw_keys, raw_values))
        sinks = sinks if sinks is None else sinks.astype(queries.dtype)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        return out[:, :, :n_tokens]

    def attend_step(self, step: StepInputs) -> tuple[mx.array, Pair]:
        queries, tokens, raw, pages, rows, scale, sinks = step
        if queries.dtype != raw[0].dtype:
            out, raw = self.attend_step(step._replace(queries=queries.astype(raw[0].dtype)))
            return out.astype(queries.dtype), raw
        key = self, queries.dtype, scale, sinks is None
        launch = rows.launches.get(key)
        if launch is None:
            constants = self._constants_for(scale)
            launch = self._launcher.attend(queries.dtype, rows, constants, has_sinks=sinks is not None)
            rows.launches[key] = launch
        inputs = [queries, *tokens, *raw, *launch.shared, *(launch.no_pages or pages), *launch.constants]
        if launch.merge is None:
            if sinks is not None:
                inputs.append(sinks)
            out, keys, values = launch.attend(inputs=inputs)
            return out, (keys, values)
        parts, keys, values = launch.attend(inputs=inputs)
        out = launch.merge(inputs=[parts, *launch.constants, *(() if sinks is None else (sinks,))])[0]
        return out, (keys, values)

    def path(self, n_tokens: int | None) -> AttentionPath:
        return "fused" if n_tokens is None else "expanded"

    def _constants_for(self, scale: float) -> mx.array:
        """The constant inputs of layers with this attention scale, as uint32 words. shapes.h has the layout."""
        if scale not in self._constants:
            s, books = self.shape, self._codebooks
            signs = [np.array(Rotation(dim).signs) for dim in (s.key_dim, s.value_dim)]
            tables = [
                pair_table(levels).view(np.uint32).ravel()
                for bits, levels in ((s.key_bits, books.keys), (s.value_bits, books.values))
                if bits <= MAX_TABLE_BITS
            ]
            floats = np.concatenate([[scale * LOG2_E, 0, 0, 0], *signs]).astype(np.float32)
            self._constants[scale] = resident(mx.array(np.concatenate([floats.view(np.uint32), *tables])))
        return self._constants[scale]


class MetalLanes(FusedLanes):
    name: ClassVar[str] = "metal"
    language: ClassVar[Language] = "metal"


class CudaLanes(FusedLanes):
    name: ClassVar[str] = "cuda"
    language: ClassVar[Language] = "cuda"
    # On CUDA MLX converts bool masks to numbers once per layer. cuDNN builds a plan for each pair of lengths, which
    # takes about 40 ms. Without rounding, every prompt that continues from a cache would wait for a plan.
    masks = MaskForm(added=True, rounded=True)
