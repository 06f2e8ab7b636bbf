"""A case in a process of its own, and one that gives no answer: its row has the reason."""

import sys

import pytest

from tests.turbocache.benchmark.conftest import Ask
from turbocache.benchmark import processes
from turbocache.benchmark.processes import NoAnswer, ask
from turbocache.benchmark.settings import Settings


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


@pytest.mark.slow
def test_a_process_of_its_own_measures_what_this_one_does(here: Ask) -> None:
    """The probe's answer goes to it as JSON, and bytes are the same wherever they are counted."""
    settings = Settings(contexts=(300,), presets=("k4v4",), against=(), max_size=256, generate=2).as_json()
    survey = here({"settings": settings, "task": "survey"}, 60)
    request = {"settings": settings, "task": "case", "contender": "k4v4", "context": 300}
    request["backend"] = survey["backends"]["k4v4"]
    apart, found = ask(request, timeout=120), here(request, 60)
    assert apart.keys() == found.keys()
    assert apart["cache_bytes"] == found["cache_bytes"]
    assert apart["decode_tokens_per_second"] > 0
    # Nothing but the weights of 138 MiB, Python and this case.
    assert 138 << 20 < apart["process_peak_bytes"] < 1 << 30
