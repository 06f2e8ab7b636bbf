"""What a group of ranks costs and saves against one process: `python -m tests.group` prints a table.

All runs take place on this machine, each rank a process: so ranks share its cores, and what is compared is the cost of
keeping in step, not the speed of several machines. Figures of one run are compared by their ratio.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import httpx

from tests.group.launch import running_group, started_group
from tests.group.models import write
from tests.group.network import can_make_hosts, network
from tests.serving.launch import SERVE, Server, endless, filler, running

PROMPT_SENTENCES = 80


class Figures(NamedTuple):
    """Of one way to run: tokens a second of one stream and of four together, of reading a prompt, and bytes that a rank
    holds: of weights and other arrays, and of the cache.
    """

    one: float
    four: float
    prefill: float
    active: float
    cache: float


def stream(server: Server, name: str, n: int) -> list[float]:
    """Times between the tokens of one answer, in seconds."""
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=endless(name, stream=True, max_tokens=n), timeout=600
    ) as answer:
        times = [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]
    return [b - a for a, b in pairwise(times[2:])]


def measured(server: Server, n_tokens: int, rank: str) -> Figures:
    stream(server, "warm", 10)
    one = 1 / statistics.median(stream(server, "one", n_tokens))
    with ThreadPoolExecutor(4) as pool:
        four = [gap for gaps in pool.map(lambda i: stream(server, f"of-{i}", n_tokens), range(4)) for gap in gaps]
    reading = []
    for i in range(3):
        body = {
            "model": "default",
            "max_tokens": 1,
            "messages": [{"role": "user", "content": filler(PROMPT_SENTENCES, 700 + i)}],
        }
        began = time.perf_counter()
        usage = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).json()["usage"]
        reading.append(usage["prompt_tokens"] / (time.perf_counter() - began))
    time.sleep(1.5)  # the other ranks tell their memory once a second
    return Figures(
        one,
        4 / statistics.median(four),
        statistics.median(reading),
        server.metric("device_memory_bytes", kind="active", rank=rank),
        server.metric("cache_bytes", rank=rank),
    )


@contextmanager
def group_on_hosts(folder: Path, n: int, delay: float, **settings: str) -> Iterator[Server]:
    """A group whose ranks are on hosts of their own, `delay` seconds apart."""
    with (
        network(n, delay) as hosts,
        started_group(folder, n, addresses=hosts.addresses, within=hosts.within, **settings) as group,
    ):
        group.wait_until_ready()
        yield group.server


def main() -> None:
    """Measure one process, two and four ranks on loopback, and two ranks 1 ms apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60, help="of each answer (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of everything; medians are printed (default %(default)s)"
    )
    parser.add_argument("--delay", type=float, default=1.0, help="ms between hosts (default %(default)s)")
    options = parser.parse_args()
    rows: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wide = {"MODEL": str(write(folder / "wide"))}
        for turn in range(options.rounds):
            for model, name, sizes in (({}, "tiny-recall", (2,)), (wide, "random, 4 KV heads", (2, 4))):
                at = folder / f"{turn}-{name[:4]}"
                at.mkdir()
                with running(at, SERVE, None, **model) as server:
                    _note(rows, f"{name}: one process", measured(server, options.tokens, "0"))
                for n in sizes:
                    with running_group(at / f"ranks-{n}", n, 0, **model) as group:
                        _note(rows, f"{name}: {n} ranks, loopback", measured(group.server, options.tokens, str(n - 1)))
                if can_make_hosts():
                    with group_on_hosts(at / "hosts", 2, options.delay / 1e3, **model) as server:
                        _note(
                            rows, f"{name}: 2 ranks, {options.delay:g} ms apart", measured(server, options.tokens, "1")
                        )
    heads = ("one stream", "four streams", "prefill", "MLX's arrays a rank, MB", "cache a rank, MB")
    print("| tokens/s |", " | ".join(heads), "|")
    print("|---" * (len(heads) + 1), "|", sep="")
    for name, figures in rows.items():
        one, four, prefill, active, cache = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {name} | {one:.1f} | {four:.1f} | {prefill:.0f} | {active / 1e6:.0f} | {cache / 1e6:.1f} |")


def _note(rows: dict[str, list[Figures]], name: str, figures: Figures) -> None:
    rows.setdefault(name, []).append(figures)
    print(f"{name}: {figures}", flush=True)


if __name__ == "__main__":
    main()
