from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.launch import Server, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server as a user starts it, with the bundled model and default settings."""
    with running(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose sessions rotate at 512 tokens and whose batch has two places and queue one."""
    folder: Path = tmp_path_factory.mktemp("small")
    with running(folder, MAX_SIZE="512", KEEP="64", WINDOW="128", MAX_BATCH="2", QUEUE_LIMIT="1") as process:
        yield process
