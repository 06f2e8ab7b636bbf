"""Sessions on disk: a prompt cache to a file and back, bit-identical, layer by layer.

Only a server that would write the same bytes can use a file: same model and tokenizer, same lanes and sizes. The
manifest names these, and any difference is refused. turbocache/storage/session_file.py has the file's format.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from kernels.codec.layout import LAYOUT_VERSION
from kernels.codec.rotation import ROTATION_SEED
from kernels.lanes.qjl import SKETCH_SEED, QjlShape
from turbocache.backend import codebooks_of
from turbocache.cache.batch import CacheBatch
from turbocache.cache.conditioning import KeyCentre
from turbocache.cache.outline import PLAIN, Outline
from turbocache.cache.pool import PoolExhausted
from turbocache.cache.spec import CacheSpec, CompressedLayer
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm.group import Group
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.prompt_cache import leaves
from turbocache.storage.session_file import Piece, SessionFileError, open_checked, piece, read_manifest, write
from turbocache.store import CacheStore, batches_of

VERSION = 5
"""Version of the manifest and of the arrays' names. `LAYOUT_VERSION` covers the bytes in pages."""
_UNPINNED = 4
"""The version before. Its rings have no outline and no pinned pages."""
_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class State:
    """A prompt cache and the tokens that it holds."""

    kind: str
    """`session`, or the kind of a checkpoint."""
    tokens: np.ndarray
    """int32."""
    cache: Sequence[Any]


class SessionFiles:
    """Writes and reads sessions' caches for one model, store and backend. Used by the thread that owns MLX."""

    def __init__(self, model: LoadedModel, store: CacheStore, group: Group | None = None) -> None:
        """In a `group` each rank writes files for its own share. The model's fingerprint covers all shares."""
        group = Group() if group is None else group
        self._store = store
        self.model, layout = fingerprint(model), _layout(store)
        if not group.alone:
            self.model = hashlib.sha256(b"".join(group.gather(self.model.encode()))).hexdigest()
            layout["rank"] = [group.rank, group.size]
        self._made_by: dict[str, Any] = {
            "version": VERSION,
            "layout_version": LAYOUT_VERSION,
            "model": self.model,
            "layout": layout,
            "rotation": _rotation(store),
            "codebooks": _codebooks(store),
        }

    def save(self, path: Path, states: Sequence[State], about: Mapping[str, Any] | None = None) -> int:
        """Write states of one session at rest, the session's own first, over `path`. Returns the file's bytes.

        Writes a page once that several states hold. `peek` returns `about`. Raises OSError.
        """
        pieces: dict[str, Piece] = {}
        pages = [_page_pieces(_of(s), spec, states, pieces) for s, spec in enumerate(self._store.specs)]
        places = [{page: i for i, page in enumerate(owned)} for owned in pages]
        records = [self._state_pieces(f"state.{n}", state, places, pieces) for n, state in enumerate(states)]
        tokens = np.ascontiguousarray(states[0].tokens, dtype=np.int32).tobytes()
        manifest = {
            **self._made_by,
            "about": dict(about or {}),
            "tokens": hashlib.sha256(tokens).hexdigest(),
            "n_pages": len(pages[0]),
            "n_sliding_pages": [len(owned) for owned in pages[1:]],
            "states": records,
        }
        return write(path, pieces, manifest)

    def load(self, path: Path) -> list[State]:
        """Read a session's states, or only the first if there are not enough pages for all.

        Raises SessionFileError for a damaged or foreign file, PoolExhausted without enough pages for one state.
        """
        manifest, arrays = open_checked(path)
        self._check(path.name, manifest)
        records, n_pages = manifest["states"], [manifest["n_pages"], *manifest.get("n_sliding_pages", ())]
        try:
            try:
                return self._states(records, n_pages, arrays)
            except PoolExhausted:
                return self._states(records[:1], n_pages, arrays)
        except PoolExhausted:
            raise
        except RuntimeError as error:  # MLX reads the file here
            raise SessionFileError("unreadable", f"{path.name}: {error}") from error

    def _check(self, name: str, manifest: Mapping[str, Any]) -> None:
        """Raise SessionFileError unless this server writes the same bytes."""
        versions = manifest.get("version"), manifest.get("layout_version")
        if versions[0] not in (VERSION, _UNPINNED) or versions[1] != LAYOUT_VERSION:
            expected = f"{VERSION} with pages of layout {LAYOUT_VERSION}"
            actual = f"{versions[0]} with pages of layout {versions[1]}"
            raise SessionFileError("other_version", f"{name}: version {actual}, not {expected}")
        if manifest["model"] != self.model:
            raise SessionFileError("other_model", f"{name}: made by another model or tokenizer")
        if manifest["layout"].get("rank") != self._made_by["layout"].get("rank"):
            raise SessionFileError("other_group", f"{name}: written by another rank, or another number of them")
        if manifest["layout"] != self._made_by["layout"]:
            reason = "made with another preset, backend, or sizes of sink, window or session"
            raise SessionFileError("other_layout", f"{name}: {reason}")
        # Another preset has other codebooks too. So these come after the layout.
        if manifest["rotation"] != self._made_by["rotation"]:
            raise SessionFileError("other_rotation", f"{name}: keys and values were rotated with another seed")
        if manifest["codebooks"] != self._made_by["codebooks"]:
            raise SessionFileError("other_codebook", f"{name}: keys and values were encoded with other codebooks")

    def peek(self, path: Path) -> tuple[dict[str, Any], np.ndarray]:
        """`tokens_of` a file of this model."""
        return tokens_of(path, self.model)

    def _state_pieces(
        self, name: str, state: State, places: Sequence[Mapping[int, int]], pieces: dict[str, Piece]
    ) -> dict[str, Any]:
        """The manifest's record of a state. Adds its arrays to `pieces`. `places`: each page's index, by spec."""
        pieces[f"{name}.tokens"] = piece(mx.array(np.asarray(state.tokens, dtype=np.int32)))
        batches = {batch.spec: batch for batch in batches_of(state.cache)}
        record: dict[str, Any] = {"kind": state.kind, "ring": None, "sliding": [], "native": []}
        for s, spec in enumerate(self._store.specs):
            part = _ring_pieces(f"{name}.{_of(s)}", batches[spec], places[s], pieces) if spec in batches else {}
            if s:
                record["sliding"].append(part)
            else:
                record |= part
        for i, leaf in enumerate(leaves(state.cache)):
            if not isinstance(leaf, PagedKVCache):
                flat = None if leaf.empty() else _flatten(f"{name}.native.{i}", leaf.state, pieces)
                record["native"].append(flat)
        return record

    def _states(
        self, records: Sequence[dict[str, Any]], n_pages: Sequence[int], arrays: Mapping[str, mx.array]
    ) -> list[State]:
        with ExitStack() as taken:
            page_at = []
            for s, spec in enumerate(self._store.specs):
                places = sorted({place for record in records for place in _part(record, s).get("pages", ())})
                pages = spec.pool.take(len(places))
                taken.callback(spec.pool.release, pages)  # the rings hold references of their own
                if pages:
                    _write_pages(_of(s), spec, pages, places if len(places) < n_pages[s] else None, arrays)
                page_at.append(dict(zip(places, pages, strict=True)))
            return [self._state(f"state.{n}", record, page_at, arrays) for n, record in enumerate(records)]

    def _state(
        self, name: str, record: dict[str, Any], page_at: Sequence[Mapping[int, int]], arrays: Mapping[str, mx.array]
    ) -> State:
        cache = self._store.new_cache()
        for batch in batches_of(cache):
            s = self._store.specs.index(batch.spec)
            _restore_ring(f"{name}.{_of(s)}", batch, _part(record, s), page_at[s], arrays)
        native = iter(record["native"])
        for leaf in leaves(cache):
            if not isinstance(leaf, PagedKVCache) and (state := next(native)) is not None:
                leaf.state = _unflatten(state, arrays)
                mx.eval(leaf.state)
        return State(record["kind"], np.array(arrays[f"{name}.tokens"]).astype(np.int32).reshape(-1), cache)


def tokens_of(path: Path, model: str | None = None) -> tuple[dict[str, Any], np.ndarray]:
    """A file's `about` and the session's tokens, int32, both checked. Refuses files of other models than `model`.

    Raises SessionFileError.
    """
    manifest, data = read_manifest(path, "state.0.tokens")
    if model is not None and manifest.get("model") != model:
        raise SessionFileError("other_model", f"{path.name}: made by another model or tokenizer")
    if manifest.get("tokens") != hashlib.sha256(data).hexdigest():
        raise SessionFileError("corrupt", f"{path.name}: the tokens are not what was written")
    return dict(manifest["about"]), np.frombuffer(data, dtype=np.int32)


def fingerprint(model: LoadedModel) -> str:
    """SHA-256 that identifies a model with its tokenizer.

    Covers the names, shapes and sampled values of all weights, the model's settings (rope included), the vocabulary and
    the chat template.
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


def _of(spec: int) -> str:
    """Beginning of the names of a spec's arrays."""
    return f"sliding.{spec - 1}." if spec else ""


def _part(record: Mapping[str, Any], spec: int) -> Mapping[str, Any]:
    """A spec's part of the record of a state."""
    part: Mapping[str, Any] = record["sliding"][spec - 1] if spec else record
    return part


def _page_pieces(name: str, spec: CacheSpec, states: Sequence[State], pieces: dict[str, Piece]) -> list[int]:
    """The pages of all states. Adds their arrays to `pieces`."""
    batches = [batch for state in states for batch in batches_of(state.cache) if batch.spec is spec]
    pages = list(dict.fromkeys(page for batch in batches for page in batch.rings[0].pages))
    pool, index = spec.pool, mx.array(pages, dtype=mx.int32)
    for i in range(len(spec.layers)):
        for k, array in enumerate(pool.pages(i)):

            def gathered(layer: int = i, part: int = k) -> mx.array:
                return mx.take(pool.pages(layer)[part], index, axis=0)

            pieces[f"{name}layer.{i}.pages.{k}"] = Piece((len(pages), *array.shape[1:]), array.dtype, gathered)
    return pages


def _write_pages(
    name: str, spec: CacheSpec, pages: list[int], places: list[int] | None, arrays: Mapping[str, mx.array]
) -> None:
    """Write a file's pages, or those at `places`, into the pool."""
    mx.synchronize()  # a write beside a reader copies the pool
    for i in range(len(spec.layers)):
        parts = tuple(arrays[f"{name}layer.{i}.pages.{k}"] for k in range(len(spec.pool.pages(i))))
        if places is not None:
            parts = tuple(mx.take(part, mx.array(places, dtype=mx.int32), axis=0) for part in parts)
        spec.pool.write(i, pages, parts)
        mx.eval(spec.pool.pages(i))


def _ring_pieces(name: str, batch: CacheBatch, places: Mapping[int, int], pieces: dict[str, Piece]) -> dict[str, Any]:
    """The record of a spec's part of a state. Adds its arrays to `pieces`."""
    ring = batch.rings[0]
    for i, raw in enumerate(batch.raw):
        for k, array in enumerate(raw):
            pieces[f"{name}layer.{i}.raw.{k}"] = piece(array)
        if ring.centre is not None and i in ring.centre.means:
            pieces[f"{name}layer.{i}.centre"] = piece(ring.centre.means[i])
    return {
        "ring": {"offset": ring.offset, "first": ring.gone, "flushed": ring.flushed, "pinned": ring.pinned},
        "outline": dataclasses.asdict(ring.outline),
        "pages": [places[page] for page in ring.pages],
        "centred": None if ring.centre is None else [ring.centre.n_heads, sorted(ring.centre.means)],
    }


def _restore_ring(
    name: str, batch: CacheBatch, record: Mapping[str, Any], page_at: Mapping[int, int], arrays: Mapping[str, mx.array]
) -> None:
    """Fill a new batch of one row from `_ring_pieces`."""
    ring, pages = batch.rings[0], [page_at[place] for place in record["pages"]]
    batch.spec.pool.retain(pages)
    ring.append_pages(pages)
    ring.offset, ring.gone, ring.flushed = (record["ring"][part] for part in ("offset", "first", "flushed"))
    ring.pinned, ring.outline = record["ring"].get("pinned", 0), _outline(record.get("outline", {}))
    raw = []
    for i in range(len(batch.spec.layers)):
        raw.append((arrays[f"{name}layer.{i}.raw.0"], arrays[f"{name}layer.{i}.raw.1"]))
        mx.eval(raw[-1])
    batch.raw = raw
    if (centred := record["centred"]) is not None:
        n_heads, layers = centred
        means = {layer: arrays[f"{name}layer.{layer}.centre"] for layer in layers}
        ring.centre = KeyCentre(means, n_heads)
        mx.eval(list(means.values()))


def _layout(store: CacheStore) -> dict[str, Any]:
    """Everything that the meaning of a cache's bytes depends on."""
    ring, sliding = store.spec.ring, [[spec.ring.window, spec.ring.max_size] for spec in store.specs[1:]]
    return {
        "preset": store.preset.name,
        "ring": [ring.keep, ring.window, ring.max_size],
        **({"sliding": sliding} if sliding else {}),
        "layers": [
            [
                layer.lanes.name,
                layer.lanes.codebook,
                layer.lanes.shape.widths,
                str(layer.dtype),
                layer.centre_above,
                [[list(shape), str(dtype)] for shape, dtype in layer.lanes.page_arrays()],
            ]
            for layer in _layers(store)
        ],
        "native": [plan.kind for plan in store.plans if not plan.compressed],
    }


def _layers(store: CacheStore) -> list[CompressedLayer]:
    return [layer for spec in store.specs for layer in spec.layers]


def _rotation(store: CacheStore) -> list[int]:
    """Seeds of the random matrices that tokens in pages are multiplied by. Empty if pages hold no codes."""
    if all(codebooks_of(layer.lanes) is None for layer in _layers(store)):
        return []
    sketches = any(isinstance(layer.lanes.shape, QjlShape) for layer in _layers(store))
    return [ROTATION_SEED, SKETCH_SEED] if sketches else [ROTATION_SEED]


def _codebooks(store: CacheStore) -> str:
    """SHA-256 of all layers' levels and zooms, of keys and values."""
    digest = hashlib.sha256()
    for layer in _layers(store):
        if (books := codebooks_of(layer.lanes)) is not None:
            zooms = books.key_zooms, books.value_zooms
            digest.update(f"{books.keys.shape} {books.values.shape} {zooms}".encode())
            digest.update(books.keys.tobytes() + books.values.tobytes())
    return digest.hexdigest()


def _outline(record: Mapping[str, Any]) -> Outline:
    return Outline(record["prefix"], tuple(record["turns"]), tuple(record["steps"])) if record else PLAIN


def _flatten(name: str, state: Any, pieces: dict[str, Piece]) -> Any:
    """The state of one of mlx-lm's own caches as JSON. Adds its arrays to `pieces`."""
    if isinstance(state, mx.array):
        pieces[name] = piece(state)
        return {"array": name}
    if isinstance(state, list | tuple):
        return [_flatten(f"{name}.{i}", part, pieces) for i, part in enumerate(state)]
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"a cache's state has a {type(state).__name__} in it")


def _unflatten(state: Any, arrays: Mapping[str, mx.array]) -> Any:
    if isinstance(state, dict):
        return arrays[state["array"]]
    return [_unflatten(part, arrays) for part in state] if isinstance(state, list) else state
