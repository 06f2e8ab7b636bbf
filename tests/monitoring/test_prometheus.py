"""A real Prometheus on deploy/'s own configuration, scraping a real server under load."""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.monitoring.names import PROMETHEUS, panels, recorded, rules, variables
from tests.processes import Deadline, child, patient
from tests.serving.launch import Server, endless, filler, running

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian's package) is not installed"),
]

# What Grafana puts in, for a scrape every second.
_VALUES = {"$__rate_interval": "10s", "$instance": ".*", "$model": ".*"}
_LOAD_SECONDS = 8.0
_SECONDS = 30.0


@dataclass(frozen=True)
class Prometheus:
    """Answers as of `at`, a time in seconds, or as of now."""

    url: str
    at: float | None = None

    def get(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        when = {} if self.at is None else {"time": str(self.at)}
        found: list[dict[str, Any]] = self.get("query", query=expression, **when)["result"]
        return found

    def has(self, expression: str) -> bool:
        """Whether there is data that is a number."""
        return any(sample["value"][1] != "NaN" for sample in self.query(expression))


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """deploy/'s configuration with another target and shorter intervals; its rule files are the real ones."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    with child(command, folder / "prometheus.log", env={**os.environ, "GOMAXPROCS": "1"}, stop=True):
        found = Prometheus(f"http://{address}")
        eventually(lambda: httpx.get(f"{found.url}/-/ready").status_code == 200)
        yield found


def eventually(check: Any) -> Any:
    """The first truth that `check` returns. Fails after half a minute."""
    deadline = Deadline(_SECONDS)
    while True:
        try:
            if found := check():
                return found
        except httpx.TransportError:
            pass
        assert not deadline.passed(), "it did not come true in time"
        time.sleep(0.2)


def talk(server: Server, name: str, seed: int) -> Callable[[], None]:
    """A turn that makes a session rotate; returns the next turn."""

    def turn(messages: list[dict[str, str]]) -> dict[str, str]:
        body = {"model": "default", "prompt_cache_key": name, "max_tokens": 12, "messages": messages}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=patient(60)).raise_for_status()
        message: dict[str, str] = answer.json()["choices"][0]["message"]
        return message

    ask = {"role": "user", "content": filler(60, seed)}
    answer = turn([ask])
    return lambda: turn([ask, answer, {"role": "user", "content": "Go on, please."}]) and None


def load(server: Server, who: str) -> None:
    """Conversations of two turns each, for some scrapes and until memory can't hold them all."""
    started, deadline, i = time.monotonic(), Deadline(120), 0
    while time.monotonic() < started + _LOAD_SECONDS or not server.metric("spills_total"):
        assert not deadline.passed(), "no session had to leave memory in time"
        talk(server, f"{who} {i}", i)()
        i += 1


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Server]]:
    folder = tmp_path_factory.mktemp("monitoring")
    settings = {
        "MAX_SIZE": "512", "WINDOW": "64", "KEEP": "64", "KV_MEMORY": "48MiB", "SESSION_DIR": str(folder / "sessions"),
        "BACKEND": "auto", "METRICS_EXEMPLARS": "true",
    }  # fmt: skip
    with running(folder, **settings) as server, prometheus(folder, server.url.removeprefix("http://")) as found:
        eventually(lambda: found.query("turbocache_engine_up == 1"))
        go_on = talk(server, "first", 99)
        with ThreadPoolExecutor() as pool:
            loads = [pool.submit(load, server, who) for who in ("one", "other")]
            with httpx.stream(
                "POST", f"{server.url}/v1/chat/completions", json=endless("left", stream=True), timeout=60
            ) as left:
                next(left.iter_lines())
            for done in loads:
                done.result()
        go_on()  # from disk, by now
        ended = time.time()
        server.wait_until_idle()
        # A scrape later all of the load has been seen, and at that moment it was going on.
        eventually(lambda: found.query("timestamp(turbocache_engine_up)")[0]["value"][1] > str(ended + 1))
        yield replace(found, at=ended), server


def test_the_load_did_what_is_to_be_seen(watched: tuple[Prometheus, Server]) -> None:
    """Else the queries below would have data without any meaning."""
    _, server = watched
    for name in ("rotations_total", "spills_total", "restores_total", "generated_tokens_total"):
        assert server.metric(name) > 0, name
    assert server.metric("prompt_tokens_total", source="cached") > 0
    assert server.metric("requests_finished_total", reason="cancelled") == 1


def test_every_target_is_up_and_every_rule_works(watched: tuple[Prometheus, Server]) -> None:
    found, _ = watched
    targets = found.get("targets")["activeTargets"]
    assert [target["health"] for target in targets] == ["up"]
    groups = found.get("rules")["groups"]
    listed = [rule for group in groups for rule in group["rules"]]
    assert len(listed) == len(rules())
    assert {rule["name"]: rule.get("lastError") for rule in listed if rule["health"] != "ok"} == {}


def test_every_recording_rule_has_data(watched: tuple[Prometheus, Server]) -> None:
    found, _ = watched
    assert {name for name in recorded() if not found.has(name)} == set()
    assert [sample["metric"]["model_name"] for sample in found.query("vllm:num_requests_running")] == [
        "tiny-recall-4bit"
    ]
    reasons = {sample["metric"]["finished_reason"] for sample in found.query("vllm:request_success_total")}
    assert reasons == {"stop", "length", "abort", "error"}


def test_every_query_of_the_dashboard_has_data(watched: tuple[Prometheus, Server]) -> None:
    found, _ = watched
    empty = {}
    for title, query in panels():
        if not found.has(filled_in(query)):
            empty.setdefault(title, []).append(query)
    assert empty == {}
    for query in variables().values():
        parts = re.fullmatch(r"label_values\((.*), (\w+)\)", filled_in(query))
        assert parts is not None
        series, label = parts.groups()
        assert found.get(f"label/{label}/values", **{"match[]": series}), query


def test_a_server_that_works_has_no_alert_but_for_a_missing_gpu(watched: tuple[Prometheus, Server]) -> None:
    found, server = watched
    states = {alert["labels"]["alertname"]: alert["state"] for alert in found.get("alerts")["alerts"]}
    assert ("TurbocacheNoAccelerator" in states) == (server.metric("fallbacks_total", reason="no_device") > 0)
    assert not {"TurbocacheDown", "TurbocacheEngineDead", "TurbocacheKernelFaults", "TurbocacheRawCopies"} & set(states)


def filled_in(query: str) -> str:
    for name, value in _VALUES.items():
        query = query.replace(name, value)
    return query
