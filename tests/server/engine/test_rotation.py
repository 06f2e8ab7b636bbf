"""A conversation that outgrows its session: the system message and the tools stay, and the oldest turns go."""

from collections.abc import Callable
from typing import Any

import pytest

from server.engine.engine import MlxEngine
from server.protocol import Conversation, Dropped, Prompt
from tests.server.engine.answers import Answer, on_engine, owned_by_nobody
from turbocache.store import ring_of

SYSTEM = {"role": "system", "content": "You look after a warehouse. " + "Each crate has a number and a place. " * 20}
N_TURNS = 14
SIZES: dict[str, Any] = {"max_size": 640, "kv_preset": "off"}


def question(n: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Crate {n} is green and stands in row {n + 3}. Which crate came last? " * 2}


def talk(engine: MlxEngine, name: str, messages: list[dict[str, Any]], turns: range, owner: str = "") -> None:
    """Ask one question after the other, each with the whole conversation before it. No token is prefilled twice."""
    done = 0
    for n in turns:
        messages.append(question(n))
        answer = Answer(engine, messages, name, owner=owner)
        text, usage = answer.whole()
        if done:
            assert usage.cached_tokens >= done - 1
        done = usage.prompt_tokens + usage.completion_tokens - 1
        messages.append({"role": "assistant", "content": text})


def row(engine: MlxEngine, name: str, owner: str = "") -> dict[str, Any]:
    (found,) = [row for row in engine.sessions(owner) if row["id"] == name]
    return found


@pytest.mark.slow
def test_a_rotated_conversation_keeps_its_system_message(start: Callable[..., MlxEngine]) -> None:
    engine = start(**SIZES)
    messages: list[dict[str, Any]] = [SYSTEM]
    talk(engine, "a", messages, range(N_TURNS))
    prompt = engine.tokenize(Conversation([*messages, question(N_TURNS)]))
    assert prompt.outline.prefix > 150
    told, seen = engine.dropped(prompt), row(engine, "a")
    assert seen["pinned_tokens"] == 64 + 64 * -(-(prompt.outline.prefix - 64) // 64)
    assert seen["pinned_tokens"] + seen["dropped_tokens"] + 640 > seen["tokens_seen"] > 900
    assert seen["tokens_held"] == seen["tokens_seen"] - seen["dropped_tokens"] <= 640
    assert 0 < seen["dropped_turns"] < N_TURNS
    assert seen["ring"]["pinned_pages"] == (seen["pinned_tokens"] - 64) // 64
    # What the answer's header will say: at least what has gone, at most the question's tokens and one turn more.
    assert seen["dropped_tokens"] <= told.tokens <= seen["dropped_tokens"] + 150
    assert seen["dropped_turns"] <= told.turns <= seen["dropped_turns"] + 2
    assert on_engine(engine, lambda: owned_by_nobody(engine))
    # A client that edits its last question goes back to the checkpoint before it.
    edited = [*messages[:-2], {"role": "user", "content": "Which crate is green?"}]
    _, usage = Answer(engine, edited, "a").whole()
    assert usage.cached_tokens > 900
    # Another owner's session reads the whole conversation at once and answers the same.
    messages.append(question(N_TURNS))
    again = Answer(engine, messages, "b", owner="other").whole()
    assert (Answer(engine, messages, "a").text(), 0) == (again[0], again[1].cached_tokens)
    both = [row(engine, name, owner) for name, owner in (("a", ""), ("b", "other"))]
    assert both[0]["ring"] == both[1]["ring"]
    assert (both[0]["dropped_turns"], both[0]["pinned_tokens"]) == (both[1]["dropped_turns"], both[1]["pinned_tokens"])


@pytest.mark.slow
def test_what_is_pinned_goes_into_forks_and_files(start: Callable[..., MlxEngine]) -> None:
    engine = start(**SIZES)
    messages: list[dict[str, Any]] = [SYSTEM]
    talk(engine, "a", messages, range(N_TURNS))
    engine.change_session("fork", "", "a", "b").result(60)
    whole, fork = row(engine, "a"), row(engine, "b")
    assert (whole["ring"], whole["dropped_turns"]) == (fork["ring"], fork["dropped_turns"])
    asked = [*messages, question(N_TURNS)]
    answers = {Answer(engine, asked, name).text() for name in ("a", "b")}
    engine.stop()
    other = start(**SIZES)
    assert row(other, "a")["pinned_tokens"] is None
    later = other.change_session("restore", "", "b").result(60)
    assert later["pinned_tokens"] == whole["pinned_tokens"]
    assert later["dropped_turns"] >= whole["dropped_turns"] > 0
    text, usage = Answer(other, asked, "b").whole()
    assert answers == {text}
    assert usage.cached_tokens > 900


@pytest.mark.slow
def test_nothing_is_pinned_with_a_share_of_0(start: Callable[..., MlxEngine]) -> None:
    engine = start(**SIZES, pin_share=0.0)
    talk(engine, "a", [SYSTEM], range(N_TURNS))
    seen = row(engine, "a")
    assert seen["pinned_tokens"] == 64
    assert seen["dropped_tokens"] > 200
    session = engine.services.registry.find("", "a")
    assert session is not None
    assert session.cache is not None
    ring = ring_of(session.cache)
    assert ring is not None
    assert ring.outline.turns  # turns go whole all the same


@pytest.mark.slow
def test_text_without_turns_loses_its_oldest_tokens(start: Callable[..., MlxEngine]) -> None:
    engine = start(**SIZES)
    tokens = engine.encode("The river runs by the mill. " * 130)
    assert engine.dropped(Prompt(tokens)) == Dropped(len(tokens) - 640, 0)
    assert engine.dropped(Prompt(tokens[:640])) == Dropped()
