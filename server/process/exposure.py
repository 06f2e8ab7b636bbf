"""A warning when anyone on the network may use the server."""

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from server.settings import Settings

logger = logging.getLogger(__name__)

_DESCRIPTORS = Path("/dev/fd")
_CHECK_SECONDS = 0.1
_CHECKS = 100


async def warn_when_exposed(settings: Settings) -> None:
    """Warn once if the process listens beyond this machine and has no API keys.

    The ASGI server does not tell the application its address: uvicorn may have --host, --fd or workers. A request's
    scope has an address, but the first request from outside is too late. So this checks the sockets of the process.
    Servers listen only after the application has started, so it checks repeatedly. It can't see a proxy or a published
    port of a container.
    """
    if settings.api_keys:
        return
    for _ in range(_CHECKS):
        await asyncio.sleep(_CHECK_SECONDS)
        if addresses := listening():
            break
    else:
        return
    for host, port in addresses:
        if not is_loopback(host):
            logger.warning(
                "The server listens on %s port %d and asks for no API key: anyone who reaches this machine over the "
                "network can use it and read its sessions. Set TURBOCACHE_API_KEYS, or listen on 127.0.0.1.",
                host,
                port,
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an IP address of a socket."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def listening() -> list[tuple[str, int]]:
    """Host and port of this process's listening TCP sockets. Empty where descriptors can't be listed."""
    return sorted(set(_listening()))


def _listening() -> Iterator[tuple[str, int]]:
    try:
        numbers = [int(entry) for entry in os.listdir(_DESCRIPTORS)]
    except OSError:
        return
    for number in numbers:
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            duplicate = socket.socket(fileno=os.dup(number))
        except OSError as error:
            if error.errno != errno.EBADF:  # closed meanwhile, as the listing's own descriptor is
                raise
            continue
        with duplicate:
            is_tcp = duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM
            if is_tcp and duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield duplicate.getsockname()[:2]
