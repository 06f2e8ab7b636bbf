"""Servers that official clients talk to: real processes with the bundled model, in the environment of the server."""

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.serving.launch import Server, running

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server as a user starts it."""
    with running(tmp_path_factory.mktemp("server")) as process:
        yield process


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One place in the batch and one in the queue, API keys, small bodies and chunks; streams open at once."""
    settings = {
        "MAX_BATCH": "1",
        "QUEUE_LIMIT": "1",
        "BODY_LIMIT": "64KiB",
        "KEEPALIVE_SECONDS": "0.2",
        "PREFILL_CHUNK": "128",
    }
    with running(tmp_path_factory.mktemp("narrow"), API_KEYS=",".join(KEYS), **settings) as process:
        yield process


def openai_client(server: Server, **options: Any) -> openai.OpenAI:
    """A client that raises on an answer which is not what its own types say, instead of passing it on."""
    chosen: dict[str, Any] = {
        "api_key": "none",
        "max_retries": 0,
        "timeout": 60,
        "_strict_response_validation": True,
        **options,
    }
    return openai.OpenAI(base_url=f"{server.url}/v1", **chosen)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai_client(server) as made:
        yield made


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client, as strict."""
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as made:
        yield made
