"""How the ranks of a group notice that one of them is lost.

A rank that waits in a collective of MLX can't distinguish a slow rank from one that is dead, stopped or cut off. So
each rank answers `GET /rank` over HTTP, from a thread that computes nothing, and asks every other rank once a second.
"""

import http.client
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_EVERY_SECONDS = 1.0
_AGAIN_SECONDS = 0.3
_REFUSED_TWICE = 2
_BLAME_SECONDS = 1.5
_HOSTFILE = "MLX_HOSTFILE"

Report = Callable[[], Mapping[str, Any]]
"""Returns what this rank tells the others, as JSON values. Called from any thread."""


def own_address(rank: int, given: str | None = None) -> str:
    """The address at which the other ranks reach this one.

    It is `given`, or from the launcher's host file, or the one from which this machine reaches rank 0 (NCCL_HOST_IP).
    Without any of these it is the loopback address, for ranks of one machine.
    """
    if given is not None:
        return given
    if path := os.environ.get(_HOSTFILE):
        entry = json.loads(Path(path).read_text())[rank]
        addresses = entry["ips"] if isinstance(entry, dict) else entry
        return str(addresses[0]).rsplit(":", 1)[0]
    if leader := os.environ.get("NCCL_HOST_IP"):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as route:
            route.connect((leader, 9))  # sends nothing
            return str(route.getsockname()[0])
    return "127.0.0.1"


class RankWatch:
    """Answers for this rank, and watches the others.

    silence: seconds without an answer after which a rank is lost.
    on_lost: called once, from a thread of the watch, with a sentence that names the lost rank and the reason.
    on_stop: called when another rank asks for an orderly stop.
    """

    def __init__(
        self,
        rank: int,
        address: str,
        silence: float,
        report: Report,
        on_lost: Callable[[str], None],
        on_stop: Callable[[], None],
    ) -> None:
        self.seen: dict[int, dict[str, Any]] = {}
        """The last answer of each other rank."""
        self._rank = rank
        self._silence = silence
        self._report = report
        self._on_lost = on_lost
        self._on_stop = on_stop
        self._stopping = False
        self._ending: str | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._lost: str | None = None
        self._peers: dict[int, str] = {}
        self._server = ThreadingHTTPServer((address, 0), _handler(self._answer))
        self._server.daemon_threads = True
        self.address = f"{address}:{self._server.server_port}"
        self._start(self._server.serve_forever)

    def watch(self, addresses: Sequence[str]) -> None:
        """Begin to ask the ranks at these addresses, which are in the order of ranks."""
        self._peers = {rank: address for rank, address in enumerate(addresses) if rank != self._rank}
        for rank, address in self._peers.items():
            self._start(self._follow, rank, address)

    def stop(self) -> None:
        """An orderly stop: from now on no rank is reported as lost."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def end(self, reason: str) -> None:
        """Tell the other ranks why this one ends the group."""
        self._ending = self._ending or reason

    def ask_to_stop(self) -> None:
        """Tell the other ranks that this one should stop."""
        self._stopping = True

    def blame(self) -> str | None:
        """The reason of the loss, after a collective has failed. Waits up to 1.5 s until the watch notices it."""
        until = time.monotonic() + _BLAME_SECONDS
        while self._lost is None and time.monotonic() < until:
            time.sleep(_AGAIN_SECONDS / 3)
        return self._lost

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, name="rank watch", daemon=True).start()

    def _answer(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "pid": os.getpid(),
            "ending": self._ending,
            "stopping": self._stopping,
            **self._report(),
        }

    def _follow(self, rank: int, address: str) -> None:
        """Ask one rank until it is lost."""
        heard, refused, asked_to_stop = time.monotonic(), 0, False
        while not self._stopped.is_set():
            asked = time.monotonic()
            try:
                answer = _ask(address, self._silence / 2)
            except ConnectionError:  # nobody listens there, or the connection was reset
                refused += 1
                if refused >= _REFUSED_TWICE:
                    return self._lose(f"rank {rank} ({address}) has ended; its own log says why")
            except (OSError, http.client.HTTPException, ValueError):
                refused = 0
            else:
                heard, refused = asked, 0
                self.seen[rank] = answer
                if answer.get("ending"):
                    return self._lose(str(answer["ending"]))
                if answer.get("stopping") and not asked_to_stop:
                    asked_to_stop = True
                    self._on_stop()
            silent = time.monotonic() - heard
            if silent > self._silence:
                return self._lose(
                    f"rank {rank} ({address}) has not answered for {silent:.0f} s: its process hangs or is stopped, "
                    "its machine is down, or the link to it is cut"
                )
            self._stopped.wait(_EVERY_SECONDS if heard == asked else _AGAIN_SECONDS)
        return None

    def _lose(self, reason: str) -> None:
        with self._lock:
            first = self._lost is None
            self._lost = self._lost or reason
        if first and not self._stopped.is_set():
            self._on_lost(reason)


def _ask(address: str, timeout: float) -> dict[str, Any]:
    host, port = address.rsplit(":", 1)
    with closing(http.client.HTTPConnection(host, int(port), timeout=timeout)) as connection:
        connection.request("GET", "/rank")
        return dict(json.loads(connection.getresponse().read()))


def _handler(answer: Callable[[], dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/rank":
                self.send_error(404)
                return
            body = json.dumps(answer()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """No log: every rank asks once a second."""

    return Handler
