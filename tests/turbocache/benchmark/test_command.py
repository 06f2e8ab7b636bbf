"""The command as a person types it: files, exit status, one sentence for what can't be; and the committed results."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from server import cli
from tests.turbocache.benchmark.conftest import Ask
from turbocache.benchmark import run
from turbocache.benchmark.matrix import FILE, matrix, page_of, update
from turbocache.benchmark.settings import BenchmarkError

DOCS = Path(__file__).resolve().parents[3] / "docs" / "benchmarks"
SMALL = ["--contexts", "300", "--generate", "2", "--max-size", "256", "--presets", "k4v4"]


@pytest.fixture
def in_process(here: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are measured in this process, which saves some seconds each."""
    monkeypatch.setattr(run, "ask", here)


def fields(heading: str) -> set[str]:
    """The names in the first column of the page's table behind this text."""
    lines = (DOCS / "README.md").read_text().split(heading, 1)[1].strip().splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return {name for line in table[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_run_writes_what_the_page_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert cli.main(["bench", *SMALL, "--against", "kv", "--budget", "1GiB", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert [line.split(",")[0] for line in printed.err.splitlines()] == ["1/2  mlx-lm KVCache", "2/2  k4v4"]
    told = json.loads((out / "bench.json").read_text())
    assert set(told) == fields("## The JSON file")
    documented = fields("A case that ran has") - {"first_prefill_tokens_per_second"}  # on a GPU
    kv, ours = told["cases"]
    assert set(kv) == set(ours) == documented
    for case in (kv, ours):
        speed = case["decode_tokens_per_second"]
        assert 0 < speed["least"] <= speed["median"] <= speed["most"]
        assert case["sessions_in_budget"] == (1 << 30) // case["cache_bytes"]
    assert (told["settings"]["budget"], told["settings"]["max_size"], told["settings"]["chunk"]) == (1 << 30, 256, 512)
    assert told["command"] == (
        "turbocache bench --contexts 300 --presets k4v4 --against kv --budget 1GiB --generate 2 --max-size 256"
    )
    assert told["model"]["id"] == "tiny-recall-4bit"
    assert told["backends"]["k4v4"]["name"] == "packed"
    assert str(tmp_path) not in (out / "bench.json").read_text()
    page = (out / "bench.md").read_text()
    assert "| mlx-lm KVCache | 300 |" in printed.out
    assert all(line in page for line in printed.out.splitlines() if line.startswith("|"))
    assert "![memory.png](memory.png)" in page
    assert sorted(p.name for p in out.iterdir()) == [
        "bench.json", "bench.md", "memory.png", "memory.svg", "speed.png", "speed.svg",
    ]  # fmt: skip
    assert "<!-- k4v4 -->" in (out / "speed.svg").read_text()


@pytest.mark.usefixtures("in_process")
def test_of_mlx_lms_a_failure_is_a_row_and_of_ours_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    given = ["bench", *SMALL, "--against", "rotating-quantized"]
    assert cli.main([*given, "--presets", "none", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "| mlx-lm RotatingKVCache, 4 bits, 256 tokens | does not run: NotImplementedError:" in printed.out
    assert "no plots: plots need matplotlib: pip install 'turbocache[plots]'" in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    assert cli.main([*given, "--against", "none", "--presets", "k4v4:cuda"]) == 1
    assert "turbocache bench: k4v4:cuda did not run: " in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_what_was_measured_is_kept_when_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.ask

    def ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
        if request.get("contender") == "k4v4":
            raise KeyboardInterrupt
        return real(request, timeout)

    monkeypatch.setattr(run, "ask", ask)
    assert cli.main(["bench", *SMALL, "--against", "kv", "--out", str(tmp_path)]) == 130
    assert "interrupted; what was measured is in" in capsys.readouterr().err
    kv, ours = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert kv["cache_bytes"] > 0
    assert "interrupted" in ours["unavailable"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--budget", "much"], "--budget: 'much' is no number of bytes: expected one such as 4GiB"),
        (["--shape", "9b"], "--shape '9b': there are"),
        (["--presets", "k9v9"], "--presets: unknown preset 'k9v9'"),
        (["--max-size", "100"], "max_size must be at least"),
        (["--model", "no/such", "--timeout", "60"], "can't load the model 'no/such'"),
        (["--matrix", "no/such"], "no */bench.json in 'no/such'"),
    ],
)
def test_what_cant_be_is_one_sentence(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["bench", *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("turbocache bench: ")
    assert said in line


def test_the_committed_matrix_and_pages_are_what_the_command_makes() -> None:
    assert matrix(DOCS) in (DOCS / "README.md").read_text()
    for path in DOCS.glob(f"*/{FILE}"):
        assert path.with_suffix(".md").read_text() == page_of(path), f"run turbocache bench --matrix {DOCS}"


def test_a_new_device_is_a_new_row(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    folder = tmp_path / "docs"
    before = matrix(folder).splitlines()
    first = sorted(folder.glob(f"*/{FILE}"))[0]
    told = json.loads(first.read_text())
    told["machine"]["device"] = "Another Device"
    told["remarks"] = ["It was a hot day."]
    (folder / "2999-01-01-another").mkdir()
    (folder / "2999-01-01-another" / FILE).write_text(json.dumps(told))
    made = update(folder)
    assert made.splitlines()[:-1] == before
    assert "| Another Device, " in made.splitlines()[-1]
    assert "(2999-01-01-another/bench.md)" in made.splitlines()[-1]
    assert made in (folder / "README.md").read_text()
    assert "**It was a hot day.**" in (folder / "2999-01-01-another" / "bench.md").read_text()
    (folder / "2999-01-01-another" / FILE).write_text('{"schema": 0}')
    with pytest.raises(BenchmarkError, match="no result of this version"):
        matrix(folder)
    (folder / "README.md").write_text("nothing")
    shutil.rmtree(folder / "2999-01-01-another")
    with pytest.raises(BenchmarkError, match="has no lines"):
        update(folder)
