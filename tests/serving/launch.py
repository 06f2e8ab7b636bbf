"""A real server process for the tests, and text to talk about."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import Deadline, child, patient, wait_until

ROOT = Path(__file__).resolve().parents[2]
# Not from the package, which the environment of official clients does not have.
BUNDLED = ROOT / "turbocache" / "bundled" / "tiny-recall-4bit"
START_SECONDS = 90.0
# Tests of official clients run in an environment without the server.
PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)


@dataclass(frozen=True)
class Server:
    """A running server and what its process wrote."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self) -> openai.OpenAI:
        """A client of its own, closed with the server: one that is merely dropped leaves an open socket behind."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=patient(120))
        self.clients.append(client)
        return client

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a family's samples with these labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=patient(10)).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"turbocache_{name}" and labels.items() <= sample.labels.items()
        )

    def cache_bytes(self) -> float:
        return self.metric("cache_bytes")

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Until nothing runs or waits. Raises AssertionError when that takes longer."""
        wait_until(lambda: not self._busy(), seconds, "something still runs or waits")

    def _busy(self) -> bool:
        rows = self.sessions().values()
        waiting = self.metric("requests_running") or self.metric("requests_waiting")
        return bool(waiting) or any(row["state"] == "running" for row in rows)

    def sessions(self) -> dict[str, dict[str, object]]:
        return {row["id"]: row for row in httpx.get(f"{self.url}/v1/sessions", timeout=patient(10)).json()["data"]}


UVICORN = ("uvicorn", "server.app:app")
SERVE = ("server.cli", "serve")


@contextmanager
def running(
    folder: Path, command: Sequence[str] = UVICORN, listener: socket.socket | None = None, **settings: str
) -> Iterator[Server]:
    """`python -m command` with these TURBOCACHE_ settings, ready to answer; ended and waited for afterwards. The model
    is the bundled one unless they name another. uvicorn can be given a bound `listener`.
    """
    with listener.dup() if listener is not None else socket.socket() as probe:
        if listener is None:
            probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ["--port", str(port)] if listener is None else ["--fd", str(listener.fileno())]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TURBOCACHE_")}
    given = {"MODEL": str(BUNDLED), **settings}
    environment |= {f"TURBOCACHE_{name}": value for name, value in given.items()} | {"HF_HUB_OFFLINE": "1"}
    log = folder / f"server-{port}.log"
    inherited = () if listener is None else [listener.fileno()]
    serve = [PYTHON, "-m", *command, *where]
    with child(serve, log, cwd=ROOT, env=environment, stop=True, pass_fds=inherited) as process:
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            wait_until_ready(server.url, [process], lambda: server.log.read_text())
            yield server
        finally:
            for client in server.clients:
                client.close()


def wait_until_ready(url: str, processes: Sequence[subprocess.Popen[bytes]], log: Callable[[], str]) -> None:
    """Until /health answers 200. Raises AssertionError with the `log` when a process ends first or none answers."""
    deadline = Deadline(START_SECONDS)
    while not deadline.passed() and all(process.poll() is None for process in processes):
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"it did not start:\n{log()}")


_PLACES = [
    "river",
    "mill",
    "harbour",
    "garden",
    "market",
    "tower",
    "bridge",
    "orchard",
    "chapel",
    "meadow",
    "station",
    "library",
]
_PEOPLE = ["miller", "teacher", "sailor", "painter", "farmer", "doctor", "weaver", "baker", "hunter", "singer"]
_DEEDS = ["walked to", "looked at", "painted", "bought", "described", "remembered", "repaired", "left"]


def filler(n_sentences: int, seed: int) -> str:
    """Plain sentences without names or numbers, about 12 tokens each."""
    draw = random.Random(seed)
    return " ".join(
        f"The {draw.choice(_PEOPLE)} {draw.choice(_DEEDS)} the {draw.choice(_PLACES)} near the {draw.choice(_PLACES)}."
        for _ in range(n_sentences)
    )


def endless(name: str, **fields: Any) -> dict[str, Any]:
    """A request whose answer ends only with the model's positions, because the tokens that end one are forbidden."""
    ends = json.loads((BUNDLED / "generation_config.json").read_text())["eos_token_id"]
    messages = [{"role": "user", "content": f"Continue, {name}: {filler(6, 3)}"}]
    forbidden = {str(token): -100 for token in ends}
    return {"model": "default", "messages": messages, "prompt_cache_key": name, "logit_bias": forbidden, **fields}


def digits(text: str) -> str:
    return "".join(re.findall(r"\d", text))
