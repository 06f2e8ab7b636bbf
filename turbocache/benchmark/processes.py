"""Asking a process of its own, and what it means when it gives no answer."""

import json
import signal
import subprocess
import sys
from typing import Any

WORKER = (sys.executable, "-m", "turbocache.benchmark.worker")


class NoAnswer(Exception):
    """The process failed, ended or took too long; the message is the reason that its row gives."""


def ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """One request to a new process (turbocache/benchmark/worker.py); what it found. Raises NoAnswer."""
    try:
        ended = subprocess.run(WORKER, input=json.dumps(request), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"ended after {timeout:g} seconds (--timeout)") from None
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        raise NoAnswer(_how_it_ended(ended))
    said: dict[str, Any] = json.loads(lines[-1])
    if "failed" in said:
        raise NoAnswer(" ".join(said["failed"].split()))
    found: dict[str, Any] = said["found"]
    return found


def _how_it_ended(ended: subprocess.CompletedProcess[str]) -> str:
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return f"the process was ended by {name}" + (", as for want of memory" if name == "SIGKILL" else "")
    said = ended.stderr.strip().splitlines()
    return f"the process ended with status {ended.returncode}: {said[-1] if said else 'without a word'}"
