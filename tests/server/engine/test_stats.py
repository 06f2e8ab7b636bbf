"""What GET /v1/sessions and GET /v1/status say while an engine works."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from server.api.own.bodies import SessionBody, StatusBody
from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.protocol import Finished, SamplingParams
from tests.server.engine.answers import Answer
from tests.server.engine.conftest import SETTINGS

Row = dict[str, Any]
ASKED = "Please continue: " + "the river and the mill and " * 20


@pytest.fixture(scope="module")
def small() -> Iterator[MlxEngine]:
    """An engine whose sessions hold 160 tokens."""
    engine = MlxEngine(SETTINGS.model_copy(update={"max_size": 160, "keep": 16, "window": 64}), Metrics())
    engine.start()
    yield engine
    engine.stop()


def endless(engine: MlxEngine, name: str, n_tokens: int) -> Answer:
    """An answer of just so many tokens."""
    ends = engine.services.runtime.model.tokenizer.eos_token_ids
    sampling = SamplingParams(temperature=0, logit_bias=tuple((token, -100.0) for token in ends))
    return Answer(engine, ASKED, name, max_tokens=n_tokens, sampling=sampling)


def row_when(engine: MlxEngine, name: str, state: str, enough: Callable[[Row], bool]) -> Row:
    """The session's row, at the first look at which it is in this state and `enough` holds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for row in engine.sessions():
            if row["id"] == name and row["state"] == state and enough(row):
                return row
        time.sleep(0.02)
    raise AssertionError(f"{name} was never {state} with what was asked for: {engine.sessions()}")


def held(ring: Row) -> int:
    """Tokens that lie in a ring's parts, pages that are partly out of sight in full."""
    return int(ring["sink_tokens"] + ring["pages"] * ring["page_tokens"] + ring["window_tokens"])


@pytest.mark.slow
def test_the_ring_of_a_running_session_moves(small: MlxEngine) -> None:
    answer = endless(small, "runs", 120)
    early = row_when(small, "runs", "running", lambda row: row["ring"] is not None)
    later = row_when(small, "runs", "running", lambda row: row["ring"]["first_page"] >= 1)
    end = answer.end()
    assert isinstance(end, Finished)
    rest = row_when(small, "runs", "resident", lambda row: True)
    for row in (early, later, rest):
        SessionBody.model_validate(row)
        ring = row["ring"]
        assert held(ring) + ring["first_page"] * ring["page_tokens"] == ring["offset"]
        assert (ring["max_size"], ring["page_tokens"], row["rotations"]) == (160, 64, ring["first_page"])
        assert row["tokens_held"] == min(row["tokens_seen"], ring["offset"], 160)
        assert 64 < ring["window_tokens"] <= 128 or ring["offset"] < 144
    assert early["ring"]["offset"] < later["ring"]["offset"] < rest["ring"]["offset"]
    assert rest["ring"]["offset"] == end.usage.prompt_tokens + end.usage.completion_tokens
    assert rest["ring"]["pages"] == rest["bytes"]["pages"] // small.status()["pages"]["nbytes"]


@pytest.mark.slow
def test_rings_are_told_apart_in_a_batch(small: MlxEngine) -> None:
    """One reads a long prompt while another answers."""
    short = endless(small, "short", 60)
    row_when(small, "short", "running", lambda row: row["ring"] is not None)
    long = Answer(small, ASKED * 6, "long", max_tokens=5)
    reading = row_when(small, "long", "running", lambda row: row["ring"] is not None and row["ring"]["first_page"] > 4)
    answering = row_when(small, "short", "running", lambda row: True)
    assert (
        answering["ring"]["offset"] <= answering["tokens_seen"] + 2
    )  # a step's token is in it before it is handed out
    assert reading["ring"]["offset"] > answering["ring"]["offset"]
    for answer in (long, short):
        assert isinstance(answer.end(), Finished)


def test_the_status_counts_what_runs_and_its_memory(small: MlxEngine) -> None:
    before = small.status()
    answer = endless(small, "counted", 40)
    promised = small.services.budget._cost(len(answer.request.prompt.tokens) + 40)
    # While the prompt is read the budget holds more, and the status is refreshed a few times a second.
    deadline = time.monotonic() + 60
    while (during := small.status())["memory"]["running_bytes"] != promised and time.monotonic() < deadline:
        time.sleep(0.001)
    answer.end()
    after = small.status()
    for status in (before, during, after):
        StatusBody.model_validate(status)
        memory = status["memory"]
        assert memory["budget_bytes"] == 64 << 20
        used = memory["running_bytes"] + memory["resting_bytes"]
        assert memory["pressure_ratio"] == pytest.approx(used / memory["budget_bytes"], abs=1e-6)
    assert during["requests"] == {"running": 1, "waiting": 0}
    assert during["memory"]["running_bytes"] == promised
    assert after["requests"] == {"running": 0, "waiting": 0}
    assert after["memory"]["running_bytes"] == 0
    assert after["memory"]["resting_bytes"] > before["memory"]["resting_bytes"]
