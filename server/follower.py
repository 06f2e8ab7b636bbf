"""A rank that has no HTTP server: it computes what rank 0 decides, until rank 0 stops or ends."""

try:
    import turbocache  # isort: skip  # first, for the same reason as in server/app.py
except ValueError as error:
    raise SystemExit(str(error)) from None

import logging
import signal
import sys

from server.engine import build_engine
from server.errors import StartupError
from server.logs import configure_logging
from server.metrics import Metrics
from server.settings import load_settings

__all__ = ["follow", "turbocache"]

log = logging.getLogger(__name__)

_FAILED = 3
"""The exit status of uvicorn when the application does not start."""


def follow() -> int:
    """Run this rank to its end. Returns the exit status.

    Launchers and supervisors signal all ranks at once. Rank 0 obeys and stops the others, so this rank ignores SIGINT
    and SIGHUP. After a SIGTERM it asks rank 0 to stop.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        settings = load_settings()
        configure_logging(settings.log_level, settings.log_format)
        engine = build_engine(settings, Metrics())
        engine.start()
        signal.signal(signal.SIGTERM, lambda *_: engine.ask_to_stop())
    except StartupError as error:
        print(error, file=sys.stderr)
        return _FAILED
    if not engine.join():
        return _FAILED
    log.info("stopped with rank 0")
    return 0
