"""The plan of one forward pass over the rings of a batch, made once for all layers.

`plan_decode` and `plan_prefill` are pure integer work on `PageRing`s. They take pages, advance offsets and decide which
slots to write, which blocks to compress and which keys each query sees. `CacheBatch` does the array work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from kernels.attention.masks import Mask, MaskForm
from kernels.attention.page_tables import PageIndex, RowIndex
from kernels.codec.layout import PAGE
from turbocache.cache.conditioning import KeyCentre
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import PageRing


@dataclass(frozen=True, slots=True)
class Flush:
    """Compress the block that starts at raw slot `slot` of `row` into `page`."""

    row: int
    slot: int
    page: int


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token per row."""

    flushes: tuple[Flush, ...]
    """Blocks to compress before the tokens are stored."""
    decides: tuple[int, ...]
    """Rows that get their first page, before which their keys' centre is measured."""
    rows: RowIndex
    """Where the tokens are stored and what they see."""


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """A chunk of one row's prompt. Its keys, in order: the pages of `index`, `n_sink` sink tokens, the body.

    The body is the raw window's old tokens, then the chunk's tokens behind the sink.
    """

    row: int
    start: int
    """Position of the first token."""
    n: int
    """Number of tokens."""
    decides: bool
    """Whether this chunk settles the centre of the row's keys."""
    n_sink: int
    """Sink tokens after the chunk."""
    sink_taken: int
    """The chunk's tokens that go to the sink."""
    old_slots: mx.array
    """Raw slots of the window's old tokens, int32 in order of position."""
    new_pages: tuple[int, ...]
    """Pages for the first `PAGE * n_new_pages` tokens of the body."""
    index: PageIndex
    """All pages of the row, the new ones included."""
    to_slots: mx.array
    """For each window slot the body token that it holds afterwards, int32 `[window_slots]`."""
    mask: Mask
    """As `Lanes.attend` takes it."""
    _masks: dict[tuple[MaskForm, mx.Dtype], Mask] = field(default_factory=dict)

    @property
    def n_new_pages(self) -> int:
        return len(self.new_pages)

    @property
    def n_keys(self) -> int:
        n_body = self.old_slots.size + self.n - self.sink_taken
        return self.index.n_pages * PAGE + self.n_sink + n_body

    def mask_in(self, form: MaskForm, dtype: mx.Dtype) -> Mask:
        """`mask` in the lanes' preferred form for queries of `dtype`, made once for all layers."""
        if (form, dtype) not in self._masks:
            self._masks[form, dtype] = form.of(self.mask, self.n, self.n_keys, dtype)
        return self._masks[form, dtype]


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """One chunk step per row that still has tokens."""

    chunks: tuple[ChunkStep, ...]


def plan_decode(rings: Sequence[PageRing], pool: PagePool, previous: RowIndex | None) -> tuple[DecodeStep, int]:
    """Advance every ring by one token. Returns the step and the number of pages that rotated out.

    `previous` is the last step's index. Its page table is reused while it does not change. If this raises
    PoolExhausted, nothing has changed.
    """
    config = rings[0].config
    due = [row for row, ring in enumerate(rings) if ring.flushed_at(ring.offset) > ring.flushed]
    flushes, decides = [], []
    for row, page in zip(due, pool.take(len(due)) if due else (), strict=True):
        ring = rings[row]
        if _decides(ring):
            decides.append(row)
        slot = config.keep + (ring.window_start - config.keep) % config.window_slots
        flushes.append(Flush(row, slot, page))
        ring.append_pages([page])
    rows = RowIndex(
        tables=tuple(ring.pages for ring in rings),
        offsets=tuple(ring.offset for ring in rings),
        first=tuple(ring.gone for ring in rings),
        n_queries=1,
        keep=config.keep,
        window_slots=config.window_slots,
        max_size=config.max_size,
        previous=previous,
        pinned=tuple(min(ring.pinned, len(ring.pages)) for ring in rings),
        skip=tuple(ring.skip for ring in rings),
    )
    for ring in rings:
        ring.offset += 1
    rotated = sum(ring.rotate() for ring in rings)
    return DecodeStep(tuple(flushes), tuple(decides), rows), rotated


def plan_prefill(rings: Sequence[PageRing], lengths: Sequence[int], pool: PagePool) -> tuple[PrefillStep, int]:
    """Advance ring i by `lengths[i]` tokens, which may be 0. Returns the step and the number of pages rotated out.

    If this raises PoolExhausted, nothing has changed.
    """
    targets = [
        ring.flushed_at(ring.offset + n - 1) if n else ring.flushed for ring, n in zip(rings, lengths, strict=True)
    ]
    fresh = pool.take(sum(target - ring.flushed for target, ring in zip(targets, rings, strict=True)))
    chunks = []
    for row, (ring, n, target) in enumerate(zip(rings, lengths, targets, strict=True)):
        if n:
            pages, fresh = fresh[: target - ring.flushed], fresh[target - ring.flushed :]
            chunks.append(_plan_chunk(row, ring, n, pages))
    rotated = sum(ring.rotate() for ring in rings)
    return PrefillStep(tuple(chunks)), rotated


def _plan_chunk(row: int, ring: PageRing, n: int, new_pages: list[int]) -> ChunkStep:
    keep, slots = ring.config.keep, ring.config.window_slots
    start, end, body_start = ring.offset, ring.offset + n, ring.window_start
    sink_taken = min(max(keep - start, 0), n)
    old = np.arange(body_start, max(start, body_start))
    flushed_before = ring.flushed
    ring.append_pages(new_pages)
    ring.offset = end
    held = np.arange(max(ring.window_start, keep), end)
    to_slots = np.zeros(slots, dtype=np.int32)
    to_slots[(held - keep) % slots] = held - body_start
    n_sink = min(keep, end)
    return ChunkStep(
        row=row,
        start=start,
        n=n,
        decides=bool(new_pages) and _decides(ring),
        n_sink=n_sink,
        sink_taken=sink_taken,
        old_slots=mx.array((old - keep) % slots + keep, dtype=mx.int32),
        new_pages=tuple(new_pages),
        index=PageIndex((ring.pages,)),
        to_slots=mx.array(to_slots),
        mask=_chunk_mask(ring, n, n_sink, flushed_before),
    )


def _chunk_mask(ring: PageRing, n: int, n_sink: int, flushed_before: int) -> Mask:
    """Which keys (pages, sink, body) each of the newest `n` tokens sees, as a lazy array made once for all layers.

    Blocks that the chunk compresses are in both pages and body. Each query sees the form that its position requires.
    """
    keep, window, end = ring.config.keep, ring.config.window, ring.offset
    rotation_start, held = ring.rotation_start, ring.rotation_start + ring.evicted
    if ring.flushed == flushed_before and ring.first_visible(end - 1) <= held:
        return "causal" if n > 1 else None
    pages_end = keep + PAGE * ring.flushed
    pinned, rotating = mx.arange(keep, min(rotation_start, pages_end)), mx.arange(held, pages_end)
    paged, sink = mx.concatenate([pinned, rotating]), mx.arange(n_sink)
    body = mx.arange(keep + PAGE * flushed_before, end)
    queries = mx.arange(end - n, end)[:, None]
    boundary = keep + PAGE * mx.maximum(flushed_before, (queries - keep) // PAGE - window // PAGE)
    in_pages, in_body = paged < boundary, (body >= boundary) & (body <= queries)
    if ring.config.max_size is not None:
        oldest = mx.array([ring.first_visible(position) for position in range(end - n, end)])[:, None]
        in_pages = in_pages & ((paged >= oldest) | (paged < rotation_start))
        in_body = in_body & ((body >= oldest) | (body < rotation_start))
    return mx.concatenate([in_pages, sink <= queries, in_body], axis=1)[None, None]


def _decides(ring: PageRing) -> bool:
    """Whether a ring that gets a page has no centre yet. It then gets one for the layers to fill."""
    if ring.centre is not None:
        return False
    ring.centre = KeyCentre()
    return True
