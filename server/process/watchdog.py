"""Keep-alive messages for a supervisor: systemd's `WatchdogSec`.

A stopped or starved process sends none, so the supervisor kills and restarts it. SIGTERM would not end a stopped
process. The protocol is in sd_notify(3): a datagram to `$NOTIFY_SOCKET`.
"""

import os
import socket
import threading
from collections.abc import Mapping

_MESSAGES_PER_LIMIT = 3
"""Messages within the time after which the supervisor considers the process dead."""


def keep_alive(environment: Mapping[str, str] = os.environ) -> threading.Event | None:
    """Send messages from a new thread until the returned event is set. Returns None if no supervisor wants them."""
    address, limit = environment.get("NOTIFY_SOCKET", ""), environment.get("WATCHDOG_USEC", "")
    asked = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not address or not limit.isdigit() or not asked:
        return None
    ended = threading.Event()
    every = int(limit) / 1e6 / _MESSAGES_PER_LIMIT
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
                return  # the supervisor has ended
            ended.wait(every)
