"""What metrics cost: time between tokens of a server that is scraped, over one that has no metrics.

    python -m tests.bench.metrics [--pairs N] [--streams N,N] [--every SECONDS]

Both run at once and are asked in turns, so the machine is the same for both. The figure is the median over pairs of the
ratio of the mean times between two tokens; how long a scrape takes under that load is told as well.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tests.bench.client import Answer, Endpoint
from tests.bench.prompts import long_answers
from tests.serving.launch import running

MOST = 1.02
MOST_SCRAPE_SECONDS = 0.02
_GENERATE = 192
_UNMETERED = ("uvicorn", "tests.bench.unmetered:app")


def between(answers: Sequence[Answer]) -> float:
    """Mean seconds between two texts of a stream: a scrape that holds up one token in a hundred counts."""
    return statistics.fmean((answer.stamps[-1] - answer.stamps[0]) / (len(answer.stamps) - 1) for answer in answers)


@contextmanager
def scraped(endpoint: Endpoint, every: float, seconds: list[float]) -> Iterator[None]:
    """A scrape every so many seconds while the block runs; how long each took goes into `seconds`."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(every):
            start = time.perf_counter()
            status, _ = endpoint.get("/metrics")
            assert status == 200
            seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when both costs are within their limits."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.metrics", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of answers (default: 15)")
    parser.add_argument("--streams", default="1,8", help="numbers of streams at once, by commas (default: 1,8)")
    parser.add_argument(
        "--every", type=float, default=5.0, help="seconds between scrapes (default: 5, as deploy/prometheus has it)"
    )
    options = parser.parse_args(argv)
    numbers, wrong = [int(number) for number in options.streams.split(",")], False
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder)) as metered,
        running(Path(folder), _UNMETERED) as unmetered,
    ):
        with_metrics, without = (
            Endpoint(int(server.url.rpartition(":")[2]), {"model": "default"}, names_sessions=True)
            for server in (metered, unmetered)
        )
        prompts = long_answers([with_metrics, without], [], 60, max(numbers), _GENERATE, max(numbers), "metrics")
        for streams in numbers:
            ratios, scrapes = [], list[float]()
            for i in range(options.pairs):
                times = {}
                for endpoint in (with_metrics, without) if i % 2 == 0 else (without, with_metrics):
                    with scraped(endpoint, options.every, scrapes) if endpoint is with_metrics else nullcontext():
                        times[endpoint is with_metrics] = between(endpoint.chat_together(prompts[:streams], _GENERATE))
                ratios.append(times[True] / times[False])
            ratios.sort()
            median, scrape = statistics.median(ratios), statistics.median(scrapes)
            wrong = wrong or median > MOST or scrape > MOST_SCRAPE_SECONDS
            print(
                f"{streams} streams, time between tokens, with metrics over without: {median:.3f} ({ratios[0]:.3f} to "
                f"{ratios[-1]:.3f}, {len(ratios)} pairs; must be at most {MOST}); a scrape: {1000 * scrape:.1f} ms "
                f"(at most {1000 * max(scrapes):.1f}, {len(scrapes)} scrapes; must be at most "
                f"{1000 * MOST_SCRAPE_SECONDS:.0f})",
                flush=True,
            )
        assert "turbocache_generated_tokens_total 0.0" in without.get("/metrics")[1], "the other one has metrics"
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
