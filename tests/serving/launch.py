"""A real server process for the tests, and text to talk about."""

import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
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
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)
        self.clients.append(client)
        return client

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a family's samples with these labels."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"turbocache_{name}" and labels.items() <= sample.labels.items()
        )

    def cache_bytes(self) -> float:
        return self.metric("cache_bytes")

    def sessions(self) -> dict[str, dict[str, object]]:
        return {row["id"]: row for row in httpx.get(f"{self.url}/v1/sessions").json()["data"]}


@contextmanager
def running(folder: Path, **settings: str) -> Iterator[Server]:
    """`uvicorn server.app:app` with these TURBOCACHE_ settings, ready to answer; ended and waited for afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TURBOCACHE_")}
    environment |= {f"TURBOCACHE_{name}": value for name, value in settings.items()} | {"HF_HUB_OFFLINE": "1"}
    log = folder / f"server-{port}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [PYTHON, "-m", "uvicorn", "server.app:app", "--port", str(port)],
            cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT,
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        for client in server.clients:
            client.close()
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()}")


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


def digits(text: str) -> str:
    return "".join(re.findall(r"\d", text))
