"""Runs of suites through the journal, and the table that they give."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.turbocache.evaluation.conftest import Silent
from turbocache.evaluation import report
from turbocache.evaluation.journal import Journal
from turbocache.evaluation.rows import OpenCache
from turbocache.evaluation.run import Work, prepare, run
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.evaluation.suites.registry import suite_cells, suites_of
from turbocache.mlxlm.model import LoadedModel

SMALL: dict[str, Any] = {"keep": (4,), "window": (0,), "windows": 0, "suite_trials": 1, "suite_context": 560}


class Interrupting(Silent):
    """Progress that a person interrupts after a number of results."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def update(self, n: int) -> None:
        super().update(n)
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


@pytest.fixture
def work_of(bundled: LoadedModel, text: Path) -> Callable[..., Work]:
    def make(*rows: str, **options: Any) -> Work:
        return prepare(bundled, Settings(text, rows, **{**SMALL, **options}))

    return make


def measured(work: Work, path: Path) -> list[dict[str, Any]]:
    with Journal(path, work.circumstances()) as journal:
        return run(work, journal, Silent())


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_table(work_of: Callable[..., Work], tmp_path: Path) -> None:
    work = work_of("k2v2", suites=("drift",), answer_lengths=(8, 16))
    with Journal(tmp_path / "killed", work.circumstances()) as journal, pytest.raises(KeyboardInterrupt):
        run(work, journal, Interrupting(after=1))
    left = (tmp_path / "killed").read_text()
    assert left.count("\n") == 2
    with Journal(tmp_path / "killed", work.circumstances()) as journal:
        todo, progress = work.todo(journal.results), Silent()
        rows = run(work, journal, progress)
        assert progress.tokens == todo > 0
        assert work.todo(journal.results) == 0
    assert (tmp_path / "killed").read_text().startswith(left)
    again = measured(work_of("k2v2", suites=("drift",), answer_lengths=(8, 16)), tmp_path / "whole")
    assert again == rows
    assert report.table(again) == report.table(rows)
    full, small = rows
    assert full["suites"]["drift"]["first_difference"] == [None]
    assert small["suites"]["drift"]["kld_mean"] > 0.01
    assert small["stored_bits_half"] < full["stored_bits_half"] >= 16


@pytest.mark.slow
def test_other_projects_have_no_sessions(work_of: Callable[..., Work], tmp_path: Path) -> None:
    rows = measured(work_of("off", "mlx-lm-8", suites=("cycles",)), tmp_path / "journal")
    heads, cells = suite_cells(rows)
    assert heads == ["cycles KLD, kept", "cycles KLD, rotating"]
    assert cells[0] == cells[2] == ["no sessions", "no sessions"]
    assert float(cells[1][0]) < 1e-9
    assert "| mlx-lm-8 | no sessions | no sessions |" in report.table(rows)


def test_faults_of_others_are_reasons(work_of: Callable[..., Work], tmp_path: Path) -> None:
    def failing(n_tokens: int, n_forks: int = 0) -> OpenCache:
        raise ValueError("not with this model")

    work = work_of("mlx-lm-4", suites=("facts",))
    broken = replace(work, rows=[replace(work.rows[0], open=failing)])
    full, theirs = measured(broken, tmp_path / "journal")
    assert theirs == {"preset": "mlx-lm-4", "note": "", "unavailable": "ValueError: not with this model"}
    assert full["suites"]["facts"]["asked"] == 12


def test_suites_have_the_order_of_the_table() -> None:
    def names(*typed: str) -> list[str]:
        return [suite.name for suite in suites_of(Settings(Path("text"), ("off",), suites=typed))]

    assert names("sums", "drift") == ["drift", "sums"]
    assert names("all") == ["drift", "facts", "sums", "arguments", "cycles"]
    with pytest.raises(EvaluationError, match="unknown suite 'songs'; there are all, drift, facts, sums, arguments"):
        names("facts", "songs")


def test_contexts_beyond_the_positions_are_refused(work_of: Callable[..., Work]) -> None:
    with pytest.raises(EvaluationError, match="--suite-context 9000 is longer than the 8192 positions of the model"):
        work_of("off", suites=("facts",), suite_context=9000)
    with pytest.raises(EvaluationError, match="--suite-trials must be at least 1, not 0"):
        work_of("off", suites=("facts",), suite_trials=0)
    with pytest.raises(EvaluationError, match="--answer-lengths must be at least 8, not 4"):
        work_of("off", suites=("drift",), answer_lengths=(100, 4))


ROWS: list[dict[str, Any]] = [
    {"preset": "full", "note": "", "suites": {
        "facts": {"correct": 1, "asked": 8, "nats_lost": 0.0, "nats_moved": 0.0}, "cycles": {"absent": "no sessions"}}},
    {"preset": "k4v4", "note": "", "suites": {
        "facts": {"correct": 0, "asked": 8, "nats_lost": -0.0123, "nats_moved": 0.02},
        "cycles": {"kept": {"kld": 0.001}, "rotating": {"kld": 0.02}}}},
    {"preset": "mlx-lm-4", "note": "", "unavailable": "it does not"},
]  # fmt: skip


def test_the_table_has_the_columns_of_the_suites() -> None:
    assert report.table(ROWS).splitlines() == [
        "| preset | facts | facts, nats | cycles KLD, kept | cycles KLD, rotating |",
        "|---|---|---|---|---|",
        "| full | 1/8 | 0 (0) | no sessions | no sessions |",
        "| k4v4 | 0/8 | -0.0123 (0.02) | 0.001 | 0.02 |",
        "| mlx-lm-4 | does not run: it does not | | | |",
        "",
        "- facts: full precision answers 1 of 8: the model is too small.",
    ]
