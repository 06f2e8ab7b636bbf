"""Servers that are killed while they write sessions to disk, or on their way to a stop, again and again.

After every kill each file is whole or refused with a reason, sessions that were whole before still are, and the next
server starts, clears what was not written to its end, and goes on from every whole file with the very text that a
server gives that nothing ever happened to. The two have not gone through the same requests, but through the same
tokens: turns only ever extend a session, so no state is gone back in, and what a state holds follows from its tokens
and their positions alone, whoever computed them when. Only rounding depends on what else is in the batch, and the talks
are such that the model is never in doubt.
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from server.settings import MemoryBudget, Settings
from tests.serving.launch import UVICORN, Server, running
from tests.soak.disk.chatting import Chatting, Tally
from tests.soak.disk.stored import Found, Look, look
from tests.soak.disk.talks import Talk, talks
from tests.soak.engines import started
from turbocache.models import BUNDLED
from turbocache.storage.session_codec import SessionFiles
from turbocache.storage.whole_file import PARTIAL

CLIENTS = 3
KEEP, WINDOW = 16, 64
BUDGET = 18 << 20
"""Room for what three clients ask at once and one session at rest, or none."""

_HOWS = {"at any moment": 1, "in a write": 2, "after SIGTERM": 1, "in a write after SIGTERM": 2}
"""When to kill, and how often so."""

_TALK_SECONDS = 2.5
_STOP_SECONDS = 0.6
_WRITE_SECONDS = 0.006
_LOOK_SECONDS = 0.0005
_MOST_WRITES = 2


@dataclass(slots=True)
class Kills:
    """What happened, and `wrong`: sentences, each a failure."""

    kills: Counter[str] = field(default_factory=Counter)
    in_a_write: int = 0
    came_too_late: int = 0
    starts: int = 0
    files: int = 0
    whole: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    restored: int = 0
    most_partials: int = 0
    partials_after_start: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def wrong(self) -> list[str]:
        return self.tally.wrong

    def lines(self) -> list[str]:
        refused = ", ".join(f"{n} {reason}" for reason, n in self.refused.items()) or "none"
        hows = ", ".join(f"{n} {how}" for how, n in self.kills.items())
        return [
            f"kills                     {self.kills.total()} ({hows})",
            f"  during a write          {self.in_a_write}",
            f"  after an orderly stop   {self.came_too_late} (not counted above)",
            f"servers started           {self.starts}",
            f"files looked at           {self.files}: {self.whole} whole, refused: {refused}",
            f"sessions gone on from     {self.restored}",
            f"turns answered to the end {self.tally.turns}, hung up on {self.tally.hung_up}, "
            f"cut off {self.tally.cut_off}, asked to come later {self.tally.later}",
            f"wrong texts               {self.tally.wrong_texts}",
            f"most partial files        {self.most_partials} after a kill, {self.partials_after_start} after a start",
            f"failures                  {len(self.wrong)}",
            *(f"  {what}" for what in self.wrong[:20]),
        ]


class Rounds:
    """Servers on one folder, one after the other, and what is known of it."""

    def __init__(self, place: Path, told: list[Talk], files: SessionFiles, dice: random.Random, result: Kills) -> None:
        self._folder = place / "sessions"
        self._logs = place / "logs"
        self._told = told
        self._files = files
        self._dice = dice
        self._result = result
        self._turns = dict.fromkeys(range(len(told)), 0)
        self._seen = Look()
        self._folder.mkdir()
        self._logs.mkdir()

    @property
    def nearly_told(self) -> bool:
        """Whether there is hardly anything left to say."""
        return sum(len(talk) - self._turns[i] for i, talk in enumerate(self._told)) < 2 * CLIENTS

    def begin(self) -> None:
        """An empty folder, and in it, after an orderly stop, the first turn of every talk."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        self._turns = dict.fromkeys(range(len(self._told)), 0)
        self._seen = Look()
        with self._running() as server:
            self._chatting(server).open(CLIENTS)
        self._look_again()
        if len(self._seen.whole) < len(self._told):
            self._result.wrong.append(f"an orderly stop left {len(self._seen.whole)} of {len(self._told)} sessions")

    def serve(self, how: str | None) -> None:
        """Start a server, go on from every file that it finds, and kill it; None stops it in order."""
        with self._running() as server:
            self._check_start(server)
            chatting = self._chatting(server)
            self._result.restored += chatting.go_on(self._longest(), CLIENTS)["restored"]
            if how is not None:
                with chatting.talking(CLIENTS):
                    self._kill(server.process, how, chatting.leave)
        self._look_again()

    @contextmanager
    def _running(self) -> Iterator[Server]:
        sizes = {"KEEP": str(KEEP), "WINDOW": str(WINDOW), "KV_MEMORY": str(BUDGET)}
        with running(self._logs, UVICORN, None, SESSION_DIR=str(self._folder), **sizes) as server:
            self._result.starts += 1
            yield server

    def _chatting(self, server: Server) -> Chatting:
        return Chatting(server.url, self._told, self._turns, self._dice, self._result.tally)

    def _check_start(self, server: Server) -> None:
        if left := list(self._folder.glob(f"*{PARTIAL}")):
            self._result.partials_after_start += len(left)
            self._result.wrong.append(f"{len(left)} partial files are still there after a start")
        rows = {id: row["state"] for id, row in server.sessions().items()}
        for found in self._seen.whole:
            if rows.get(found.id) != "spilled":
                self._result.wrong.append(f"a start does not know the whole file of {found.id}")

    def _longest(self) -> dict[int, int]:
        """The talks that can go on from a whole file, with how many tokens it has; their turns are set accordingly."""
        held: dict[int, int] = {}
        for found in self._seen.whole:
            if (i := self._talk_of(found)) is not None and len(found.tokens) > held.get(i, 0):
                held[i] = len(found.tokens)
                self._turns[i] = self._told[i].next_turn(found.tokens)
        return {i: n for i, n in held.items() if self._turns[i] < len(self._told[i])}

    def _talk_of(self, found: Found) -> int | None:
        for i, talk in enumerate(self._told):
            if talk.has(found.tokens):
                return i
        self._result.wrong.append(f"the file of {found.id} has tokens that nobody has said")
        return None

    def _kill(self, process: subprocess.Popen[bytes], how: str, leave: Callable[[], None]) -> None:
        dice = self._dice
        if how == "at any moment":
            time.sleep(dice.uniform(0, _TALK_SECONDS))
        elif how == "in a write":
            time.sleep(dice.uniform(0, _TALK_SECONDS / 2))
            self._wait_for_writes(process, 1)
        else:
            time.sleep(dice.uniform(0, _TALK_SECONDS / 2))
            process.send_signal(signal.SIGTERM)
            leave()
            if how == "after SIGTERM":
                time.sleep(dice.uniform(0, _STOP_SECONDS))
            else:
                self._wait_for_writes(process, dice.randint(1, _MOST_WRITES))
        process.kill()
        code = process.wait()
        if code == -signal.SIGKILL:
            self._result.kills[how] += 1
        elif code == -signal.SIGTERM and "SIGTERM" in how:
            self._result.came_too_late += 1
        else:
            self._result.wrong.append(f"a server ended by itself with {code}")

    def _wait_for_writes(self, process: subprocess.Popen[bytes], n: int) -> None:
        """Until the `n`th file is being written, and a little into it."""
        seen: set[str] = set()
        deadline = time.monotonic() + 2 * _TALK_SECONDS
        while len(seen) < n and process.poll() is None and time.monotonic() < deadline:
            seen |= {entry.name for entry in os.scandir(self._folder) if entry.name.endswith(PARTIAL)}
            time.sleep(_LOOK_SECONDS)
        time.sleep(self._dice.uniform(0, _WRITE_SECONDS))

    def _look_again(self) -> None:
        before, now, result = self._seen, look(self._folder, self._files), self._result
        self._seen = now
        result.files += len(now.whole) + len(now.refused)
        result.whole += len(now.whole)
        result.refused.update(now.reasons)
        result.in_a_write += bool(now.partial)
        result.most_partials = max(result.most_partials, len(now.partial))
        if len(now.partial) > 1:
            result.wrong.append(f"{len(now.partial)} partial files after one kill")
        whole = {found.path for found in now.whole}
        for lost in {found.path for found in before.whole} - whole:
            result.wrong.append(f"{lost.name} was whole and is now {now.refused.get(lost, 'gone')}")


def run(times: int, seed: int, n_talks: int = 10, n_turns: int = 9, say: Callable[[str], None] = print) -> Kills:
    """Kill `times` servers. Raises AssertionError when one does not start."""
    dice, result = random.Random(seed), Kills()
    with started(
        Settings(model=str(BUNDLED), keep=KEEP, window=WINDOW, kv_memory=MemoryBudget(bytes=1 << 30))
    ) as engine:
        told = talks(engine, n_talks, n_turns, seed, say)
        files = SessionFiles(engine.services.runtime.model, engine.services.runtime.store)
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        rounds = Rounds(Path(place), told, files, dice, result)
        rounds.begin()
        while result.kills.total() < times:
            (how,) = dice.choices(list(_HOWS), list(_HOWS.values()))
            if rounds.nearly_told:
                rounds.begin()
            rounds.serve(how)
            say(f"{result.kills.total()} of {times}, {how}: {result.restored} restored, {len(result.wrong)} failures")
        rounds.serve(None)
    return result
