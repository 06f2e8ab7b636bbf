"""Oracles in float64 numpy that share no code with what they judge, and a driver that holds caches against them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.codec.layout import PAGE
from kernels.codec.rotation import Rotation
from turbocache.cache.conditioning import CENTRE_ABOVE
from turbocache.cache.outline import PLAIN, Outline
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import PageRing, RingConfig
from turbocache.cache.spec import CacheSpec
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam
from turbocache.mlxlm.plan import LayerGeometry
from turbocache.presets import preset
from turbocache.store import compressed_layer

Array = np.ndarray
BlockCodec = Callable[[Array], Array]
"""Tokens of one block `[PAGE, n_kv_heads, dim]` to what a page gives back."""


def attend_dense(queries: Array, keys: Array, values: Array, scale: float, sinks: Array | None = None) -> Array:
    """One query token over tokens: `[n_heads, dk]`, `[T, n_kv_heads, dk]`, `[T, n_kv_heads, dv]` to `[n_heads, dv]`."""
    n_heads, n_kv_heads = queries.shape[0], keys.shape[1]
    of_head = np.arange(n_heads) // (n_heads // n_kv_heads)
    scores = scale * np.einsum("hd,thd->ht", queries.astype(np.float64), keys[:, of_head].astype(np.float64))
    extra = np.full((n_heads, 1), -np.inf) if sinks is None else np.asarray(sinks, dtype=np.float64)[:, None]
    scores = np.concatenate([scores, extra], axis=1)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    out: Array = np.einsum("ht,thd->hd", weights[:, :-1], values[:, of_head].astype(np.float64))
    return out


def visible_positions(position: int, keep: int, max_size: int | None) -> Array:
    """Positions that a query sees, itself included: the first `keep` and the latest `max_size - keep`."""
    everything = np.arange(position + 1)
    if max_size is None:
        return everything
    return everything[(everything < keep) | (everything > position - (max_size - keep))]


def visible_of(outline: Outline, position: int, ring: RingConfig) -> Array:
    """`visible_positions` in a conversation: the first `keep`, the pages of the prefix, and the latest that fit, less
    what is left of the turn, else of the step, of which something had to go.
    """
    everything = np.arange(position + 1)
    if ring.max_size is None:
        return everything
    most, start = min(ring.pin_share * ring.max_size, ring.max_size - ring.window - PAGE), ring.keep
    while start < outline.prefix and start + PAGE <= most:
        start += PAGE
    latest = everything[everything >= start][-(ring.max_size - start) :]
    if position + 1 > ring.max_size:
        block = (position - ring.keep) // PAGE
        in_pages = [p for p in latest if p - ring.keep <= PAGE * block - ring.window]
        half = set(in_pages[: (ring.max_size - start) // 2 + 1])
        for beginnings in (outline.turns, outline.steps):
            if near := [p for p in beginnings if p in half]:
                latest = latest[latest >= min(near)]
                break
    return np.concatenate([everything[:start], latest])


def quantise_row(row: Array, levels: Array, *, unbiased: bool, zooms: tuple[float, ...] = ()) -> Array:
    """What a rotated row `[dim]` is read back as, by the definition (TurboQuant's codes of levels of N(0, 1); EDEN's or
    the least-squares scale). Of the row and the row times each of `zooms` the one is coded whose levels point most the
    row's way. From 32 levels on, the row is stretched until its largest coordinate lies half a step beyond the last.
    """
    row, levels = row.astype(np.float64), levels.astype(np.float64)
    rms = np.sqrt((row**2).mean())
    if rms == 0:
        return np.zeros_like(row)
    tries = (stretch(row[None] / rms, levels).item(),) if levels.size >= 32 else (1.0, *zooms)
    tried = [levels[np.abs(zoom * row[:, None] / rms - levels).argmin(axis=1)] for zoom in tries]
    read: Array = max(tried, key=lambda read: float((read @ row) / np.linalg.norm(read)))
    scale = (row @ row) / (read @ row) if unbiased else (read @ row) / (read @ read)
    return float(np.float16(min(scale, 65504.0))) * read


def stretch(units: Array, levels: Array) -> Array:
    """The factor of each row `[n, dim]` for a grid of at least 32 levels: `[n, 1]`, or 1 for smaller codebooks."""
    if levels.ndim > 1 or levels.size < 32:
        return np.ones((len(units), 1))
    end = float(3 * levels[-1] - levels[-2]) / 2
    return np.asarray(end / np.maximum(np.abs(units).max(axis=1, keepdims=True), 1e-30))


def quantise_page(rows: Array, table: Array, *, unbiased: bool, zooms: tuple[float, ...] = ()) -> Array:
    """`quantise_row` for one head's rotated page `[PAGE, dim]` and any codebook: levels `[n]`, or pairs `[n, 2]`, which
    stand for neighbouring dims of a key (`unbiased`) and for one dim of neighbouring tokens' values.
    """
    if table.ndim == 1:
        return np.stack([quantise_row(row, table, unbiased=unbiased, zooms=zooms) for row in rows])
    rows, table = rows.astype(np.float64), table.astype(np.float64)
    rms = np.sqrt((rows**2).mean(axis=1, keepdims=True))
    units = rows / np.where(rms == 0, 1, rms)
    streams = units if unbiased else units.T
    pairs = streams.reshape(-1, 1, 2)
    read = table[((pairs - table) ** 2).sum(axis=-1).argmin(axis=1)].reshape(streams.shape)
    read = read if unbiased else read.T
    along = (read * rows).sum(axis=1)
    scales = (rows**2).sum(axis=1) / np.where(along == 0, 1, along) if unbiased else along / (read**2).sum(axis=1)
    return np.asarray(np.minimum(scales, 65504.0).astype(np.float16).astype(np.float64)[:, None] * read)


def rotated_codec(table: Array, dim: int, *, unbiased: bool, zooms: tuple[float, ...] = ()) -> BlockCodec:
    """Rotate, quantise, rotate back. Takes the rotation as a matrix from `Rotation`, which has its own tests."""
    matrix = np.array(Rotation(dim).apply(mx.eye(dim)), dtype=np.float64)

    def codec(block: Array) -> Array:
        heads = (block @ matrix).astype(np.float32).swapaxes(0, 1)
        read = np.stack([quantise_page(rows, table, unbiased=unbiased, zooms=zooms) for rows in heads])
        return np.asarray((read @ matrix.T).swapaxes(0, 1))

    return codec


def raw_positions(ring: PageRing) -> Array:
    """Position held by each raw slot, -1 for an empty one, int64 `[keep + window_slots]`."""
    keep, slots = ring.config.keep, ring.config.window_slots
    positions = np.full(keep + slots, -1, dtype=np.int64)
    positions[:keep] = np.where(np.arange(keep) < ring.offset, np.arange(keep), -1)
    held = np.arange(max(ring.window_start, keep), ring.offset)
    positions[keep + (held - keep) % slots] = held
    return positions


@dataclass(frozen=True)
class Heads:
    """Shape of one attention layer."""

    n_heads: int = 4
    n_kv_heads: int = 2
    key_dim: int = 16
    value_dim: int = 16


def make_spec(
    ring: RingConfig,
    layers: Sequence[Heads],
    n_pages: int,
    preset_name: str = "off",
    backend: str = "reference",
    dtype: mx.Dtype = mx.float32,
    initial: int = 64,
) -> CacheSpec:
    """A process-wide spec over layers of the given shapes."""
    kinds = [
        compressed_layer(
            LayerGeometry(h.n_heads, h.n_kv_heads, h.key_dim, h.value_dim, dtype), preset(preset_name), backend
        )
        for h in layers
    ]
    return CacheSpec(ring, PagePool([kind.lanes for kind in kinds], n_pages, initial), tuple(kinds))


@dataclass
class History:
    """One row's tokens by layer, as they were given, and how many blocks are read from pages.

    `bias` is added to all keys of a layer, `[n_kv_heads, key_dim]`; `centres` are what its pages hold keys without, by
    layer, from the first page on. `outline` is what the row's ring was told.
    """

    keys: list[Array]
    values: list[Array]
    flushed: int = 0
    bias: list[Array] | None = None
    centres: dict[int, Array] = field(default_factory=dict)
    outline: Outline = PLAIN

    @classmethod
    def empty(cls, layers: Sequence[Heads]) -> "History":
        return cls(
            [np.zeros((0, h.n_kv_heads, h.key_dim)) for h in layers],
            [np.zeros((0, h.n_kv_heads, h.value_dim)) for h in layers],
        )

    @property
    def offset(self) -> int:
        return len(self.keys[0])

    def copy(self) -> "History":
        return replace(self, keys=list(self.keys), values=list(self.values), centres=dict(self.centres))

    def centre(self, layer: int, n_first: int) -> Array:
        """The mean of the first keys, in heads where it dominates; once known, it stays as it is."""
        if layer not in self.centres:
            first = self.keys[layer][:n_first].astype(np.float64)
            mean = first.mean(axis=0)
            spread = np.square(first - mean).sum(axis=-1).mean(axis=0)
            self.centres[layer] = np.where((np.square(mean).sum(axis=-1) > CENTRE_ABOVE * spread)[:, None], mean, 0)
        return self.centres[layer]


@dataclass
class Paged:
    """A batch of paged caches next to its rows' histories; every step compares attention with the oracle."""

    layers: Sequence[Heads]
    spec: CacheSpec
    rng: np.random.Generator
    codecs: Sequence[tuple[BlockCodec, BlockCodec]] | None = None
    tolerance: float = 5e-6
    views: list[PagedKVCache] = field(default_factory=list)
    rows: list[History] = field(default_factory=list)
    worst: float = 0.0
    n_compared: int = 0

    @classmethod
    def session(cls, layers: Sequence[Heads], spec: CacheSpec, rng: np.random.Generator, **more: Any) -> "Paged":
        made = cls(layers, spec, rng, **more)
        made.views, made.rows = PagedKVCache.layers(spec), [History.empty(layers)]
        return made

    def sibling(self, views: list[PagedKVCache], rows: list[History]) -> "Paged":
        """The same driver over other caches."""
        return replace(self, views=views, rows=rows)

    def append(self, n: int) -> None:
        """The same number of tokens for every row."""
        self._step(n, [n] * len(self.rows))

    def append_padded(self, lengths: Sequence[int], chunk: int = 1 << 30) -> None:
        """Right-padded prompts in chunks of columns; whatever lies in the padding must not matter."""
        for view in self.views:
            view.prepare(lengths=list(lengths), right_padding=[max(lengths) - n for n in lengths])
        left = list(lengths)
        while max(left):
            columns = min(chunk, max(left))
            here = [min(columns, n) for n in left]
            self._step(columns, here)
            left = [n - m for n, m in zip(left, here, strict=True)]
        for view in self.views:
            view.finalize()

    def _step(self, columns: int, lengths: Sequence[int]) -> None:
        before = [row.flushed for row in self.rows]
        outs = []
        for i, heads in enumerate(self.layers):
            q, k, v = self.random_inputs(heads, columns, lengths)
            for row, history in enumerate(self.rows):
                k[row] += 0 if history.bias is None else history.bias[i][:, None].astype(np.float32)
            view = self.views[i]
            # Every layer, also those that follow the leader, must report the position before this step.
            assert np.array(view.offset).reshape(-1).tolist() == [len(row.keys[i]) for row in self.rows]
            pending = view.update_and_fetch(mx.array(k), mx.array(v))
            scale = heads.key_dim**-0.5
            out = seam.attention(mx.array(q), *pending, view, scale=scale, mask=view.make_mask(columns))
            for row, n, history in zip(range(len(lengths)), lengths, self.rows, strict=True):
                history.keys[i] = np.concatenate([history.keys[i], k[row, :, :n].swapaxes(0, 1)])
                history.values[i] = np.concatenate([history.values[i], v[row, :, :n].swapaxes(0, 1)])
            outs.append((q, out))
        mx.eval([view.state for view in self.views], [out for _, out in outs])
        for i, (q, out) in enumerate(outs):
            got = np.array(out)
            for row, n in enumerate(lengths):
                for column in self._judged(n):
                    want = self.expected(i, row, self.rows[row].offset - n + column, q[row, :, column], before[row])
                    self.worst = max(self.worst, float(np.abs(got[row, :, column] - want).max()))
                    self.n_compared += 1
                    np.testing.assert_allclose(got[row, :, column], want, atol=self.tolerance, rtol=0)
        for history, n in zip(self.rows, lengths, strict=True):
            if n:
                history.flushed = self.blocks_in_pages(history.offset - 1, history.flushed)

    def _judged(self, n: int, most: int = 16) -> list[int]:
        """Columns to compare: all of a short chunk; of a long one both ends and a random choice."""
        if n <= most:
            return list(range(n))
        ends = [0, 1, n - 2, n - 1]
        return sorted({*ends, *self.rng.choice(n, size=most - len(ends), replace=False).tolist()})

    def random_inputs(self, heads: Heads, columns: int, lengths: Sequence[int]) -> tuple[Array, Array, Array]:
        """Queries, keys and values; NaN in the padding."""
        shapes = (heads.n_heads, heads.key_dim), (heads.n_kv_heads, heads.key_dim), (heads.n_kv_heads, heads.value_dim)
        made = []
        for n_heads, dim in shapes:
            x = self.rng.normal(size=(len(lengths), n_heads, columns, dim)).astype(np.float32)
            for row, n in enumerate(lengths):
                x[row, :, n:] = np.nan
            made.append(x)
        return made[0], made[1], made[2]

    def blocks_in_pages(self, position: int, floor: int) -> int:
        """Blocks that a query at `position` reads from pages."""
        ring = self.spec.ring
        return max(floor, (position - ring.keep) // PAGE - ring.window // PAGE)

    def expected(self, layer: int, row: int, position: int, queries: Array, floor: int) -> Array:
        """The oracle's answer for one query. `floor` is the number of blocks in pages before the step."""
        ring, history = self.spec.ring, self.rows[row]
        at = visible_of(history.outline, position, ring)
        keys, values = history.keys[layer][: position + 1], history.values[layer][: position + 1]
        if self.codecs is not None:
            n_blocks = self.blocks_in_pages(position, floor)
            centre = history.centre(layer, ring.raw_slots) if n_blocks else 0
            keys = self._with_pages(keys - centre, n_blocks, self.codecs[layer][0]) + centre
            values = self._with_pages(values, n_blocks, self.codecs[layer][1])
        return attend_dense(queries, keys[at], values[at], self.layers[layer].key_dim ** -0.5)

    def _with_pages(self, tokens: Array, n_blocks: int, codec: BlockCodec) -> Array:
        tokens, keep = tokens.copy(), self.spec.ring.keep
        for block in range(n_blocks):
            here = slice(keep + PAGE * block, keep + PAGE * (block + 1))
            tokens[here] = coded(codec, tokens[here])
        return tokens

    def trim(self, n: int) -> None:
        """Forget the newest tokens. A page that is cut leaves its older tokens as it had them."""
        for view in self.views:
            assert view.trim(n) == n
        for row in self.rows:
            blocks = max(0, (row.offset - n - self.spec.ring.keep) // PAGE)
            if blocks < row.flushed:
                if self.codecs is not None:
                    start = self.spec.ring.keep + PAGE * blocks
                    for i, (key_codec, value_codec) in enumerate(self.codecs):
                        for tokens, codec in ((row.keys, key_codec), (row.values, value_codec)):
                            centre = row.centre(i, self.spec.ring.raw_slots) if tokens is row.keys else 0
                            tokens[i] = tokens[i].copy()
                            tokens[i][start : start + PAGE] = (
                                coded(codec, tokens[i][start : start + PAGE] - centre) + centre
                            )
                row.flushed = blocks
            row.keys = [tokens[: len(tokens) - n] for tokens in row.keys]
            row.values = [tokens[: len(tokens) - n] for tokens in row.values]
            row.outline = row.outline.before(row.offset)
            if not row.offset:
                row.centres = {}


_pages: dict[tuple[BlockCodec, bytes], Array] = {}


def coded(codec: BlockCodec, block: Array) -> Array:
    """`codec(block)`, worked out once: drivers ask for the same pages after every step."""
    key = (codec, block.tobytes())
    if key not in _pages:
        if len(_pages) > 4096:
            _pages.clear()
        _pages[key] = codec(block)
    return _pages[key]


def merged(parts: Sequence[Paged]) -> Paged:
    """One batch of all parts' rows; the parts stay as they are."""
    views = [
        part_views[0].merge(part_views) for part_views in map(list, zip(*(part.views for part in parts), strict=True))
    ]
    return parts[0].sibling(views, [row.copy() for part in parts for row in part.rows])


def extracted(batch: Paged, row: int) -> Paged:
    """An independent session of one row."""
    return batch.sibling([view.extract(row) for view in batch.views], [batch.rows[row].copy()])


def filtered(batch: Paged, rows: Sequence[int]) -> None:
    """Keep only these rows."""
    for view in batch.views:
        view.filter(list(rows))
    batch.rows = [batch.rows[row] for row in rows]


def extended(batch: Paged, other: Paged) -> None:
    """Take over the rows of another batch."""
    for view, theirs in zip(batch.views, other.views, strict=True):
        view.extend(theirs)
    batch.rows, other.rows = batch.rows + other.rows, []
