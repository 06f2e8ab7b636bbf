"""Handling of SIGTERM and SIGINT while requests are open.

At the first signal the ASGI server takes no more connections and waits for the open ones. uvicorn alone would wait
without limit, also at further SIGTERMs. Here the requests have a grace period to finish. After it, or at a second
signal, each open request ends with an error that the server stops. The server does not wait for clients that don't read
that error. From the third signal on the ASGI server handles signals alone, and drops everything.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from server.errors import ServerError, ShuttingDown

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ERROR_SECONDS = 2.0
"""Time for the clients to receive the error."""

_Handler = Callable[[int, FrameType | None], object]


class Stoppable(Protocol):
    """The open requests."""

    def __len__(self) -> int: ...

    def end_all(self, error: ServerError) -> None:
        """End those that are open, and every later one at once."""
        ...


class Stopping:
    """Handles signals before the ASGI server's own handlers do. `stop_engine` runs in a thread if the ASGI server would
    end the process before the application has stopped.
    """

    def __init__(self, requests: Stoppable, grace_seconds: float, stop_engine: Callable[[], None]) -> None:
        self._requests = requests
        self._grace = grace_seconds
        self._stop_engine = stop_engine
        self._loop = asyncio.get_running_loop()
        self._before: dict[int, _Handler] = {}
        self._heard = 0
        self._ending: asyncio.Task[None] | None = None
        self._grace_timer: asyncio.TimerHandle | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Installs the handlers while the server runs. Outside the main thread there are no signals and it does
        nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        number: int
        for number in _SIGNALS:
            # Without a handler of the ASGI server the signal ends the process. Leave that as it is.
            if callable(handler := signal.getsignal(number)):
                self._before[number] = handler
                signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            for timer in (self._grace_timer, self._ending):
                if timer is not None:
                    timer.cancel()

    def ask(self) -> None:
        """Acts like a first signal, unless there was one. May be called from any thread."""
        if not self._heard:
            os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard += 1
        if self._heard == 1:
            self._loop.call_soon_threadsafe(self._begin)
        elif self._heard == 2:
            self._loop.call_soon_threadsafe(self._end)
            return
        self._before[number](number, frame)

    def _begin(self) -> None:
        if len(self._requests):
            logger.info(
                "stopping: %d open requests have %g s to end; another signal ends them now",
                len(self._requests),
                self._grace,
            )
        self._grace_timer = self._loop.call_later(self._grace, self._end)

    def _end(self) -> None:
        if self._ending is None:
            self._ending = self._loop.create_task(self._end_all())

    async def _end_all(self) -> None:
        """Ends the requests with an error. A client that does not read keeps its connection open, and only the ASGI
        server can drop that: uvicorn does at a SIGINT after the first signal. It may then exit before the
        application has stopped, so the engine stops first.
        """
        self._requests.end_all(ShuttingDown())
        await asyncio.sleep(_ERROR_SECONDS)
        logger.warning("stopping without %d requests whose clients do not read", len(self._requests))
        await asyncio.to_thread(self._stop_engine)
        if (handler := self._before.get(signal.SIGINT)) is not None:
            handler(signal.SIGINT, None)
