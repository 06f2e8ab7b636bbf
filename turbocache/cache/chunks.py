"""The array work of one row's prefill chunk, as its `ChunkStep` plans it.

A pair is keys and values of one row, `[1, n_kv_heads, n, dim]` each.
"""

from collections.abc import Sequence

import mlx.core as mx

from kernels.codec.layout import PAGE
from kernels.lanes.base import Pair
from turbocache.cache.conditioning import KeyCentre
from turbocache.cache.steps import ChunkStep


def centred(
    chunk: ChunkStep, layer: int, centre: KeyCentre | None, raw: Pair, new: Pair, above: float | None
) -> tuple[Pair, Pair]:
    """A row's raw buffers and its chunk, less the row's centre. Measures the centre if the chunk decides it."""
    if centre is None or above is None:
        return raw, new
    if not chunk.decides:
        mean = centre.means.get(layer)
        return raw, new if mean is None else (new[0] - mean, new[1])
    n_raw = raw[0].shape[2]  # the first n_raw positions fill the slots in order
    first = mx.concatenate([raw[0][:, :, : chunk.start], new[0][:, :, : n_raw - chunk.start]], axis=2)
    mean = centre.measure(layer, first, above)
    return (raw[0] - mean, raw[1]), (new[0] - mean, new[1])


def body_of(chunk: ChunkStep, raw: Pair, new: Pair) -> Pair:
    """The raw window's old tokens and the chunk's tokens behind the sink."""
    keys, values = (
        mx.concatenate([mx.take(old, chunk.old_slots, axis=2), x[:, :, chunk.sink_taken :]], axis=2)
        for old, x in zip(raw, new, strict=True)
    )
    return keys, values


def raw_after(chunk: ChunkStep, raw: Pair, new: Pair, body: Pair) -> Pair:
    """Sink and window after the chunk."""
    keys, values = (_slots_after(chunk, *part) for part in zip(raw, new, body, strict=True))
    return keys, values


def _slots_after(chunk: ChunkStep, raw: mx.array, new: mx.array, body: mx.array) -> mx.array:
    parts = [raw[:, :, : chunk.n_sink - chunk.sink_taken], new[:, :, : chunk.sink_taken]]
    if not body.shape[2]:
        return mx.concatenate([*parts, raw[:, :, chunk.n_sink :]], axis=2)  # the whole chunk went to the sink
    return mx.concatenate([*parts, mx.take(body, chunk.to_slots, axis=2)], axis=2)


def page_blocks(chunks: Sequence[ChunkStep], bodies: Sequence[Pair]) -> Pair:
    """The content of the chunks' `new_pages`, in order: `[N, n_kv_heads, PAGE, dim]`."""
    blocks: tuple[list[mx.array], list[mx.array]] = [], []
    for chunk, body in zip(chunks, bodies, strict=True):
        n = chunk.n_new_pages
        for part, tokens in zip(blocks, body, strict=True):
            _, n_kv_heads, _, dim = tokens.shape
            part.append(tokens[0, :, : n * PAGE].reshape(n_kv_heads, n, PAGE, dim).swapaxes(0, 1))
    return mx.concatenate(blocks[0]), mx.concatenate(blocks[1])
