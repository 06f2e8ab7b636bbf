"""Sink, ring and window of one or many sessions, for all compressed layers: the arrays behind mlx-lm's caches.

A session at rest is a batch of one row. mlx-lm's generator merges, filters, extends and extracts batches. These move
page lists and the small raw buffers, never pages.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from kernels.attention.page_tables import RowIndex
from kernels.codec.layout import PAGE
from kernels.lanes.base import ChunkInputs, Pair, StepInputs, gather_expanded, store_tokens
from turbocache.cache.chunks import body_of, centred, page_blocks, raw_after
from turbocache.cache.conditioning import RowCentres
from turbocache.cache.ring import PageRing
from turbocache.cache.spec import CacheSpec, CompressedLayer
from turbocache.cache.steps import DecodeStep, PrefillStep, plan_decode, plan_prefill

_LONG = 64
"""A prefill over at least this many pages waits for its layers (`CacheBatch._bound_scratch`)."""


class CacheBatch:
    """`B` rows of sink + ring + window. Owns its rings (and through them their pages) and its raw buffers.

    Raw keys and values are `[B, n_kv_heads, keep + window_slots, dim]` per layer, as the model gave them, but keys less
    the row's centre. A step raises PoolExhausted when the pool is full, and the batch is then as before the step.
    """

    def __init__(self, spec: CacheSpec, n_rows: int = 1) -> None:
        self.spec = spec
        self.rings = [PageRing(spec.ring, spec.pool) for _ in range(n_rows)]
        self._raw = [self._empty_raw(layer, n_rows) for layer in spec.layers]
        self._unstored: dict[int, tuple[Pair, RowIndex]] = {}
        self._remaining: list[int] | None = None
        self._rows: RowIndex | None = None
        self._in_flight: mx.array | None = None
        self._centres = RowCentres()
        spec.live.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CacheBatch":
        return self.select(range(len(self.rings)))

    @property
    def n_rows(self) -> int:
        return len(self.rings)

    @property
    def offsets(self) -> list[int]:
        """Tokens ever seen by each row."""
        return [ring.offset for ring in self.rings]

    @property
    def raw(self) -> list[Pair]:
        """Raw keys and values of each layer. Stores the tokens of layers that have not attended in this step first."""
        for layer, (tokens, rows) in self._unstored.items():
            self._raw[layer] = store_tokens(tokens, self._raw[layer], rows)
        self._unstored.clear()
        return self._raw

    @raw.setter
    def raw(self, raw: list[Pair]) -> None:
        self._unstored.clear()
        self._raw = raw

    @property
    def raw_nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.raw)

    @property
    def shadow_nbytes(self) -> int:
        """Raw bytes beyond sinks and windows. Anything but 0 is a hidden copy of tokens in pages."""
        return self.raw_nbytes - self.n_rows * self.spec.raw_nbytes

    # Rows. Page lists and raw buffers move, pages do not.

    def select(self, rows: Sequence[int]) -> "CacheBatch":
        """An independent batch of the given rows; pages are shared by reference."""
        other = CacheBatch(self.spec, 0)
        other.rings = [self.rings[row].fork() for row in rows]
        other.raw = list(self.raw) if list(rows) == list(range(self.n_rows)) else self._raw_of(rows)
        return other

    @classmethod
    def merged(cls, batches: Sequence["CacheBatch"]) -> "CacheBatch":
        """An independent batch of all rows of `batches`, in order. Raises ValueError for different specs."""
        if any(batch.spec is not batches[0].spec for batch in batches):
            raise ValueError("only caches of one process-wide spec can be merged")
        merged = cls(batches[0].spec, 0)
        for batch in batches:
            merged.extend(batch.select(range(batch.n_rows)))
        return merged

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows and release their pages."""
        kept = {int(row) for row in rows}
        for row, ring in enumerate(self.rings):
            if row not in kept:
                ring.close()
        self.rings = [self.rings[int(row)] for row in rows]
        self._remaining = None  # an interrupted prompt does not continue in other rows
        self.raw = self._raw_of(rows)

    def extend(self, other: "CacheBatch") -> None:
        """Take over the rows of `other`, which is empty afterwards."""
        if other.n_rows and self.n_rows:
            self.raw = [
                (mx.concatenate([mine[0], theirs[0]]), mx.concatenate([mine[1], theirs[1]]))
                for mine, theirs in zip(self.raw, other.raw, strict=True)
            ]
        elif other.n_rows:
            self.raw = other.raw
        self.rings = self.rings + other.rings
        self._remaining = None
        other.rings = []  # self owns their pages now
        other.close()

    def close(self) -> None:
        """Release all pages and raw buffers. The batch has no rows afterwards."""
        for ring in self.rings:
            ring.close()
        self.rings, self.raw = [], [self._empty_raw(layer, 0) for layer in self.spec.layers]

    def _raw_of(self, rows: Sequence[int]) -> list[Pair]:
        index = mx.array([int(row) for row in rows], dtype=mx.int32)
        return [(mx.take(keys, index, axis=0), mx.take(values, index, axis=0)) for keys, values in self.raw]

    def can_trim_to(self, offset: int) -> bool:
        """Whether a batch of one row can go back to its state after `offset` tokens."""
        return self.n_rows == 1 and self.rings[0].can_trim_to(offset)

    def trim(self, n: int) -> None:
        """Drop the newest `n` tokens of every row. Raises ValueError if needed tokens have rotated out.

        A cut within a page brings the page's older tokens back into the window, as the page decodes them.
        """
        for ring in self.rings:
            if not ring.can_trim_to(ring.offset - n):
                raise ValueError(f"can't go back {n} tokens from {ring.offset}: {ring.evicted} have rotated out")
        for row, ring in enumerate(self.rings):
            self._trim_row(row, ring, ring.offset - n)

    def _trim_row(self, row: int, ring: PageRing, offset: int) -> None:
        blocks = max(0, ring.block(offset))
        if blocks < ring.flushed and offset > ring.config.keep + PAGE * blocks:
            self._restore_block(row, ring.pages[blocks - ring.gone], blocks)
        ring.cut(offset)

    def _restore_block(self, row: int, page: int, block: int) -> None:
        slot = self.spec.ring.keep + PAGE * block % self.spec.ring.window_slots
        start = mx.array([row, slot])
        table = mx.array([[page]])
        for i, layer in enumerate(self.spec.layers):
            restored = gather_expanded(layer.lanes.expand, self.spec.pool.pages(i), table, layer.dtype)
            keys, values = (
                mx.slice_update(raw, tokens, start, axes=[0, 2])
                for raw, tokens in zip(self.raw[i], restored, strict=True)
            )
            self.raw[i] = (keys, values)
        mx.eval(self.raw)

    # Steps. Planned once a forward pass, applied layer by layer.

    def prepare(self, lengths: Sequence[int]) -> None:
        """Announce a right-padded prompt with `lengths[i]` real tokens in row i."""
        self._remaining = [int(n) for n in lengths]

    def finalize(self) -> None:
        """End the right-padded prompt."""
        self._remaining = None

    def begin_step(self, n_tokens: int) -> DecodeStep | PrefillStep:
        """Advance all rings by a forward pass over `n_tokens` columns. Returns the plan for every layer.

        Waits for the device before pages are written, because a write beside a reader copies the whole pool.
        """
        step: DecodeStep | PrefillStep
        _ = self.raw  # stores the last step's tokens
        self._centres.update([ring.centre for ring in self.rings])
        if n_tokens == 1 and self._remaining is None:
            step, rotated = plan_decode(self.rings, self.spec.pool, self._rows)
            self._rows = step.rows
            writes = bool(step.flushes)
            self.spec.paths.add(None)
        else:
            lengths = [n_tokens] * self.n_rows
            if self._remaining is not None:
                lengths = [min(n_tokens, left) for left in self._remaining]
            step, rotated = plan_prefill(self.rings, lengths, self.spec.pool)
            if self._remaining is not None:
                self._remaining = [left - n for left, n in zip(self._remaining, lengths, strict=True)]
            writes = any(chunk.new_pages for chunk in step.chunks)
            for chunk in step.chunks:
                self.spec.paths.add(chunk.n)
        self.spec.rotated_pages += rotated
        if writes:
            mx.synchronize()
        return step

    def decode(self, layer: int, step: DecodeStep, keys: mx.array, values: mx.array) -> Pair:
        """Compress the blocks that are due. Returns the tokens, one a row, as `attend_decode` stores them."""
        raw_keys, raw_values = self._raw[layer]
        keys, above = keys.astype(raw_keys.dtype), self.spec.layers[layer].centre_above
        if step.decides and above is not None:
            deciding = {row: centre for row in step.decides if (centre := self.rings[row].centre) is not None}
            raw_keys = self._centres.decide(layer, deciding, raw_keys, above)
            self._raw[layer] = raw_keys, raw_values
        if (centres := self._centres.of(layer)) is not None:
            keys = keys - centres
        if step.flushes:
            blocks = [
                mx.concatenate([raw[f.row : f.row + 1, :, f.slot : f.slot + PAGE] for f in step.flushes])
                for raw in (raw_keys, raw_values)
            ]
            content = self.spec.layers[layer].lanes.encode(*blocks)
            self.spec.pool.write(layer, [f.page for f in step.flushes], content)
        tokens = keys, values.astype(raw_values.dtype)
        self._unstored[layer] = tokens, step.rows
        return tokens

    def attend_decode(
        self, layer: int, step: DecodeStep, tokens: Pair, queries: mx.array, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """`[B, n_heads, 1, key_dim]` to `[B, n_heads, 1, value_dim]` in the queries' dtype. Stores the tokens."""
        lanes, pages = self.spec.layers[layer].lanes, self.spec.pool.pages(layer)
        inputs = StepInputs(queries, tokens, self._raw[layer], pages, step.rows, scale, sinks)
        out, self._raw[layer] = lanes.attend_step(inputs)
        self._unstored.pop(layer, None)
        return out

    def prefill(self, layer: int, step: PrefillStep, keys: mx.array, values: mx.array) -> list[Pair]:
        """Store a chunk: full blocks become pages, the rest goes to sink and window.

        Returns the body's keys and values of each chunk step, which the chunk's own queries still see raw.
        """
        keys, values = (x.astype(self.spec.layers[layer].dtype) for x in (keys, values))
        above = self.spec.layers[layer].centre_above
        raw_keys, raw_values = self.raw[layer]
        rows = [(raw_keys[row : row + 1], raw_values[row : row + 1]) for row in range(self.n_rows)]
        bodies = []
        for chunk in step.chunks:
            here = slice(chunk.row, chunk.row + 1)
            new = keys[here, :, : chunk.n], values[here, :, : chunk.n]
            raw, new = centred(chunk, layer, self.rings[chunk.row].centre, rows[chunk.row], new, above)
            bodies.append(body_of(chunk, raw, new))
            rows[chunk.row] = raw_after(chunk, raw, new, bodies[-1])
        self.raw[layer] = (mx.concatenate([row[0] for row in rows]), mx.concatenate([row[1] for row in rows]))
        if ids := [page for chunk in step.chunks for page in chunk.new_pages]:
            content = self.spec.layers[layer].lanes.encode(*page_blocks(step.chunks, bodies))
            self.spec.pool.write(layer, ids, content)
        return bodies

    def attend_prefill(
        self,
        layer: int,
        step: PrefillStep,
        bodies: list[Pair],
        queries: mx.array,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        """`[B, n_heads, L, key_dim]` to `[B, n_heads, L, value_dim]`. Columns beyond a row's tokens are zero."""
        lanes, pages = self.spec.layers[layer].lanes, self.spec.pool.pages(layer)
        _, n_heads, n_columns, _ = queries.shape
        outs = [mx.zeros((1, n_heads, n_columns, lanes.shape.value_dim), queries.dtype)] * self.n_rows
        for chunk, body in zip(step.chunks, bodies, strict=True):
            here = slice(chunk.row, chunk.row + 1)
            keys, values = (
                mx.concatenate([kept[here, :, : chunk.n_sink], tokens], axis=2)
                for kept, tokens in zip(self.raw[layer], body, strict=True)
            )
            chosen = queries[here, :, : chunk.n]
            mask = chunk.mask_in(lanes.masks, queries.dtype)
            out = lanes.attend(ChunkInputs(chosen, (keys, values), pages, chunk.index, mask, scale, sinks))
            if chunk.n < n_columns:
                out = mx.pad(out, [(0, 0), (0, 0), (0, n_columns - chunk.n), (0, 0)])
            outs[chunk.row] = out
        joined = mx.concatenate(outs) if len(outs) > 1 else outs[0]
        self._bound_scratch(layer, joined, max((chunk.index.n_pages for chunk in step.chunks), default=0))
        return joined

    def _bound_scratch(self, layer: int, out: mx.array, n_pages: int) -> None:
        """Bound the expanded pages to two layers. MLX would start all layers and free nothing until the first ends."""
        if n_pages < _LONG:
            return
        before, self._in_flight = self._in_flight if layer else None, out
        mx.async_eval(out)
        if before is not None:
            mx.eval(before)
        if layer == len(self.spec.layers) - 1:
            self._in_flight = None

    def _empty_raw(self, layer: CompressedLayer, n_rows: int) -> tuple[mx.array, mx.array]:
        shape, slots = layer.lanes.shape, self.spec.ring.raw_slots
        return (
            mx.zeros((n_rows, shape.n_kv_heads, slots, shape.key_dim), dtype=layer.dtype),
            mx.zeros((n_rows, shape.n_kv_heads, slots, shape.value_dim), dtype=layer.dtype),
        )
