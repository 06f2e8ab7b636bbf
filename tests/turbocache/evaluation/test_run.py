from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.turbocache.evaluation.conftest import Silent
from turbocache.evaluation.journal import Journal
from turbocache.evaluation.rows import OpenCache
from turbocache.evaluation.run import prepare, run
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.mlxlm.model import LoadedModel


@pytest.mark.slow
def test_what_is_done_is_not_done_again(bundled: LoadedModel, text: Path, tmp_path: Path) -> None:
    settings = Settings(
        text,
        ("k4v4", "mlx-lm-8"),
        context=72,
        windows=2,
        score_from=40,
        needles=(),
        lengths=(120,),
        trials=(1,),
        depths=(0.5,),
    )
    work = prepare(bundled, settings)
    with Journal(tmp_path / "journal", work.circumstances()) as journal:
        first, second = Silent(), Silent()
        expected = work.todo(journal.results)
        rows = run(work, journal, first)
        assert first.tokens == expected == 2 * 3 * 73 + 2 * sum(len(needle.ids) for needle in work.needles)
        assert work.todo(journal.results) == 0
        assert run(work, journal, second) == rows
        assert second.tokens == 0

        # A new row reads the reference again, but no other row.
        more, third = prepare(bundled, replace(settings, rows=("k4v4", "k2v2"), needles=None)), Silent()
        expected = more.todo(journal.results)
        assert [row["preset"] for row in run(more, journal, third)] == ["full", "k4v4", "k2v2"]
        assert third.tokens == expected == 2 * 2 * 73


def test_faults_of_others_are_reasons_and_faults_of_this_project_are_faults(
    bundled: LoadedModel, text: Path, tmp_path: Path
) -> None:
    def failing(n_tokens: int, n_forks: int = 0) -> OpenCache:
        raise ValueError("the last dimension must be divisible by 64")

    settings = Settings(text, ("mlx-lm-4",), context=40, windows=1, needles=(), lengths=(120,), trials=(1,))
    work = prepare(bundled, settings)
    foreign = replace(work, rows=[replace(work.rows[0], open=failing)])
    with Journal(tmp_path / "theirs", work.circumstances()) as journal:
        rows = run(foreign, journal, Silent())
    assert rows[1]["unavailable"] == "ValueError: the last dimension must be divisible by 64"
    assert "needle" not in rows[1]
    own = replace(work, rows=[replace(work.rows[0], open=failing, foreign=False)])
    with (
        Journal(tmp_path / "ours", work.circumstances()) as journal,
        pytest.raises(ValueError, match="divisible by 64"),
    ):
        run(own, journal, Silent())


def test_needles_of_files_are_the_first_of_each_cell(bundled: LoadedModel, text: Path, tmp_path: Path) -> None:
    line = (
        '{{"id": "{}", "messages": [{{"role": "user", "content": "{}?"}}], "answer": "1", "context": {}, "depth": {}}}'
    )
    cells = [(64, 0.1), (64, 0.9), (128, 0.1), (256, 0.1)]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(line.format(f"{c}-{d}-{i}", i, c, d) for i in range(3) for c, d in cells))

    def asked(**options: Any) -> list[str]:
        return sorted(
            n.id for n in prepare(bundled, Settings(text, ("off",), windows=0, needles=(path,), **options)).needles
        )

    assert len(asked()) == 12
    assert asked(lengths=(64, 256), trials=(1,)) == ["256-0.1-0", "64-0.1-0", "64-0.9-0"]
    assert asked(lengths=(64, 128), trials=(1, 2)) == ["128-0.1-0", "128-0.1-1", "64-0.1-0", "64-0.9-0"]
    with pytest.raises(EvaluationError, match="none of the needles in the files has one of the --lengths"):
        asked(lengths=(512,))


def test_prompts_beyond_the_positions_are_refused(bundled: LoadedModel, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "' + "word " * 60 + '"}], "answer": "1"}')
    short = replace(bundled, max_positions=50)
    with pytest.raises(EvaluationError, match=r"a needle's prompt has \d+ tokens, more than the 50 positions"):
        prepare(short, Settings(text, ("off",), windows=0, context=40, needles=(path,)))


def test_numbers_that_are_none_are_empty(measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from turbocache.evaluation import run as module

    monkeypatch.setattr(module, "summary", lambda scores: {"perplexity": float("inf"), "kld_mean": float("nan")})
    _, (full, _) = measured("mlx-lm-8", context=40)
    assert (full["perplexity"], full["kld_mean"]) == (None, None)
    assert full["stored_bits"] > 0
