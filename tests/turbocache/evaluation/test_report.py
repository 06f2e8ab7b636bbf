import json
from pathlib import Path
from typing import Any

import pytest

from turbocache.documents import PlotsUnavailable, as_json
from turbocache.evaluation import report
from turbocache.evaluation.plots import draw

ROWS: list[dict[str, Any]] = [
    {"preset": "full", "note": "", "stored_bits": 32.0, "stored_bits_half": 16.0, "perplexity": 20.0, "kld_mean": 0.0,
     "kld_p99": 0.0, "top1": 1.0},
    {"preset": "k4v4", "note": "a | b", "stored_bits": 6.1, "stored_bits_half": 5.0, "perplexity": 20.1234,
     "kld_mean": 0.00071, "kld_p99": 0.0052, "top1": 0.9876, "needle": {"512": 1.0, "8000": 0.5, "other": 0.25},
     "needle_cells": {"512": {"0.1": [2, 2]}, "8000": {"0.1": [0, 1], "0.9": [1, 1]}, "other": {"-": [1, 4]}}},
    {"preset": "off", "note": "", "stored_bits": 32.0, "stored_bits_half": 16.0, "perplexity": 20.0, "kld_mean": 1e-12,
     "kld_p99": 1e-11, "top1": 1.0},
    {"preset": "mlx-lm-4", "note": "", "unavailable": "no\nreason | at all"},
    {"preset": "k2v2", "note": "", "stored_bits": 4.0, "stored_bits_half": 3.0, "perplexity": None, "kld_mean": None,
     "kld_p99": None, "top1": 0.0},
]  # fmt: skip
TOLD: dict[str, Any] = {
    "rows": ROWS, "date": "2026-11-25", "command": "turbocache eval m", "model": "m", "dtype": "float32",
    "text": "t.txt", "context": 64, "windows": 2, "score_from": 32, "scored_tokens": 64, "seed": 0,
    "versions": {"mlx": "1"},
    "machine": {"device": "CPU", "architecture": "x", "cores": 2, "system": "Linux", "python": "3"},
}  # fmt: skip


def test_the_table_has_a_line_for_each_row_and_a_column_for_each_length() -> None:
    lines = report.table(ROWS).splitlines()
    heads = ["preset", "bits", "bits, half", "perplexity", "KLD mean", "KLD p99", "top-1"]
    assert lines[0] == f"| {' | '.join([*heads, 'needle 512', 'needle 8000', 'needle other'])} |"
    assert lines[3] == (
        "| k4v4 | 6.10 | 5.00 | 20.123 | 0.00071 | 0.0052 | 98.76% | 100.0% (2/2) | 50.0% (1/2) | 25.0% (1/4) |"
    )
    assert lines[5].startswith("| mlx-lm-4 | does not run: no reason \\| at all |")
    assert lines[6] == "| k2v2 | 4.00 | 3.00 | - | - | - | 0.00% | - | - | - |"
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_divergence_is_set_against_that_of_others() -> None:
    def row(name: str, bits: float, kld: float) -> dict[str, Any]:
        return {"preset": name, "note": "", "stored_bits_half": bits, "kld_mean": kld}

    rows = [row("full", 3.0, 0.0), row("k4v4", 5.0, 0.001), row("k2v2", 3.0, 0.04), row("k3v3", 4.0, 0.005)]
    rows += [row("mlx-lm-4", 4.5, 0.02), row("mlx-lm-2", 2.5, 0.4), row("mlx-vlm-4-all", 5.0, 0.05)]
    assert report.comparisons(rows) == [
        "mlx-lm-4 (4.50 bits) has 0.02; k3v3 (4.00 bits) has 0.005, 0.25 of it",
        "mlx-lm-2 (2.50 bits) has 0.4; no preset is as small",
        "mlx-vlm-4-all (5.00 bits) has 0.05; k4v4 (5.00 bits) has 0.001, 0.02 of it",
    ]
    heads, _, _, k4v4, *_ = report.table(rows).splitlines()
    assert heads == "| preset | bits, half | KLD mean | KLD / mlx-lm-4 |"
    assert k4v4 == "| k4v4 | 5.00 | 0.001 | 0.050 |"


def test_the_page_says_what_was_measured_and_how() -> None:
    page = report.markdown(TOLD, ["plots/kld.png"])
    for said in (
        "# m, 2026-11-25",
        "    turbocache eval m",
        "scored from 32 (64 tokens)",
        "mlx 1",
        "2 cores",
        "Seed 0",
    ):
        assert said in page
    assert "- k4v4: a \\| b" in page
    assert page.endswith("![plots/kld.png](plots/kld.png)\n")


def test_json_has_no_numbers_that_are_none() -> None:
    assert json.loads(as_json(TOLD))["rows"][4]["perplexity"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json({"rows": [float("nan")]})


def test_plots_are_drawn_as_png_and_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(TOLD, tmp_path / "plots") == ["kld.png", "needles.png"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert sorted(files) == ["kld.png", "kld.svg", "needles.png", "needles.svg"]
    assert all(content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") for name, content in files.items())
    # Text is drawn as shapes with the text beside them as a comment.
    kld, needles = files["kld.svg"].decode(), files["needles.svg"].decode()
    assert "<!-- k4v4 -->" in kld
    for said in ("full", "off"):
        assert f"<!-- {said} -->" not in kld  # rounding is not divergence, and none has no place on a logarithmic axis
    assert "<!-- k2v2 -->" not in kld
    for said in ("k4v4", "512", "8000", "2/2", "0/1"):
        assert f"<!-- {said} -->" in needles
    assert "<!-- other -->" not in needles
    draw(TOLD, tmp_path / "again")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert draw({**TOLD, "rows": ROWS[:1]}, tmp_path / "nothing") == []


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotsUnavailable, match=r"pip install 'turbocache\[eval\]'"):
        draw(TOLD, tmp_path)
    assert list(tmp_path.iterdir()) == []
