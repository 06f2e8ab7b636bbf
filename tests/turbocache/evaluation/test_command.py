"""The command as a person types it: files, resuming after a kill, and one sentence for what can't be."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server import cli
from turbocache.evaluation import command
from turbocache.evaluation.run import journal_path
from turbocache.mlxlm import model
from turbocache.mlxlm.model import LoadedModel
from turbocache.models import BUNDLED
from turbocache.presets import DEFAULT_PRESET

SMALL = ["--context", "80", "--windows", "2", "--score-from", "40", "--keep", "4", "--window", "0", "--chunk", "50"]


@pytest.fixture
def loaded(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "load_model", lambda source: bundled)


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    return ["eval", str(BUNDLED), "--text", str(text), "--json", str(out), *SMALL, *more]


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_numbers_come_as_json_markdown_and_plots(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.json"
    more = ["--presets", "k4v4,mlx-lm-4", "--needles", "--lengths", "150", "--depths", "0.5", "--trials", "1"]
    pages = ["--markdown", str(tmp_path / "out.md"), "--plots", str(tmp_path / "plots")]
    assert cli.main(arguments(text, out, *more, *pages)) == 0
    told = json.loads(out.read_text())
    assert [row["preset"] for row in told["rows"]] == ["full", "k4v4", "mlx-lm-4"]
    for row in told["rows"]:
        assert {"stored_bits", "perplexity", "kld_mean", "kld_p99", "top1"} <= set(row)
    assert set(told["rows"][1]["needle"]) == {"150"}
    for name in ("date", "versions", "model", "seed", "context", "windows", "score_from", "machine", "command"):
        assert told[name] not in (None, "")
    assert told["scored_tokens"] == 80
    assert told["command"].startswith("turbocache eval tiny-recall-4bit --text LICENSE --presets k4v4,mlx-lm-4")
    assert str(tmp_path) not in out.read_text()
    page = (tmp_path / "out.md").read_text()
    assert capsys.readouterr().out.strip() in page
    assert "![plots/kld.png](plots/kld.png)" in page
    assert (tmp_path / "plots" / "needles.svg").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("loaded")
def test_suites_are_columns_of_the_table(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    more = ["--suite", "drift", "--answer-lengths", "8,12", "--presets", "k4v4", "--windows", "0"]
    assert cli.main(arguments(text, out, *more, "--markdown", str(tmp_path / "out.md"))) == 0
    told = json.loads(out.read_text())
    assert [row["preset"] for row in told["rows"]] == ["full", "k4v4"]
    assert told["rows"][0]["suites"]["drift"]["equal"] == {"8": 1.0, "12": 1.0}
    assert told["suites"] == ["drift"]
    assert "--suite drift --answer-lengths 8,12" in told["command"]
    page = (tmp_path / "out.md").read_text()
    assert capsys.readouterr().out.strip() in page
    assert "| preset | bits | bits, half | drift: first | equal 8 | equal 12 | loops 8 |" in page
    assert "*drift*: long greedy answers" in page


def test_suites_have_rows_and_windows_of_their_own() -> None:
    parser = argparse.ArgumentParser()
    command.add_to(parser.add_subparsers())
    plain, suites = (
        parser.parse_args(["eval", "m", "--text", "t", "--json", "j", *more]) for more in ([], ["--suite", "all"])
    )
    for options in (plain, suites):
        command.complete(options)
    assert (plain.presets, plain.windows) == (("all",), 3)
    assert (suites.presets, suites.windows) == (("off", DEFAULT_PRESET, "mlx-lm-8", "mlx-lm-4"), 0)
    assert command.command_line(suites) == (
        f"turbocache eval m --text t --presets off,{DEFAULT_PRESET},mlx-lm-8,mlx-lm-4 --suite all --json j"
    )


@pytest.mark.usefixtures("loaded")
def test_without_matplotlib_the_numbers_are_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out.json"
    pages = ["--plots", str(tmp_path / "plots"), "--markdown", str(tmp_path / "out.md")]
    assert cli.main(arguments(text, out, "--presets", "k4v4", "--windows", "1", *pages)) == 1
    assert "turbocache[eval]" in capsys.readouterr().err
    assert json.loads(out.read_text())["rows"][1]["kld_mean"] > 0
    assert "k4v4" in (tmp_path / "out.md").read_text()


def numbers(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    text: Path, tmp_path: Path, loaded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process, killed in the middle of a row: what it had finished stays, and the rest gives the same numbers as
    a run that was left alone.
    """
    rows = ["--presets", "k2v2", "--windows", "3"]
    killed, whole = tmp_path / "killed.json", tmp_path / "whole.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", *arguments(text, killed, *rows)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(cli.__file__).parents[1],
    )
    journal = journal_path(killed)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not killed.exists()
    left = journal.read_bytes()
    finished = left[: left.rfind(b"\n") + 1]
    assert 3 <= finished.count(b"\n") < 7

    assert cli.main(arguments(text, killed, *rows)) == 0
    assert journal.read_bytes().startswith(finished)
    assert journal.read_bytes().count(b"\n") == 7  # circumstances, and two rows of three windows
    assert cli.main(arguments(text, whole, *rows)) == 0
    assert numbers(killed) == numbers(whole)

    # Fewer windows are the same run, another context is not.
    before = journal.read_bytes()
    assert cli.main(arguments(text, killed, "--presets", "k2v2", "--windows", "2")) == 0
    assert journal.read_bytes() == before
    capsys.readouterr()
    assert cli.main(arguments(text, killed, *rows, "--context", "90")) == 1
    said = capsys.readouterr().err
    assert "context 80 then, 90 now" in said
    assert "--restart" in said
    assert journal.read_bytes() == before
    assert cli.main(arguments(text, killed, "--presets", "full", "--context", "90", "--windows", "1", "--restart")) == 0
    assert json.loads(journal.read_text().splitlines()[0])["context"] == 90


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--text", "absent.txt"], "can't read the text 'absent.txt': No such file"),
        (["--text", "/dev/null"], "the text '/dev/null' is empty"),
        (["--presets", "k4v4,k5v5"], "unknown preset 'k5v5'; there are"),
        (["--context", "9000"], "--context 9000 is longer than the 8192 positions of tiny-recall-4bit"),
        (["--context", "4000", "--windows", "5"], "tokens, and 5 windows of 4000 need 20001"),
        (["--context", "1"], "--context must be at least 2, not 1"),
        (["--score-from", "80"], "--score-from 80 leaves nothing to score in a context of 80 tokens"),
        (["--chunk", "0"], "--chunk must be at least 1, not 0"),
        (["--window", "30"], "window must be a multiple of 64 tokens, not 30"),
        (["--backend", "vulkan"], "auto, metal, cuda, packed, reference"),
        (["--needles", "--lengths", "9000"], "--lengths 9000 is longer than the 8192 positions"),
        (["--needles", "--depths", "1.5"], "--depths are shares of the context"),
        (["--needles", "--trials", "0"], "--trials must be at least 1"),
        (
            ["--needles", "--lengths", "64,128", "--trials", "1,2,3"],
            "--trials has 3 numbers: give one, or one for each",
        ),
        (["--suite", "facts,songs"], "unknown suite 'songs'; there are all, drift, facts, sums, arguments, cycles"),
        (["--suite", "drift", "--answer-lengths", "4"], "--answer-lengths must be at least 8, not 4"),
        (["--needles", "absent.jsonl"], "can't read the needles 'absent.jsonl'"),
        (["--json", "/dev/null/out.json"], "can't make the folder of '/dev/null/out.json'"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_what_can_not_be_is_said_in_one_sentence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert cli.main(arguments(text, tmp_path / "out.json", "--presets", "k4v4", *more)) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.startswith("turbocache eval: ")
    assert len(told.err.strip().splitlines()) == 1
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "no model"
    empty.mkdir()
    assert cli.main(["eval", str(empty), "--text", str(text), "--json", str(tmp_path / "out.json")]) == 1
    assert "can't load the model" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--lengths", "many"], ["--presets", ","], ["--context", "x"]])
def test_options_of_the_wrong_form_are_bad_usage(text: Path, tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        cli.main(arguments(text, tmp_path / "out.json", *more))
    assert exit_status.value.code == 2
