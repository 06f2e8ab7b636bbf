"""Makes the caches of all sessions from a loaded model, a backend and settings."""

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from kernels.codec.layout import PAGE
from kernels.lanes.identity import IdentityLanes
from turbocache.backend import Backend, lane_shape, lanes_for
from turbocache.cache.batch import CacheBatch
from turbocache.cache.conditioning import CENTRE_ABOVE
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import PageRing, RingConfig
from turbocache.cache.spec import CacheSpec, CompressedLayer
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam
from turbocache.mlxlm.plan import LayerGeometry, LayerPlan, all_native, plan_layers
from turbocache.mlxlm.prompt_cache import leaves, with_leaves
from turbocache.presets import PRESETS, Preset

_SAME_LOGITS = 0.02
"""Largest allowed difference, relative to the largest logit, between two computations in half precision."""


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
    ring = RingConfig(keep=2, window=0)
    store = CacheStore(model, plans, PRESETS["off"], "reference", ring, n_pages=4)
    try:
        native = _proof_logits(model, make_prompt_cache(model))
    except Exception as error:  # models are foreign code and may raise anything
        return all_native(plans, f"the model fails with mlx-lm's own cache: {type(error).__name__}: {error}")
    try:
        paged = _proof_logits(model, store.new_cache())
    except Exception as error:
        return all_native(plans, f"the model can't use a paged cache: {type(error).__name__}: {error}")
    worst = max(_relative_error(got, want) for got, want in zip(paged, native, strict=True))
    if worst > _SAME_LOGITS:
        return all_native(plans, f"logits over a paged cache differ by {worst:.1%} from mlx-lm's own")
    return plans


def _proof_logits(model: Module, cache: list[Any]) -> list[mx.array]:
    """Last logits of a prompt in the window, of a chunk that fills pages, and of two decode steps."""
    prompts = [range(1, 6), range(1, PAGE + 8), [3], [4]]
    return [model(mx.array([list(tokens)]), cache=cache)[0, -1].astype(mx.float32) for tokens in prompts]


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
        self._model = model
        self.plans = list(plans)
        self.preset = preset

        @functools.cache
        def layer(geometry: LayerGeometry, chosen: Preset) -> CompressedLayer:
            return compressed_layer(geometry, chosen, backend)

        # Layers of a kind share their lanes, because lanes plan a step's launch once.
        layers = tuple(
            layer(plan.geometry, preset.of_layer(i, len(plans)))
            for i, plan in enumerate(plans)
            if plan.geometry is not None
        )
        self.spec = CacheSpec(ring, PagePool([layer.lanes for layer in layers], n_pages), layers)
        seam.install()

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
        pages = self.spec.ring.pages_needed(n_tokens, chunk) * self.spec.pool.page_nbytes
        native = sum(plan.native_nbytes(n_tokens) for plan in self.plans)
        return pages + 2 * (self.spec.raw_nbytes + self.spec.centre_nbytes) + native

    def prefill_nbytes(self, n_tokens: int, chunk: int) -> int:
        """Most bytes that the prefill of `n_tokens` in chunks of `chunk` needs in addition.

        These are a chunk's mask and two layers' expanded pages (`CacheBatch.attend_prefill`).
        """
        keys = self.spec.ring.raw_slots + PAGE * self.spec.ring.pages_needed(n_tokens, chunk)
        keys = min(keys, n_tokens)
        layers = sorted(
            plan.geometry.n_kv_heads * (plan.geometry.key_dim + plan.geometry.value_dim) * plan.geometry.dtype.size
            for plan in self.plans
            if plan.geometry is not None
        )
        return sum(layers[-2:]) * keys + (min(chunk, n_tokens) * keys if layers else 0)

    @property
    def can_checkpoint(self) -> bool:
        """Whether copies of a session's cache are cheap: pages are shared, and mlx-lm's own caches are bounded."""
        return all(plan.compressed or plan.max_tokens is not None or not plan.token_nbytes for plan in self.plans)

    @property
    def can_go_back(self) -> bool:
        """Whether a cache that has not rotated can drop any number of tokens. A layer with a recurrent state can't."""
        return all(plan.compressed or (plan.max_tokens is None and not plan.fixed_nbytes) for plan in self.plans)

    def resting_nbytes(self, caches: Iterable[Sequence[Any]]) -> int:
        """Bytes of caches at rest. Each page counts once.

        Pages that running sessions share are left out, because the budget counts them for those sessions. But if rings
        rotate, a running session may release them, so then they count.
        """
        owners: Counter[int] = Counter()
        total = 0
        for cache in caches:
            ring = ring_of(cache)
            total += self.held_nbytes(cache)
            if ring is not None:
                total -= len(ring.pages) * self.spec.pool.page_nbytes
                owners.update(ring.pages)
        rotates = self.spec.ring.max_size is not None
        n_pages = sum(rotates or self.spec.pool.n_owners(page) == n for page, n in owners.items())
        return total + n_pages * self.spec.pool.page_nbytes

    def held_nbytes(self, cache: Sequence[Any]) -> int:
        """Bytes of one session at rest, shared pages in full."""
        ring = ring_of(cache)
        if ring is None:
            return native_nbytes(cache)
        centre = 0 if ring.centre is None else ring.centre.nbytes
        return len(ring.pages) * self.spec.pool.page_nbytes + self.spec.raw_nbytes + centre + native_nbytes(cache)

    def close_all_but(self, kept: Iterable[Sequence[Any]]) -> None:
        """Close every batch that is not part of `kept`, even if something still refers to it.

        After a failed step the exception's traceback keeps the step's batch alive.
        """
        kept_batches = {layer.batch for cache in kept for layer in leaves(cache) if isinstance(layer, PagedKVCache)}
        for batch in set(self.spec.live) - kept_batches:
            batch.close()

    def new_cache(self) -> list[Any]:
        """An empty session's prompt cache: a view for each compressed layer, mlx-lm's own caches for the others."""
        native = make_prompt_cache(self._model)
        views = iter(PagedKVCache.layers(self.spec))
        chosen = [
            next(views) if plan.compressed else leaf for plan, leaf in zip(self.plans, leaves(native), strict=True)
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
    ring = ring_of(cache)
    return ring is None or ring.is_same_after(offset)


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


def batch_of(cache: Sequence[Any]) -> CacheBatch | None:
    """The batch behind a prompt cache's compressed layers, or None without any."""
    return next((layer.batch for layer in leaves(cache) if isinstance(layer, PagedKVCache)), None)


def rings_of(cache: Sequence[Any]) -> list[PageRing]:
    """The page rings of a prompt cache, one for each row, or none without compressed layers."""
    return [] if (batch := batch_of(cache)) is None else batch.rings


def ring_of(cache: Sequence[Any]) -> PageRing | None:
    """The page ring of one session's cache, or None without compressed layers."""
    return next(iter(rings_of(cache)), None)
