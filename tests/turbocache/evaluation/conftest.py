"""A text that is always there, and the pieces of an evaluation over the bundled model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbocache.evaluation.journal import Journal
from turbocache.evaluation.run import Work, prepare, run
from turbocache.evaluation.settings import Settings
from turbocache.mlxlm.model import LoadedModel

LICENSE = Path(__file__).resolve().parents[3] / "LICENSE"


class Silent:
    """Progress that nobody sees; counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def set_description(self, desc: str, refresh: bool) -> None:
        pass

    def update(self, n: int) -> None:
        self.tokens += n


@pytest.fixture(scope="session")
def text() -> Path:
    return LICENSE


@pytest.fixture
def measured(bundled: LoadedModel, text: Path, tmp_path: Path) -> Callable[..., tuple[Work, list[dict[str, Any]]]]:
    """Runs an evaluation of the bundled model, small unless told otherwise; returns its work and its rows."""

    def measure(*rows: str, **options: Any) -> tuple[Work, list[dict[str, Any]]]:
        sizes = {"context": 96, "windows": 1, "score_from": 32, "keep": (4,), "window": (0,), **options}
        work = prepare(bundled, Settings(text=text, rows=rows, **sizes))
        with Journal(tmp_path / "journal", work.circumstances(), restart=True) as journal:
            return work, run(work, journal, Silent())

    return measure
