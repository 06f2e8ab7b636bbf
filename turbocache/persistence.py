"""Sessions on disk: a prompt cache to a file and back, bit by bit the same, layer by layer.

A file is only of use to a server that would have made the same bytes: same model and tokenizer, same lanes and sizes.
Its manifest says what it was made by, and everything else is refused (turbocache/session_file.py has the form).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from turbocache.batch import CacheBatch
from turbocache.conditioning import KeyCentre
from turbocache.leaves import leaves
from turbocache.model import LoadedModel
from turbocache.pool import PoolExhausted
from turbocache.ring import PageRing
from turbocache.session_file import Piece, SessionFileError, open_checked, piece, read_manifest, write
from turbocache.store import CacheStore
from turbocache.view import PagedKVCache

VERSION = 1
"""Of the manifest and of the arrays' names."""
_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Saved:
    """A session that came back: a cache of its own and the tokens that it holds."""

    cache: list[Any]
    tokens: list[int]


class SessionFiles:
    """Writes and reads sessions' caches for one model, store and backend. Used by the thread that owns MLX."""

    def __init__(self, model: LoadedModel, store: CacheStore) -> None:
        self._store = store
        self.model = fingerprint(model)
        self._layout = _layout(store)

    def save(
        self,
        path: Path,
        cache: Sequence[Any],
        tokens: Sequence[int] | np.ndarray,
        about: Mapping[str, Any] | None = None,
    ) -> int:
        """Write a session at rest, in place of what is at `path`; returns the file's bytes. `about` is for `peek`.
        Raises OSError.
        """
        pieces = {"tokens": piece(mx.array(np.asarray(tokens, dtype=np.int32)))}
        manifest: dict[str, Any] = {"version": VERSION, "model": self.model, "layout": self._layout}
        manifest["about"] = dict(about or {})
        batch = _batch_of(cache)
        if batch is not None:
            ring = batch.rings[0]
            manifest["ring"] = {"offset": ring.offset, "first": ring.first, "flushed": ring.flushed}
            manifest["centred"] = None if ring.centre is None else [ring.centre.n_heads, sorted(ring.centre.means)]
            pieces |= self._ring_pieces(batch, ring)
        states: list[Any] = []
        for i, leaf in enumerate(leaves(cache)):
            if not isinstance(leaf, PagedKVCache):
                states.append(_taken_apart(f"native.{i}", leaf.state, pieces) if not leaf.empty() else None)
        manifest["states"] = states
        return write(path, pieces, manifest)

    def load(self, path: Path) -> Saved:
        """Read a session back. Raises SessionFileError when the file is damaged or of something else, PoolExhausted
        when there are not enough pages.
        """
        manifest, arrays = open_checked(path)
        if manifest.get("version") != VERSION:
            raise SessionFileError("other_version", f"{path.name}: version {manifest.get('version')}, not {VERSION}")
        if manifest["model"] != self.model:
            raise SessionFileError("other_model", f"{path.name}: made by another model or tokenizer")
        if manifest["layout"] != self._layout:
            raise SessionFileError(
                "other_layout", f"{path.name}: made with another preset, backend, or sizes of sink, window or session"
            )
        cache = self._store.new_cache()
        try:
            if (batch := _batch_of(cache)) is not None:
                self._fill(batch, manifest, arrays)
            states = iter(manifest["states"])
            for leaf in leaves(cache):
                if not isinstance(leaf, PagedKVCache) and (state := next(states)) is not None:
                    leaf.state = _put_together(state, arrays)
                    mx.eval(leaf.state)
            return Saved(cache, np.array(arrays["tokens"]).tolist())
        except PoolExhausted:
            raise
        except RuntimeError as error:  # MLX reads the file now
            raise SessionFileError("unreadable", f"{path.name}: {error}") from error

    def peek(self, path: Path) -> tuple[dict[str, Any], np.ndarray]:
        """What was said `about` a session, and its tokens, int32; neither is checked. Raises SessionFileError."""
        manifest = read_manifest(path)
        if manifest.get("model") != self.model:
            raise SessionFileError("other_model", f"{path.name}: made by another model or tokenizer")
        try:
            arrays = mx.load(str(path))
            assert isinstance(arrays, dict)
            return dict(manifest["about"]), np.array(arrays["tokens"]).astype(np.int32).reshape(-1)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise SessionFileError("corrupt", f"{path.name}: the tokens can't be read ({error})") from error

    def _ring_pieces(self, batch: CacheBatch, ring: PageRing) -> dict[str, Piece]:
        pool, pieces, index = self._store.spec.pool, {}, mx.array(ring.pages, dtype=mx.int32)
        for i, raw in enumerate(batch.raw):
            for k, array in enumerate(pool.pages(i)):
                shape = (len(ring.pages), *array.shape[1:])

                def gathered(layer: int = i, part: int = k) -> mx.array:
                    return mx.take(pool.pages(layer)[part], index, axis=0)

                pieces[f"layer.{i}.pages.{k}"] = Piece(shape, array.dtype, gathered)
            for k, array in enumerate(raw):
                pieces[f"layer.{i}.raw.{k}"] = piece(array)
            if ring.centre is not None and i in ring.centre.means:
                pieces[f"layer.{i}.centre"] = piece(ring.centre.means[i])
        return pieces

    def _fill(self, batch: CacheBatch, manifest: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        ring, pool = batch.rings[0], self._store.spec.pool
        pages = pool.take(manifest["ring"]["flushed"] - manifest["ring"]["first"])
        ring.append_pages(pages)  # from here on they go when the batch goes
        ring.offset, ring.first = manifest["ring"]["offset"], manifest["ring"]["first"]
        ring.flushed = manifest["ring"]["flushed"]
        mx.synchronize()  # a write under a reader copies the pool
        raw = []
        for i in range(len(self._store.spec.layers)):
            if pages:
                parts = tuple(arrays[f"layer.{i}.pages.{k}"] for k in range(len(pool.pages(i))))
                pool.write(i, pages, parts)
            raw.append((arrays[f"layer.{i}.raw.0"], arrays[f"layer.{i}.raw.1"]))
            mx.eval(pool.pages(i), raw[-1])
        batch.raw = raw
        if (centred := manifest["centred"]) is not None:
            n_heads, layers = centred
            ring.centre = KeyCentre.known({layer: arrays[f"layer.{layer}.centre"] for layer in layers}, n_heads)
            mx.eval(list(ring.centre.means.values()))


def fingerprint(model: LoadedModel) -> str:
    """What tells this model with its tokenizer from any other: all weights' names, shapes and samples of their values,
    its settings (rope among them), the vocabulary and the chat template.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(cast(list[tuple[str, mx.array]], tree_flatten(model.model.parameters()))):
        flat = weight.reshape(-1)
        some = flat[:: max(1, flat.size // _SAMPLES)][:_SAMPLES].astype(mx.float32)
        digest.update(f"{name} {weight.shape} {weight.dtype}".encode())
        digest.update(np.array(some).tobytes())
    settings = getattr(model.model, "args", None)
    vocabulary = model.tokenizer.get_vocab()
    template = str(getattr(model.tokenizer, "chat_template", None))
    digest.update(json.dumps([str(settings), vocabulary, template], sort_keys=True).encode())
    return digest.hexdigest()


def _layout(store: CacheStore) -> dict[str, Any]:
    """Everything that decides what the bytes of a cache mean."""
    ring = store.spec.ring
    return {
        "preset": store.preset.name,
        "ring": [ring.keep, ring.window, ring.max_size],
        "layers": [
            [
                layer.lanes.name,
                layer.lanes.codebook,
                layer.lanes.shape.widths,
                str(layer.dtype),
                layer.centre_above,
                [[list(shape), str(dtype)] for shape, dtype in layer.lanes.page_arrays()],
            ]
            for layer in store.spec.layers
        ],
        "native": [plan.kind for plan in store.plans if not plan.compressed],
    }


def _batch_of(cache: Sequence[Any]) -> CacheBatch | None:
    return next((leaf.batch for leaf in leaves(cache) if isinstance(leaf, PagedKVCache)), None)


def _taken_apart(name: str, state: Any, pieces: dict[str, Piece]) -> Any:
    """A state of mlx-lm's own caches as JSON, whose arrays go to `pieces`."""
    if isinstance(state, mx.array):
        pieces[name] = piece(state)
        return {"array": name}
    if isinstance(state, list | tuple):
        return [_taken_apart(f"{name}.{i}", part, pieces) for i, part in enumerate(state)]
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"a cache's state has a {type(state).__name__} in it")


def _put_together(state: Any, arrays: dict[str, mx.array]) -> Any:
    if isinstance(state, dict):
        return arrays[state["array"]]
    return [_put_together(part, arrays) for part in state] if isinstance(state, list) else state
