"""Leases between real processes: who has one, who gets it next, and what ends it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.errors import StartupError
from server.sessions.leases import NAME, Leases

_OTHER = """
import sys
from pathlib import Path
from server.sessions.leases import Leases
leases = Leases(Path(sys.argv[1]))
for line in sys.stdin:
    what, _, name = line.strip().partition(" ")
    print(getattr(leases, what)(*[name][: bool(name)]), flush=True)
"""


class Other:
    """Another server's process, which does as it is told."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", _OTHER, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, said: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{said}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Other]]:
    others: list[Other] = []

    def make() -> Other:
        others.append(Other(tmp_path))
        return others[-1]

    yield make
    for other in others:
        other.end()


@pytest.fixture
def leases(tmp_path: Path) -> Iterator[Leases]:
    mine = Leases(tmp_path)
    yield mine
    mine.close()


def test_of_two_processes_one_has_it_until_it_lets_go_or_is_killed(
    leases: Leases, start: Callable[[], Other], tmp_path: Path
) -> None:
    other = start()
    assert other("take a") == other("take a") == "True"
    assert not leases.take("a")
    assert leases.take("b")
    assert other("take b") == "False"
    leases.release("b")
    assert other("take b") == "True"
    other("release a")
    assert leases.take("a")
    other.process.send_signal(signal.SIGKILL)
    other.process.wait()
    assert leases.take("b")
    third = start()
    assert third("take a") == third("take b") == "False"
    leases.close()
    assert third("take a") == "True"
    assert (tmp_path / NAME).stat().st_size == 0


def test_a_stopped_process_keeps_its_own(leases: Leases, start: Callable[[], Other]) -> None:
    other = start()
    assert other("take a") == "True"
    other.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, other.process.pid, os.WSTOPPED)
    assert not leases.take("a")
    other.process.send_signal(signal.SIGCONT)
    other("release a")
    assert leases.take("a")


def test_two_of_one_process_exclude_each_other_and_the_end_of_one_costs_the_other_nothing(
    leases: Leases, start: Callable[[], Other], tmp_path: Path
) -> None:
    """Whatever name leads to the folder. POSIX alone would give both, and drop all with the first one's end."""
    (tmp_path / "link").symlink_to(tmp_path)
    second = Leases(tmp_path / "link")
    assert leases.take("a")
    assert not second.take("a")
    assert second.take("b")
    second.close()
    second.close()
    other = start()
    assert other("take a") == "False"
    assert other("take b") == "True"


def test_a_block_has_it_for_its_time(leases: Leases, start: Callable[[], Other]) -> None:
    other = start()
    with leases.taken("a") as taken:
        assert taken
        assert other("take a") == "False"
    assert other("take a") == "True"
    with leases.taken("a") as taken:
        assert not taken


def test_a_folder_without_locks_stops_the_start_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", none)
        with pytest.raises(StartupError, match=r"TURBOCACHE_SESSION_DIR.*no locks.*mount it with locks"):
            Leases(tmp_path)
    Leases(tmp_path).close()
