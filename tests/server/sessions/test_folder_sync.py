"""Several servers on one folder: sessions that move between them, and files that one of them is at."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.engine.engine import MlxEngine
from server.errors import Conflict, SessionNotSaved
from server.sessions.leases import Leases
from server.settings import MemoryBudget
from tests.server.engine.answers import Answer, owned_by_nobody
from tests.server.engine.test_session_changes import change
from tests.server.sessions.test_disk import TEXT, files, metric, of, states
from turbocache.storage.session_file import SUFFIX
from turbocache.storage.whole_file import PARTIAL

ASKED = [of("user", TEXT * 12)]


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    """Another server's."""
    (tmp_path / "kept").mkdir(exist_ok=True)
    theirs = Leases(tmp_path / "kept")
    yield theirs
    theirs.close()


class Talk:
    """One conversation, whichever server a turn goes to."""

    def __init__(self, name: str | None, first: str = TEXT * 12) -> None:
        self.name = name
        self.messages = [of("user", first)]

    def turn(self, engine: MlxEngine, n_tokens: int = 12) -> int:
        """One more turn; returns how many tokens of its prompt were prefilled."""
        text, usage = Answer(engine, self.messages, self.name, max_tokens=n_tokens).whole()
        self.messages += [of("assistant", text), of("user", "And then?")]
        return usage.prompt_tokens - usage.cached_tokens


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(engine: MlxEngine, event: str) -> float:
    return metric(engine, "session_handovers_total", event=event)


def test_a_session_that_moves_goes_on_from_the_other_s_file_and_so_does_one_that_comes_back(
    start: Callable[..., MlxEngine],
) -> None:
    one, two, never = start(), start(), start(session_dir=None)
    named, unnamed, alone = Talk("a"), Talk(None, "Please repeat: " + TEXT * 10), Talk("a")
    for talk in (named, unnamed):
        talk.turn(one)
        change(one, "save", next(id for id in states(one) if (id == "a") == (talk is named)))
    for talk in (named, unnamed):  # `two` was started before they were written
        assert talk.turn(two) < 20
    assert events(two, "found") == 2
    for id in states(two):
        change(two, "save", id)
    for talk in (named, unnamed):  # `one` still has the first turn in memory
        assert talk.turn(one) < 20
    assert events(one, "taken_up") == 2
    for _ in range(3):
        alone.turn(never)
    assert named.messages == alone.messages
    assert owned_by_nobody(one)
    assert owned_by_nobody(two)


def test_an_earlier_turn_never_takes_the_place_of_a_later_one(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    """Whichever server writes first; what is not the latest is forgotten when it would be written."""
    one, two, talk = start(), start(), Talk("a")
    talk.turn(one)
    moved = Talk("a")
    moved.messages = list(talk.messages)
    assert moved.turn(two) > 200  # nothing was on disk
    change(two, "save", "a")
    (path,) = files(tmp_path)
    before = path.stat().st_ino
    row = change(one, "save", "a")
    assert (row["state"], row["tokens_seen"]) == ("spilled", two.sessions()[0]["tokens_seen"])
    assert path.stat().st_ino == before
    assert (events(one, "superseded"), metric(one, "spills_total")) == (1, 0)
    assert moved.turn(one) < 20
    change(one, "save", "a")
    assert path.stat().st_ino != before
    assert owned_by_nobody(one)


def test_what_memory_has_more_of_stays_whatever_the_file_says(start: Callable[..., MlxEngine]) -> None:
    one, two, talk = start(), start(), Talk("a")
    talk.turn(one)
    change(one, "save", "a")
    other = Talk("a")
    other.messages = [*talk.messages[:1], of("assistant", "No."), of("user", "Why?")]
    talk.turn(one)
    other.turn(two)
    change(two, "save", "a")
    assert talk.turn(one) < 20
    assert (events(one, "taken_up"), metric(one, "restores_total")) == (0, 0)
    change(one, "save", "a")
    assert metric(one, "spills_total") == 2  # its turn was the latest


def test_a_file_that_another_server_is_at_is_left_alone(
    start: Callable[..., MlxEngine], tmp_path: Path, leases: Leases
) -> None:
    engine, talk = start(session_save_after=0), Talk("a")
    talk.turn(engine)
    change(engine, "save", "a")
    (path,) = files(tmp_path)
    before = path.stat()
    assert leases.take(path.name)
    assert talk.turn(engine) < 20
    with pytest.raises(SessionNotSaved):
        change(engine, "save", "a")
    with pytest.raises(Conflict) as leased:
        change(engine, "delete", "a")
    assert (leased.value.code, leased.value.headers()) == ("session_leased", {"Retry-After": "1"})
    assert path.stat() == before
    assert states(engine) == {"a": "resident"}
    assert events(engine, "leased") == 1
    Talk("b", "I am b. " + TEXT * 12).turn(engine)  # idle now, the server writes what it can
    wait_until(lambda: len(files(tmp_path)) == 2)
    assert path.stat() == before
    leases.release(path.name)
    wait_until(lambda: path.stat().st_ino != before.st_ino)
    change(engine, "delete", "a")
    assert path not in files(tmp_path)


def test_memory_pressure_forgets_what_it_may_not_write(
    start: Callable[..., MlxEngine], tmp_path: Path, leases: Leases
) -> None:
    engine, talk = start(kv_memory=MemoryBudget(bytes=20 << 20)), Talk("s0", "I am s0. " + TEXT * 12)
    talk.turn(engine)
    change(engine, "save", "s0")
    (path,) = files(tmp_path)
    assert leases.take(path.name)
    talk.turn(engine)
    for i in range(1, 5):
        Talk(f"s{i}", f"I am s{i}. " + TEXT * 12).turn(engine)
    assert metric(engine, "evictions_total", reason="memory") == 1
    assert states(engine)["s0"] == "spilled"  # its first turn, which is there to be read
    assert talk.turn(engine) < 80
    assert owned_by_nobody(engine)


def test_neither_a_start_nor_the_disk_s_budget_removes_what_another_server_is_at(
    start: Callable[..., MlxEngine], tmp_path: Path, leases: Leases
) -> None:
    half = tmp_path / "kept" / f"x{SUFFIX}{PARTIAL}"
    half.write_bytes(b"half")
    leases.take(f"x{SUFFIX}")
    engine = start(session_disk=2 << 20)
    assert half.exists()
    leases.release(f"x{SUFFIX}")
    Talk("a").turn(engine)
    assert engine.services.disk is not None
    engine.services.disk._budget = 64 << 20
    change(engine, "save", "a")
    (path,) = (path for path in files(tmp_path) if path != half)
    leases.take(path.name)
    engine.services.disk._budget = 2 << 20
    Talk("b", "I am b. " + TEXT * 12).turn(engine)
    with pytest.raises(SessionNotSaved):  # there is no room, and nothing else that may go
        change(engine, "save", "b")
    assert path.exists()
    start()
    assert not half.exists()


def test_nobody_counts_on_a_file_that_another_server_has_removed(start: Callable[..., MlxEngine]) -> None:
    one = start()
    for name in "ab":
        Talk(name, f"I am {name}. " + TEXT * 12).turn(one)
        change(one, "save", name)
    two, memory = start(), Talk("c")
    memory.turn(two)
    change(two, "save", "c")
    for name in "ac":
        change(one, "delete", name)
    assert two.services.disk is not None
    two.services.disk._snapshot._next_poll = 0.0  # it looks once a second
    Talk("d", "I am d. " + TEXT * 12).turn(two)
    saved = {row["id"]: (row["state"], row["saved"]) for row in two.sessions()}
    assert saved == {"b": ("spilled", True), "c": ("resident", False), "d": ("resident", False)}
    change(two, "save", "c")
    assert Talk("c").turn(one) == 1
