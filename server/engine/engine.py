"""The engine thread: takes requests, keeps the batch full, feeds tokens back, and puts sessions to rest."""

import gc
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from mlx_lm.generate import BatchGenerator, GenerationBatch
from mlx_lm.sample_utils import Sampler, make_sampler

from server.engine.budget import Budget
from server.engine.gauges import Gauges
from server.engine.generator import first_tokens, new_generator
from server.engine.host import Host, announce, load_host
from server.engine.prompts import PromptEncoder
from server.engine.run import ANSWER_STEP, Run
from server.engine.sessions import SessionRegistry
from server.engine.text import TextAssembler
from server.errors import (
    ContextLengthExceeded,
    EngineDead,
    InternalError,
    InvalidRequest,
    QueueFull,
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
    SamplingParams,
)
from server.settings import Settings
from turbocache.memory import keep_freed_memory
from turbocache.store import evaluate

log = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5
_STOP_SECONDS = 30.0
_YIELD_SECONDS = 1e-3
"""After a first token the event loop gets the interpreter to itself, to send it before the next step is built."""


_Accepted = tuple[GenerationRequest, Deliver, int, int]
"""A request, its event sink, the most answer tokens it may have, and how many of them memory is promised for."""


class MlxEngine:
    """`server.protocol.Engine` on mlx-lm's BatchGenerator. One thread owns the model, the caches and the sessions."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._commands: queue.SimpleQueue[tuple[GenerationRequest, Deliver, int, int] | str | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._ready = threading.Event()
        self._startup_error: BaseException | None = None
        self._admission = threading.Lock()
        self._n_waiting = 0
        self._stopping = False
        self._death: str | None = None
        self._beat = time.monotonic()
        # Owned by the engine's thread from here on.
        self._host: Host
        self._prompts: PromptEncoder
        self._budget: Budget
        self._registry: SessionRegistry
        self._gauges: Gauges
        self._generator: BatchGenerator
        self._waiting: deque[_Accepted] = deque()
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

    def tokenize(self, messages: list[dict[str, Any]]) -> list[int]:
        """Messages through the model's chat template. Raises InvalidRequest when the template refuses them."""
        if not self._host.model.tokenizer.has_chat_template:
            raise InvalidRequest(f"The model {self._host.model.id} has no chat template.", param="messages")
        try:
            return self._prompts.encode(messages)
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Accept a request, or raise and accept nothing; see `server.protocol.Engine`."""
        health = self.health()
        if not health.alive:
            raise EngineDead(health.detail)
        limit = self._answer_limit(request)
        with self._admission:
            if self._n_waiting >= self._settings.queue_limit:
                raise QueueFull()
            # Without max_tokens the promise starts small and grows as the answer does.
            allowed = limit if request.max_tokens is not None else min(limit, ANSWER_STEP)
            self._budget.promise(request.request_id, len(request.prompt) + allowed)
            self._n_waiting += 1
        self._commands.put((request, deliver, limit, allowed))

    def cancel(self, request_id: str) -> None:
        self._commands.put(request_id)

    def health(self) -> Health:
        if not self._thread.is_alive() or self._stopping:
            return Health(False, self._death or "the engine thread has ended; restart the server")
        silent = time.monotonic() - self._beat
        if silent > self._settings.stall_seconds:
            return Health(False, f"the engine thread has not answered for {silent:.0f} s; restart the server")
        return Health(True, "ok")

    def backend(self) -> dict[str, Any]:
        return self._host.report()

    def sessions(self) -> list[dict[str, Any]]:
        return self._gauges.session_rows

    def _answer_limit(self, request: GenerationRequest) -> int:
        positions, n_prompt = self._host.model.max_positions, len(request.prompt)
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
                self._admit()
                if self._runs:
                    self._step()
                self._gauges.refresh_now_and_then(self._n_waiting, self._runs.values())
            self._end_all(EngineDead("The server is shutting down."))
        except BaseException as error:
            self._death = f"the engine thread died of {type(error).__name__}; see the log and restart the server"
            log.critical("the engine thread died", exc_info=error)
            self._end_all(EngineDead("The engine has died; the server must be restarted."))

    def _load(self) -> None:
        self._host = load_host(self._settings)
        self._prompts = PromptEncoder(self._host.model.tokenizer)
        store = self._host.store
        self._budget = Budget(self._host.budget, lambda n: store.session_nbytes(n, self._host.chunk))
        self._registry = SessionRegistry(store.new_cache)
        self._gauges = Gauges(self._metrics, self._host, self._registry)
        self._generator = self._new_generator()
        # What the start has loaded lives as long as the process: collections need not look at it between tokens.
        gc.collect()
        gc.freeze()
        announce(self._host)

    def _new_generator(self) -> BatchGenerator:
        return new_generator(self._host.model, self._settings.max_batch, self._settings.prefill_chunk)

    def _listen(self) -> None:
        """Take all commands; wait for one when there is nothing else to do."""
        block = not self._runs and not self._waiting
        while True:
            try:
                command = self._commands.get(block=block, timeout=_IDLE_SECONDS if block else None)
            except queue.Empty:
                return
            block = False
            if isinstance(command, str):
                self._cancel(command)
            elif command is not None:
                self._waiting.append(command)

    def _admit(self) -> None:
        """Start waiting requests, oldest first, while the batch has room. A turn whose session runs is passed over."""
        for entry in list(self._waiting):
            if len(self._runs) >= self._settings.max_batch:
                return
            if self._start(*entry):
                self._waiting.remove(entry)
                self._waited()

    def _start(self, request: GenerationRequest, deliver: Deliver, limit: int, allowed: int) -> bool:
        claim = self._registry.claim(request.session, request.prompt)
        if claim is None:
            return False
        self._make_room()
        tokenizer = self._host.model.tokenizer
        (uid,) = self._generator.insert(
            [list(request.prompt[claim.cached :])],
            max_tokens=[limit],
            caches=[claim.cache],
            all_tokens=[list(request.prompt[: claim.cached])],
            samplers=[_sampler(request.sampling)],
        )
        text = TextAssembler(tokenizer, request.prompt, request.stop)
        self._runs[uid] = Run(request, deliver, claim.session, claim.cached, text, limit, allowed)
        self._metrics.prompt_tokens.labels(source="cached").inc(claim.cached)
        return True

    def _make_room(self) -> None:
        """Evict idle sessions, if need be, until what is promised and what rests fit the budget together."""
        store = self._host.store
        idle = [(session, store.held_nbytes(session.cache or ())) for session in self._registry.idle()]
        excess = self._budget.promised + sum(held for _, held in idle) - self._budget.total
        for session, held in idle:
            if excess <= 0:
                return
            self._registry.forget(session)
            self._metrics.evictions.labels(reason="memory").inc()
            excess -= held

    def _step(self) -> None:
        try:
            prompts, tokens = self._generator.next()
        except Exception as error:
            log.error("a step failed; the requests in it are answered with an error", exc_info=error)
            self._drop_batch(error)
            return
        for response in tokens:
            if run := self._runs.get(response.uid):
                self._take(run, response)
        for progress in prompts:
            if run := self._runs.get(progress.uid):
                run.deliver(PrefillProgress(*progress.progress))
        self._begin_answers(progress.uid for progress in prompts if progress.end_of_prompt)

    def _begin_answers(self, uids: Iterable[int]) -> None:
        """Prompts are through: count them, and send the first token's text without waiting for the second."""
        for uid, token in first_tokens(self._generator, uids).items():
            run = self._runs[uid]
            self._metrics.prompt_tokens.labels(source="prefilled").inc(len(run.request.prompt) - run.cached)
            if token not in self._host.model.tokenizer.eos_token_ids:
                run.send(run.text.add(token))
                run.sent_ahead = True
                time.sleep(_YIELD_SECONDS)

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
        if not self._budget.extend(run.request.request_id, len(run.request.prompt) + allowed):
            return False
        run.allowed = allowed
        self._make_room()
        return True

    def _finish(self, uid: int, run: Run, reason: FinishReason, cache: Any, tokens: Any) -> None:
        run.send(run.text.finish())
        if cache is None:
            cache, tokens = self._generator.remove([uid], return_prompt_caches=True)[uid]
        self._rest(uid, run, cache, tokens)
        run.deliver(Finished(reason, run.usage))

    def _rest(self, uid: int, run: Run, cache: Any, tokens: Any) -> None:
        """Give a run's session its cache back and void the run's promise."""
        evaluate(cache)
        del self._runs[uid]
        self._registry.put_back(run.session, cache, tokens)
        self._budget.release(run.request.request_id)
        # Before the client hears of the end, so that what it asks next sees this turn.
        self._gauges.refresh(self._n_waiting, self._runs.values())

    def _cancel(self, request_id: str) -> None:
        """Stop working for a client that is gone. What its session has cached so far stays."""
        for entry in self._waiting:
            if entry[0].request_id == request_id:
                self._waiting.remove(entry)
                self._waited()
                self._budget.release(request_id)
                return
        for uid, run in self._runs.items():
            if run.request.request_id == request_id:
                cache, tokens = self._generator.remove([uid], return_prompt_caches=True)[uid]
                self._rest(uid, run, cache, tokens)
                return

    def _drop_batch(self, error: Exception) -> None:
        """A step failed midway: its rows can't be trusted. Fail the runs, forget their sessions' caches, start anew."""
        self._generator = self._new_generator()
        self._host.store.close_all_but(session.cache for session in self._registry if session.cache is not None)
        for run in self._runs.values():
            self._registry.put_back(run.session, None, [])
            self._budget.release(run.request.request_id)
            failure = InternalError.of(run.request.request_id)
            failure.__cause__ = error
            run.deliver(Failed(failure))
        self._runs.clear()

    def _end_all(self, error: EngineDead) -> None:
        for run in self._runs.values():
            run.deliver(Failed(error))
        for _, deliver, _, _ in self._waiting:
            deliver(Failed(error))
        self._runs.clear()
        self._waiting.clear()

    def _waited(self) -> None:
        with self._admission:
            self._n_waiting -= 1


@lru_cache(maxsize=64)
def _sampler(params: SamplingParams) -> Sampler:
    """One sampler object for equal parameters, so that a batch which shares them samples in one call."""
    return make_sampler(temp=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=params.top_k)
