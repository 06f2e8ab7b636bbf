"""A process that gives no answer: its row has the reason."""

import sys

import pytest

from turbocache.benchmark import processes
from turbocache.benchmark.processes import NoAnswer, ask


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(processes, "WORKER", (sys.executable, "-S", "-c", text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL, as for want of memory"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV$"),
        ("raise SystemExit('no such device')", "ended with status 1: no such device"),
        ("pass", "ended with status 0: without a word"),
        ("import time; time.sleep(60)", r"ended after 0.5 seconds \(--timeout\)"),
        ("print('noise'); print('{\"failed\": \"ValueError: no\"}')", "^ValueError: no$"),
    ],
)
def test_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    program(monkeypatch, text)
    with pytest.raises(NoAnswer, match=reason):
        ask({}, timeout=0.5 if "sleep" in text else 30)


def test_an_answer_is_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "import sys; print('noise'); print('{\"found\": ' + sys.stdin.read() + '}')")
    assert ask({"a": 1}, timeout=30) == {"a": 1}
