"""Many clients at once at a real server whose queue is too short for all; a third of their requests are left.

Every accepted request ends in one terminal event or in a disconnect that the server has noticed, every other one is
refused with 429; afterwards nothing runs, waits or is owned. How long the event loop was kept from its work meanwhile
is what the server itself has measured.
"""

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.process.loop_lag import BEAT_SECONDS
from tests.serving.launch import Server, running
from tests.soak.load.crowd_client import CHAT, Client

MOST_LAG_SECONDS = 0.1
_STARVED_SECONDS = 0.05
_SHOWN_MS = (5, 10, 20, 50)


@dataclass(slots=True)
class Crowd:
    """What the clients saw, what the server says of it, and `wrong`: sentences, each a failure.

    `ends` are requests by their ends as clients saw them: done, left, refused. `beats` are those of the event loop by
    the most seconds that they were late; `longest_lag` is in seconds, `own_lag` the longest that was not for want of a
    processor.
    """

    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    beats: dict[float, int] = field(default_factory=dict)
    longest_lag: float = 0.0
    own_lag: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def starved(self) -> bool:
        """Whether other processes left the server too little of the machine for its stalls to mean anything: then also
        the threads stand still that have Python's lock, for which the event loop waits.
        """
        return self.longest_lag - self.own_lag > _STARVED_SECONDS

    def lines(self) -> list[str]:
        n_beats = max(self.beats.values(), default=0)
        late = ", ".join(f"{n_beats - self.beats[ms / 1000]} over {ms} ms" for ms in _SHOWN_MS if self.beats)
        return [
            f"requests                 {self.ends.total()} in {self.seconds:.0f} s: {_listed(self.ends)}",
            f"outcomes at the server   {_listed(self.outcomes)}",
            f"statuses at the server   {_listed(self.statuses)}",
            f"event loop's stalls      longest {self.longest_lag * 1000:.0f} ms, "
            f"{self.own_lag * 1000:.0f} ms without waiting for a processor (up to {BEAT_SECONDS * 1000:.0f} more)",
            f"  late beats             {late} of {n_beats}",
            *(["  not judged             the machine is too busy"] if self.starved else []),
            f"failures                 {len(self.wrong)}",
            *(f"  {what}" for what in self.wrong[:20]),
        ]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if n) or "none"


def run(
    clients: int,
    n_requests: int,
    seed: int,
    most_lag: float = MOST_LAG_SECONDS,
    say: Callable[[str], None] = print,
) -> Crowd:
    """`clients` at once, of `n_requests` each. Raises AssertionError when the server does not start or settle."""
    result = Crowd()
    with tempfile.TemporaryDirectory(prefix="crowd-") as place:
        # Eight places in the batch; half of those who don't get one find no room to wait either.
        with running(Path(place), QUEUE_LIMIT=str(max(1, (clients - 8) // 2))) as server:
            say(f"{clients} clients, {n_requests} requests each")
            begun = time.monotonic()
            asyncio.run(_ask(server.url, clients, n_requests, seed, result))
            result.seconds = time.monotonic() - begun
            server.wait_until_idle()
            _read_metrics(server, result)
            _check_counts(result)
            _check_nothing_left(server, result)
        if "Traceback" in (log := server.log.read_text()):
            result.wrong.append(f"the server's log: {log[log.index('Traceback') - 500 :][:3000]}")
    if result.own_lag >= most_lag and not result.starved:
        result.wrong.append(f"the event loop stood still for {result.own_lag:.3f} s")
    return result


async def _ask(url: str, n_clients: int, n_requests: int, seed: int, result: Crowd) -> None:
    clients = [Client(url, number, seed + number) for number in range(n_clients)]
    await asyncio.gather(*(client.ask(n_requests) for client in clients))
    for client in clients:
        result.ends += client.ends
        result.wrong += client.wrong


def _read_metrics(server: Server, result: Crowd) -> None:
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for name, labels, value, *_ in family.samples:
            if name == "turbocache_requests_finished_total":
                result.outcomes[labels["reason"]] = int(value)
            elif name == "turbocache_http_requests_total" and labels["path"] == CHAT:
                result.statuses[labels["status"]] = int(value)
            elif name == "turbocache_event_loop_lag_seconds_bucket":
                result.beats[float(labels["le"])] = int(value)
            elif name == "turbocache_event_loop_longest_lag_seconds":
                result.longest_lag = value
            elif name == "turbocache_event_loop_longest_own_lag_seconds":
                result.own_lag = value


def _check_counts(result: Crowd) -> None:
    """What clients saw against what the server has counted. Requests that were left may have come to any end, also to
    none that the server knows of: 499 before it had accepted them, or never arrived.
    """
    done, left, refused = (result.ends[end] for end in ("done", "left", "refused"))
    finished, cancelled = result.outcomes["stop"] + result.outcomes["length"], result.outcomes["cancelled"]
    for what, least, counted, most in (
        ("answers", done, finished, done + left),
        ("answers and cancellations", done, finished + cancelled, done + left),
        ("refusals", refused, result.statuses["429"], refused + left),
        ("responses", done + refused, result.statuses.total(), done + refused + left),
    ):
        if not least <= counted <= most:
            result.wrong.append(f"{counted} {what} at the server, {least} to {most} by its clients")
    if others := result.statuses.keys() - {"200", "429", "499"}:
        result.wrong.append(f"statuses {others}")
    if result.outcomes["error"]:
        result.wrong.append(f"{result.outcomes['error']} turns ended with an error")


def _check_nothing_left(server: Server, result: Crowd) -> None:
    """No promise, no session that runs, and no page once the sessions have been deleted."""
    if (promised := server.metric("budget_bytes", kind="promised")) != 0:
        result.wrong.append(f"{promised:.0f} bytes are still promised")
    for id, row in server.sessions().items():
        if row["state"] != "resident":
            result.wrong.append(f"session {id} is {row['state']}")
        httpx.delete(f"{server.url}/v1/sessions/{quote(id, safe='')}").raise_for_status()
    if left := server.sessions():
        result.wrong.append(f"sessions after all were deleted: {list(left)}")
    for metric in ("pages_used", "cache_bytes", "raw_shadow_bytes"):
        if (value := server.metric(metric)) != 0:
            result.wrong.append(f"{metric} is {value:.0f} after all sessions were deleted")
    if server.metric("pages_free") != server.metric("pages_capacity"):
        result.wrong.append("pages are neither free nor used")
