"""server.app: a cheap import, and starts that fail with a sentence instead of a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn

from server.app import create_app
from server.errors import StartupError
from server.metrics import Metrics
from server.settings import Settings
from tests.server.conftest import Serve, make_settings
from tests.server.scripted_engine import ScriptedEngine

ROOT = Path(__file__).resolve().parents[2]


def test_import_is_cheap() -> None:
    code = "import server.app, sys; sys.exit(any(name.partition('.')[0] in ('mlx', 'mlx_lm') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_bad_setting_ends_the_start_with_its_sentence(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TURBOCACHE_WINDOW": "100"}
    command = [sys.executable, "-m", "uvicorn", "server.app:app", "--port", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "TURBOCACHE_WINDOW='100' is not valid: expected a positive multiple of 64 (tokens)." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_that_serves_nobody_is_no_application(tmp_path: Path) -> None:
    """Started with uvicorn on every rank, all would want the port, and only one would get it."""
    command = [sys.executable, "-m", "uvicorn", "server.app:app", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLX_RANK": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "This process is rank 1 of a group" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_cannot_start_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(settings: Settings, metrics: Metrics) -> ScriptedEngine:
        raise StartupError("The model is not there.")

    config = uvicorn.Config(create_app(refuse, make_settings()), port=0, log_config=None)
    with pytest.raises(SystemExit):
        uvicorn.Server(config).run()
    messages = [record.getMessage() for record in caplog.records]
    assert "The model is not there." in messages
    assert not any("Traceback" in message for message in messages)


def test_the_engine_is_started_and_stopped_once(serve: Serve) -> None:
    engine = ScriptedEngine()
    server = serve(engine)
    assert server.http.get("/health").status_code == 200
    assert (engine.started, engine.stopped) == (1, 0)
