"""Signs of life for a supervisor that wants them: systemd's `WatchdogSec`.

A process that is stopped or starved sends none, so the supervisor kills it and starts it again; nothing else would,
since a stopped process does not even end at SIGTERM. See sd_notify(3) for the protocol: a datagram to `$NOTIFY_SOCKET`.
"""

import os
import socket
import threading
from collections.abc import Mapping

_OFTEN = 3
"""Signs within the time after which the supervisor takes the process for dead."""


def keep_alive(environment: Mapping[str, str] = os.environ) -> threading.Event | None:
    """Send signs of life from now on, from a thread of its own, until the returned event is set. None where no
    supervisor asks for them.
    """
    address, limit = environment.get("NOTIFY_SOCKET", ""), environment.get("WATCHDOG_USEC", "")
    asked = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not address or not limit.isdigit() or not asked:
        return None
    ended = threading.Event()
    every = int(limit) / 1e6 / _OFTEN
    threading.Thread(target=_send, args=(address, every, ended), name="watchdog", daemon=True).start()
    return ended


def _send(address: str, every: float, ended: threading.Event) -> None:
    if address.startswith("@"):  # Linux's abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        while not ended.is_set():
            try:
                supervisor.sendto(b"WATCHDOG=1", address)
            except OSError:
                return  # it has gone, and nobody waits for a sign
            ended.wait(every)
