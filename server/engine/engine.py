"""The engine thread: takes requests, keeps the batch full, feeds tokens back, and puts sessions to rest."""

import gc
import logging
import queue
import threading
import time
from collections.abc import Iterable
from typing import Any

from mlx_lm.generate import GenerationBatch, PromptProcessingBatch

from server.engine.budget import Budget, make_room
from server.engine.checkpoints import Kind
from server.engine.disk import SessionDisk
from server.engine.faults import FaultLog
from server.engine.gauges import Gauges
from server.engine.generator import Generator
from server.engine.host import Host, announce, load_host
from server.engine.prompt import PromptMaker
from server.engine.run import ANSWER_STEP, Run
from server.engine.sessions import LEAST_SHARED, SessionRegistry
from server.engine.text import TextAssembler
from server.engine.waiting import Entry, WaitingRoom
from server.errors import (
    ContextLengthExceeded,
    EngineDead,
    InternalError,
    KernelFault,
    OutOfMemory,
    ServerError,
    StartupError,
)
from server.metrics import Metrics
from server.protocol import (
    Deliver,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    ModelInfo,
    PrefillProgress,
    Prompt,
)
from server.settings import Settings
from turbocache.memory import keep_freed_memory
from turbocache.persistence import SessionFiles
from turbocache.pool import PoolExhausted
from turbocache.store import evaluate

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5
_STOP_SECONDS = 30.0
_YIELD_SECONDS = 1e-3
"""After a first token the event loop gets the interpreter to itself, to send it before the next step is built."""


class MlxEngine:
    """`server.protocol.Engine` on mlx-lm's BatchGenerator. One thread owns the model, the caches and the sessions."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._commands: queue.SimpleQueue[Entry | str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._ready = threading.Event()
        self._startup_error: BaseException | None = None
        self._waiting = WaitingRoom(settings.queue_limit)
        self._stopping = False
        self._death: str | None = None
        self._beat = time.monotonic()
        # Owned by the engine's thread from here on.
        self._host: Host
        self._prompts: PromptMaker
        self._budget: Budget
        self._registry: SessionRegistry
        self._gauges: Gauges
        self._faults: FaultLog
        self._generator: Generator
        self._runs: dict[int, Run] = {}

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
        """End every request with an error and the thread with it."""
        self._stopping = True
        self._commands.put(None)
        self._thread.join(_STOP_SECONDS)

    @property
    def model(self) -> ModelInfo:
        model = self._host.model
        return ModelInfo(model.id, model.created, model.max_positions)

    def tokenize(self, messages: list[dict[str, Any]]) -> Prompt:
        """Messages through the model's chat template. Raises InvalidRequest when the template refuses them."""
        return self._prompts.prompt(messages)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Accept a request, or raise and accept nothing; see `server.protocol.Engine`."""
        health = self.health()
        if not health.alive:
            raise EngineDead(health.detail)
        limit = self._answer_limit(request)
        # Without max_tokens the promise starts small and grows as the answer does.
        allowed = limit if request.max_tokens is not None else min(limit, ANSWER_STEP)
        self._waiting.enter()
        try:
            self._budget.promise(request.request_id, len(request.prompt.tokens) + allowed)
        except OutOfMemory:
            self._waiting.leave()
            raise
        self._commands.put(Entry(request, deliver, limit, allowed))

    def cancel(self, request_id: str) -> None:
        self._commands.put(request_id)

    def health(self) -> Health:
        if not self._thread.is_alive() or self._stopping:
            return Health(False, self._death or "the engine thread has ended; restart the server")
        silent = time.monotonic() - self._beat
        if silent > self._settings.stall_seconds:
            return Health(False, f"the engine thread has not answered for {silent:.0f} s; restart the server")
        if self._faults.verdict is not None:
            return Health(False, self._faults.verdict)
        return Health(True, "ok")

    def backend(self) -> dict[str, Any]:
        return self._host.report()

    def sessions(self) -> list[dict[str, Any]]:
        return self._gauges.session_rows

    def _answer_limit(self, request: GenerationRequest) -> int:
        positions, n_prompt = self._host.model.max_positions, len(request.prompt.tokens)
        if n_prompt >= positions or n_prompt + (request.max_tokens or 0) > positions:
            raise ContextLengthExceeded(limit=positions, prompt_tokens=n_prompt, max_tokens=request.max_tokens)
        return request.max_tokens or positions - n_prompt

    # The engine's thread.

    def _main(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self._startup_error = error
            return
        finally:
            self._ready.set()
        try:
            while not self._stopping:
                self._beat = time.monotonic()
                self._listen()
                if self._faults.verdict is not None:
                    self._refuse(self._faults.verdict)
                self._admit()
                if self._runs:
                    self._step()
                self._gauges.refresh_now_and_then(len(self._waiting), self._runs.values())
            if self._faults.verdict is None:
                self._rest_all()
            self._end_all(EngineDead("The server is shutting down."))
        except BaseException as error:
            self._death = f"the engine thread died of {type(error).__name__}; see the log and restart the server"
            log.critical("the engine thread died", exc_info=error)
            self._end_all(EngineDead("The engine has died; the server must be restarted."))

    def _load(self) -> None:
        self._host = load_host(self._settings)
        self._prompts = PromptMaker(self._host.model)
        store = self._host.store
        self._budget = Budget(self._host.budget, lambda n: store.session_nbytes(n, self._host.chunk))
        self._registry = SessionRegistry(store, self._disk(), self._make_room)
        self._gauges = Gauges(self._metrics, self._host, self._registry)
        self._faults = FaultLog(self._metrics, self._host.backend.name)
        self._generator = self._new_generator()
        # What the start has loaded lives as long as the process: collections need not look at it between tokens.
        gc.collect()
        gc.freeze()
        announce(self._host)

    def _disk(self) -> SessionDisk | None:
        if (folder := self._settings.session_dir) is None:
            return None
        try:
            files = SessionFiles(self._host.model, self._host.store)
            return SessionDisk(folder, self._settings.session_disk, files, self._metrics)
        except OSError as error:
            raise StartupError(f"TURBOCACHE_SESSION_DIR: {folder} can't be used: {error.strerror}.") from error

    def _rest_all(self) -> None:
        """An orderly stop: what has been computed stays with its sessions, and these go to disk."""
        for uid, run in list(self._runs.items()):
            self._rest(uid, run, *self._generator.remove(uid))
            run.deliver(Failed(EngineDead("The server is shutting down.")))
        if self._settings.session_dir is not None:
            log.info("%d sessions are on disk in %s", self._registry.save_all(), self._settings.session_dir)

    def _new_generator(self) -> Generator:
        return Generator(self._host.model, self._settings.max_batch, self._settings.prefill_chunk)

    def _listen(self) -> None:
        """Take all commands; wait for one when there is nothing else to do."""
        block = not self._runs and self._waiting.empty
        while True:
            try:
                command = self._commands.get(block=block, timeout=_IDLE_SECONDS if block else None)
            except queue.Empty:
                return
            block = False
            if isinstance(command, str):
                self._cancel(command)
            elif command is not None:
                self._waiting.add(command)

    def _admit(self) -> None:
        """Start waiting requests, oldest first, while the batch has room. A turn whose session runs is passed over."""
        for entry in self._waiting:
            if len(self._runs) >= self._settings.max_batch:
                return
            if self._start(entry):
                self._waiting.remove(entry)

    def _start(self, entry: Entry) -> bool:
        request = entry.request
        claim = self._registry.claim(request.session, request.prompt.tokens)
        if claim is None:
            return False
        self._make_room()
        tokens, stops = request.prompt.tokens, self._stops(request.prompt, claim.cached)
        uid = self._generator.insert(tokens, claim.cached, claim.cache, entry.limit, request.sampling, stops)
        text = TextAssembler(self._host.model.tokenizer, tokens, request.stop)
        run = Run(request, entry.deliver, claim.session, claim.cached, text, entry.limit, entry.allowed, stops=stops)
        self._runs[uid] = run
        self._metrics.prompt_tokens.labels(source="cached").inc(claim.cached)
        self._metrics.checkpoint_hits.labels(kind=claim.source).inc()
        return True

    def _stops(self, prompt: Prompt, cached: int) -> dict[int, Kind]:
        """Where in a prompt to take checkpoints while it is read. Of a state that can't go back by the few tokens that
        open an answer one is taken before them.
        """
        store, stops = self._host.store, dict[int, Kind]()
        if not store.can_checkpoint:
            return stops
        if prompt.system_end >= cached + LEAST_SHARED:
            stops[prompt.system_end] = "system"
        if prompt.messages_end > cached and not store.can_go_back:
            stops[prompt.messages_end] = "prompt"
        return stops

    def _make_room(self) -> None:
        evicted = make_room(self._budget, self._registry, self._host.store)
        self._metrics.evictions.labels(reason="memory").inc(evicted.sessions)
        self._metrics.checkpoint_drops.labels(reason="memory").inc(evicted.checkpoints)

    def _step(self) -> None:
        try:
            prompts, tokens = self._generator.next()
        except Exception as error:
            log.error("a step failed; the requests in it are answered with an error", exc_info=error)
            if not isinstance(error, PoolExhausted):
                self._faults.note(type(error).__name__)
            self._drop_batch(InternalError if isinstance(error, PoolExhausted) else KernelFault, error)
            return
        bad = []
        for response in tokens:
            if (run := self._runs.get(response.uid)) is None:
                continue
            if self._generator.finite(response.uid):
                self._take(run, response)
            else:
                bad.append(response.uid)
        for progress in prompts:
            if run := self._runs.get(progress.uid):
                self._checkpoint_stop(progress, run)
                run.deliver(PrefillProgress(*progress.progress))
        bad += self._begin_answers(progress.uid for progress in prompts if progress.end_of_prompt)
        if bad:
            self._fail_rows(bad)

    def _begin_answers(self, uids: Iterable[int]) -> list[int]:
        """Prompts are through: count them, and send the first token's text without waiting for the second. Returns
        the rows that have no first token because their logits are not finite.
        """
        bad = []
        firsts = self._generator.first_tokens(uids)
        for uid, token in firsts.items():
            run = self._runs[uid]
            self._metrics.prompt_tokens.labels(source="prefilled").inc(len(run.request.prompt.tokens) - run.cached)
            if token is None:
                bad.append(uid)
            elif token not in self._host.model.tokenizer.eos_token_ids:
                run.send(run.text.add(token))
                run.sent_ahead = True
                time.sleep(_YIELD_SECONDS)
        for uid in firsts.keys() - bad:
            self._checkpoint_prompt(uid, self._runs[uid])
        return bad

    def _checkpoint_stop(self, progress: PromptProcessingBatch.Response, run: Run) -> None:
        """A prompt has come to a place at which it may have to stop."""
        at = run.cached + progress.progress[0]
        if progress.end_of_segment and not progress.end_of_prompt and (kind := run.stops.get(at)):
            self._checkpoint(progress.uid, run, kind, at)

    def _checkpoint_prompt(self, uid: int, run: Run) -> None:
        """The prompt is in the cache and nothing of the answer."""
        if self._host.store.can_checkpoint and self._host.store.can_go_back:
            self._checkpoint(uid, run, "prompt", len(run.request.prompt.tokens))

    def _checkpoint(self, uid: int, run: Run, kind: Kind, n_tokens: int) -> None:
        cache = self._generator.snapshot(uid)
        self._registry.checkpoint(run.session, kind, run.request.prompt.tokens[:n_tokens], cache)
        self._make_room()

    def _take(self, run: Run, response: GenerationBatch.Response) -> None:
        """One token of one run."""
        run.generated += 1
        self._metrics.generated_tokens.inc()
        if (interval := run.token_interval()) is not None:
            self._metrics.inter_token_latency.observe(interval)
        if run.sent_ahead:
            run.sent_ahead = False
        elif response.finish_reason != "stop":
            run.send(run.text.add(response.token))
        if run.text.stopped or response.finish_reason is not None:
            reason: FinishReason = "length" if response.finish_reason == "length" and not run.text.stopped else "stop"
            self._finish(response.uid, run, reason, response.prompt_cache, response.all_tokens)
        elif run.generated == run.allowed and not self._allow_more(run):
            self._finish(response.uid, run, "length", None, None)

    def _allow_more(self, run: Run) -> bool:
        allowed = min(run.limit, run.allowed + ANSWER_STEP)
        if not self._budget.extend(run.request.request_id, len(run.request.prompt.tokens) + allowed):
            return False
        run.allowed = allowed
        self._make_room()
        return True

    def _finish(self, uid: int, run: Run, reason: FinishReason, cache: Any, tokens: Any) -> None:
        run.send(run.text.finish())
        if cache is None:
            cache, tokens = self._generator.remove(uid)
        self._rest(uid, run, cache, tokens)
        run.deliver(Finished(reason, run.usage))

    def _rest(self, uid: int, run: Run, cache: Any, tokens: Any) -> None:
        """Give a run's session its cache back and void the run's promise."""
        evaluate(cache)
        del self._runs[uid]
        self._registry.put_back(run.session, cache, tokens)
        self._budget.release(run.request.request_id)
        # Before the client hears of the end, so that what it asks next sees this turn.
        self._gauges.refresh(len(self._waiting), self._runs.values())

    def _cancel(self, request_id: str) -> None:
        """Stop working for a client that is gone. What its session has cached so far stays."""
        for entry in self._waiting:
            if entry.request.request_id == request_id:
                self._waiting.remove(entry)
                self._budget.release(request_id)
                return
        for uid, run in self._runs.items():
            if run.request.request_id == request_id:
                self._rest(uid, run, *self._generator.remove(uid))
                return

    def _fail_rows(self, uids: list[int]) -> None:
        """Rows whose logits are not finite: end them before their next token, and forget what they have cached."""
        self._faults.note(f"{len(uids)} of {len(self._runs)} rows with logits that are not finite")
        for uid in uids:
            self._generator.drop(uid)
            run = self._runs.pop(uid)
            self._give_up(run, KernelFault.of(run.request.request_id))

    def _drop_batch(self, kind: type[InternalError], error: Exception) -> None:
        """A step failed midway: its rows can't be trusted. Fail the runs, forget their sessions' caches, start anew."""
        self._generator = self._new_generator()
        self._host.store.close_all_but(self._registry.caches())
        runs, self._runs = self._runs, {}
        for run in runs.values():
            failure = kind.of(run.request.request_id)
            failure.__cause__ = error
            self._give_up(run, failure)

    def _refuse(self, verdict: str) -> None:
        """Too many faults. What rests is kept, though nobody will be answered before a restart."""
        if self._runs:
            self._generator = self._new_generator()
        self._end_all(EngineDead(f"The server has stopped answering: {verdict}."))

    def _give_up(self, run: Run, error: ServerError) -> None:
        """End a run that is out of the batch; its session is forgotten and its promise void."""
        self._registry.put_back(run.session, None, [])
        self._budget.release(run.request.request_id)
        self._gauges.refresh(len(self._waiting), self._runs.values())
        run.deliver(Failed(error))

    def _end_all(self, error: EngineDead) -> None:
        """Nothing is computed any more: end what runs and what waits."""
        runs, self._runs = self._runs, {}
        for run in runs.values():
            self._give_up(run, error)
        for entry in self._waiting:
            self._waiting.remove(entry)
            self._budget.release(entry.request.request_id)
            entry.deliver(Failed(error))
