"""Engines for these runs, and ways to look into one while it works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from server.engine import startup
from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import Settings
from tests.models.configs import OVERRIDES
from tests.models.tiny import build
from tests.server.engine.answers import on_engine
from turbocache.mlxlm.model import load_model
from turbocache.models import BUNDLED

ANSWER_SECONDS = 60.0
_PLAIN = {"llama": {"layer_types": ["full_attention"] * 4}}
_LEAVING_SECONDS = 0.5


@contextmanager
def started(settings: Settings, metrics: Metrics | None = None) -> Iterator[MlxEngine]:
    """An engine that runs until the block ends."""
    engine = MlxEngine(settings, metrics or Metrics())
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@contextmanager
def loaded_once() -> Iterator[None]:
    """Engines that start in this block share one copy of the bundled model."""
    model = load_model(BUNDLED)
    with patch.object(startup, "load_model", lambda source, group: model):
        yield


@contextmanager
def tiny_model(architecture: str, max_positions: int) -> Iterator[None]:
    """Engines that start in this block have a model of random weights, with the bundled model's tokenizer."""
    bundled = load_model(BUNDLED)
    sizes = {**OVERRIDES.get(architecture, {}), **_PLAIN.get(architecture, {})}
    sizes["vocab_size"] = len(bundled.tokenizer.get_vocab()) + 64
    with patch.dict(OVERRIDES, {architecture: sizes}):
        model = build(architecture)
    tiny = replace(bundled, model=model, id=f"tiny-{architecture}", max_positions=max_positions)
    with patch.object(startup, "load_model", lambda source, group: tiny):
        yield


def after_each_step(engine: MlxEngine, check: Callable[[], None]) -> None:
    """From now on the engine's thread calls `check` after every step."""
    step = engine.loop.scheduler.step

    def checked() -> None:
        step()
        check()

    on_engine(engine, lambda: setattr(engine.loop.scheduler, "step", checked))


def is_busy(engine: MlxEngine) -> bool:
    """Whether requests run or wait. To be asked on the engine's thread."""
    return bool(engine.loop.scheduler.batch) or len(engine.services.queue) > 0


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    """Sum of a family's samples that have these labels."""
    return sum(
        found.value
        for family in metrics.registry.collect()
        for found in family.samples
        if found.name == f"turbocache_{name}" and labels.items() <= found.labels.items()
    )


def leave() -> None:
    """Before the process ends: MLX frees what an engine's thread has compiled after Python has joined the thread, and
    an interpreter that is gone by then aborts the process.
    """
    time.sleep(_LEAVING_SECONDS)
