"""Ranks that die, hang or are cut off, on hosts of their own with a slow link between them, under a supervisor."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.group.launch import starts
from tests.group.network import Network, can_make_hosts, network
from tests.group.supervise import WATCHDOG_SECONDS, Run, Supervised
from tests.processes import patient, wait_until
from tests.serving.launch import endless, wait_until_ready

DELAY = 1e-3
MOST_SECONDS = 10.0
TALK = [{"role": "user", "content": "My locker code is 5917. Remember it well. " * 8}]
KEPT = {"model": "default", "prompt_cache_key": "kept", "temperature": 0, "max_tokens": 8}

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_make_hosts(), reason="separate hosts need root, ip and /dev/net/tun"),
]


@dataclass
class Group:
    """Two supervised ranks, each on a host of the network."""

    url: str
    ranks: list[Supervised]
    network: Network

    def wait_until_ready(self) -> None:
        # A rank that ends is started again, so none of them is watched.
        wait_until_ready(self.url, [], lambda: "\n".join(rank.log.read_text()[-3000:] for rank in self.ranks))

    def kept(self) -> int:
        """A turn of the session that is kept, written to disk afterwards; returns how much of it was in the cache."""
        answer = httpx.post(f"{self.url}/v1/chat/completions", json={**KEPT, "messages": TALK}, timeout=patient(60))
        httpx.post(f"{self.url}/v1/sessions/kept/save", timeout=patient(30)).raise_for_status()
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    with network(2, DELAY) as hosts, ExitStack() as supervisors:
        url, found = starts(tmp_path, 2, hosts.addresses, hosts.within, SESSION_DIR=str(tmp_path / "kept"))
        ranks = []
        for one in found:
            ranks.append(rank := Supervised(one.command, one.environment, one.log))
            supervisors.callback(rank.close)
        yield Group(url, ranks, hosts)


def interrupted(group: Group, fault: str, host: int) -> list[str]:
    """The lines of an answer in the middle of which a fault happens to a host."""
    lines = []
    body = endless("cut short", stream=True)
    url = f"{group.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=patient(MOST_SECONDS)) as answer:
        try:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 20:
                    inject(group, fault, host)
        except httpx.TransportError as error:
            lines.append(f"broken: {error!r}")
    return lines


def inject(group: Group, fault: str, host: int) -> None:
    if fault == "cut":
        group.network.cut(host)
    else:
        group.ranks[host].now.process.send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def all_ended(runs: list[Run]) -> bool:
    return all(run.ended is not None for run in runs)


FAULTS = [
    ("kill", 1, "rank 1 (10.77.0.2:", "has ended; its own log says why"),
    ("kill", 0, "rank 0 (10.77.0.1:", "has ended; its own log says why"),
    ("stop", 1, "rank 1 (10.77.0.2:", "its process hangs or is stopped"),
    ("cut", 1, "rank 1 (10.77.0.2:", "the link to it is cut"),
]


def test_a_group_ends_with_a_reason_and_serves_again(group: Group) -> None:
    """One fault after the other: running requests hear of it, all ranks end, their supervisor starts them again, and
    the session that was saved goes on from its files.
    """
    group.wait_until_ready()
    assert group.kept() == 0
    for fault, host, who, how in FAULTS:
        runs, sizes = [rank.now for rank in group.ranks], [len(rank.log.read_text()) for rank in group.ranks]
        lines = interrupted(group, fault, host)
        # A stopped rank can't end by itself: that is the watchdog's.
        others = [run for i, run in enumerate(runs) if (fault, i) != ("stop", host)]
        wait_until(lambda others=others: all_ended(others), MOST_SECONDS, "a rank has not ended")
        group.network.join(host)
        other = 1 - host
        said = group.ranks[other].log.read_text()[sizes[other] :]
        (reason,) = [line for line in said.splitlines() if "CRITICAL" in line]
        assert "the group of ranks ends" in reason
        assert who in reason
        assert how in reason
        if host != 0:  # rank 0 lives to tell its clients
            assert any('"code": "engine_dead"' in line and who in line for line in lines), lines[-3:]
        else:
            assert lines[-1].startswith("broken: ")
        if fault == "stop":
            wait_until(lambda run=runs[host]: run.ended is not None, 2 * WATCHDOG_SECONDS, "the watchdog did nothing")
            assert runs[host].killed
        group.wait_until_ready()
        assert group.kept() > len(TALK[0]["content"]) // 8, fault
