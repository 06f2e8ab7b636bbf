"""A supervisor as systemd is one with Restart=always and WatchdogSec: each rank by itself, on its own host."""

import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import child, kill_group
from tests.serving.launch import ROOT

WATCHDOG_SECONDS = 15.0
RESTART_SECONDS = 1.0


@dataclass
class Run:
    """One life of a process: when it began and ended (by `time.monotonic`), and its exit status."""

    process: subprocess.Popen[bytes]
    began: float
    ended: float | None = None
    killed: bool = False


@dataclass
class Supervised:
    """Starts a command again whenever it has ended; kills it after `WATCHDOG_SECONDS` without a sign of life."""

    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = self.log.with_suffix(".notify")
        self._socket.bind(str(address))
        self._socket.settimeout(0.2)
        self.environment |= {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6))}
        self._thread = threading.Thread(target=self._supervise)
        self._thread.start()

    @property
    def now(self) -> Run:
        """The life that is being lived, or was last."""
        return self.runs[-1]

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _supervise(self) -> None:
        while not self._over.is_set():
            with child(self.command, self.log, cwd=ROOT, env=self.environment) as process:
                self.runs.append(run := Run(process, time.monotonic()))
                self._follow(run)
            self._over.wait(RESTART_SECONDS)

    def _follow(self, run: Run) -> None:
        heard = run.began
        while run.process.poll() is None:
            with suppress(TimeoutError):
                if self._socket.recv(100) == b"WATCHDOG=1":
                    heard = time.monotonic()
            run.killed = time.monotonic() - heard > WATCHDOG_SECONDS
            if run.killed or self._over.is_set():
                kill_group(run.process)
        run.ended = time.monotonic()
