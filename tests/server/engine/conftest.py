from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import MemoryBudget, Settings

SETTINGS = Settings(kv_memory=MemoryBudget(bytes=64 << 20), prefill_chunk=128)


@pytest.fixture
def engine() -> Iterator[MlxEngine]:
    running = MlxEngine(SETTINGS, Metrics())
    running.start()
    yield running
    running.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., MlxEngine]]:
    """Starts engines with settings of their own, whose sessions go to the folder `kept`."""
    engines: list[MlxEngine] = []

    def make(**settings: Any) -> MlxEngine:
        engines.append(MlxEngine(SETTINGS.model_copy(update={"session_dir": tmp_path / "kept", **settings}), Metrics()))
        engines[-1].start()
        return engines[-1]

    yield make
    for engine in engines:
        engine.stop()
