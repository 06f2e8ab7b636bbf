import json
from pathlib import Path

import pytest

from turbocache.evaluation.journal import Journal
from turbocache.evaluation.settings import EvaluationError

HERE = {"model": "m", "context": 64, "mlx": "1"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.json.journal"


def begun(path: Path) -> Path:
    with Journal(path, HERE) as journal:
        journal.record("a", {"kld": [0.1 + 0.2, 1e-300, 5e-324], "nll": float("inf")})
        journal.record("b", True)
    return path


def test_results_come_back_exactly(path: Path) -> None:
    with Journal(begun(path), HERE) as journal:
        assert journal.results == {"a": {"kld": [0.1 + 0.2, 1e-300, 5e-324], "nll": float("inf")}, "b": True}
        journal.record("c", 3)
    with Journal(path, HERE) as journal:
        assert list(journal.results) == ["a", "b", "c"]


def test_a_result_is_on_the_disk_as_soon_as_it_is_recorded(path: Path) -> None:
    with Journal(path, HERE) as journal:
        journal.record("a", 1)
        assert json.loads(path.read_text().splitlines()[-1]) == {"key": "a", "result": 1}


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_line_that_was_interrupted_is_dropped(path: Path, cut: int) -> None:
    content = begun(path).read_bytes()
    path.write_bytes(content[:-cut])
    with Journal(path, HERE) as journal:
        assert list(journal.results) == ["a"]
        journal.record("b", True)
    assert path.read_bytes() == content


def test_a_first_line_that_was_interrupted_begins_anew(path: Path) -> None:
    path.write_bytes(begun(path).read_bytes()[:7])
    with Journal(path, HERE) as journal:
        assert journal.results == {}
    assert json.loads(path.read_text()) == HERE


def test_other_circumstances_are_refused_and_named(path: Path) -> None:
    content = begun(path).read_bytes()
    with pytest.raises(EvaluationError, match=r"\(context 64 then, 32 now; mlx-vlm None then, '2' now\).*--restart"):
        Journal(path, {**HERE, "context": 32, "mlx-vlm": "2"})
    assert path.read_bytes() == content
    with Journal(path, {**HERE, "context": 32}, restart=True) as journal:
        assert journal.results == {}
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("content", ["not a journal\n", '{"model": "m"}\n[1]\n', '{"model": "m"}\n{"result": 1}\n'])
def test_a_file_of_something_else_is_left_alone(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(EvaluationError, match="is no record of an evaluation"):
        Journal(path, {"model": "m"})
    assert path.read_text() == content


def test_a_place_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"can't write '.*': No such file"):
        Journal(tmp_path / "absent" / "journal", HERE)
