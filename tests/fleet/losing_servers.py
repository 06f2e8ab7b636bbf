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
            starts = [pool.submit(stack.enter_context, running(folder, SERVE, **settings)) for _ in range(n)]
        servers = [start.result() for start in starts]
        proxy = stack.enter_context(proxied(folder / "nginx", [address(server.url) for server in servers]))
        yield proxy, servers


def lose_servers(folder: Path, size: Size, say: Callable[[str], None] = lambda text: None) -> Found:
    """The whole run."""
    found = Found(size)
    talks = [Talk(i, size.max_tokens) for i in range(size.sessions)]
    with fleet(folder, 3, size) as (proxy, servers), ExitStack() as beside:
        others = beside.enter_context(Bystanders(proxy.url, [talk.name for talk in talks], size.bystanders))
        say("every session on its server")
        _phase(found, "all servers up", talks, proxy, size.before)
        homes = {talk.name: talk.servers()[0] for talk in talks}
        found.sessions_of.update(homes.values())
        for talk in talks:
            if set(talk.servers()) != {homes[talk.name]}:
                found.wrong.append(f"{talk.name} did not stay on its server: {talk.servers()}")
        _check_placement(found, talks, servers)

        say("one is killed in mid-load")
        killed = max(servers, key=lambda server: found.sessions_of[address(server.url)])
        of_killed = [talk for talk in talks if homes[talk.name] == address(killed.url)]
        found.moved = len(of_killed)
        killer = threading.Thread(target=_kill_while_answering, args=(killed, of_killed))
        killer.start()
        _phase(found, "while one is killed", talks, proxy, size.during, of_killed)
        killer.join()
        elsewhere = [next(turn for turn in talk.turns if turn.server != homes[talk.name]) for talk in of_killed]
        found.phases["of these the first on another server"] = elsewhere
        for talk in talks:
            later = set(talk.servers()[size.before :])
            if talk in of_killed:
                if talk.servers()[-1] == homes[talk.name] or len(later - {homes[talk.name]}) != 1:
                    found.wrong.append(f"{talk.name} did not go on on one other server: {talk.servers()}")
            elif later != {homes[talk.name]}:
                found.wrong.append(f"{talk.name} was moved though its server runs: {talk.servers()}")

        beside.close()
        say("another one is drained and stopped")
        proxy.wait_until_down(address(killed.url))
        left = [server for server in servers if server is not killed]
        stopped = max(left, key=lambda server: sum(talk.servers()[-1] == address(server.url) for talk in talks))
        of_stopped = [talk for talk in talks if talk.servers()[-1] == address(stopped.url)]
        found.stopped = len(of_stopped)
        proxy.script("drain", address(stopped.url))
        stopped.process.send_signal(signal.SIGTERM)
        if stopped.process.wait(60) != 0:
            found.wrong.append(f"the stopped server ended with {stopped.process.returncode}")
        _phase(found, "after one was stopped", of_stopped, proxy, 1)
        for talk in of_stopped:
            if not talk.turns[-1].cached:
                found.wrong.append(f"{talk.name} did not come back from its file")
        found.files_refused = sum(s.metric("session_files_refused_total") for s in left if s is not stopped)
        found.bystanders = others.asked
        found.longest = max(others.longest, *(turn.seconds for talk in talks for turn in talk.turns))
    if found.files_refused:
        found.wrong.append(f"{found.files_refused:.0f} session files were refused")
    if found.longest > LONGEST_SECONDS:
        found.wrong.append(f"a request took {found.longest:.0f} s")
    return found


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
    deadline = time.monotonic() + LONGEST_SECONDS
    while not any(talk.streaming for talk in talks) and time.monotonic() < deadline:
        time.sleep(0.001)
    server.process.kill()
    server.process.wait()


def _check_placement(found: Found, talks: Sequence[Talk], servers: Sequence[Server]) -> None:
    """The servers' own lists agree: no session is on two."""
    for server in servers:
        own = {talk.name for talk in talks if talk.servers()[-1] == address(server.url)}
        resident = {id for id, row in server.sessions().items() if row["state"] != "spilled"}
        if strangers := {talk.name for talk in talks if talk.name in resident} - own:
            found.wrong.append(f"{address(server.url)} has {strangers}, which others answer")
