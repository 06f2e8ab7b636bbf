"""Real groups of ranks on this machine, as a launcher starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.processes import child, kill_group, wait_for_end
from tests.serving.launch import ROOT, Server, wait_until_ready

STOP_SECONDS = 30.0
SERVE = (sys.executable, "-m", "server.cli", "serve")
_POLITE = ("nice", "-n", "5")
"""More ranks than cores wait for each other busily, and other tests run beside them."""
LOOPBACK = "127.0.0.1"


@dataclass
class RunningGroup:
    """The ranks' processes and what they wrote; `server` is rank 0's."""

    url: str
    ranks: list[subprocess.Popen[bytes]]
    logs: list[Path]
    server: Server = field(init=False)

    def __post_init__(self) -> None:
        self.server = Server(self.url, self.ranks[0], self.logs[0])

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def all_logs(self) -> str:
        return "\n".join(f"--- rank {i}\n{self.log(i)}" for i in range(len(self.logs)))

    def wait_until_ready(self) -> None:
        """Until rank 0 answers. Raises AssertionError when a rank ends first."""
        wait_until_ready(self.url, self.ranks, self.all_logs)

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses, once all ranks have ended. Raises TimeoutExpired."""
        return [wait_for_end(rank, seconds) for rank in self.ranks]

    def kill(self) -> None:
        """What a supervisor does when one rank has ended."""
        for rank in self.ranks:
            kill_group(rank)


def free_ports(n: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as held:
        probes = [held.enter_context(closing(socket.socket())) for _ in range(n)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def environment(settings: dict[str, str]) -> dict[str, str]:
    """This process's, with these TURBOCACHE_ settings only."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TURBOCACHE_", "MLX_"))}
    return kept | {f"TURBOCACHE_{name}": value for name, value in settings.items()} | {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Start:
    """How one rank is started."""

    command: list[str]
    environment: dict[str, str]
    log: Path


def starts(
    folder: Path,
    n: int,
    addresses: Sequence[str] | None = None,
    within: Sequence[Sequence[str]] | None = None,
    patches: Sequence[str] | None = None,
    own: Mapping[int, dict[str, str]] | None = None,
    **settings: str,
) -> tuple[str, list[Start]]:
    """The address of `n` ranks with these TURBOCACHE_ settings (and a rank's `own`), rank i at `addresses[i]` and by
    the command `within[i]` (such as `ip netns exec`), and how to start each; Python of `patches[i]` runs in it first.
    Rank 0 listens at its own address.
    """
    folder.mkdir(parents=True, exist_ok=True)
    addresses = addresses or [LOOPBACK] * n
    within = within or [()] * n
    http, *ports = free_ports(n + 1)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"{address}:{at}"] for address, at in zip(addresses, ports, strict=True)]))
    before = _POLITE if n > 2 else ()
    found = []
    for rank in range(n):
        serve = _serve(patches[rank] if patches else "")
        found.append(
            Start(
                [*within[rank], *before, *serve, "--host", addresses[0], "--port", str(http)],
                environment(settings | (own or {}).get(rank, {})) | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                folder / f"rank-{rank}.log",
            )
        )
    return f"http://{addresses[0]}:{http}", found


def _serve(patch: str) -> Sequence[str]:
    if not patch:
        return SERVE
    # The package comes first, as in the application.
    return (
        sys.executable,
        "-c",
        f"import turbocache; {patch}; from server.cli import main; raise SystemExit(main())",
        "serve",
    )


@contextmanager
def started_group(folder: Path, n: int, **options: Any) -> Iterator[RunningGroup]:
    """Ranks as `starts` describes them, which may still be starting. None is left afterwards."""
    url, found = starts(folder, n, **options)
    with ExitStack() as running:
        ranks = [running.enter_context(child(one.command, one.log, cwd=ROOT, env=one.environment)) for one in found]
        group = RunningGroup(url, ranks, [one.log for one in found])
        try:
            yield group
        finally:
            for client in group.server.clients:
                client.close()


@contextmanager
def running_group(folder: Path, n: int, stop: int = 0, **options: Any) -> Iterator[RunningGroup]:
    """A group on loopback, ready to answer; stopped in order afterwards, by a signal to rank `stop`."""
    with started_group(folder, n, **options) as group:
        group.wait_until_ready()
        yield group
        group.ranks[stop].send_signal(signal.SIGTERM)
        assert group.wait(STOP_SECONDS) == [0] * n, [group.log(i)[-2000:] for i in range(n)]
