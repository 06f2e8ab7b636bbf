"""The engine as other threads see it. Its own thread owns the model, the caches and the sessions."""

import gc
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from server.commands import Cancel, ChangeSession, Command
from server.coordinator import Coordinator
from server.engine.admission import admit
from server.engine.loop import EngineLoop
from server.engine.queue import WaitingQueue
from server.engine.services import Services, load_services
from server.engine.startup import announce
from server.errors import EngineDead, StartupError
from server.metrics import Metrics
from server.protocol import (
    AnswerRules,
    Conversation,
    Deliver,
    Dropped,
    GenerationRequest,
    Grammar,
    Health,
    ModelInfo,
    Prompt,
    SessionChange,
)
from server.settings import Settings
from turbocache.cache import PAGE
from turbocache.machine.launched import is_launched
from turbocache.machine.memory import keep_freed_memory

log = logging.getLogger(__name__)

_JOIN_SECONDS = 0.5
_THREAD_END_SECONDS = 0.5
_STOP_SECONDS = 60.0
"""A stop gives up when the thread works on one thing, such as writing one session, for longer than this."""


class MlxEngine:
    """`server.protocol.Engine` on mlx-lm's BatchGenerator."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        metrics.requests_running_limit.set(settings.max_batch)
        metrics.requests_waiting_limit.set(settings.queue_limit)
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._queue = WaitingQueue(settings.queue_limit)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._ready = threading.Event()
        self._startup_error: BaseException | None = None
        self._death: str | None = None
        self._coordinator = Coordinator()
        self._loop: EngineLoop | None = None

    def start(self) -> None:
        """Load the model and begin to serve. Raises StartupError."""
        keep_freed_memory()
        self._thread.start()
        self._ready.wait()
        if isinstance(self._startup_error, StartupError):
            raise self._startup_error
        if self._startup_error is not None:
            raise StartupError(f"The engine could not start: {self._startup_error!r}.") from self._startup_error

    def stop(self) -> None:
        """End all requests with an error, write the sessions to disk, and end the thread."""
        began = time.monotonic()
        if self._loop is not None:
            self._loop.stopping, self._loop.beat = True, began
        self._commands.put(None)
        while self._thread.is_alive() and time.monotonic() - self._beat(began) < _STOP_SECONDS:
            self._thread.join(_JOIN_SECONDS)
        _wait_for_thread_end(self._thread)

    def when_asked_to_stop(self, ask: Callable[[], None]) -> None:
        self._coordinator.on_stop_asked = ask

    def ask_to_stop(self) -> None:
        """Ask rank 0 to stop the group. Called on any other rank."""
        self._coordinator.ask_to_stop()

    def join(self) -> bool:
        """Wait until the thread ends, which rank 0 decides. Returns whether it was an orderly stop."""
        self._thread.join()
        _wait_for_thread_end(self._thread)
        return self._death is None

    @property
    def loop(self) -> EngineLoop:
        """The loop of the engine's thread. Raises EngineDead before the model is loaded."""
        if self._loop is None:
            raise EngineDead("The engine has not loaded its model.")
        return self._loop

    @property
    def services(self) -> Services:
        """What the thread has loaded. Raises EngineDead before that."""
        return self.loop.services

    @property
    def model(self) -> ModelInfo:
        return self.services.model

    def tokenize(self, conversation: Conversation) -> Prompt:
        return self.services.prompts.build(conversation)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.services.prompts.encode(text, special)

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        return self.services.prompts.decode(tokens, param)

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        return self.services.prompts.token_strings(tokens)

    def constrain(self, rules: AnswerRules, prompt: Prompt) -> Grammar | None:
        services = self.services
        if rules.raw or prompt.continued:
            services.vocabulary.ll_tokenizer  # noqa: B018  (slow at first use: not on the engine's thread)
        return services.grammars.compile(rules, prompt.opening == "reasoning")

    def submit(self, requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        self._check_alive()
        for queued in admit(requests, deliver, self.model, self._queue, self.services.budget):
            self._commands.put(queued)

    def dropped(self, prompt: Prompt) -> Dropped:
        ring, outline = self.services.runtime.store.spec.ring, prompt.outline
        pinned = ring.pinned(outline)
        start, end = ring.keep + PAGE * pinned, ring.first_visible(len(prompt.tokens) - 1, pinned, outline)
        return Dropped(end - start, outline.turns_dropped(start, end))

    def cancel(self, request_id: str) -> None:
        self._commands.put(Cancel(request_id))

    def health(self) -> Health:
        if not self._thread.is_alive() or self._death is not None or (self._loop is not None and self._loop.stopping):
            return Health(False, self._death or "the engine thread has ended; restart the server")
        if self._loop is None:
            return Health(False, "the engine is still loading its model")
        silent = time.monotonic() - self._loop.beat
        if silent > self.services.settings.stall_seconds:
            return Health(False, f"the engine thread has not answered for {silent:.0f} s; restart the server")
        if self.services.faults.verdict is not None:
            return Health(False, self.services.faults.verdict)
        return Health(True, "ok")

    def backend(self) -> dict[str, Any]:
        return self.services.runtime.report()

    def status(self) -> dict[str, Any]:
        return self.loop.scheduler.stats.status

    def sessions(self, owner: str = "") -> list[dict[str, Any]]:
        return [row for (of, _), row in self.loop.scheduler.stats.session_rows.items() if of == owner]

    def change_session(
        self, change: SessionChange, owner: str, id: str, new_id: str | None = None
    ) -> Future[dict[str, Any]]:
        self._check_alive()
        command = ChangeSession(change, owner, id, new_id)
        self._commands.put(command)
        return command.done

    def _check_alive(self) -> None:
        health = self.health()
        if not health.alive:
            raise EngineDead(health.detail)

    def _beat(self, default: float) -> float:
        return default if self._loop is None else self._loop.beat

    # The engine's thread.

    def _main(self) -> None:
        try:
            self._loop = self._load()
        except BaseException as error:
            self._startup_error = self._coordinator.start_failed(error)
            return
        finally:
            self._ready.set()
        try:
            self._loop.run()
        except BaseException as error:
            if self._coordinator.thread_failed(error):
                return
            self._death = f"the engine thread died of {type(error).__name__}; see the log and restart the server"
            log.critical("the engine thread died", exc_info=error)
            self._loop.close(EngineDead("The engine has died; the server must be restarted."))

    def _load(self) -> EngineLoop:
        settings, seed = self._settings, secrets.randbits(64)
        if is_launched():
            from server.group.coordinator import join_ranks

            self._coordinator, settings, seed = join_ranks(settings, self._report, self._end_group)
        services = load_services(settings, self._metrics, self._coordinator, self._queue, seed)
        loop = EngineLoop(services, self._commands)
        # All that is loaded lives as long as the process: collections need not look at it between tokens.
        gc.collect()
        gc.freeze()
        announce(services.runtime)
        return loop

    # Called by the group of ranks, from any thread.

    def _report(self, step: int) -> dict[str, Any]:
        """What the other ranks learn about this one."""
        now, memory = time.monotonic(), {} if self._loop is None else self._loop.scheduler.stats.memory
        return {"step": step, "silent_seconds": now - self._beat(now), "memory": memory}

    def _end_group(self, reason: str) -> None:
        """The thread may wait in MLX forever, so this thread reports the failure."""
        self._death = f"the group of ranks has ended: {reason}"
        if self._loop is None:
            self._startup_error = StartupError(f"The group of ranks has ended: {reason}.")
            self._ready.set()
            return
        self._loop.report_failure(
            EngineDead(f"The group of ranks that computes the answers has ended: {reason}. Please try again.")
        )


def _wait_for_thread_end(thread: threading.Thread) -> None:
    """Python joins a thread when its function has returned. MLX frees the thread's compile cache after that and needs
    the interpreter for it: a process that exits meanwhile is aborted.
    """
    deadline, tasks = time.monotonic() + _THREAD_END_SECONDS, Path("/proc/self/task")
    while time.monotonic() < deadline and (not tasks.exists() or (tasks / str(thread.native_id)).exists()):
        time.sleep(0.01)
