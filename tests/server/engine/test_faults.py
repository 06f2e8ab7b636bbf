"""Faults of the computation while serving: the request ends with an error, and repeated ones end the serving."""

import threading
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from server.engine.engine import MlxEngine
from server.engine.faults import MAX_FAULTS, WINDOW_SECONDS, FaultLog
from server.errors import EngineDead, InternalError, KernelFault
from server.metrics import Metrics
from server.protocol import Failed, Finished, TextDelta
from tests.server.engine.answers import Answer, owned_by_nobody
from turbocache.cache.pool import PoolExhausted

pytestmark = pytest.mark.slow

LONG = "Repeat after me: " + "alpha beta gamma delta epsilon zeta eta theta iota kappa " * 4
"""A prompt whose answer is long as well."""


def n_faults(engine: MlxEngine) -> float:
    value = engine.services.metrics.registry.get_sample_value("turbocache_kernel_faults_total")
    assert value is not None
    return value


class Poison:
    """Makes the model's logits NaN for chosen rows of a decode step, as a broken kernel would."""

    def __init__(self, engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: Callable[[int], list[int]] = lambda n_rows: []
        self.times = 0
        model = engine.services.runtime.model.model
        call = type(model).__call__

        def poisoned(this: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            logits = call(this, inputs, *args, **kwargs)
            if inputs.shape[1] != 1 or not (rows := self.rows(inputs.shape[0])):
                return logits
            self.times += 1
            bad = mx.array([row in rows for row in range(inputs.shape[0])])[:, None, None]
            return mx.where(bad, mx.nan, logits)

        monkeypatch.setattr(type(model), "__call__", poisoned)


@pytest.fixture
def poison(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> Poison:
    return Poison(engine, monkeypatch)


def error_of(end: Finished | Failed) -> Exception:
    assert isinstance(end, Failed), end
    return end.error


def test_a_row_that_is_not_finite_fails_alone(engine: MlxEngine, poison: Poison) -> None:
    alone = Answer(engine, LONG, "alone", max_tokens=40).text()
    good = Answer(engine, LONG, "good", max_tokens=40)
    first = good.events.get(timeout=60)
    while not isinstance(first, TextDelta):
        first = good.events.get(timeout=60)
    # From the first step that both share, the second row is NaN.
    poison.rows = lambda n_rows: [1] if n_rows == 2 else []
    bad = Answer(engine, LONG, "bad", max_tokens=40)
    error = error_of(bad.end())
    assert isinstance(error, KernelFault)
    assert error.code == "kernel_fault"
    assert bad.request.request_id in error.message
    assert poison.times
    assert first.text + good.text() == alone
    assert n_faults(engine) == 1
    assert engine.health().alive
    assert engine.services.registry.find("", "bad") is None
    poison.rows = lambda n_rows: []
    assert Answer(engine, LONG, "bad", max_tokens=40).text() == alone
    assert owned_by_nobody(engine)
    assert engine.services.budget.promised == 0


def test_a_first_token_that_is_not_finite_is_not_sent(engine: MlxEngine, poison: Poison) -> None:
    poison.rows = lambda n_rows: [0]
    answer = Answer(engine, "Hello!", "first")
    assert isinstance(error_of(answer.end()), KernelFault)
    assert n_faults(engine) == 1


def test_no_text_comes_from_the_token_after_the_fault(engine: MlxEngine, poison: Poison) -> None:
    whole = Answer(engine, LONG, "whole", max_tokens=40).text()
    steps = []

    def after_ten(n_rows: int) -> list[int]:
        steps.append(n_rows)
        return [0] if len(steps) >= 10 else []

    poison.rows = after_ten
    answer, text = Answer(engine, LONG, "cut", max_tokens=40), ""
    while not isinstance(event := answer.events.get(timeout=60), Failed):
        text += event.text if isinstance(event, TextDelta) else ""
    assert isinstance(event.error, KernelFault)
    assert text
    assert whole.startswith(text)
    assert len(text.split()) < 10 < len(whole.split())


def test_after_repeated_faults_nothing_more_is_served(engine: MlxEngine, poison: Poison) -> None:
    kept = Answer(engine, "Hello!", "kept")
    assert isinstance(kept.end(), Finished)
    poison.rows = lambda n_rows: [0]
    for i in range(MAX_FAULTS - 1):
        assert isinstance(error_of(Answer(engine, "Hello!", f"bad-{i}").end()), KernelFault)
        assert engine.health().alive
    # A long prompt is in the batch and one waits for its session when the last fault comes.
    poison.rows = lambda n_rows: []
    long = Answer(engine, LONG * 8, "long", max_tokens=500)
    waits = Answer(engine, LONG * 8, "long", max_tokens=500)
    poison.rows = lambda n_rows: [0]
    assert isinstance(error_of(Answer(engine, "Hello!", "last").end()), KernelFault)
    for answer in (long, waits):
        assert isinstance(error_of(answer.end()), EngineDead | KernelFault)
    health = engine.health()
    assert not health.alive
    for words in ("unhealthy", "3 steps", "packed", "not finite", "restart"):
        assert words in health.detail
    with pytest.raises(EngineDead) as refused:
        Answer(engine, "Hello!", "late")
    assert refused.value.message == health.detail
    poison.rows = lambda n_rows: []
    assert not engine.health().alive  # a restart is needed
    assert n_faults(engine) == MAX_FAULTS
    assert engine.services.budget.promised == 0
    assert owned_by_nobody(engine)
    assert engine._thread.is_alive()  # metrics and sessions are still told


def test_failing_steps_count_and_a_full_pool_does_not(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, raised in enumerate((RuntimeError("injected"), PoolExhausted("injected"), RuntimeError("again"))):
        failing = threading.Event()

        def fault(raised: Exception = raised, failing: threading.Event = failing) -> Any:
            failing.set()
            raise raised

        monkeypatch.setattr(engine.loop.scheduler.generator, "next", fault)
        error = error_of(Answer(engine, "Hello!", f"step-{i}").end())
        assert failing.is_set()
        assert type(error) is (InternalError if isinstance(raised, PoolExhausted) else KernelFault)
        assert error.__cause__ is raised
    assert n_faults(engine) == 2
    assert engine.health().alive
    monkeypatch.setattr(engine.loop.scheduler.generator, "next", fault)
    assert isinstance(error_of(Answer(engine, "Hello!", "third").end()), KernelFault)
    deadline = time.monotonic() + 5
    while engine.health().alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "RuntimeError" in engine.health().detail


def test_only_faults_close_together_end_the_serving() -> None:
    now = 0.0
    faults = FaultLog(Metrics(), "cuda", clock=lambda: now)
    for _ in range(20):
        now += WINDOW_SECONDS / 2 + 1
        faults.note("slow drip")
        assert faults.verdict is None
    now += WINDOW_SECONDS / 2 - 1
    faults.note("too soon")
    assert faults.verdict is not None
    assert "too soon" in faults.verdict
    assert "TURBOCACHE_BACKEND=packed" in faults.verdict
    verdict = faults.verdict
    now += 10 * WINDOW_SECONDS
    faults.note("much later")
    assert faults.verdict == verdict
