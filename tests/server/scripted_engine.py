"""An engine without a model: a real thread that plays a script for each request."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from server.protocol import (
    AnswerRules,
    Conversation,
    Deliver,
    Dropped,
    Event,
    Finished,
    GenerationRequest,
    Grammar,
    Health,
    ModelInfo,
    PrefillProgress,
    Prompt,
    SamplingParams,
    SessionChange,
    TextDelta,
    Usage,
)


@dataclass(frozen=True)
class Wait:
    """Does nothing for this long, unless the request is cancelled first."""

    seconds: float


@dataclass(frozen=True)
class Die:
    """The thread ends without a terminal event, as a crashed engine would."""


Step = Event | Wait | Die
USAGE = Usage(prompt_tokens=12, cached_tokens=8, completion_tokens=3)
HELLO: tuple[Step, ...] = (
    PrefillProgress(4, 4),
    TextDelta("Hel"),
    TextDelta("lo"),
    TextDelta("!"),
    Finished("stop", USAGE),
)
# Never ends by itself.
_ON: tuple[Step, ...] = (Wait(0.02), TextDelta(" on"))
ENDLESS: tuple[Step, ...] = (TextDelta("go"), *_ON * 3000)
SILENT: tuple[Step, ...] = (Wait(60.0),)


_USUAL = SamplingParams()


class ScriptedEngine:
    """Plays `script` for every request, one after another. What happened to it can be read from its lists."""

    def __init__(
        self,
        script: Sequence[Step] = HELLO,
        *,
        submit_error: Exception | None = None,
        tokenize_error: Exception | None = None,
        model_id: str = "org/scripted-model",
        max_tokens: int = 1000,
        rotates_at: int | None = None,
        license: str | None = None,
        origin: str | None = None,
        sampling: SamplingParams = _USUAL,
    ) -> None:
        self.script = tuple(script)
        self.submit_error = submit_error
        self.tokenize_error = tokenize_error
        self._model = ModelInfo(
            id=model_id,
            created=1_700_000_000,
            max_tokens=max_tokens,
            n_tokens=1000,
            rotates_at=rotates_at,
            license=license,
            origin=origin,
            sampling=sampling,
        )
        self.requests: list[GenerationRequest] = []
        self.rules: list[AnswerRules] = []
        self.messages: list[list[dict[str, Any]]] = []
        self.cancelled: list[str] = []
        self.changes: list[tuple[SessionChange, str, str, str | None]] = []
        self.tokenized_in: list[str] = []
        self.started = self.stopped = 0
        self.stuck = False
        self._jobs: queue.Queue[tuple[GenerationRequest, Deliver] | None] = queue.Queue()
        self._cancel = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)

    @property
    def model(self) -> ModelInfo:
        return self._model

    def start(self) -> None:
        self.started += 1
        self._thread.start()

    def when_asked_to_stop(self, ask: Callable[[], None]) -> None:
        """Nobody asks it."""

    def stop(self) -> None:
        self.stopped += 1
        self._cancel.set()
        self._jobs.put(None)
        self._thread.join(5.0)

    def tokenize(self, conversation: Conversation) -> Prompt:
        self.tokenized_in.append(threading.current_thread().name)
        if self.tokenize_error is not None:
            raise self.tokenize_error
        self.messages.append(conversation.messages)
        return Prompt([ord(letter) % 100 for message in conversation.messages for letter in message["content"]] or [0])

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(letter) % 100 for letter in text]

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        return "".join(chr(token) for token in tokens)

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        return [chr(token) for token in tokens]

    def constrain(self, rules: AnswerRules, prompt: Prompt) -> Grammar | None:
        self.rules.append(rules)
        return None

    def dropped(self, prompt: Prompt) -> Dropped:
        rotates_at = self._model.rotates_at
        return Dropped() if rotates_at is None else Dropped(max(0, len(prompt.tokens) - rotates_at), 1)

    def submit(self, requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        if self.submit_error is not None:
            raise self.submit_error
        self._cancel.clear()
        for request in requests:
            self.requests.append(request)
            self._jobs.put((request, deliver))

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self._cancel.set()

    def health(self) -> Health:
        if not self._thread.is_alive():
            return Health(False, "The engine thread is dead. Restart the server.")
        return Health(False, "The engine is stuck.") if self.stuck else Health(True, "running")

    def backend(self) -> dict[str, Any]:
        return {"name": "scripted", "reason": "a test asked for it"}

    def status(self) -> dict[str, Any]:
        return {"object": "status", "model": self._model.id}

    def sessions(self, owner: str) -> list[dict[str, Any]]:
        return [
            {"id": f"s{i}", "tokens": len(r.prompt.tokens)} for i, r in enumerate(self.requests) if r.owner == owner
        ]

    def change_session(
        self, change: SessionChange, owner: str, id: str, new_id: str | None = None
    ) -> Future[dict[str, Any]]:
        self.changes.append((change, owner, id, new_id))
        done: Future[dict[str, Any]] = Future()
        if not self.stuck:
            done.set_result({"id": new_id or id})
        return done

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._play(*job):
                return

    def _play(self, request: GenerationRequest, deliver: Deliver) -> bool:
        for step in self.script:
            if isinstance(step, Die):
                return False
            if isinstance(step, Wait):
                self._cancel.wait(step.seconds)
            elif not self._cancel.is_set():
                deliver(replace(step, choice=request.choice))
            if self._cancel.is_set():
                break
        return True


def eventually(condition: Any, seconds: float = 5.0) -> bool:
    """Whether `condition()` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


__all__ = ["ENDLESS", "HELLO", "SILENT", "USAGE", "Die", "ScriptedEngine", "Wait", "eventually"]
