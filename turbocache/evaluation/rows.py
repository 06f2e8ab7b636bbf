"""The rows of an evaluation: named ways to make a cache.

    full                       mlx-lm's own cache in full precision: the reference for all others
    PRESET                     a preset of this project, with the backend, sink and window of the settings
    PRESET:BACKEND             with a backend of its own
    PRESET@KEEP/WINDOW         with a sink and window of its own, as sweeps make them
    PRESET@KEEP/WINDOW/SIZE    the same, rotating: a query sees at most SIZE tokens
    PRESET+FIELD=VALUE         with another value of a preset's field; on and off for truth values
    mlx-lm-BITS                mlx-lm's QuantizedKVCache, groups of 64, from the first token
    mlx-vlm-BITS               mlx-vlm's TurboQuant cache as its generation uses it: the last layer stays raw
    mlx-vlm-BITS-all           the same with the last layer compressed as well
    kvarn-BITS                 KVarN's codec (kvarn.py) with the sink and window of the settings, in tiles of 128 tokens
    kvarn-KEYS/VALUES          with widths of their own for keys and values: 1 to 8 bits, or 16 for tokens as they are
    kvarn-...-gSIZE            in tiles of SIZE tokens

A row that can't run on this machine or with this model stays in the table with the reason.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from mlx.nn.layers.base import Module
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, make_prompt_cache

from turbocache.backend import Backend, BackendUnavailable, choose_backend
from turbocache.cache.ring import RingConfig
from turbocache.evaluation import kvarn, turboquant
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.evaluation.storage import Stored, foreign_bytes, paged_bytes
from turbocache.mlxlm import seam
from turbocache.mlxlm.plan import LayerPlan
from turbocache.mlxlm.prompt_cache import PromptCache, leaves, with_leaves
from turbocache.presets import PRESETS, Preset
from turbocache.store import CacheStore

FULL = "full"
MLX_LM_BITS = (8, 4, 3, 2)
MLX_VLM_BITS = (4.0, 3.5, 3.0, 2.5, 2.0)
KVARN_WIDTHS = ("4", "4/2", "3", "2")
GROUP_SIZE = 64

GROUPS = {
    "presets": tuple(PRESETS),
    "mlx-lm": tuple(f"mlx-lm-{bits}" for bits in MLX_LM_BITS),
    "mlx-vlm": tuple(f"mlx-vlm-{bits:g}{which}" for bits in MLX_VLM_BITS for which in ("", "-all")),
    "kvarn": tuple(f"kvarn-{widths}" for widths in KVARN_WIDTHS),
}
"""Names for several rows. `all` is all of these groups."""


class RowUnavailable(Exception):
    """This row can't run here. The message is the reason in the table."""


@dataclass(frozen=True, slots=True)
class OpenCache:
    """The prompt cache of an empty session."""

    layers: PromptCache
    stored: Callable[[], Stored]
    """Counts its bytes."""
    store: CacheStore | None = None
    """What made it, None for another project's cache."""


class Opener(Protocol):
    """Makes empty caches."""

    def __call__(self, n_tokens: int, n_forks: int = 0) -> OpenCache:
        """A cache for `n_tokens`, with pages for as many tokens in each of its forks. Raises RowUnavailable."""


@dataclass(frozen=True, slots=True)
class Row:
    """A named way to make caches."""

    name: str
    key: str
    """Names everything that its results depend on, with backend and sizes."""
    open: Opener
    foreign: bool = False
    """Whether the cache is another project's code."""
    note: str = ""
    rotating: Callable[[int], Opener] | None = None
    """Opens caches that rotate at a number of tokens, or at the least that is possible. None for others' caches."""


def expand_names(settings: Settings) -> list[str]:
    """The settings' rows, with groups and sweeps expanded, each once. Raises EvaluationError for unknown names."""
    every = tuple(name for group in GROUPS.values() for name in group)
    names = [name for typed in settings.rows for name in (every if typed == "all" else GROUPS.get(typed, (typed,)))]
    is_sweep = len(settings.keep) * len(settings.window) > 1
    swept = []
    for name in names:
        if is_sweep and parse_preset(name) is not None and "@" not in name and not _is_off(name):
            swept += [f"{name}@{keep}/{window}" for keep in settings.keep for window in settings.window]
        else:
            swept.append(name)
    for name in swept:
        if parse_preset(name) is None and not is_foreign(name) and name != FULL:
            known = ", ".join(["all", *GROUPS, FULL, *every])
            raise EvaluationError(f"unknown preset {name!r}; there are {known}")
    return list(dict.fromkeys(swept))


def full_precision(model: Module) -> Row:
    """The row that is the reference for all others."""
    return Row(FULL, FULL, lambda n_tokens, n_forks=0: _foreign(make_prompt_cache(model)))


class RowMaker:
    """Makes rows for one model and its layer plans. Probes each backend and preset once."""

    def __init__(self, model: Module, plans: Sequence[LayerPlan], settings: Settings) -> None:
        self._model, self._plans, self._settings = model, plans, settings
        self._backend = cache(self._choose)

    def row(self, name: str) -> Row:
        """The row of that name. Raises EvaluationError if its backend does not work here."""
        if name == FULL:
            return full_precision(self._model)
        parsed = parse_preset(name)
        if parsed is not None:
            return self._paged(name, *parsed)
        widths = _kvarn_widths(name)
        if widths is not None:
            return self._kvarn(name, *widths)
        whose, bits, whole = _foreign_bits(name) or ("", 0.0, False)
        if whose == "mlx-lm":
            return Row(name, name, lambda n_tokens, n_forks=0: self._mlx_lm(int(bits)), foreign=True)
        return Row(name, name, lambda n_tokens, n_forks=0: self._mlx_vlm(bits, whole), foreign=True)

    def _paged(self, name: str, preset: Preset, backend: str | None, ring: RingConfig | None) -> Row:
        settings = self._settings
        chosen = self._backend(backend or settings.backend, preset)
        ring = ring or RingConfig(settings.keep[0], settings.window[0])

        def opener(sizes: RingConfig) -> Opener:
            def open_cache(n_tokens: int, n_forks: int = 0) -> OpenCache:
                pages = max(1, (1 + n_forks) * sizes.pages_needed(n_tokens, settings.chunk))
                store = CacheStore(self._model, self._plans, preset, chosen, sizes, pages)
                layers = store.new_cache()
                return OpenCache(layers, lambda: paged_bytes(store, layers), store)

            return open_cache

        def rotating(max_size: int) -> Opener:
            return opener(replace(ring, max_size=max(max_size, ring.smallest_max_size)))

        rotates = "" if ring.max_size is None else f", of {ring.max_size} tokens"
        note = f"backend {chosen.name}, sink {ring.keep}, window {ring.window}{rotates}: {chosen.reason}"
        sizes = f"{ring.keep}/{ring.window}" + ("" if ring.max_size is None else f"/{ring.max_size}")
        key = f"{re.split('[:@]', name)[0]}:{chosen.name}@{sizes}"
        return Row(name, key, opener(ring), note=note, rotating=rotating)

    def _choose(self, backend: str, preset: Preset) -> Backend:
        try:
            return choose_backend(backend, self._plans, preset)
        except (ValueError, BackendUnavailable) as error:
            raise EvaluationError(f"--backend: {error}") from error

    def _kvarn(self, name: str, key_bits: int, value_bits: int, group: int) -> Row:
        ring = RingConfig(self._settings.keep[0], self._settings.window[0])
        keys, values = kvarn.codec(key_bits, by_channel=True), kvarn.codec(value_bits, by_channel=False)

        def open_cache(n_tokens: int, n_forks: int = 0) -> OpenCache:
            layers = make_prompt_cache(self._model)
            seam.install()
            pairs = zip(self._plans, leaves(layers), strict=True)
            return _foreign(with_leaves(layers, iter([make_layer(plan, leaf) for plan, leaf in pairs])))

        def make_layer(plan: LayerPlan, native: Any) -> Any:
            sizes = ring if plan.window is None else ring.of_sliding(plan.window)
            if plan.geometry is None or sizes is None:
                return native
            dims = plan.geometry.key_dim, plan.geometry.value_dim
            if any(dim & (dim - 1) for dim in dims):
                raise RowUnavailable(f"KVarN's rotation needs head dims that are powers of two, not {dims}")
            return kvarn.KvarnLayer(sizes, keys, values, group)

        note = (
            f"this project's implementation of KVarN, in the layers, and with the sink ({ring.keep}) and window "
            f"({ring.window}), of the presets; tiles of {group} tokens"
        )
        return Row(name, f"{name}@{ring.keep}/{ring.window}", open_cache, note=note)

    def _mlx_lm(self, bits: int) -> OpenCache:
        layers = make_prompt_cache(self._model)
        try:
            maybe_quantize_kv_cache(layers, 0, GROUP_SIZE, bits)
        except NotImplementedError as error:
            raise RowUnavailable(f"mlx-lm can't quantise this model's cache: {error}") from error
        return _foreign(layers)

    def _mlx_vlm(self, bits: float, whole: bool) -> OpenCache:
        try:
            make_layer = turboquant.layer_maker(bits)
        except turboquant.NotInstalled as error:
            raise RowUnavailable(str(error)) from error
        seam.install()
        layers = make_prompt_cache(self._model)
        last = len(layers) - 1 if len(layers) > 2 and not whole else None
        layers = [make_layer() if type(layer) is KVCache and i != last else layer for i, layer in enumerate(layers)]
        return _foreign(layers)


def result_or_reason(row: Row, measure: Callable[[], Any]) -> Any:
    """The result, or a row's reason for having none. Errors of this project's own caches are raised."""
    try:
        return measure()
    except RowUnavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:
        if not row.foreign:
            raise
        return {"unavailable": f"{type(error).__name__}: {error}"}


def _foreign(layers: PromptCache) -> OpenCache:
    return OpenCache(layers, lambda: foreign_bytes(layers))


def parse_preset(name: str) -> tuple[Preset, str | None, RingConfig | None] | None:
    """The parts of a preset's row name, None for another name. Raises EvaluationError for invalid values."""
    match = re.fullmatch(r"([^:@+]+)((?:\+\w+=[\w.]+)*)(?::([a-z]+))?(?:@(\d+)/(\d+)(?:/(\d+))?)?", name)
    if match is None or match[1] not in PRESETS:
        return None
    try:
        ring = RingConfig(*(int(size) for size in match.groups()[3:] if size)) if match[4] else None
        changes = dict(change.split("=") for change in match[2].split("+")[1:])
        preset = replace(PRESETS[match[1]], **{field: _value(text) for field, text in changes.items()})
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"preset {name!r}: {error}") from error
    return preset, match[3], ring


def _value(text: str) -> Any:
    return {"on": True, "off": False}[text] if text in ("on", "off") else float(text) if "." in text else int(text)


def _is_off(name: str) -> bool:
    return re.split("[:+@]", name)[0] == "off"


def is_foreign(name: str) -> bool:
    """Whether a row has another project's method, to compare presets with."""
    return _foreign_bits(name) is not None or _kvarn_widths(name) is not None


def _kvarn_widths(name: str) -> tuple[int, int, int] | None:
    """Bits of keys and of values, and tokens of a tile. None for other names."""
    match = re.fullmatch(r"kvarn-(\d+)(?:/(\d+))?(?:-g(\d+))?", name)
    if match is None:
        return None
    key_bits, value_bits, group = int(match[1]), int(match[2] or match[1]), int(match[3] or kvarn.GROUP)
    known = (*range(1, 9), kvarn.RAW_BITS)
    return (key_bits, value_bits, group) if {key_bits, value_bits} <= set(known) and group > 1 else None


def _foreign_bits(name: str) -> tuple[str, float, bool] | None:
    """The project, the bits and whether all layers are compressed. None for other names."""
    match = re.fullmatch(r"(mlx-lm|mlx-vlm)-(\d(?:\.5)?)(-all)?", name)
    if match is None:
        return None
    whose, bits = match[1], float(match[2])
    known = MLX_LM_BITS if whose == "mlx-lm" else MLX_VLM_BITS
    return (whose, bits, bool(match[3])) if bits in known and not (whose == "mlx-lm" and match[3]) else None
