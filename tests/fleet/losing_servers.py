"""Three servers behind nginx under load, of which one is killed and another one is stopped."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.fleet.proxy import Proxy, address, proxied
from tests.fleet.talking import LONGEST_SECONDS, Bystanders, Talk, Turn, at_once
from tests.processes import Deadline, patient, wait_for_end
from tests.serving.launch import SERVE, Server, running


@dataclass(frozen=True)
class Size:
    """Of a run. `sentences` has some 12 tokens each; a server is killed when every conversation has had `before` turns,
    and while they have `during` more. Clients pause for `pause` seconds between turns.
    """

    sessions: int = 24
    bystanders: int = 8
    before: int = 4
    during: int = 4
    sentences: int = 16
    max_tokens: int = 24
    memory: str = "320MiB"
    save_after: float = 1.0
    pause: float = 2.0


@dataclass
class Found:
    """What a run has shown. `wrong` are sentences, each a failure."""

    size: Size
    sessions_of: Counter[str] = field(default_factory=Counter)
    phases: dict[str, list[Turn]] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    stopped: int = 0
    bystanders: int = 0
    longest: float = 0.0
    files_refused: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        shares = ", ".join(str(n) for n in sorted(self.sessions_of.values(), reverse=True))
        lines = [
            f"sessions by server: {shares}",
            "| turns | number | tokens had before | of these computed again | share | sent again | longest, s |",
            "|---|---|---|---|---|---|---|",
        ]
        for phase, turns in self.phases.items():
            known, again = sum(turn.known for turn in turns), sum(turn.recomputed for turn in turns)
            longest = max(turn.seconds for turn in turns)
            lines.append(
                f"| {phase} | {len(turns)} | {known} | {again} | {100 * again / max(1, known):.1f} % | "
                f"{self.broken.get(phase, 0)} | {longest:.1f} |"
            )
        lines.append(f"other requests: {self.bystanders}; the longest of all requests took {self.longest:.1f} s")
        return [*lines, *(f"WRONG: {sentence}" for sentence in self.wrong)]


@contextmanager
def fleet(folder: Path, n: int, size: Size) -> Iterator[tuple[Proxy, list[Server]]]:
    """`n` servers on one folder of sessions, and nginx in front of them."""
    settings = {
        "SESSION_DIR": str(folder / "sessions"),
        "SESSION_SAVE_AFTER": str(size.save_after),
        "KV_MEMORY": size.memory,
        "STOP_GRACE": "1",
    }
    with ExitStack() as stack:
        with ThreadPoolExecutor(n) as pool:  # they take a while to start
            starts = [pool.submit(stack.enter_context, running(folder, SERVE, None, **settings)) for _ in range(n)]
        servers = [start.result() for start in starts]
        proxy = stack.enter_context(proxied(folder / "nginx", [address(server.url) for server in servers]))
        yield proxy, servers


def lose_servers(folder: Path, size: Size, say: Callable[[str], None] = lambda text: None) -> Found:
    """The whole run."""
    found = Found(size)
    talks = [Talk(i, size.max_tokens) for i in range(size.sessions)]
    with fleet(folder, 3, size) as (proxy, servers):
        with Bystanders(proxy.url, [talk.name for talk in talks], size.bystanders) as others:
            say("every session on its server")
            homes = _stay(found, talks, proxy, servers)
            say("one is killed in mid-load")
            killed = _kill_one(found, talks, proxy, servers, homes)
        say("another one is drained and stopped")
        proxy.wait_until_down(address(killed.url))
        last = _stop_one(found, talks, proxy, [server for server in servers if server is not killed])
        found.files_refused = last.metric("session_files_refused_total")
    found.bystanders = others.asked
    found.longest = max(others.longest, *(turn.seconds for talk in talks for turn in talk.turns))
    if found.files_refused:
        found.wrong.append(f"{found.files_refused:.0f} session files were refused")
    if found.longest > patient(LONGEST_SECONDS):
        found.wrong.append(f"a request took {found.longest:.0f} s")
    return found


def _stay(found: Found, talks: Sequence[Talk], proxy: Proxy, servers: Sequence[Server]) -> dict[str, str]:
    """All servers are up; returns where each session is."""
    _phase(found, "all servers up", talks, proxy, found.size.before)
    homes = {talk.name: talk.servers()[0] for talk in talks}
    found.sessions_of.update(homes.values())
    for talk in talks:
        if set(talk.servers()) != {homes[talk.name]}:
            found.wrong.append(f"{talk.name} did not stay on its server: {talk.servers()}")
    for server in servers:  # their own lists agree
        resident = {id for id, row in server.sessions().items() if row["state"] != "spilled"}
        own = {name for name, home in homes.items() if home == address(server.url)}
        if strangers := {talk.name for talk in talks if talk.name in resident} - own:
            found.wrong.append(f"{address(server.url)} has {strangers}, which others answer")
    return homes


def _kill_one(
    found: Found, talks: Sequence[Talk], proxy: Proxy, servers: Sequence[Server], homes: dict[str, str]
) -> Server:
    """The server with most sessions dies while all conversations go on; returns it."""
    killed = max(servers, key=lambda server: found.sessions_of[address(server.url)])
    moving = [talk for talk in talks if homes[talk.name] == address(killed.url)]
    killer = threading.Thread(target=_kill_while_answering, args=(killed, moving))
    killer.start()
    _phase(found, "while one is killed", talks, proxy, found.size.during, moving)
    killer.join()
    for talk in talks:
        home, later = homes[talk.name], talk.turns[found.size.before :]
        elsewhere = [turn for turn in later if turn.server != home]
        if talk in moving:
            found.phases.setdefault("of these the first on another server", []).extend(elsewhere[:1])
            if talk.servers()[-1] == home or len({turn.server for turn in elsewhere}) != 1:
                found.wrong.append(f"{talk.name} did not go on on one other server: {talk.servers()}")
        elif elsewhere:
            found.wrong.append(f"{talk.name} was moved though its server runs: {talk.servers()}")
    found.moved = len(moving)
    return killed


def _stop_one(found: Found, talks: Sequence[Talk], proxy: Proxy, left: Sequence[Server]) -> Server:
    """One of two servers is drained and stopped; returns the other one, which has its sessions then."""
    last, stopped = sorted(left, key=lambda server: sum(talk.servers()[-1] == address(server.url) for talk in talks))
    moving = [talk for talk in talks if talk.servers()[-1] == address(stopped.url)]
    proxy.script("drain", address(stopped.url))
    stopped.process.send_signal(signal.SIGTERM)
    if wait_for_end(stopped.process, 60) != 0:
        found.wrong.append(f"the stopped server ended with {stopped.process.returncode}")
    _phase(found, "after one was stopped", moving, proxy, 1)
    for talk in moving:
        if not talk.turns[-1].cached:
            found.wrong.append(f"{talk.name} did not come back from its file")
    found.stopped = len(moving)
    return last


def _phase(
    found: Found, name: str, talks: Sequence[Talk], proxy: Proxy, turns: int, apart: Sequence[Talk] = ()
) -> None:
    """All conversations take turns, each by a client of its own. Those `apart` are counted as `name: moved`."""

    def lead(talk: Talk) -> None:
        for n in range(turns):
            if n:
                time.sleep(found.size.pause)
            talk.turn(proxy.url, found.size.sentences)

    before = {talk.name: len(talk.broken) for talk in talks}
    at_once([partial(lead, talk) for talk in talks])
    for talk in talks:
        phase = f"{name}: its sessions" if talk in apart else f"{name}: the others" if apart else name
        found.phases.setdefault(phase, []).extend(talk.turns[-turns:])
        found.broken[phase] = found.broken.get(phase, 0) + len(talk.broken) - before[talk.name]


def _kill_while_answering(server: Server, talks: Sequence[Talk]) -> None:
    """SIGKILL in the middle of a stream."""
    deadline = Deadline(LONGEST_SECONDS)
    while not any(talk.streaming for talk in talks) and not deadline.passed():
        time.sleep(0.001)
    server.process.kill()
    server.process.wait()
