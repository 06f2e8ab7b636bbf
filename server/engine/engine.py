"""The engine: one thread that owns the model, the caches and the sessions, and the doors to it. One rank of a group, or
all by itself.
"""

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from server.engine.admission import queued
from server.engine.budget import Budget
from server.engine.queue import QueuedRequest, WaitingQueue
from server.engine.scheduler import Scheduler
from server.engine.session_changes import SessionChanges
from server.engine.startup import Runtime, announce, load_runtime
from server.errors import (
    EngineDead,
    OutOfMemory,
    ServerError,
    ShuttingDown,
    StartupError,
)
from server.group.commands import Cancel, Change, Command, Decisions
from server.group.disk import GroupDisk
from server.group.ranks import TICK_SECONDS, Ranks
from server.metrics import Metrics
from server.protocol import (
    AnswerRules,
    Conversation,
    Deliver,
    Failed,
    GenerationRequest,
    Grammar,
    Health,
    ModelInfo,
    Prompt,
    SessionChange,
)
from server.sessions.checkpoints import LEAST_SHARED
from server.sessions.clock import StepClock
from server.sessions.disk import SessionDisk
from server.sessions.other_groups import other_groups, rank_folder
from server.sessions.registry import SessionRegistry
from server.settings import Settings
from server.text.assembler import Vocabulary, opening_state
from server.text.chat_template import PromptBuilder
from server.text.grammar import GrammarCompiler
from server.text.tool_formats import tool_format
from turbocache.machine.memory import keep_freed_memory
from turbocache.storage.session_codec import SessionFiles

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5
_LAST_WORDS_SECONDS = 0.5
_STOP_SECONDS = 60.0
"""A stop waits as long as the thread does something; this long for any one thing, such as a session's way to disk."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Something to do on the engine's thread between steps."""

    work: Callable[[], Any]
    done: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.done.set_result(self.work())
        except Exception as error:
            self.done.set_exception(error)


def _wait_for_last_words(thread: threading.Thread) -> None:
    """Python counts a thread as joined when its function has returned. MLX's compile cache of that thread goes after
    that, and needs the interpreter for it: a process that ends meanwhile is aborted.
    """
    deadline, tasks = time.monotonic() + _LAST_WORDS_SECONDS, Path("/proc/self/task")
    while time.monotonic() < deadline and (not tasks.exists() or (tasks / str(thread.native_id)).exists()):
        time.sleep(0.01)


class MlxEngine:
    """`server.protocol.Engine` on mlx-lm's BatchGenerator."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        metrics.requests_running_limit.set(settings.max_batch)
        metrics.requests_waiting_limit.set(settings.queue_limit)
        self._commands: queue.SimpleQueue[Command | _Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._ready = threading.Event()
        self._startup_error: BaseException | None = None
        self._waiting = WaitingQueue(settings.queue_limit)
        self._stopping = False
        self._death: str | None = None
        self._beat = time.monotonic()
        self._serving = False
        # Owned by the engine's thread from here on.
        self._clock = StepClock()
        self._ranks = Ranks(self._report, self._end_group)
        self._runtime: Runtime
        self._prompts: PromptBuilder
        self._grammars: GrammarCompiler
        self._vocabulary: Vocabulary
        self._budget: Budget
        self._registry: SessionRegistry
        self._scheduler: Scheduler
        self._changes: SessionChanges

    # Called from the event loop.

    def start(self) -> None:
        """Load the model and begin to serve. Raises StartupError when that fails."""
        keep_freed_memory()
        self._thread.start()
        self._ready.wait()
        if isinstance(self._startup_error, StartupError):
            raise self._startup_error
        if self._startup_error is not None:
            raise StartupError(f"The engine could not start: {self._startup_error!r}.") from self._startup_error

    def stop(self) -> None:
        """End every request with an error and the thread with it, once the sessions are on disk."""
        self._stopping, self._beat = True, time.monotonic()
        self._commands.put(None)
        while self._thread.is_alive() and time.monotonic() - self._beat < _STOP_SECONDS:
            self._thread.join(_IDLE_SECONDS)
        _wait_for_last_words(self._thread)

    def when_asked_to_stop(self, ask: Callable[[], None]) -> None:
        """See `server.app.RunnableEngine`: a rank that is told to stop asks rank 0 to stop them all."""
        self._ranks.on_stop_asked = ask

    def ask_to_stop(self) -> None:
        """On another rank than 0: have rank 0 stop the group."""
        self._ranks.ask_to_stop()

    def join(self) -> bool:
        """Wait for the thread's end, which rank 0 decides on; whether it was in order."""
        self._thread.join()
        _wait_for_last_words(self._thread)
        return self._death is None

    @property
    def model(self) -> ModelInfo:
        model, max_size, n_tokens = self._runtime.model, self._runtime.store.spec.ring.max_size, self._prompts.n_tokens
        if max_size is not None and self._settings.overflow == "error":
            return ModelInfo(model.id, model.created, max_size, n_tokens)
        return ModelInfo(model.id, model.created, model.max_positions, n_tokens, max_size)

    def tokenize(self, conversation: Conversation) -> Prompt:
        return self._prompts.build(conversation)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self._prompts.encode(text, special)

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        return self._prompts.decode(tokens, param)

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        return self._prompts.token_strings(tokens)

    def constrain(self, rules: AnswerRules, prompt: Prompt) -> Grammar | None:
        if rules.raw or prompt.continued:
            self._vocabulary.ll_tokenizer  # noqa: B018  (slow at first use: not on the engine's thread)
        return self._grammars.compile(rules, opening_state(self._runtime.model.tokenizer, prompt.tokens) == "reasoning")

    def submit(self, requests: Sequence[GenerationRequest], deliver: Deliver) -> None:
        """Accept all requests, or raise and accept none; see `server.protocol.Engine`."""
        self._check_alive()
        model = self.model
        entries = [queued(request, deliver, model) for request in requests]
        self._waiting.enter(len(entries))
        promised: list[str] = []
        try:
            for entry in entries:
                id, n_prompt = entry.request.request_id, len(entry.request.prompt.tokens)
                self._budget.promise(id, n_prompt + entry.allowed, n_prompt)
                promised.append(id)
        except OutOfMemory:
            self._waiting.leave(len(entries))
            for id in promised:
                self._budget.release(id)
            raise
        for entry in entries:
            self._commands.put(entry)

    def cancel(self, request_id: str) -> None:
        self._commands.put(Cancel(request_id))

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something on the engine's thread, between two steps. Raises EngineDead. Not in a group, whose other ranks
        would not do it.
        """
        self._check_alive()
        assert self._ranks.group.alone
        call = _Call(work)
        self._commands.put(call)
        return call.done

    def health(self) -> Health:
        if not self._thread.is_alive() or self._stopping or self._death is not None:
            return Health(False, self._death or "the engine thread has ended; restart the server")
        silent = time.monotonic() - self._beat
        if silent > self._settings.stall_seconds:
            return Health(False, f"the engine thread has not answered for {silent:.0f} s; restart the server")
        if self._scheduler.faults.verdict is not None:
            return Health(False, self._scheduler.faults.verdict)
        return Health(True, "ok")

    def backend(self) -> dict[str, Any]:
        return self._runtime.report()

    def status(self) -> dict[str, Any]:
        return self._scheduler.stats.status

    def sessions(self, owner: str = "") -> list[dict[str, Any]]:
        return [row for (of, _), row in self._scheduler.stats.session_rows.items() if of == owner]

    def change_session(
        self, change: SessionChange, owner: str, id: str, new_id: str | None = None
    ) -> Future[dict[str, Any]]:
        """See `server.protocol.Engine`."""
        self._check_alive()
        asked = Change(change, owner, id, new_id)
        self._commands.put(asked)
        return asked.done

    def _check_alive(self) -> None:
        health = self.health()
        if not health.alive:
            raise EngineDead(health.detail)

    # The engine's thread.

    def _main(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self._startup_error = self._ranks.start_failed(error)
            return
        finally:
            self._ready.set()
        try:
            while not self._step():
                self._scheduler.refresh_now_and_then()
            if self._scheduler.faults.verdict is None:
                self._rest_all()
            self._ranks.part()
            self._close(ShuttingDown())
        except BaseException as error:
            if not self._ranks.group.alone:
                self._ranks.end(self._ranks.cause(error), error)
                return
            self._death = f"the engine thread died of {type(error).__name__}; see the log and restart the server"
            log.critical("the engine thread died", exc_info=error)
            self._close(EngineDead("The engine has died; the server must be restarted."))

    def _step(self) -> bool:
        """Decide with the other ranks and do it; whether it was the last step."""
        self._beat = time.monotonic()
        idle = not self._scheduler.runs and self._waiting.empty
        if idle:
            self._ranks.rest()
        decisions = self._ranks.lockstep.next(lambda: self._decide(idle))
        self._clock.set(decisions.now)
        for command in decisions.commands:
            self._obey(command)
        if decisions.stop:
            self._stopping = True
            return True
        self._scheduler.grow(decisions.growth)
        if self._scheduler.faults.verdict is not None:
            self._scheduler.refuse(self._scheduler.faults.verdict)
        self._scheduler.admit()
        if self._scheduler.runs:
            self._ranks.lockstep.send(lambda: self._decide(False))
            self._scheduler.step()
            self._changes.save_between_steps()
        elif self._waiting.empty:
            self._changes.tidy()
        if not self._ranks.group.alone:
            self._ranks.lockstep.note(self._scheduler.done())
        return False

    def _load(self) -> None:
        self._settings, seed = self._ranks.join(self._settings)
        self._clock.seed(seed)
        mx.random.seed(seed)
        runtime = self._runtime = load_runtime(self._settings, self._ranks.group)
        self._prompts = PromptBuilder(runtime.model)
        vocabulary, format = Vocabulary(runtime.model.tokenizer), tool_format(runtime.model.tokenizer)
        self._vocabulary = vocabulary
        self._grammars = GrammarCompiler(runtime.model.tokenizer, format, vocabulary)
        store, chunk = runtime.store, runtime.chunk
        self._budget = Budget(
            runtime.budget, lambda n: store.session_nbytes(n, chunk), lambda n: store.prefill_nbytes(n, chunk)
        )
        disk = self._disk()
        self._registry = SessionRegistry(store, disk, self._clock)
        self._scheduler = Scheduler(
            self._settings,
            self._metrics,
            runtime,
            self._ranks,
            self._waiting,
            self._budget,
            self._registry,
            vocabulary,
            self._grammars,
            format,
        )
        self._changes = SessionChanges(
            self._settings, self._metrics, disk, self._budget, self._registry, self._scheduler, self._clock
        )
        # What the start has loaded lives as long as the process: collections need not look at it between tokens.
        gc.collect()
        gc.freeze()
        announce(runtime)
        self._serving = True

    def _disk(self) -> SessionDisk | None:
        if (folder := self._settings.session_dir) is None:
            return None
        try:
            group = self._runtime.group
            files, others = SessionFiles(self._runtime.model, self._runtime.store, group), other_groups(folder, group)
            folder, budget = rank_folder(folder, group), self._settings.session_disk
            if group.alone:
                return SessionDisk(folder, budget, files, self._metrics, others)
            return GroupDisk(folder, budget, files, self._metrics, others, group)
        except OSError as error:
            raise StartupError(f"TURBOCACHE_SESSION_DIR: {folder} can't be used: {error.strerror}.") from error

    def _rest_all(self) -> None:
        """An orderly stop: what has been computed stays with its sessions, and these go to disk."""
        self._scheduler.rest_all()
        if self._settings.session_dir is None:
            return
        n_saved = 0
        for session in self._registry.idle()[::-1]:  # if the process is killed meanwhile, the dearest are there
            self._beat = time.monotonic()
            n_saved += len(session.tokens) >= LEAST_SHARED and self._registry.save(session)
        log.info("%d sessions of this run are on disk in %s", n_saved, self._settings.session_dir)

    def _close(self, error: ServerError) -> None:
        """Nothing is computed any more."""
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Call | Change):
                if command.done.set_running_or_notify_cancel():
                    command.done.set_exception(error)
            elif isinstance(command, QueuedRequest):
                self._waiting.add(command)
        self._scheduler.end_all(error)
        self._changes.close()

    def _decide(self, wait: bool) -> Decisions:
        """What this step does, on the rank that decides. With `wait` it waits a little for a command."""
        commands: list[Command] = []
        timeout = _IDLE_SECONDS if self._ranks.group.alone else TICK_SECONDS
        while True:
            try:
                command = self._commands.get(block=wait, timeout=timeout if wait else None)
            except queue.Empty:
                break
            wait = False
            if isinstance(command, _Call):
                command.run()
            elif command is not None:
                commands.append(command)
        return Decisions(time.time(), tuple(commands), self._scheduler.growth(), self._stopping)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Cancel):
            self._scheduler.cancel(command.request_id)
        elif isinstance(command, Change):
            self._change(command)
        elif self._ranks.group.leads:
            self._waiting.add(command)
        else:
            n_prompt = len(command.request.prompt.tokens)
            self._budget.record(command.request.request_id, n_prompt + command.allowed, n_prompt)
            self._waiting.follow(command)

    def _change(self, asked: Change) -> None:
        if not asked.done.set_running_or_notify_cancel():
            if self._ranks.group.alone:
                return
            asked = replace(asked, done=Future())  # the other ranks make it: they don't know that nobody waits for it
        try:
            asked.done.set_result(self._changes.make(asked.change, asked.owner, asked.id, asked.new_id))
        except Exception as error:
            asked.done.set_exception(error)
            if not isinstance(error, ServerError) and not self._ranks.group.alone:
                raise  # the other ranks may have done it

    # Among the ranks of a group.

    def _report(self) -> dict[str, Any]:
        """What the other ranks are told of this one."""
        memory = self._scheduler.stats.memory if self._serving else {}
        return {"step": self._ranks.lockstep.step, "silent_seconds": time.monotonic() - self._beat, "memory": memory}

    def _end_group(self, reason: str) -> None:
        """The thread may wait in MLX for ever, so that requests hear of it from here. Called from any thread."""
        self._death = f"the group of ranks has ended: {reason}"
        if not self._serving:
            self._startup_error = StartupError(f"The group of ranks has ended: {reason}.")
            self._ready.set()
            return
        failure = EngineDead(f"The group of ranks that computes the answers has ended: {reason}. Please try again.")
        for run in list(self._scheduler.runs.values()):
            run.deliver(Failed(failure))
        for entry in self._waiting:
            entry.deliver(Failed(failure))
