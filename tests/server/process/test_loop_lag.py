"""server.process.loop_lag: a stall of the event loop is seen at its length."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.metrics import Metrics
from server.process.loop_lag import BEAT_SECONDS, processor_wait, watch_loop


def value(metrics: Metrics, sample: str) -> float:
    return metrics.registry.get_sample_value(f"turbocache_event_loop_{sample}") or 0.0


async def test_a_stall_is_measured_and_the_longest_kept() -> None:
    metrics = Metrics()
    watching = asyncio.create_task(watch_loop(metrics))
    await asyncio.sleep(0)
    for seconds in (0.3, 0.1):
        time.sleep(seconds)
        await asyncio.sleep(3 * BEAT_SECONDS)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert value(metrics, "longest_lag_seconds") >= value(metrics, "longest_own_lag_seconds")
    assert 0.3 - BEAT_SECONDS - 0.001 <= value(metrics, "longest_own_lag_seconds") < 0.6
    assert value(metrics, "lag_seconds_count") > 3
    beyond = value(metrics, "lag_seconds_count") - (
        metrics.registry.get_sample_value("turbocache_event_loop_lag_seconds_bucket", {"le": "0.075"}) or 0.0
    )
    assert beyond >= 2


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="only Linux tells it")
def test_waiting_for_a_processor_is_told_apart() -> None:
    """Two processes on one processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with processor_wait() as waited:
            begun, first = time.monotonic(), waited()
            while waited() - first < 0.2:
                assert time.monotonic() - begun < 20
            assert waited() - first <= time.monotonic() - begun
    finally:
        os.sched_setaffinity(0, before)
        busy.kill()
        busy.wait()
