"""Positions after a rotation: whether the kept tokens should keep their positions or move up to the prefix.

    python -m tests.bench.positions MODEL TEXT [--windows N]

A session reads a text, keeps its first tokens and drops the oldest of the others. Then it reads on in three ways:

    kept        as the session has them: keys at the positions at which they came
    moved       keys turned back (RoPE), so that no position is missing
    fresh       the kept tokens computed again, as a new conversation of just these

Prints, for the tokens that follow, the perplexity of each and the KL divergence from `fresh`, in nats per token. The
session is not compressed, so that nothing else counts. Models of the llama kind, without scaled RoPE.
"""

import turbocache  # noqa: F401, I001  (before everything that imports mlx: it puts the fast BLAS in front)

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.codec.layout import PAGE
from kernels.lanes.base import gather_expanded
from tests.oracles import raw_positions
from turbocache.cache.outline import Outline
from turbocache.cache.ring import RingConfig
from turbocache.evaluation.text import cut_windows, read_text
from turbocache.mlxlm.model import LoadedModel, load_model
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import PRESETS
from turbocache.store import CacheStore, batches_of

PREFIX, RECENT, NEW = 256, 640, 128
"""Tokens that stay, the newest tokens that are kept, and the tokens that are scored."""
_CHUNK = 128


class Dense:
    """A cache of given keys and values whose next token is at `offset`."""

    def __init__(self, keys: mx.array, values: mx.array, offset: int) -> None:
        self.keys, self.values, self.offset = keys, values, offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = (
            mx.concatenate([old, new], axis=2) for old, new in ((self.keys, keys), (self.values, values))
        )
        self.offset += keys.shape[2]
        return self.keys, self.values

    def make_mask(self, n: int, **_: Any) -> str | None:
        return "causal" if n > 1 else None


def turned(keys: mx.array, by: int, theta: float) -> mx.array:
    """Keys `[B, n_kv_heads, n, dim]` as if each token stood `by` positions later."""
    half = keys.shape[-1] // 2
    angles = by * theta ** (-mx.arange(half, dtype=mx.float32) / half)
    a, b, cos, sin = keys[..., :half], keys[..., half:], mx.cos(angles), mx.sin(angles)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def kept_tokens(store: CacheStore, cache: list[Any], layer: int, positions: np.ndarray) -> tuple[mx.array, mx.array]:
    """Keys and values at `positions`, which the session holds."""
    batch = batches_of(cache)[0]
    ring, spec = batch.rings[0], store.spec
    table, lanes = mx.array([list(ring.pages)]), spec.layers[layer].lanes
    paged = gather_expanded(lanes.expand, spec.pool.pages(layer), table, spec.layers[layer].dtype)
    blocks = np.arange(ring.flushed)
    blocks = blocks[(blocks < ring.pinned) | (blocks >= ring.pinned + ring.gone)]
    in_pages = (ring.config.keep + PAGE * blocks[:, None] + np.arange(PAGE)).ravel()
    place = {int(position): i for i, position in enumerate([*in_pages, *raw_positions(ring)])}
    index = mx.array([place[int(position)] for position in positions])
    keys, values = (
        mx.take(mx.concatenate([p, raw], axis=2), index, axis=2) for p, raw in zip(paged, batch.raw[layer], strict=True)
    )
    return keys, values


def read(loaded: LoadedModel, cache: Any, tokens: Sequence[int]) -> mx.array:
    """Log-probabilities `[n, vocab]` after each token of the last chunk."""
    chunks = [mx.array([tokens[start : start + _CHUNK]]) for start in range(0, len(tokens), _CHUNK)]
    for chunk in chunks[:-1]:
        mx.eval(loaded.model.model(chunk, cache=cache))  # no logits
    logits = loaded.model(chunks[-1], cache=cache)[0].astype(mx.float32)
    logprobs: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return logprobs


@dataclass
class Sums:
    """Over all scored tokens of a way to read on."""

    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0
    n: int = 0

    def add(self, own: mx.array, fresh: mx.array, following: Sequence[int]) -> None:
        self.loss -= float(own[mx.arange(len(following)), mx.array(list(following))].sum())
        self.divergence += float((mx.exp(fresh) * (fresh - own)).sum())
        self.same += int((own.argmax(axis=-1) == fresh.argmax(axis=-1)).sum())
        self.n += len(following)


def measure(
    loaded: LoadedModel, window: Sequence[int], drops: Sequence[int], sums: dict[tuple[int, str], Sums]
) -> None:
    """One text. Its first tokens are the prefix."""
    ring = RingConfig(64, 128, PREFIX + RECENT + NEW)
    store = CacheStore(loaded.model, plan_layers(loaded.model), PRESETS["off"], "reference", ring, n_pages=200)
    cache, theta = store.new_cache(), float(loaded.model.args.rope_theta)
    batch = batches_of(cache)[0]
    batch.rings[0].describe(Outline(PREFIX))
    seen = 0
    for dropped in sorted(drops):
        end = PREFIX + dropped + RECENT
        read(loaded, cache, window[seen:end])
        seen = end
        new, following = window[end : end + NEW], window[end + 1 : end + NEW + 1]
        positions = np.concatenate([np.arange(PREFIX), np.arange(end - RECENT, end)])
        layers = [kept_tokens(store, cache, i, positions) for i in range(len(store.spec.layers))]
        moved = [
            (mx.concatenate([k[:, :, :PREFIX], turned(k[:, :, PREFIX:], -dropped, theta)], 2), v) for k, v in layers
        ]
        kept_ids = [window[position] for position in positions]
        fresh = read(loaded, [Dense(k[:, :, :0], v[:, :, :0], 0) for k, v in layers], [*kept_ids, *new])[-NEW:]
        ways = {
            "fresh": fresh,
            "kept": read(loaded, [Dense(*layer, end) for layer in layers], new),
            "moved": read(loaded, [Dense(*layer, PREFIX + RECENT) for layer in moved], new),
        }
        for name, own in ways.items():
            sums.setdefault((dropped, name), Sums()).add(own, fresh, following)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.positions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=2, help="texts (default: 2)")
    parser.add_argument("--dropped", type=int, nargs="+", default=[512, 3072], help="tokens (default: 512 3072)")
    options = parser.parse_args()
    loaded, sums = load_model(str(options.model)), dict[tuple[int, str], Sums]()
    length = PREFIX + max(options.dropped) + RECENT + NEW
    for window in cut_windows(loaded.tokenizer, read_text(options.text), length, options.windows):
        measure(loaded, window, options.dropped, sums)
    print("| dropped | way | perplexity | KLD from fresh | same first choice |\n|---|---|---|---|---|")
    for (dropped, name), s in sums.items():
        print(f"| {dropped} | {name} | {np.exp(s.loss / s.n):.2f} | {s.divergence / s.n:.4f} | {s.same / s.n:.1%} |")


if __name__ == "__main__":
    main()
