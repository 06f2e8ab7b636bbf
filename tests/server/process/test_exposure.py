"""server.process.exposure: what the process' own sockets say about who can reach it."""

import logging
import socket
from collections.abc import Iterator

import pytest

from server.process.exposure import is_loopback, listening, warn_when_exposed
from tests.server.conftest import make_settings


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    with socket.socket() as opened:
        yield opened


def listen(opened: socket.socket, host: str) -> int:
    opened.bind((host, 0))
    opened.listen()
    return int(opened.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%eth0", False),
    ],
)
def test_addresses(host: str, local: bool) -> None:
    assert is_loopback(host) == local


def test_only_sockets_that_take_connections_count(bound: socket.socket) -> None:
    with socket.socket() as other, socket.socket(socket.AF_UNIX) as unix, socket.socket(type=socket.SOCK_DGRAM) as udp:
        port = listen(bound, "127.0.0.1")
        unix.bind(b"\0turbocache-test-exposure")
        unix.listen()
        udp.bind(("127.0.0.1", 0))
        other.connect(("127.0.0.1", port))
        assert listening() == [("127.0.0.1", port)]
    bound.close()
    assert listening() == []


async def test_a_server_that_others_reach_without_a_key_is_warned_of(
    bound: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    port = listen(bound, "0.0.0.0")
    await warn_when_exposed(make_settings())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"on 0.0.0.0 port {port} and asks for no API key" in record.getMessage()


@pytest.mark.parametrize(("host", "keys"), [("127.0.0.1", ()), ("0.0.0.0", ("secret",))])
async def test_others_are_not(
    bound: socket.socket, caplog: pytest.LogCaptureFixture, host: str, keys: tuple[str, ...]
) -> None:
    listen(bound, host)
    await warn_when_exposed(make_settings(api_keys=keys))
    assert caplog.records == []
