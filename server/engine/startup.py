"""Loads what the engine runs on: the model, the backend and the cache store."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.coordinator import Coordinator
from server.engine.generator import Generator
from server.engine.sampling import suggested_sampling
from server.errors import StartupError
from server.protocol import SamplingParams
from server.settings import Settings
from turbocache.backend import Backend, BackendUnavailable, choose_backend, with_warm_up_check
from turbocache.backends import BACKENDS
from turbocache.cache import PAGE
from turbocache.cache.ring import RingConfig
from turbocache.machine import blas
from turbocache.machine.memory import available_memory, device_memory
from turbocache.mlxlm.model import LoadedModel, ModelError, load_model
from turbocache.mlxlm.plan import LayerPlan
from turbocache.models import default_model
from turbocache.presets import Preset, preset
from turbocache.store import CacheStore, checked_plans

log = logging.getLogger(__name__)

_DEFAULT_SHARE = 0.25
"""The cache gets at most this share of the device's memory, and twice this share of the free memory."""

_GIB = 2**30
_SHORT = (5, 12, 25, 60)
"""Tokens of the warm-up's short prompts. MLX on CUDA has separate kernels for quantised products of up to 16 rows, up
to 32 and more. An H200's host compiles each in 31 s and keeps it in a file.
"""
_PAGED = 160
"""Tokens of the warm-up's longest prompt that do not fit into sink and window."""
_ANSWER = 4
"""Tokens of each answer of the warm-up."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """The model and its cache, fixed from start to stop."""

    model: LoadedModel
    backend: Backend
    store: CacheStore
    budget: int
    """Bytes for the cache."""
    chunk: int
    """Prompt tokens of one prefill step."""

    def report(self) -> dict[str, Any]:
        """The JSON of GET /v1/backend."""
        ring, library = self.store.spec.ring, blas.prefer_fast()
        layers = [
            {
                "index": i,
                "cache": plan.kind,
                "compressed": plan.compressed,
                "reason": self.store.reason(i),
                **self.store.layer_sizes(i),
            }
            for i, plan in enumerate(self.store.plans)
        ]
        return {
            **self.backend.as_json(),
            "model": self.model.id,
            "model_notes": list(self.model.notes),
            "dtype": str(self.model.dtype).removeprefix("mlx.core."),
            "preset": self.store.preset.name,
            "layers": layers,
            "cache": {"keep": ring.keep, "window": ring.window, "max_size": ring.max_size or self.model.max_positions},
            "kv_memory_bytes": self.budget,
            "blas": dataclasses.asdict(library),
        }


def load_runtime(settings: Settings, coordinator: Coordinator) -> Runtime:
    """Load the model, choose a backend and lay out the cache. Raises StartupError, which says what to change."""
    try:
        condition, protect = settings.kv_condition == "auto", settings.kv_protect
        chosen = replace(preset(settings.kv_preset), condition=condition, protect=protect)
    except ValueError as error:
        raise StartupError(f"TURBOCACHE_KV_PRESET: {error}.") from error
    try:
        model = load_model(settings.model or _default_model(coordinator), coordinator.group)
    except ModelError as error:
        raise StartupError(str(error)) from error
    max_size = settings.max_size
    if max_size is not None and max_size >= model.max_positions:
        max_size = None  # the model's own limit is lower, so nothing rotates
    try:
        ring = RingConfig(settings.keep, settings.window, max_size, settings.pin_share)
    except ValueError as error:
        raise StartupError(f"TURBOCACHE_MAX_SIZE, TURBOCACHE_KEEP, TURBOCACHE_WINDOW: {error}.") from error
    plans = checked_plans(model.model)
    backend = _working_backend(model, plans, chosen, ring, settings, coordinator)
    budget = coordinator.smallest(_budget(settings))
    layout = CacheStore(model.model, plans, chosen, backend, ring, n_pages=1)
    page_nbytes = int(coordinator.largest(layout.spec.pool.page_nbytes))
    n_pages = max(1, budget // max(1, page_nbytes))
    runtime = Runtime(
        model=model,
        backend=backend,
        store=CacheStore(model.model, plans, chosen, backend, ring, n_pages),
        budget=budget,
        chunk=settings.prefill_chunk,
    )
    smallest = runtime.store.session_nbytes(ring.raw_slots, runtime.chunk)
    if smallest > budget:
        raise StartupError(
            f"TURBOCACHE_KV_MEMORY is {budget} bytes, but one session of {ring.raw_slots} tokens needs {smallest}. "
            "Raise it, or lower TURBOCACHE_KEEP and TURBOCACHE_WINDOW."
        )
    return runtime


def _default_model(coordinator: Coordinator) -> str:
    default = default_model(in_group=not coordinator.group.alone)
    log.log(logging.WARNING if default.is_fallback else logging.INFO, "%s", default.reason)
    return str(default.path)


def _working_backend(
    model: LoadedModel,
    plans: Sequence[LayerPlan],
    chosen: Preset,
    ring: RingConfig,
    settings: Settings,
    coordinator: Coordinator,
) -> Backend:
    """The first backend that passes the probe and the warm-up. Raises StartupError."""
    failed: dict[str, Exception] = {}
    while True:
        try:
            backend = coordinator.choose_backend(
                lambda: choose_backend(settings.backend, plans, chosen, failed), failed
            )
        except BackendUnavailable as error:
            raise StartupError(str(error)) from error
        if backend is None:
            continue
        longest = min(ring.raw_slots + _PAGED, model.max_positions // 2)
        fused = BACKENDS[backend.name].fused
        lengths = (*_SHORT, longest) if fused else _SHORT[:1]
        if fused:
            log.info("first answers over %s: kernels that this device has not run yet are compiled now", backend.name)
        n_pages = ring.pages_needed(longest, settings.prefill_chunk) + 1
        try:
            store = CacheStore(model.model, plans, chosen, backend, ring, n_pages)
            seconds, failure = warm_up(model, store, settings.prefill_chunk, lengths), None
        except Exception as error:  # a model or a device may raise anything
            seconds, failure = 0.0, error
        if (failure := coordinator.first_failure(failure)) is None:
            return with_warm_up_check(backend, seconds) if backend.checks else backend
        if backend.code == "nothing_to_compress":
            raise StartupError(f"The model can't answer: {type(failure).__name__}: {failure}.") from failure
        failed[backend.name] = failure


def warm_up(model: LoadedModel, store: CacheStore, chunk: int, lengths: Iterable[int]) -> float:
    """Answer a prompt of each length, to check the backend and compile its kernels. Returns the seconds.

    Raises FloatingPointError for logits that are not finite, and errors of the model or its cache.
    """
    start = time.perf_counter()
    generator = Generator(model, max_batch=1, prefill_chunk=chunk)
    for length in lengths:
        prompt = [1 + i % 32 for i in range(length)]
        generator.insert(prompt, 0, store.new_cache(), _ANSWER, SamplingParams())
        ended = False
        while not ended:
            _, tokens = generator.next()
            if not all(generator.is_finite(response.token) for response in tokens):
                raise FloatingPointError(f"logits after a prompt of {length} tokens are not finite")
            ended = any(response.finish_reason for response in tokens)
    return time.perf_counter() - start


def announce(runtime: Runtime) -> None:
    """Log the model, backend, cache and BLAS."""
    report = runtime.report()
    n_compressed = sum(plan.compressed for plan in runtime.store.plans)
    cache, notes = report["cache"], ", ".join(runtime.model.notes)
    log.info("model %s, %d positions%s", runtime.model.id, runtime.model.max_positions, f" ({notes})" if notes else "")
    card = runtime.model.card
    if differences := _differences(suggested_sampling(runtime.model.generation_config)):
        log.info(
            "requests that say nothing else are answered with %s (the model's generation_config.json)", differences
        )
    log.info("the model's licence is %s, its origin %s", card.license or "not known", card.origin or "not known")
    log.info("backend %s on %s (%s)", runtime.backend.name, runtime.backend.device, runtime.backend.reason)
    log.info(
        "cache preset %s on %d of %d layers; a session holds %d tokens, %d sink and %d to %d recent ones raw",
        runtime.store.preset.name,
        n_compressed,
        len(runtime.store.plans),
        cache["max_size"],
        cache["keep"],
        cache["window"],
        cache["window"] + PAGE,
    )
    pool = runtime.store.spec.pool
    log.info(
        "cache memory budget %.2f GiB, %d pages of %d bytes", runtime.budget / _GIB, pool.capacity, pool.page_nbytes
    )
    blas = report["blas"]
    log.log(logging.INFO if blas["fast"] else logging.WARNING, "BLAS %s: %s", blas["name"], blas["advice"])


def _differences(sampling: SamplingParams) -> str:
    """What differs from OpenAI's defaults."""
    usual, given = dataclasses.asdict(SamplingParams()), dataclasses.asdict(sampling)
    return ", ".join(f"{name} {value:g}" for name, value in given.items() if value != usual[name])


def _budget(settings: Settings) -> int:
    total = device_memory()
    if settings.kv_memory is not None:
        return settings.kv_memory.resolve(total)
    return int(min(_DEFAULT_SHARE * total, 2 * _DEFAULT_SHARE * available_memory()))
