from collections.abc import Iterator

import pytest

from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import MemoryBudget, Settings

SETTINGS = Settings(kv_memory=MemoryBudget(bytes=64 << 20), stall_seconds=1.0, prefill_chunk=128)


@pytest.fixture
def engine() -> Iterator[MlxEngine]:
    running = MlxEngine(SETTINGS, Metrics())
    running.start()
    yield running
    running.stop()
