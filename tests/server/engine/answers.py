"""Requests put to a real engine, and what must hold of it afterwards."""

import queue
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from server.engine.engine import MlxEngine
from server.protocol import Conversation, Event, Failed, Finished, GenerationRequest, SamplingParams, TextDelta, Usage

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0)


class Answer:
    """Collects one request's events."""

    def __init__(self, engine: MlxEngine, asked: str | list[dict[str, Any]], name: str | None, **chosen: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        prompt = engine.tokenize(
            Conversation([{"role": "user", "content": asked}] if isinstance(asked, str) else asked)
        )
        options: dict[str, Any] = {"max_tokens": 8, "sampling": GREEDY} | chosen
        self.request = GenerationRequest(f"request-{uuid.uuid4()}", prompt, session=name, **options)
        engine.submit([self.request], self.events.put)

    def end(self) -> Finished | Failed:
        """The terminal event; nothing may follow it."""
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Finished | Failed):
                return event

    def text(self) -> str:
        return self.whole()[0]

    def whole(self) -> tuple[str, Usage]:
        """Its text and what it took."""
        text = ""
        while not isinstance(event := self.events.get(timeout=60), Finished):
            assert not isinstance(event, Failed), event
            text += event.text if isinstance(event, TextDelta) else ""
        return text, event.usage


def owned_by_nobody(engine: MlxEngine) -> bool:
    specs = engine.services.runtime.store.specs
    for spec in specs:
        spec.check_integrity()
    return all(spec.pool.n_used == len({page for ring in spec.rings for page in ring.pages}) for spec in specs)


def on_engine(engine: MlxEngine, work: Callable[[], T]) -> T:
    """The result of `work`, done by the engine's own thread between two steps: as the callback of a change to a session
    that does not exist.
    """
    here, done, late = threading.get_ident(), Future[T](), list[bool]()

    def call(change: Future[Any]) -> None:
        if threading.get_ident() == here:  # the change was made before the callback was there
            late.append(True)
            return
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    while True:
        late.clear()
        engine.change_session("delete", "", f"nobody-{uuid.uuid4()}").add_done_callback(call)
        if not late:
            return done.result(60)
