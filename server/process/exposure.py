"""A warning when whoever reaches this machine may use the server."""

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
_LOOK_SECONDS = 0.1
_LOOKS = 100


async def warn_when_exposed(settings: Settings) -> None:
    """Warns once if the process listens beyond this machine and asks for no API key.

    It asks the sockets of the process, because nothing else is the same whoever has started it (uvicorn with --host,
    --fd or workers, another ASGI server): applications are not told where they are served, and a request's scope has
    the address that it came in by, which says nothing until somebody from outside has come. Servers listen only after
    the application has started, hence some looks one after the other. What it can't see: a proxy or a container's port
    that leads here from outside.
    """
    if settings.api_keys:
        return
    for _ in range(_LOOKS):
        await asyncio.sleep(_LOOK_SECONDS)
        if found := listening():
            break
    else:
        return
    for host, port in found:
        if not is_loopback(host):
            logger.warning(
                "The server listens on %s port %d and asks for no API key: whoever reaches this machine over the "
                "network can use it and read its sessions. Set TURBOCACHE_API_KEYS, or listen on 127.0.0.1.",
                host,
                port,
            )


def is_loopback(host: str) -> bool:
    """Whether an IP address, as a socket names it, can be reached from this machine only."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def listening() -> list[tuple[str, int]]:
    """Host and port of this process' TCP sockets that take connections; none where descriptors can't be listed."""
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
            if error.errno != errno.EBADF:  # closed meanwhile, as the listing's own is
                raise
            continue
        with duplicate:
            is_tcp = duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM
            if is_tcp and duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield duplicate.getsockname()[:2]
