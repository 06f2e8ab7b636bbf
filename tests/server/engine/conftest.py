import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.engine import startup
from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import MemoryBudget, Settings
from turbocache.mlxlm.model import load_model
from turbocache.mlxlm.plan import LayerPlan
from turbocache.models import BUNDLED
from turbocache.store import checked_plans

SETTINGS = Settings(model=str(BUNDLED), kv_memory=MemoryBudget(bytes=64 << 20), prefill_chunk=128)


@pytest.fixture(scope="session", autouse=True)
def loaded_once() -> Iterator[None]:
    """Engines of one process share what they only read: the model, and the plans that were proven for it. These are
    most of a start, and have tests of their own.
    """
    plans: dict[int, tuple[Any, Sequence[LayerPlan]]] = {}

    def proven(model: Any) -> Sequence[LayerPlan]:
        if id(model) not in plans:
            plans[id(model)] = model, checked_plans(model)  # with the model, so that its id stays its own
        return plans[id(model)][1]

    with pytest.MonkeyPatch.context() as patch:
        known = functools.cache(load_model)
        patch.setattr(startup, "load_model", lambda source, group: known(source))
        patch.setattr(startup, "checked_plans", proven)
        yield


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
