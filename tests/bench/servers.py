"""The two servers as child processes: start, wait until ready, and stop."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.bench.client import Endpoint, RequestFailed
from tests.bench.machine import Blas, child_environment
from tests.bench.prompts import user
from tests.processes import kill_group

ROOT = Path(__file__).resolve().parents[2]
Kind = Literal["turbocache", "mlx-lm"]

MLX_LM_DEFAULTS = "decode concurrency 32, prompt concurrency 8, prefill step 2048, prompt cache 10 sequences"
"""What `mlx_lm.server` uses when its options are left alone, as they are here."""


class ServerFailed(RuntimeError):
    """A server did not start or stopped by itself; the message ends with its log."""


@dataclass(slots=True)
class Server:
    """One server process. Use `start` and `stop`, or the context manager `running`. `settings` are environment
    variables and `options` arguments that it gets besides those that every server of its kind has.
    """

    name: str
    kind: Kind
    model: Path
    blas: Blas
    preset: str
    log: Path
    greet: bool = True
    start_timeout: float = 180.0
    settings: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _endpoint: Endpoint | None = field(default=None, init=False)

    @property
    def endpoint(self) -> Endpoint:
        """Where the running server listens. Raises ServerFailed when it is not running."""
        if self._endpoint is None or self._process is None or self._process.poll() is not None:
            raise self._failure("is not running")
        return self._endpoint

    def start(self) -> None:
        """Start on a free port, wait for /health and, to warm it up, one short chat. Raises ServerFailed."""
        port = _free_port()
        extra: dict[str, str] = {}
        command = [sys.executable, "-m"]
        if self.kind == "turbocache":
            command += ["uvicorn", "server.app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
            extra = {"TURBOCACHE_MODEL": str(self.model), "TURBOCACHE_KV_PRESET": self.preset}
        else:
            command += ["mlx_lm", "server", "--model", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
        command += self.options
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=child_environment(self.blas, {**extra, **self.settings}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(Endpoint(port, {}, names_sessions=False))
            body: dict[str, Any] = {}
            if self.kind == "turbocache":
                body["model"] = json.loads(Endpoint(port, {}, False).get("/v1/models")[1])["data"][0]["id"]
            self._endpoint = Endpoint(port, body, names_sessions=self.kind == "turbocache")
            if self.greet:
                self._endpoint.chat([user("Hello!")], 8)
        except (OSError, RequestFailed, KeyError, ValueError) as error:
            failure = self._failure(f"did not answer: {type(error).__name__}: {error}")
            self.stop()
            raise failure from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after ten seconds. Does nothing when not running."""
        process, self._process, self._endpoint = self._process, None, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        kill_group(process)

    def restart(self) -> None:
        """Stop and start: no cache outlives this."""
        self.stop()
        self.start()

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the server's output."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _wait(self, endpoint: Endpoint) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise self._failure("stopped while starting")
            with contextlib.suppress(OSError):
                if endpoint.get("/health")[0] == 200:
                    return
            time.sleep(0.2)
        raise self._failure(f"was not ready after {self.start_timeout:.0f} s")

    def _failure(self, what: str) -> ServerFailed:
        code = self._process.poll() if self._process is not None else None
        exit_note = "" if code is None else f" (exit status {code})"
        return ServerFailed(f"{self.name} {what}{exit_note}; the end of its log:\n{self.log_tail()}")


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Start the servers one after the other and stop them at the end, whatever happens."""
    try:
        for server in servers:
            server.start()
        yield
    finally:
        for server in servers:
            server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
