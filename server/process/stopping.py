"""A stop that nobody waits for for ever: what SIGTERM and SIGINT mean while requests are open.

The ASGI server hears of the first signal as ever, takes no more connections and waits for what is open; uvicorn by
itself would wait for as long as that takes, also through further SIGTERMs. Here the requests have a time of grace to
end by themselves. After it, or at a second signal, each is told that the server stops. Whoever does not even take that
is left behind a moment later, and from the third signal on all are for the ASGI server again, which then drops
everything.
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
_LAST_WORDS_SECONDS = 2.0
"""What a request may take to tell its client that it has been ended."""

_Handler = Callable[[int, FrameType | None], object]


class Stoppable(Protocol):
    """The open requests."""

    def __len__(self) -> int: ...

    def end_all(self, error: ServerError) -> None:
        """End those that are open, and every later one at once."""
        ...


class Stopping:
    """Listens for signals in front of the ASGI server's own handlers. `stop_engine` is called in a thread where the
    ASGI server would not let the application come to its end.
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
        """While the server answers. Outside of the main thread there are no signals, and nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        number: int
        for number in _SIGNALS:
            # Without a handler of the ASGI server's the signal ends the process, and may go on doing so.
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
        """Stop as at a first signal, unless one has come. From any thread."""
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
        """Tell the clients. One that does not read holds its connection open, which only the ASGI server can drop:
        uvicorn does at a SIGINT behind the signal that stopped it, and then may end before the application has.
        """
        self._requests.end_all(ShuttingDown())
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        logger.warning("stopping without %d requests whose clients do not read", len(self._requests))
        await asyncio.to_thread(self._stop_engine)
        if (handler := self._before.get(signal.SIGINT)) is not None:
            handler(signal.SIGINT, None)
