"""A small piece of the real table, where the model that it is about is at hand: no more divergence than was promised,
as a share of that of mlx-lm's 4-bit cache.
"""

from pathlib import Path

import pytest

from tests.turbocache.evaluation.conftest import Silent
from turbocache.evaluation.journal import Journal
from turbocache.evaluation.run import prepare, run
from turbocache.evaluation.settings import Settings
from turbocache.mlxlm.model import load_model

SHARED = Path(__file__).resolve().parents[4] / "shared"
MODEL, TEXT = SHARED / "models" / "tiny-recall", SHARED / "texts" / "wiki.test.raw"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (MODEL.exists() and TEXT.exists()), reason="needs ../shared")
def test_presets_stay_within_their_share_of_mlx_lm(tmp_path: Path) -> None:
    names = ("k4v4", "turbo3_5", "turbo2_5", "k4v4:packed", "mlx-lm-4")
    settings = Settings(TEXT, names, context=1536, windows=1, score_from=1024)
    work = prepare(load_model(str(MODEL)), settings)
    with Journal(tmp_path / "journal", work.circumstances()) as journal:
        kld = {row["preset"]: row["kld_mean"] for row in run(work, journal, Silent())}
    assert kld["mlx-lm-4"] > 0.005
    for name, share in (("k4v4", 0.07), ("turbo3_5", 0.17), ("turbo2_5", 0.85)):
        assert kld[name] <= share * kld["mlx-lm-4"], (name, kld)
    assert kld["k4v4:packed"] <= 1.5 * kld["k4v4"], kld
