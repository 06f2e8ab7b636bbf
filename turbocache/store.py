"""Makes the caches of all sessions from a loaded model, a backend and settings."""

import copy
import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from kernels.codec.layout import PAGE
from kernels.lanes.identity import IdentityLanes
from turbocache.backend import Backend, lane_shape, lanes_for
from turbocache.cache.batch import CacheBatch
from turbocache.cache.conditioning import CENTRE_ABOVE
from turbocache.cache.outline import Outline
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import PageRing, RingConfig
from turbocache.cache.spec import CacheSpec, CompressedLayer
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam
from turbocache.mlxlm.head import LastLogits
from turbocache.mlxlm.plan import LayerGeometry, LayerPlan, all_native, plan_layers, too_small
from turbocache.mlxlm.prompt_cache import PromptCache, leaves, with_leaves
from turbocache.presets import PRESETS, Preset

_SAME_LOGITS = 0.02
"""Largest allowed difference, relative to the largest logit, between two computations in half precision."""
_LONGEST_PROOF = 1024
"""Longer sliding windows are not filled by the proof, so that a start does not take long."""
_PROOF_TOKENS = 71
"""The proof's prompt repeats after this many different tokens."""
_PAYS = 0.8
"""A sliding window is compressed if its bytes are at most this share of mlx-lm's own."""
_UNBOUNDED = 1 << 30
"""Capacity of a sliding window's pool. A session has few pages there, and the memory budget counts them."""


def compressed_layer(geometry: LayerGeometry, preset: Preset, backend: Backend | str) -> CompressedLayer:
    """Storage of one layer: the lanes that the probe chose, or uncompressed pages for `off`."""
    shape = lane_shape(geometry, preset)
    if not preset.compressed:
        return CompressedLayer(IdentityLanes(shape, geometry.dtype), geometry.dtype)
    above = CENTRE_ABOVE if preset.condition and not geometry.sinks else None
    return CompressedLayer(lanes_for(backend, shape, geometry.dtype), geometry.dtype, above)


def checked_plans(model: Module) -> list[LayerPlan]:
    """`plan_layers`, checked: uncompressed paged caches must give the same logits as mlx-lm's own caches.

    If they do not, all layers fall back to mlx-lm's caches, with the reason.
    """
    plans = plan_layers(model)
    if not any(plan.compressed for plan in plans):
        return plans
    windows = [plan.window for plan in plans if plan.window is not None and plan.window <= _LONGEST_PROOF]
    # A prompt in the raw window, a chunk that fills pages, one that moves sliding windows on, and two decode steps.
    lengths = [5, PAGE + 7, *([max(windows)] if windows else []), 1, 1]
    ring = RingConfig(keep=2, window=0)
    store = CacheStore(model, plans, PRESETS["off"], "reference", ring, ring.pages_needed(sum(lengths)))
    try:
        native = _proof_logits(model, make_prompt_cache(model), lengths)
    except Exception as error:  # models are foreign code and may raise anything
        return all_native(plans, f"the model fails with mlx-lm's own cache: {type(error).__name__}: {error}")
    try:
        paged = _proof_logits(model, store.new_cache(), lengths)
    except Exception as error:
        return all_native(plans, f"the model can't use a paged cache: {type(error).__name__}: {error}")
    worst = max(_relative_error(got, want) for got, want in zip(paged, native, strict=True))
    if worst > _SAME_LOGITS:
        return all_native(plans, f"logits over a paged cache differ by {worst:.1%} from mlx-lm's own")
    return plans


def _proof_logits(model: Module, cache: PromptCache, lengths: Sequence[int]) -> list[mx.array]:
    """The last logits of each chunk of a prompt."""
    last_logits, logits = LastLogits(model), []
    for i, n in enumerate(lengths):
        tokens = mx.array([[1 + (i + j) % _PROOF_TOKENS for j in range(n)]])
        logits.append(last_logits(tokens, cache, mx.array([n - 1]))[0].astype(mx.float32))
        mx.eval(logits[-1])
    return logits


def _relative_error(got: mx.array, want: mx.array) -> float:
    """Largest difference relative to the largest logit. Infinite if a number is not finite."""
    error = float(mx.abs(got - want).max() / mx.maximum(mx.abs(want).max(), 1e-30))
    return error if math.isfinite(error) else math.inf


class CacheStore:
    """Makes sessions' caches. One per process, used by the thread that owns MLX."""

    def __init__(
        self,
        model: Module,
        plans: Sequence[LayerPlan],
        preset: Preset,
        backend: Backend | str,
        ring: RingConfig,
        n_pages: int,
    ) -> None:
        """`ring` has the sizes of a session, `n_pages` is the capacity of the pool for layers with plain attention."""
        self._model = model
        self.preset = preset

        @functools.cache
        def layer(geometry: LayerGeometry, chosen: Preset) -> CompressedLayer:
            return compressed_layer(geometry, chosen, backend)

        # Layers of a kind share their lanes, because lanes plan a step's launch once.
        self._layers = [
            None if plan.geometry is None else layer(plan.geometry, preset.of_layer(i, len(plans)))
            for i, plan in enumerate(plans)
        ]
        # All layers of a window or none: a mask of one may serve the others.
        rings = {window: ring.of_sliding(window) for window in sorted({p.window for p in plans if p.window})}
        paying = {n: r for n, r in rings.items() if r is not None and self._pays(self._layers_of(plans, n), r)}
        self.plans = [
            plan.native(too_small(plan.window)) if plan.window and plan.window not in paying else plan for plan in plans
        ]
        self.spec = self._spec_of(None, ring, n_pages)
        """Of the layers with plain attention, of which there may be none."""
        self._of_window: dict[int | None, CacheSpec] = {None: self.spec}
        self._of_window |= {window: self._spec_of(window, sizes, _UNBOUNDED) for window, sizes in paying.items()}
        self.specs = tuple(self._of_window.values())
        seam.install()

    def _layers_of(self, plans: Sequence[LayerPlan], window: int | None) -> list[CompressedLayer]:
        pairs = zip(self._layers, plans, strict=True)
        return [layer for layer, plan in pairs if layer is not None and plan.compressed and plan.window == window]

    def _spec_of(self, window: int | None, ring: RingConfig, n_pages: int) -> CacheSpec:
        layers = tuple(self._layers_of(self.plans, window))
        pool = PagePool([layer.lanes for layer in layers], n_pages)
        return CacheSpec(ring, pool, layers, sliding=window is not None)

    def _pays(self, layers: Sequence[CompressedLayer], ring: RingConfig) -> bool:
        """Whether pages save enough in layers with a sliding window. Without a codec they never do, and are used."""
        if not self.preset.compressed or ring.max_size is None:
            return True
        page, token = sum(layer.page_nbytes for layer in layers), sum(layer.token_nbytes for layer in layers)
        held = ring.raw_slots * token + ring.pages_needed(_UNBOUNDED) * page
        return held <= _PAYS * ring.max_size * token

    def layer_sizes(self, index: int) -> dict[str, Any]:
        """Bytes of a layer's part of a session: `fixed_bytes`, and `token_bytes` for each of at most `max_tokens`."""
        plan, layer = self.plans[index], self._layers[index]
        if layer is None or plan.geometry is None:
            return {
                "fixed_bytes": plan.fixed_nbytes,
                "token_bytes": plan.token_nbytes,
                "max_tokens": plan.max_tokens,
            }
        ring = self._of_window[plan.window].ring
        return {
            "fixed_bytes": ring.raw_slots * plan.geometry.token_nbytes,
            "token_bytes": layer.page_nbytes / PAGE,
            "max_tokens": ring.max_size,
        }

    def reason(self, index: int) -> str:
        """Why a layer is stored as it is, for `/v1/backend`."""
        plan, reasons = self.plans[index], [self.plans[index].reason]
        if plan.geometry is None or not self.preset.compressed:
            return plan.reason
        stored = self.preset.of_layer(index, len(self.plans))
        if stored is not self.preset:
            reasons.append(
                f"protected: {lane_shape(plan.geometry, stored).widths} instead of {self.preset.name}, as one of the "
                f"first or last {self.preset.protect} layers"
            )
        if not self.preset.condition:
            reasons.append("conditioning of keys is switched off")
        elif plan.geometry.sinks:
            reasons.append("keys are not conditioned, because attention has sinks")
        return "; ".join(reasons)

    def session_nbytes(self, n_tokens: int, chunk: int) -> int:
        """Most bytes that one running session needs to reach `n_tokens` with prompts in chunks of `chunk` tokens.

        Raw buffers count twice: for a moment a session at rest and its row in the batch both exist.
        """
        pages = sum(spec.ring.pages_needed(n_tokens, chunk) * spec.pool.page_nbytes for spec in self.specs)
        raw = sum(spec.raw_nbytes + spec.centre_nbytes for spec in self.specs)
        return pages + 2 * raw + sum(plan.native_nbytes(n_tokens) for plan in self.plans)

    def prefill_nbytes(self, n_tokens: int, chunk: int) -> int:
        """Most bytes that the prefill of `n_tokens` in chunks of `chunk` needs in addition.

        These are the masks of a chunk and two layers' expanded pages (`CacheBatch.attend_prefill`).
        """
        expanded, masks = [], 0
        for spec in self.specs:
            keys = min(n_tokens, spec.ring.raw_slots + PAGE * spec.ring.pages_needed(n_tokens, chunk))
            expanded += [layer.token_nbytes * keys for layer in spec.layers]
            masks += min(chunk, n_tokens) * keys if spec.layers else 0
        return sum(sorted(expanded)[-2:]) + masks

    @property
    def can_checkpoint(self) -> bool:
        """Whether copies of a session's cache are cheap: pages are shared, and mlx-lm's own caches are bounded."""
        return all(plan.compressed or plan.max_tokens is not None or not plan.token_nbytes for plan in self.plans)

    @property
    def can_go_back(self) -> bool:
        """Whether a cache that has not rotated can drop any number of tokens. Not with a recurrent state or a sliding
        window.
        """
        return all(plan.max_tokens is None and not plan.fixed_nbytes for plan in self.plans)

    def resting_nbytes(self, caches: Iterable[Sequence[Any]]) -> int:
        """Bytes of caches at rest. Each page counts once.

        Pages that running sessions share are left out, because the budget counts them for those sessions. But if rings
        rotate, a running session may release them, so then they count.
        """
        owners: dict[CacheSpec, Counter[int]] = {spec: Counter() for spec in self.specs}
        total = 0
        for cache in caches:
            total += native_nbytes(cache)
            for batch in batches_of(cache):
                total += beside_pages(batch)
                owners[batch.spec].update(page for ring in batch.rings for page in ring.pages)
        for spec, counts in owners.items():
            rotates = spec.ring.max_size is not None
            n_pages = sum(rotates or spec.pool.n_owners(page) == n for page, n in counts.items())
            total += n_pages * spec.pool.page_nbytes
        return total

    def held_nbytes(self, cache: Sequence[Any]) -> int:
        """Bytes of one session at rest, shared pages in full."""
        return native_nbytes(cache) + pages_nbytes(pages_of(cache)) + sum(map(beside_pages, batches_of(cache)))

    def close_all_but(self, kept: Iterable[Sequence[Any]]) -> None:
        """Close every batch that is not part of `kept`, even if something still refers to it.

        After a failed step the exception's traceback keeps the step's batch alive.
        """
        kept_batches = {batch for cache in kept for batch in batches_of(cache)}
        for batch in {batch for spec in self.specs for batch in spec.live} - kept_batches:
            batch.close()

    def new_cache(self) -> list[Any]:
        """An empty session's prompt cache: a view for each compressed layer, mlx-lm's own caches for the others."""
        native = make_prompt_cache(self._model)
        views = {window: iter(PagedKVCache.layers(spec)) for window, spec in self._of_window.items()}
        chosen = [
            next(views[plan.window]) if plan.compressed else leaf
            for plan, leaf in zip(self.plans, leaves(native), strict=True)
        ]
        return with_leaves(native, iter(chosen))


def fork(cache: Sequence[Any]) -> list[Any]:
    """An independent copy of a session's prompt cache; pages are shared by reference."""
    return copy.deepcopy(list(cache))


def can_trim_to(cache: Sequence[Any], offset: int, length: int) -> bool:
    """Whether a session's cache of `length` tokens can go back to its first `offset` tokens."""
    if offset == length:
        return True
    return all(
        layer.batch.can_trim_to(offset) if isinstance(layer, PagedKVCache) else layer.is_trimmable()
        for layer in leaves(cache)
    )


def is_same_after(cache: Sequence[Any], offset: int) -> bool:
    """Whether a cache that goes back to `offset` equals a cache of just these tokens. mlx-lm's trimmable ones do."""
    return all(ring.is_same_after(offset) for batch in batches_of(cache) for ring in batch.rings)


def trim(cache: Sequence[Any], n: int) -> None:
    """Drop the newest `n` tokens in every layer. Check `can_trim_to` first."""
    for layer in cache:
        layer.trim(n)


def evaluate(cache: Sequence[Any]) -> None:
    """Evaluate a prompt cache's arrays, so that it holds no graphs."""
    mx.eval([layer.state for layer in cache])


def start_evaluation(cache: Sequence[Any]) -> None:
    """Start `evaluate` without waiting, so that the arrays soon release their graphs."""
    mx.async_eval([layer.state for layer in cache])


def native_nbytes(cache: Sequence[Any]) -> int:
    """Bytes of mlx-lm's own caches in a prompt cache."""
    return sum(layer.nbytes for layer in leaves(cache) if not isinstance(layer, PagedKVCache) and not layer.empty())


def batches_of(cache: Sequence[Any]) -> list[CacheBatch]:
    """The batches behind a prompt cache's compressed layers, in the order of `CacheStore.specs`."""
    found = {layer.batch for layer in leaves(cache) if isinstance(layer, PagedKVCache)}
    return sorted(found, key=lambda batch: (batch.spec.sliding, batch.spec.ring.max_size or 0))


def pages_of(cache: Sequence[Any]) -> dict[CacheSpec, set[int]]:
    """The pages of a prompt cache."""
    return {batch.spec: {page for ring in batch.rings for page in ring.pages} for batch in batches_of(cache)}


def pages_nbytes(pages: Mapping[CacheSpec, Collection[int]]) -> int:
    """Bytes of pages."""
    return sum(len(owned) * spec.pool.page_nbytes for spec, owned in pages.items())


def rings_of(cache: Sequence[Any]) -> list[PageRing]:
    """The page rings of a prompt cache's layers with plain attention, one for each row, or none without such layers."""
    return next((batch.rings for batch in batches_of(cache) if not batch.spec.sliding), [])


def ring_of(cache: Sequence[Any]) -> PageRing | None:
    """The page ring of one session's layers with plain attention, or None without such layers."""
    return next(iter(rings_of(cache)), None)


def describe(cache: Sequence[Any], outline: Outline) -> None:
    """Tell a session's cache the outline of its conversation. Layers with a sliding window see no further than that."""
    for batch in batches_of(cache):
        if not batch.spec.sliding:
            batch.spec.rotated_pages += sum(ring.describe(outline) for ring in batch.rings)


def beside_pages(batch: CacheBatch) -> int:
    """Bytes of a batch at rest that are not in pages."""
    centres = sum(ring.centre.nbytes for ring in batch.rings if ring.centre is not None)
    return batch.n_rows * batch.spec.raw_nbytes + centres
