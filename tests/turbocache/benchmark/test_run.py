"""The order of cases, failed cases, the arithmetic of a row, and a case in its own process."""

import sys
from typing import Any

import pytest

from tests.turbocache.benchmark.conftest import Ask
from turbocache.benchmark import run
from turbocache.benchmark.run import NOT_REACHED, Benchmark, NoAnswer
from turbocache.benchmark.settings import BenchmarkError, Settings

SMALL = Settings(contexts=(300,), presets=("k4v4",), against=("kv",), max_size=256, generate=2)

SURVEY: dict[str, Any] = {"model": {"id": "m", "max_positions": 8192}, "backends": {"k4v4": {"name": "packed"}}}
RUN = {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 2.0, "cache_bytes": 300, "cache_bytes_half": 150}


def test_contenders_are_measured_in_turn_and_told_as_medians() -> None:
    asked: list[tuple[str, int]] = []

    def ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
        if request["task"] == "survey":
            return SURVEY
        asked.append((request["contender"], request["context"]))
        return RUN | {"decode_tokens_per_second": float(len(asked))}

    settings = Settings(
        contexts=(200, 100), presets=("k4v4",), against=("kv",), max_size=256, repeat=3, budget=1000, generate=2
    )
    benchmark = Benchmark(settings, ask)
    lines = list(benchmark.run())
    assert asked == [("kv", 100), ("k4v4", 100), ("kv", 200), ("k4v4", 200)] * 3
    assert lines[-1] == "12/12  k4v4, prompt of 200: prefill 10, decode 12.0 tokens/s"
    cases = benchmark.results()["cases"]
    assert [(case["contender"], case["context"]) for case in cases] == asked[:4]
    assert cases[0]["decode_tokens_per_second"] == {"median": 5.0, "least": 1.0, "most": 9.0}
    assert (cases[0]["sessions_in_budget"], cases[0]["sessions_in_budget_half"]) == (3, 6)
    assert (cases[0]["bytes_per_token"], cases[2]["bytes_per_token_half"]) == (3.0, 0.75)


def test_what_fails_once_has_no_figures_and_is_not_tried_again() -> None:
    asked: list[tuple[str, int]] = []

    def ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
        if request["task"] == "survey":
            return SURVEY
        asked.append((request["contender"], request["context"]))
        if asked[-1] == ("quantized-8", 200) and asked.count(asked[-1]) == 2:
            raise NoAnswer("the process was ended by SIGKILL, as for want of memory")
        if request["contender"] == "rotating-quantized-4":
            raise NoAnswer("NotImplementedError: NYI")
        return RUN

    against = ("kv", "quantized", "rotating-quantized")
    settings = Settings(contexts=(100, 200), presets=("k4v4",), against=against, max_size=256, repeat=3, generate=2)
    benchmark = Benchmark(settings, ask)
    list(benchmark.run())
    cases = {(case["contender"], case["context"]): case for case in benchmark.results()["cases"]}
    assert asked.count(("rotating-quantized-4", 100)) == 1
    assert ("rotating-quantized-4", 200) not in asked
    assert cases["rotating-quantized-4", 200]["unavailable"] == "NotImplementedError: NYI"
    # It ran in the first round and failed in the second: its row says so instead of half of the truth.
    assert asked.count(("quantized-8", 200)) == 2
    assert "SIGKILL" in cases["quantized-8", 200]["unavailable"]
    assert "cache_bytes" not in cases["quantized-8", 200]
    assert asked.count(("quantized-4", 200)) == 3


def test_what_was_not_reached_says_so(here: Ask) -> None:
    benchmark = Benchmark(SMALL, here)
    assert next(benchmark.run()).startswith("1/2  mlx-lm KVCache, prompt of 300: prefill ")
    kv, ours = benchmark.results()["cases"]
    assert kv["decode_tokens_per_second"]["median"] > 0
    assert ours["unavailable"] == NOT_REACHED


def test_a_backend_that_is_not_there_is_a_row_with_its_reason(here: Ask) -> None:
    settings = Settings(contexts=(100,), presets=("k4v4:cuda",), against=(), max_size=256, generate=2)
    benchmark = Benchmark(settings, here)
    assert list(benchmark.run()) == []
    (case,) = benchmark.results()["cases"]
    assert "no CUDA device" in case["unavailable"]
    assert case["ours"] is True


@pytest.mark.slow
def test_figures_of_the_bundled_model(here: Ask) -> None:
    """Every contender that there is, at a length at which pages exist and a ring has rotated."""
    settings = Settings(contexts=(300,), presets=("k4v4",), max_size=256, generate=2, budget=1 << 30)
    benchmark = Benchmark(settings, here)
    list(benchmark.run())
    cases = {case["contender"]: case for case in benchmark.results()["cases"]}
    assert "NYI" in cases.pop("rotating-quantized-4")["unavailable"]
    assert list(cases) == ["kv", "rotating", "quantized-8", "quantized-4", "k4v4", "k4v4@64/128/256"]
    for case in cases.values():
        assert case["sessions_in_budget"] == (1 << 30) // case["cache_bytes"]
        assert case["bytes_per_token"] == case["cache_bytes"] / case["held_tokens"]
        assert case["peak_bytes"]["median"] >= case["cache_bytes"]
        assert case["process_peak_bytes"]["median"] > 10 * case["cache_bytes"]
        assert case["time_to_first_token_seconds"]["median"] > 0
    assert [cases[name]["held_tokens"] for name in ("kv", "rotating", "k4v4@64/128/256")] == [300, 256, 256]
    # 8 layers of 2 heads of 128, keys and values in float32: 256 slots are 4 MiB.
    assert cases["rotating"]["cache_bytes"] == 4 << 20
    assert cases["rotating"]["cache_bytes_half"] == 2 << 20
    assert cases["kv"]["cache_bytes"] == 8 << 20
    assert cases["k4v4"]["cache_bytes"] < cases["kv"]["cache_bytes"]


def test_contexts_beyond_the_models_positions_are_refused(here: Ask) -> None:
    with pytest.raises(BenchmarkError, match="--contexts 8193 is longer than the 8192 positions of tiny-recall-4bit"):
        Benchmark(Settings(contexts=(100, 8193)), here)


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(run, "WORKER", (sys.executable, "-S", "-c", text))


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
def test_a_process_without_an_answer_gives_the_reason(monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    program(monkeypatch, text)
    with pytest.raises(NoAnswer, match=reason):
        run.ask({}, timeout=0.5 if "sleep" in text else 30)


def test_an_answer_is_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, "import sys; print('noise'); print('{\"found\": ' + sys.stdin.read() + '}')")
    assert run.ask({"a": 1}, timeout=30) == {"a": 1}


@pytest.mark.slow
def test_a_process_of_its_own_measures_what_this_one_does(here: Ask) -> None:
    """The probe's answer goes to it as JSON, and bytes are the same wherever they are counted."""
    settings = Settings(contexts=(300,), presets=("k4v4",), against=(), max_size=256, generate=2).as_json()
    survey = here({"settings": settings, "task": "survey"}, 60)
    request = {"settings": settings, "task": "case", "contender": "k4v4", "context": 300}
    request["backend"] = survey["backends"]["k4v4"]
    apart, found = run.ask(request, timeout=120), here(request, 60)
    assert apart.keys() == found.keys()
    assert apart["cache_bytes"] == found["cache_bytes"]
    assert apart["decode_tokens_per_second"] > 0
    # Nothing but the weights of 138 MiB, Python and this case.
    assert 138 << 20 < apart["process_peak_bytes"] < 1 << 30
