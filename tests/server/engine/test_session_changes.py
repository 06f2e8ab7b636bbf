"""Deleting, forking, saving and restoring sessions of a running engine, whose they are, and what time does to them."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import MlxEngine
from server.errors import Conflict, InvalidRequest, NotFound, OutOfMemory, SessionNotSaved
from server.protocol import Failed, SamplingParams, SessionChange
from server.settings import MemoryBudget
from tests.server.engine.answers import Answer, owned_by_nobody
from tests.server.sessions.test_disk import TEXT, files, metric, of, states

pytestmark = pytest.mark.slow

ASKED = [of("user", TEXT * 12)]


def change(engine: MlxEngine, what: SessionChange, id: str, new_id: str | None = None, owner: str = "") -> Any:
    return engine.change_session(what, owner, id, new_id).result(timeout=60)


def follow_up(engine: MlxEngine, name: str | None, text: str, more: str = "And then?") -> tuple[str, int]:
    """The second turn of ASKED: its text, and how many tokens were prefilled."""
    asked = [*ASKED, of("assistant", text), of("user", more)]
    answer, usage = Answer(engine, asked, name, max_tokens=10).whole()
    return answer, usage.prompt_tokens - usage.cached_tokens


def test_a_fork_shares_until_it_diverges(start: Callable[..., MlxEngine]) -> None:
    engine = start()
    text = Answer(engine, ASKED, "a", max_tokens=20).text()
    pages = engine.services.runtime.store.spec.pool.n_used
    row = change(engine, "fork", "a", "b")
    assert (row["id"], row["state"], row["tokens_seen"]) == ("b", "resident", engine.sessions()[0]["tokens_seen"])
    assert engine.services.runtime.store.spec.pool.n_used == pages
    one, prefilled = follow_up(engine, "a", text)
    assert prefilled < 15
    two, prefilled = follow_up(engine, "b", text, "Where is the mill?")
    assert prefilled < 20
    assert follow_up(engine, "a", text) == (one, 1)
    assert one != two
    made_up = change(engine, "fork", "b")["id"]
    assert set(states(engine)) == {"a", "b", made_up}
    assert owned_by_nobody(engine)


def test_bytes_are_told_by_kind(start: Callable[..., MlxEngine]) -> None:
    engine = start()
    text = Answer(engine, [of("user", TEXT * 40)], "a", max_tokens=20).text()
    Answer(engine, [of("user", TEXT * 40), of("assistant", text), of("user", "And then?")], "a", max_tokens=5).text()
    store, (session,) = engine.services.runtime.store, list(engine.services.registry)
    (row,) = engine.sessions()
    assert row["checkpoints"] == len(session.checkpoints) > 1
    assert all(row["bytes"][kind] > 0 for kind in ("pages", "sink", "window", "checkpoints"))
    assert row["bytes"]["recurrent"] == 0
    assert sum(row["bytes"].values()) == store.resting_nbytes(engine.services.registry.caches())
    change(engine, "fork", "a", "b")
    assert sum(engine.sessions()[0]["bytes"].values()) == sum(row["bytes"].values())
    assert metric(engine, "budget_bytes", kind="total", rank="0") == engine.services.budget.total
    assert metric(engine, "budget_bytes", kind="resting", rank="0") == store.resting_nbytes(
        engine.services.registry.caches()
    )
    assert (
        metric(engine, "pressure_ratio")
        == metric(engine, "budget_bytes", kind="resting", rank="0") / engine.services.budget.total
    )


def test_a_deleted_session_is_gone_from_memory_and_disk(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    engine = start()
    for name in ("a", "b"):
        Answer(engine, ASKED, name, max_tokens=5).text()
        change(engine, "save", name)
    assert len(files(tmp_path)) == 2
    assert change(engine, "delete", "a") == {"id": "a", "object": "session.deleted", "deleted": True}
    assert set(states(engine)) == {"b"}
    assert len(files(tmp_path)) == 1
    change(engine, "delete", "b")
    assert engine.services.runtime.store.spec.pool.n_used == 0
    _, usage = Answer(engine, ASKED, "a", max_tokens=5).whole()
    assert usage.cached_tokens == 0
    assert metric(engine, "prefilled_tokens_total", reason="evicted") == 0


def test_a_session_is_saved_and_restored_when_asked(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    one = start()
    text = Answer(one, ASKED, "a", max_tokens=20).text()
    assert change(one, "save", "a")["saved"]
    assert change(one, "save", "a")["state"] == "resident"
    assert metric(one, "spills_total") == 1
    assert len(files(tmp_path)) == 1
    two = start()  # the first one still runs: as if it had been killed after the save
    assert states(two) == {"a": "spilled"}
    row = change(two, "restore", "a")
    assert (row["state"], row["tokens_seen"]) == ("resident", one.sessions()[0]["tokens_seen"])
    assert row["bytes"]["window"] > 0
    assert change(two, "restore", "a") == row
    assert metric(two, "restores_total") == 1
    assert follow_up(two, "a", text) == follow_up(one, "a", text)


def test_a_fork_of_a_session_on_disk(start: Callable[..., MlxEngine]) -> None:
    one = start()
    text = Answer(one, ASKED, "a", max_tokens=20).text()
    one.stop()
    two = start()
    change(two, "fork", "a", "b")
    assert follow_up(two, "b", text)[1] < 15


@pytest.mark.parametrize("what", ["delete", "fork", "save", "restore"])
def test_unknown_and_running_sessions(start: Callable[..., MlxEngine], what: SessionChange) -> None:
    engine = start()
    with pytest.raises(NotFound) as missing:
        change(engine, what, "a")
    assert missing.value.code == "session_not_found"
    answer = Answer(engine, ASKED, "a", max_tokens=400)
    answer.events.get(timeout=60)
    with pytest.raises(Conflict) as running:
        change(engine, what, "a")
    assert (running.value.code, running.value.headers()) == ("session_running", {"Retry-After": "1"})
    with pytest.raises(NotFound):
        change(engine, what, "a", owner="somebody")
    engine.cancel(answer.request.request_id)


def test_what_can_t_be_done_is_said(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    engine = start(session_dir=None)
    Answer(engine, ASKED, "a", max_tokens=5).text()
    with pytest.raises(InvalidRequest, match="TURBOCACHE_SESSION_DIR"):
        change(engine, "save", "a")
    with pytest.raises(Conflict, match="already"):
        change(engine, "fork", "a", "a")
    one = start()
    Answer(one, ASKED, "a", max_tokens=5).text()
    one.stop()
    two, (path,) = start(), files(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Conflict, match="the contents are not what was written") as refused:
        change(two, "restore", "a")
    assert refused.value.code == "session_file_refused"
    assert states(two) == {}
    with pytest.raises(NotFound):
        change(two, "restore", "a")
    _, usage = Answer(two, ASKED, "a", max_tokens=5).whole()
    assert usage.cached_tokens == 0
    assert metric(two, "prefilled_tokens_total", reason="refused_file") == usage.prompt_tokens - 1


def test_a_save_that_fails_loses_nothing(start: Callable[..., MlxEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    text = Answer(engine, ASKED, "a", max_tokens=20).text()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(SessionNotSaved):
            change(engine, "save", "a")
    assert follow_up(engine, "a", text)[1] < 15


def test_a_restore_that_does_not_fit_is_refused_and_loses_nothing(start: Callable[..., MlxEngine]) -> None:
    one = start()
    text = Answer(one, ASKED, "a", max_tokens=20).text()
    one.stop()
    two = start()
    needed = two.services.runtime.store.session_nbytes(300, two.services.runtime.chunk)
    two.services.budget.promise("somebody", 300)
    while two.services.budget.total - two.services.budget.promised >= needed:
        two.services.budget.extend("somebody", 300)
        two.services.budget.promise(f"more {two.services.budget.promised}", 300)
    with pytest.raises(OutOfMemory):
        change(two, "restore", "a")
    for id in list(two.services.budget._promised):
        two.services.budget.release(id)
    assert follow_up(two, "a", text)[1] < 15


def test_nobody_sees_or_continues_another_owner_s_session(start: Callable[..., MlxEngine]) -> None:
    engine = start()
    text = Answer(engine, ASKED, "a", max_tokens=20, owner="anna").text()
    unnamed = Answer(engine, [of("user", "Unnamed. " + TEXT * 12)], None, max_tokens=20, owner="anna").text()
    assert engine.sessions("ben") == []
    assert len(engine.sessions("anna")) == 2
    asked = [*ASKED, of("assistant", text), of("user", "And then?")]
    for name in ("a", "b", None):
        _, usage = Answer(engine, asked, name, max_tokens=5, owner="ben").whole()
        assert usage.cached_tokens == 0, name
        change(engine, "delete", engine.sessions("ben")[0]["id"], owner="ben")
    asked = [of("user", "Unnamed. " + TEXT * 12), of("assistant", unnamed), of("user", "And then?")]
    _, usage = Answer(engine, asked, None, max_tokens=5, owner="ben").whole()
    assert usage.cached_tokens == 0
    _, usage = Answer(engine, asked, None, max_tokens=5, owner="anna").whole()
    assert usage.cached_tokens > 200
    engine.stop()
    again = start()
    assert len(again.sessions("anna")) == 2
    assert len(again.sessions("ben")) == 1


def test_a_session_at_rest_is_written_before_anybody_asks(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    """So that a crash costs little."""
    engine = start(session_save_after=0.2)
    Answer(engine, ASKED, "a", max_tokens=5).text()
    Answer(engine, [of("user", "Hi.")], "short", max_tokens=5).text()
    deadline = time.monotonic() + 30
    while not files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    assert [(row["id"], row["state"], row["saved"]) for row in engine.sessions()] == [
        ("a", "resident", True),
        ("short", "resident", False),
    ]
    assert len(files(tmp_path)) == metric(engine, "spills_total") == 1


@pytest.mark.slow
def test_a_server_that_is_never_idle_writes_sessions_too_at_a_bounded_cost(
    start: Callable[..., MlxEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(session_save_after=0.1)
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.02), sync(descriptor))[1])
    ends = tuple((token, -100.0) for token in engine.services.runtime.model.tokenizer.eos_token_ids)
    endless = SamplingParams(temperature=0, logit_bias=ends)
    answers = [Answer(engine, [of("user", f"{name}: {TEXT * 12}")], name, max_tokens=5) for name in "ab"]
    busy = Answer(engine, "Please continue.", "busy", max_tokens=3000, sampling=endless)
    for answer in answers:
        answer.text()
    written: list[tuple[float, float]] = []
    while len(written) < 2:
        if metric(engine, "spills_total") > len(written):
            written.append((time.monotonic(), metric(engine, "spill_seconds_total")))
        busy.events.get(timeout=60)
    assert engine.loop.scheduler.batch
    assert engine.sessions()[-1]["state"] == "running"
    (first, took), (second, _) = written
    assert 15 * took < second - first < 60 * took
    engine.cancel(busy.request.request_id)
    assert engine.loop.changes._next_write < time.time() + 20  # what it was idle for is no time of the write


@pytest.mark.parametrize("disk", [True, False])
def test_a_session_that_nobody_uses_leaves_memory(start: Callable[..., MlxEngine], disk: bool) -> None:
    engine = start(session_ttl=0.5, **({} if disk else {"session_dir": None}))
    text = Answer(engine, ASKED, "a", max_tokens=20).text()
    deadline = time.monotonic() + 30
    while states(engine) != ({"a": "spilled"} if disk else {}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.services.runtime.store.spec.pool.n_used == 0
    _, prefilled = follow_up(engine, "a", text)
    assert (prefilled < 15) is disk
    lost = metric(engine, "prefilled_tokens_total", reason="evicted")
    assert lost == 0 if disk else lost > 200


@pytest.mark.slow
def test_side_requests_do_not_push_out_what_was_used_since(start: Callable[..., MlxEngine]) -> None:
    """An unnamed request waits for its place in the batch while named sessions take turns."""
    engine = start(kv_memory=MemoryBudget(bytes=24 << 20), max_batch=1, session_dir=None)
    big, names = [of("user", TEXT * 30)], {"a", "b", "c"}
    texts = {name: Answer(engine, ASKED, name, max_tokens=20).text() for name in sorted(names)}
    blocker = Answer(engine, [of("user", "Hi.")], "blocker", max_tokens=60)
    blocker.events.get(timeout=60)
    late = Answer(engine, big, None, max_tokens=900)
    for session in engine.services.registry:
        session.last_used = time.time() + 5  # as if they had answered meanwhile
    end = late.end()
    assert isinstance(end, Failed)
    assert isinstance(end.error, OutOfMemory)
    assert set(states(engine)) >= names
    for name in names:
        assert follow_up(engine, name, texts[name])[1] < 15
        assert metric(engine, "admission_refusals_total", reason="later_sessions") == 1
    # One that comes afterwards may.
    Answer(engine, big, None, max_tokens=900).whole()
    assert not set(states(engine)) >= names
    assert owned_by_nobody(engine)


def test_a_restored_session_does_not_leave_again_for_its_own_sake(
    start: Callable[..., MlxEngine], tmp_path: Path
) -> None:
    """Memory and disk are full: bringing one back writes others, and its file must not be among those that go."""
    engine, names = start(kv_memory=MemoryBudget(bytes=20 << 20), session_disk=40 << 20), [f"s{i}" for i in range(5)]
    for name in names:
        Answer(engine, [of("user", f"I am {name}. " + TEXT * 12)], name, max_tokens=10).text()
    assert states(engine)["s0"] == "spilled"
    disk = engine.services.disk
    assert disk is not None
    disk._budget = sum(path.stat().st_size for path in files(tmp_path))
    for _ in range(2):
        for name in names:
            if states(engine).get(name) == "spilled":
                assert change(engine, "restore", name)["state"] == "resident", name
                assert change(engine, "fork", name, f"fork of {name}")["id"] == f"fork of {name}"
                change(engine, "delete", f"fork of {name}")
    assert metric(engine, "session_files_refused_total", reason="missing") == 0
    assert owned_by_nobody(engine)
