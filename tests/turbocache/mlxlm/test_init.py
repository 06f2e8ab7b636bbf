import tomllib
from pathlib import Path

import pytest

from server.engine import build_engine
from server.errors import StartupError
from server.metrics import Metrics
from server.settings import load_settings
from turbocache import mlxlm


def test_the_tested_version_is_the_pinned_one() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert f"mlx-lm=={mlxlm.TESTED_VERSION}" in project["project"]["dependencies"]
    mlxlm.check_version()


def test_another_version_is_refused_and_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlxlm, "version", lambda name: "0.99.0")
    sentence = r"^mlx-lm 0\.99\.0 is installed, but turbocache needs mlx-lm 0\.32\.2, .* pip install mlx-lm==0\.32\.2$"
    with pytest.raises(mlxlm.UnsupportedVersion, match=sentence):
        mlxlm.check_version()
    with pytest.raises(StartupError, match=sentence):
        build_engine(load_settings(), Metrics())
