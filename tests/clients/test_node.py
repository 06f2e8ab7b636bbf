"""The Node clients: each file under node/ is run by Node's own test runner against the server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.launch import Server

FOLDER = Path(__file__).parent / "node"
# It came with the environment; see pyproject.toml.
NODE = Path(sys.executable).parent / "node"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("*.test.mjs")))
def test_with_node(server: Server, file: str) -> None:
    run = subprocess.run(
        [NODE, "--test", "--test-reporter=spec", file],
        cwd=FOLDER, env=os.environ | {"SERVER_URL": server.url}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    # A file without a test passes as well.
    assert "\nℹ pass 0\n" not in run.stdout, run.stdout
