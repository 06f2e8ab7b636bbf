"""The engine by itself, on the bundled model: faults, order of turns, and what stays afterwards."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import MlxEngine
from server.errors import ContextLengthExceeded, EngineDead, KernelFault
from server.metrics import Metrics
from server.protocol import (
    Conversation,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    PrefillProgress,
    SamplingParams,
    TextDelta,
)
from tests.server.engine.answers import Answer, owned_by_nobody
from tests.server.engine.conftest import SETTINGS

ROOT = Path(__file__).parents[3]


def test_an_engine_that_has_not_loaded_says_so() -> None:
    engine = MlxEngine(SETTINGS, Metrics())
    assert not engine.health().alive
    with pytest.raises(EngineDead, match="has not loaded its model"):
        engine.sessions()


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(
    engine: MlxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(Answer(engine, "Hello!", "before").end(), Finished)
    broken = engine.loop.scheduler.generator

    def fault() -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(broken, "next", fault)
    ends = [Answer(engine, "Hello!", name).end() for name in ("a", "b")]
    assert [type(end.error) for end in ends if isinstance(end, Failed)] == [KernelFault]
    assert isinstance(ends[1], Finished)  # the generator was made anew
    assert engine.health().alive
    assert isinstance(Answer(engine, "Hello!", "before").end(), Finished)
    assert owned_by_nobody(engine)
    assert engine.services.budget.promised == 0


def test_a_step_that_fails_midway_leaves_no_page_behind(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = type(engine.services.runtime.store.spec.layers[3].lanes)
    calls = []

    def fault(self: Any, keys: Any, values: Any) -> Any:
        calls.append(1)
        raise RuntimeError("injected in a layer")

    long = "The river runs by the mill. " * 60
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "encode", fault)
        assert isinstance(Answer(engine, long, "midway").end(), Failed)
    assert calls
    assert engine.services.runtime.store.spec.pool.n_used == 0
    assert owned_by_nobody(engine)
    assert isinstance(Answer(engine, long, "midway").end(), Finished)


def test_a_dead_engine_ends_its_requests_and_says_so(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(engine, "Tell me something long about rivers.", "dying", max_tokens=500)
    answer.events.get(timeout=60)

    def die() -> None:
        raise SystemError("injected")

    monkeypatch.setattr(engine.loop.scheduler, "admit", die)
    end = answer.end()
    assert isinstance(end, Failed)
    assert isinstance(end.error, EngineDead)
    engine._thread.join(10)
    health = engine.health()
    assert not health.alive
    assert "SystemError" in health.detail
    with pytest.raises(EngineDead):
        Answer(engine, "Hello!", "late")


def test_a_stuck_engine_is_unhealthy_and_recovers(
    start: Callable[..., MlxEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(stall_seconds=1.0)
    step = engine.loop.scheduler.step

    def slow() -> None:
        time.sleep(2.5)
        step()

    monkeypatch.setattr(engine.loop.scheduler, "step", slow)
    answer = Answer(engine, "Hello!", "slow", max_tokens=1)
    time.sleep(2.0)
    assert not engine.health().alive
    monkeypatch.setattr(engine.loop.scheduler, "step", step)
    assert isinstance(answer.end(), Finished)
    assert engine.health().alive


def test_two_turns_of_one_session_run_one_after_the_other(engine: MlxEngine) -> None:
    first = Answer(engine, "Repeat after me: alpha beta", "shared", max_tokens=20)
    second = Answer(engine, "Repeat after me: alpha beta", "shared", max_tokens=20)
    assert first.text() == second.text()
    assert [session.turns for session in engine.services.registry if session.id == "shared"] == [2]


def test_another_history_does_not_wait_for_its_name(engine: MlxEngine) -> None:
    asked = "Please continue: " + "the river and the mill and " * 30
    running = Answer(engine, asked, "shared", max_tokens=2000)
    running.events.get(timeout=60)
    Answer(engine, "What is a good title for this? " * 12, "shared").text()
    assert [row["state"] for row in engine.sessions()] == ["running", "resident"]
    assert [row["name"] for row in engine.sessions()] == ["shared", "shared"]
    engine.cancel(running.request.request_id)


def test_what_waits_for_the_engine_ends_with_it(engine: MlxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Future[Any]] = []

    def die() -> None:
        waiting.extend(engine.change_session("delete", "", "nobody") for _ in range(2))
        assert waiting[1].cancel()  # its client is gone
        raise SystemError("injected")

    monkeypatch.setattr(engine.loop.scheduler, "admit", die)
    engine._thread.join(30)
    with pytest.raises(EngineDead):
        waiting[0].result(10)
    with pytest.raises(EngineDead):
        engine.change_session("delete", "", "nobody")


@pytest.mark.parametrize("moment", [PrefillProgress, TextDelta], ids=["amid the prompt", "amid the answer"])
def test_cancelled_work_ends_before_the_next_step(engine: MlxEngine, moment: type[Event]) -> None:
    """What was computed until then stays with the session."""
    events: list[Event] = []
    asked = "Please continue: " + "the river and the mill and " * 120
    prompt = engine.tokenize(Conversation([{"role": "user", "content": asked}]))
    request = GenerationRequest("cancelled", prompt, 2000, SamplingParams(temperature=0), session="gone", logprobs=0)

    def deliver(event: Event) -> None:
        events.append(event)
        if sum(isinstance(event, moment) for event in events) == 3:
            engine.cancel("cancelled")

    engine.submit([request], deliver)
    deadline = time.monotonic() + 20
    while [row["state"] for row in engine.sessions()] != ["resident"] and time.monotonic() < deadline:
        time.sleep(0.01)
    (row,) = engine.sessions()
    assert row["state"] == "resident"
    assert engine.services.budget.promised == 0
    assert sum(isinstance(event, moment) for event in events) == 3
    if moment is PrefillProgress:
        assert isinstance(last := events[-1], PrefillProgress)
        # The first one says that it has started.
        assert row["tokens_seen"] == last.processed == 2 * SETTINGS.prefill_chunk < len(prompt.tokens)
    else:
        # The batch computes a token before it hands out the one before it.
        drawn = sum(len(event.tokens) for event in events if isinstance(event, TextDelta))
        assert 0 <= row["tokens_seen"] - len(prompt.tokens) - drawn <= 1


def test_a_cancelled_request_gets_no_further_events_and_its_promise_is_void(engine: MlxEngine) -> None:
    answer = Answer(engine, "Please continue: " + "the river and the mill and " * 30, "gone", max_tokens=2000)
    answer.events.get(timeout=60)
    engine.cancel(answer.request.request_id)
    deadline = time.monotonic() + 20
    while engine.services.budget.promised and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.services.budget.promised == 0
    n_events = answer.events.qsize()
    assert isinstance(Answer(engine, "Hello!", "next").end(), Finished)
    assert answer.events.qsize() == n_events
    assert owned_by_nobody(engine)


def test_stopping_ends_what_runs(engine: MlxEngine) -> None:
    answer = Answer(engine, "Please continue: " + "the river and the mill and " * 30, "last", max_tokens=2000)
    answer.events.get(timeout=60)
    engine.stop()
    assert isinstance(answer.end(), Failed)
    assert not engine.health().alive


@pytest.mark.slow
@pytest.mark.parametrize("overflow", ["rotate", "error"])
def test_what_does_not_fit_a_session_rotates_or_is_refused(overflow: str) -> None:
    engine = MlxEngine(SETTINGS.model_copy(update={"max_size": 320, "overflow": overflow}), Metrics())
    engine.start()
    try:
        fits, long = "The river runs by the mill. " * 20, "The river runs by the mill. " * 60
        assert len(engine.tokenize(Conversation([{"role": "user", "content": fits}])).tokens) < 200
        assert Answer(engine, fits, "a", max_tokens=20).text()
        if overflow == "rotate":
            assert (engine.model.max_tokens, engine.model.rotates_at) == (8192, 320)
            assert Answer(engine, long, "b", max_tokens=20).text()
            return
        assert (engine.model.max_tokens, engine.model.rotates_at) == (320, None)
        for asked, n in ((long, 1), (fits, 200)):
            with pytest.raises(ContextLengthExceeded, match="maximum context length is 320 tokens"):
                Answer(engine, asked, "b", max_tokens=n)
        ban = SamplingParams(
            temperature=0, logit_bias=tuple((i, -100.0) for i in engine.services.runtime.model.tokenizer.eos_token_ids)
        )
        end = Answer(engine, fits, "c", max_tokens=None, sampling=ban).end()
        assert isinstance(end, Finished)
        assert (end.finish_reason, end.usage.prompt_tokens + end.usage.completion_tokens) == ("length", 320)
    finally:
        engine.stop()


STOPS = """
    import turbocache
    from server.engine.engine import MlxEngine
    from server.metrics import Metrics
    from server.protocol import SamplingParams
    from tests.server.engine.answers import Answer
    from tests.server.engine.conftest import SETTINGS
    engine = MlxEngine(SETTINGS, Metrics())
    engine.start()
    Answer(engine, "Hello!", "a", max_tokens=4, sampling=SamplingParams(top_p=0.9)).text()
    engine.stop()
"""


@pytest.mark.slow
def test_a_process_ends_well_right_after_its_engine() -> None:
    """Three of four did not, while MLX's own destructors were left to the thread that had been joined."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(STOPS)], capture_output=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
