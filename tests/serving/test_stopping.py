"""A server process that is told to stop while clients wait for it: each hears how it ends, and the process does end."""

import json
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import patient, wait_until
from tests.serving.launch import SERVE, UVICORN, Server, endless, running

pytestmark = pytest.mark.slow  # each starts a server of its own, or waits for a time limit

CHAT = "/v1/chat/completions"
STOPPED = {
    "error": {"message": "The server is shutting down.", "type": "server_error", "param": None, "code": "shutting_down"}
}


class Asking(threading.Thread):
    """A client and what it has heard; `begun` is set when the first text is there."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.status = 0
        self.lines: list[str] = []
        self._url = server.url + CHAT
        self._body = body
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=patient(60)) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line:
                    self.lines.append(line.removeprefix("data: "))
                    self.begun.set()

    def ends(self) -> list[str]:
        """What says that a stream is over, of all that it has sent."""
        return [line for line in self.lines if line == "[DONE]" or "error" in json.loads(line)]


def saved(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def wait_for(server: Server, metric: str, value: float) -> None:
    wait_until(lambda: server.metric(metric) >= value, 20, f"{metric} stays below {value}")


def test_what_can_end_within_the_grace_ends_and_a_second_signal_ends_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    with running(tmp_path, STOP_GRACE="60", SESSION_DIR=str(folder)) as server:
        short = Asking(server, endless("short", max_tokens=60, stream=True))
        stream, whole = Asking(server, endless("stream", stream=True)), Asking(server, endless("whole"))
        assert short.begun.wait(patient(20))
        assert stream.begun.wait(patient(20))
        wait_for(server, "requests_running", 3)
        server.process.send_signal(signal.SIGTERM)
        short.join(20)
        assert short.ends() == ["[DONE]"]
        assert '"finish_reason":"length"' in short.lines[-2]
        assert stream.is_alive()
        assert whole.is_alive()
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        stream.join(20)
        whole.join(20)
        # As uvicorn does: it ends by the signal, once all else is done.
        assert server.process.wait(patient(20)) == -signal.SIGTERM
        assert time.monotonic() - begun < patient(10)
    assert [json.loads(end) for end in stream.ends()] == [STOPPED]
    assert stream.lines[-1] == stream.ends()[0]
    assert (whole.status, [json.loads(line) for line in whole.lines]) == (503, [STOPPED])
    assert saved(folder) == 3
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "API key" not in log


@pytest.mark.parametrize(
    ("command", "number"), [(SERVE, signal.SIGTERM), (UVICORN, signal.SIGINT)], ids=["turbocache serve", "uvicorn"]
)
def test_after_the_grace_whatever_is_open_ends(tmp_path: Path, command: Sequence[str], number: int) -> None:
    with running(tmp_path, [*command, "--host", "0.0.0.0"], STOP_GRACE="0.5") as server:
        stream = Asking(server, endless("stream", stream=True))
        assert stream.begun.wait(patient(20))
        body = slow_body(server)
        server.process.send_signal(number)
        stream.join(20)
        assert server.process.wait(patient(20)) == 0
        assert [json.loads(end) for end in stream.ends()] == [STOPPED]
        with closing(body):
            head, _, text = body.recv(65536).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(text) == STOPPED
    log = server.log.read_text()
    assert "Traceback" not in log
    assert log.count("asks for no API key") == 1


def slow_body(server: Server) -> socket.socket:
    """A request whose body does not come."""
    connection = socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port), timeout=20)
    connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{{".encode())
    return connection


def test_a_client_that_does_not_read_keeps_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    with socket.socket() as listener, socket.socket() as deaf:
        # Small buffers, so that the server soon can't write any more.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        with running(tmp_path, listener=listener, STOP_GRACE="0.2", SESSION_DIR=str(folder)) as server:
            deaf.connect(listener.getsockname())
            body = json.dumps(endless("deaf", stream=True, logprobs=True, top_logprobs=20)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            deaf.sendall(head.encode() + body)
            wait_for(server, "generated_tokens_total", 60)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(patient(20)) == -signal.SIGTERM
    assert "1 requests whose clients do not read" in server.log.read_text()
    assert saved(folder) == 1
