"""Benchmarks of the bundled model in this process: all of the real thing but the process of its own."""

from collections.abc import Callable
from typing import Any

import pytest

from turbocache.benchmark import subject, worker
from turbocache.benchmark.run import NoAnswer
from turbocache.mlxlm.model import LoadedModel

Ask = Callable[[dict[str, Any], float], dict[str, Any]]


@pytest.fixture
def here(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Answers a worker's requests in this process, with the model that is loaded already."""
    monkeypatch.setattr(subject, "load_model", lambda source: bundled)
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: True)  # it would stay so for all other tests

    def ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
        try:
            return worker.answer(request)
        except Exception as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from error

    return ask
