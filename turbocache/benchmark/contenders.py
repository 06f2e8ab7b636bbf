"""Contenders: the caches that a benchmark compares, by name.

    kv                    mlx-lm's KVCache: every token in the model's own precision
    rotating              mlx-lm's RotatingKVCache: `max_size` tokens, the first 4 and the newest
    quantized-BITS        mlx-lm's QuantizedKVCache, groups of 64, as `kv_bits` makes it from the first chunk on
    rotating-quantized-4  mlx-lm's RotatingKVCache, quantised: shown with the reason that it does not run
    PRESET...             a row name of `turbocache eval` (turbocache/evaluation/rows.py). The first preset is
                          also measured rotating, with the same `max_size` as mlx-lm's

`open_contender` makes the caches in the process that measures.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from turbocache.backend import Backend
from turbocache.benchmark.settings import AGAINST, BenchmarkError, Settings
from turbocache.cache.ring import RingConfig
from turbocache.evaluation.rows import GROUP_SIZE, parse_preset
from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.storage import Stored, foreign_bytes, paged_bytes
from turbocache.mlxlm.plan import LayerPlan
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.presets import Preset
from turbocache.store import CacheStore

_LABELS = {
    "kv": "mlx-lm KVCache",
    "rotating": "mlx-lm RotatingKVCache",
    "quantized-8": "mlx-lm QuantizedKVCache, 8 bits",
    "quantized-4": "mlx-lm QuantizedKVCache, 4 bits",
    "rotating-quantized-4": "mlx-lm RotatingKVCache, 4 bits",
}
MLX_LM_KEEP = 4
"""Sink tokens of a RotatingKVCache from mlx-lm's `make_prompt_cache`."""
_AHEAD = 8
"""More tokens than a generation loop computes ahead of its output."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A cache by its name. Only this project's caches have `preset`, `backend` and `ring`."""

    name: str
    label: str
    max_size: int | None = None
    """Tokens that it holds at most. None: all."""
    preset: Preset | None = None
    backend: str | None = None
    """None: the settings' backend."""
    ring: RingConfig | None = None

    @property
    def ours(self) -> bool:
        return self.preset is not None

    def held(self, context: int) -> int:
        """Tokens that the next query sees after a prompt of `context` tokens."""
        return context if self.max_size is None else min(context, self.max_size)


@dataclass(frozen=True, slots=True)
class Opened:
    """Empty prompt caches, one for each row."""

    caches: list[PromptCache]
    options: dict[str, Any]
    """Options of mlx-lm's loop."""
    stored: Callable[[PromptCache], Stored]
    """Counts one row's bytes."""


def contenders(settings: Settings) -> list[Contender]:
    """The settings' contenders, mlx-lm's first, each once. Raises BenchmarkError for an unknown preset."""
    max_size = settings.rotating_ring.max_size
    chosen = []
    for name in (name for word in settings.against for name in AGAINST[word]):
        rotates = name.startswith("rotating")
        size = f", {max_size} tokens" if rotates else ""
        chosen.append(Contender(name, _LABELS[name] + size, max_size if rotates else None))
    chosen += [_ours(name, settings) for name in settings.presets]
    if "rotating" in settings.against and settings.presets and chosen[-len(settings.presets)].max_size is None:
        ring, first = settings.rotating_ring, settings.presets[0]
        stem = re.sub("@.*", "", first)
        chosen.append(_ours(f"{stem}@{ring.keep}/{ring.window}/{ring.max_size}", settings))
    return list({contender.name: contender for contender in chosen}.values())


def _ours(name: str, settings: Settings) -> Contender:
    try:
        parsed = parse_preset(name)
    except EvaluationError as error:
        raise BenchmarkError(f"--presets: {error}") from error
    if parsed is None:
        raise BenchmarkError(f"--presets: unknown preset {name!r}")
    preset, backend, ring = parsed
    ring = ring or settings.ring
    label = re.sub("@.*", "", name) + ("" if ring.max_size is None else f", {ring.max_size} tokens")
    return Contender(name, label, ring.max_size, preset, backend, ring)


def open_contender(
    contender: Contender,
    model: Module,
    plans: Sequence[LayerPlan],
    settings: Settings,
    backend: Backend | None,
    n_tokens: int,
) -> Opened:
    """Empty caches of all rows for `n_tokens` each. Raises mlx-lm's error for a cache that it lacks."""
    if contender.preset is not None and contender.ring is not None:
        assert backend is not None
        pages = max(1, contender.ring.pages_needed(n_tokens + _AHEAD, settings.chunk)) * settings.batch
        store = CacheStore(model, plans, contender.preset, backend, contender.ring, pages)
        caches = [store.new_cache() for _ in range(settings.batch)]
        return Opened(caches, {}, lambda cache: paged_bytes(store, cache))
    caches = [_mlx_lm_cache(model, contender.max_size) for _ in range(settings.batch)]
    options: dict[str, Any] = {}
    if (bits := re.search(r"quantized-(\d)$", contender.name)) is not None:
        options = {"kv_bits": int(bits[1]), "kv_group_size": GROUP_SIZE, "quantized_kv_start": 0}
    return Opened(caches, options, foreign_bytes)


def _mlx_lm_cache(model: Module, max_size: int | None) -> PromptCache:
    """The model's own prompt cache. With a `max_size` its plain caches rotate.

    mlx-lm's `max_kv_size` has no effect on models that make their own caches, such as llama.
    """
    layers: PromptCache = make_prompt_cache(model)
    if max_size is None:
        return layers
    if not any(type(layer) is KVCache for layer in layers):
        raise NotImplementedError("the model has no plain KVCache that could rotate")
    return [RotatingKVCache(max_size, MLX_LM_KEEP) if type(layer) is KVCache else layer for layer in layers]
