"""Starts waiting requests when the batch has room, steps the batch, and ends requests."""

import functools
import logging
import time
from collections.abc import Iterable, Mapping

from mlx_lm.generate import GenerationBatch, PromptProcessingBatch

from server.commands import QueuedRequest
from server.engine.budget import make_room
from server.engine.generator import Generator
from server.engine.running import RunningRequest
from server.engine.services import Services
from server.engine.stats import Stats
from server.errors import EngineDead, GrammarFailed, InternalError, KernelFault, OutOfMemory, ServerError, ShuttingDown
from server.protocol import Failed, Finished, FinishReason, GenerationRequest, PrefillProgress
from server.sessions.checkpoints import Kind, prompt_kind, prompt_stops
from server.sessions.registry import Claim
from server.text.assembler import TextAssembler
from turbocache.cache.pool import PoolExhausted
from turbocache.cache.ring import PageRing
from turbocache.store import describe, evaluate

log = logging.getLogger(__name__)

_STEPS_AHEAD = 2
_YIELD_SECONDS = 1e-3
"""After first tokens the event loop has the interpreter for this long, so that they are sent before the next step."""


class Scheduler:
    """Runs the requests of the queue in one batch."""

    def __init__(self, services: Services) -> None:
        self.batch: dict[int, RunningRequest] = {}
        """Requests in the batch, by the generator's uids."""
        self._services = services
        self._metrics = services.metrics
        self._store = services.runtime.store
        self._queue = services.queue
        self._budget = services.budget
        self._registry = services.registry
        self._tokens: list[tuple[int, int]] = []
        self.generator = self._new_generator()
        self.stats = Stats(services, self._running)

    def _new_generator(self) -> Generator:
        settings = self._services.settings
        return Generator(self._services.runtime.model, settings.max_batch, settings.prefill_chunk)

    def result(self) -> bytes:
        """The tokens of the last step and the sizes of pools and queue. Equal on all ranks of a group."""
        used = [spec.pool.n_used for spec in self._store.specs]
        return repr((self._tokens, used, len(list(self._queue)))).encode()

    def _running(self) -> list[tuple[RunningRequest, PageRing | None]]:
        """The requests in the batch, and their rings."""
        rings = self.generator.rings() if self.batch else {}
        return [(running, rings.get(uid)) for uid, running in self.batch.items()]

    # Into the batch.

    def admit(self) -> None:
        """Start waiting requests, oldest first, while the batch has room. Those that must wait are passed over: their
        session is running, or the prompt that they share is not yet read.
        """
        for queued in self._queue:
            if len(self.batch) >= self._services.settings.max_batch:
                return
            if not self._is_prefilling(queued.request.shares_prompt_of) and self._start(queued):
                self._queue.remove(queued)

    def _is_prefilling(self, request_id: str | None) -> bool:
        """Whether a request waits or reads its prompt."""
        if request_id is None:
            return False
        reading = any(running.id == request_id and not running.answering for running in self.batch.values())
        return reading or any(queued.request.request_id == request_id for queued in self._queue)

    def _start(self, queued: QueuedRequest) -> bool:
        """Start a request, or end it with a refusal. False when it has to wait."""
        request = queued.request
        self._budget.start(request.request_id)
        room = functools.partial(self.make_room, request)
        passing = request.shares_prompt_of is not None
        claim = self._registry.claim(request.session, request.prompt, request.owner, room, passing=passing)
        if claim is None:
            self._budget.start(request.request_id, started=False)
            return False
        if self.make_room(request):
            self._insert(queued, claim)
            return True
        self._registry.give_back(claim, request.prompt.tokens)
        self._budget.release(request.request_id)
        self._metrics.admission_refusals.labels(reason="later_sessions").inc()
        refusal = "The memory is held by named conversations that were used after this request came. Please try again."
        queued.deliver(Failed(OutOfMemory(refusal)))
        return True

    def _insert(self, queued: QueuedRequest, claim: Claim) -> None:
        services, request, tokens = self._services, queued.request, queued.request.prompt.tokens
        stops = prompt_stops(request.prompt, claim.cached, self._store) if request.shares_prompt_of is None else {}
        grammar = services.grammars.with_matcher(request.grammar)
        describe(claim.cache, request.prompt.outline)
        uid = self.generator.insert(tokens, claim.cached, claim.cache, queued.limit, request.sampling, stops, grammar)
        text = TextAssembler(
            services.runtime.model.tokenizer,
            request.prompt.opening,
            request.stop,
            request.rules,
            services.tool_format,
            begun=request.prompt.continued,
            vocabulary=services.vocabulary,
        )
        # The claim itself would keep its cache beside the batch's.
        self.batch[uid] = RunningRequest(
            queued, claim.session, claim.cached, claim.prefill, text, queued.promised, stops
        )
        self._metrics.prompt_tokens.labels(source="cached").inc(claim.cached)
        self._metrics.checkpoint_hits.labels(kind=claim.source).inc()
        queued.deliver(PrefillProgress(0, len(tokens) - claim.cached))

    def make_room(self, request: GenerationRequest | None = None) -> bool:
        """Evict until all fits into the budget. An unnamed request evicts no named session that was used after it came.
        False if that is not enough.
        """
        before = request.arrived if request is not None and request.session is None else None
        room = make_room(self._budget, self._registry, self._store, before)
        self._metrics.evictions.labels(reason="memory").inc(room.sessions)
        self._metrics.checkpoint_drops.labels(reason="memory").inc(room.checkpoints)
        return room.enough

    # Steps.

    def step(self) -> None:
        """One step of the batch: a token for each row that answers, a chunk for each row that reads its prompt."""
        try:
            prompts, tokens = self.generator.next()
        except Exception as error:
            log.error("a step failed; the requests in it are answered with an error", exc_info=error)
            if not isinstance(error, PoolExhausted):
                self._services.coordinator.check_failure(error)
                self._services.faults.note(type(error).__name__)
            self._fail_batch(InternalError if isinstance(error, PoolExhausted) else KernelFault, error)
            return
        self._tokens = [(response.uid, response.token) for response in tokens]
        if tokens:
            self._metrics.batch_rows.observe(len(tokens))
        bad = []
        for response in tokens:
            if (running := self.batch.get(response.uid)) is None:
                continue
            if not self.generator.is_finite(response.token):
                bad.append(response.uid)
            elif failure := self.generator.grammar_error(response.uid, response.finish_reason is not None):
                self._fail_grammar(response, running, failure)
            else:
                self._take_token(running, response)
        for progress in prompts:
            if running := self.batch.get(progress.uid):
                self._checkpoint_stop(progress, running)
                running.deliver(PrefillProgress(*progress.progress))
        bad += self._begin_answers(progress.uid for progress in prompts if progress.end_of_prompt)
        if bad:
            self._fail_rows(bad)

    def _begin_answers(self, uids: Iterable[int]) -> list[int]:
        """Prompts are read: count them, and send the first token's text without waiting for the second. Returns the
        rows without a first token because their logits are not finite.
        """
        bad, sent, ends = [], False, self._services.runtime.model.tokenizer.eos_token_ids
        first_tokens = self.generator.first_tokens(uids)
        for uid, token in first_tokens.items():
            running = self.batch[uid]
            self._count_prefill(running)
            if token is None:
                bad.append(uid)
            elif token not in ends and not self.generator.grammar_error(uid):
                running.note(token, self.generator.first_logprobs(uid), self._services.vocabulary)
                running.send(running.text.add(token))
                running.sent_ahead = sent = True
        if sent:
            time.sleep(_YIELD_SECONDS)
        for uid in first_tokens.keys() - bad:
            self._checkpoint_prompt(uid, self.batch[uid])
        return bad

    def _count_prefill(self, running: RunningRequest) -> None:
        running.answering = True
        self._budget.prefilled(running.id)
        n_prefilled = len(running.request.prompt.tokens) - running.cached
        self._metrics.prompt_tokens.labels(source="prefilled").inc(n_prefilled)
        for reason, n in running.prefill.items():
            self._metrics.prefilled_tokens.labels(reason=reason).inc(n)

    def _checkpoint_stop(self, progress: PromptProcessingBatch.Response, running: RunningRequest) -> None:
        """Take a checkpoint if the prompt has reached one of its stops."""
        at = running.cached + progress.progress[0]
        if progress.end_of_segment and not progress.end_of_prompt and (kind := running.stops.get(at)):
            self._checkpoint(progress.uid, running, kind, at)

    def _checkpoint_prompt(self, uid: int, running: RunningRequest) -> None:
        """The cache holds the prompt and nothing of the answer."""
        prompt = running.request.prompt
        if self._store.can_checkpoint and self._store.can_go_back and running.request.shares_prompt_of is None:
            self._checkpoint(uid, running, prompt_kind(prompt), len(prompt.tokens))

    def _checkpoint(self, uid: int, running: RunningRequest, kind: Kind, n_tokens: int) -> None:
        cache = self.generator.snapshot(uid)
        self._registry.checkpoint(running.session, kind, running.request.prompt.tokens[:n_tokens], cache)
        self.make_room(running.request)

    def _take_token(self, running: RunningRequest, response: GenerationBatch.Response) -> None:
        running.generated += 1
        self._metrics.generated_tokens.inc()
        if (interval := running.token_interval()) is not None:
            self._metrics.inter_token_latency_seconds.observe(interval)
        if running.sent_ahead:
            running.sent_ahead = False
        elif response.finish_reason != "stop":
            running.note(response.token, response.logprobs, self._services.vocabulary)
            running.send(running.text.add(response.token))
        if running.text.stopped or response.finish_reason is not None:
            length = response.finish_reason == "length" and not running.text.stopped
            self._finish(running, response.uid, "length" if length else "stop", response)
        elif running.generated == running.promised:
            self._finish(running, response.uid, "length")

    # Answers that outgrow their promise.

    def wanted_extensions(self) -> dict[str, bool]:
        """Requests with at most two tokens of their promise left, and whether the budget allows the next promise. It is
        made if so. Two tokens, because a group uses a plan one step after it was made.
        """
        due = [
            running
            for running in self.batch.values()
            if running.generated + _STEPS_AHEAD >= running.promised < running.queued.limit
        ]
        return {running.id: self._budget.extend(running.id, running.next_size) for running in due}

    def extend_promises(self, extensions: Mapping[str, bool]) -> None:
        """Let the answers grow that the plan allows to."""
        for running in self.batch.values():
            if extensions.get(running.id):
                self._budget.raise_to(running.id, running.next_size)
                if self.make_room(running.request):
                    running.promised = running.next_promise

    # Out of the batch.

    def _finish(
        self,
        running: RunningRequest,
        uid: int,
        reason: FinishReason,
        response: GenerationBatch.Response | None = None,
    ) -> None:
        running.send_rest(running.text.finish())
        self._release(uid, running, response)
        if reason == "stop" and running.text.called:
            reason = "tool_calls"
        running.deliver(Finished(reason, running.usage, running.text.stop))

    def _release(self, uid: int, running: RunningRequest, response: GenerationBatch.Response | None = None) -> None:
        """Give the session its cache back, which `response` has if the row has ended by itself, and end the promise."""
        cache, tokens = (None, None) if response is None else (response.prompt_cache, response.all_tokens)
        if cache is None or tokens is None:
            cache, tokens = self.generator.remove(uid)
        evaluate(cache)
        del self.batch[uid]
        self._registry.put_back(running.session, cache, tokens)
        self._budget.release(running.id)
        # Before the client learns of the end, so that what it asks next shows this turn.
        self.stats.refresh()

    def stop_all(self) -> None:
        """An orderly stop: sessions keep what was computed."""
        for uid, running in list(self.batch.items()):
            self._release(uid, running)
            running.deliver(Failed(ShuttingDown()))

    def cancel(self, request_id: str) -> None:
        """Stop a request whose client has left. Its session keeps what was computed."""
        for queued in self._queue:
            if queued.request.request_id == request_id:
                self._queue.remove(queued)
                self._budget.release(request_id)
                return
        for uid, running in self.batch.items():
            if running.id == request_id:
                self._release(uid, running)
                return

    # Failures.

    def _fail_grammar(self, response: GenerationBatch.Response, running: RunningRequest, error: str) -> None:
        """The answer keeps to its grammar so far, but the grammar can't continue."""
        log.error("%s: llguidance could not continue: %s", running.id, error)
        self._release(response.uid, running, response)
        running.deliver(Failed(GrammarFailed.of(running.id)))

    def _fail_rows(self, uids: list[int]) -> None:
        """End rows whose logits are not finite before their next token, and forget their sessions' caches."""
        self._services.faults.note(f"{len(uids)} of {len(self.batch)} rows with logits that are not finite")
        for uid in uids:
            self.generator.drop(uid)
            running = self.batch.pop(uid)
            self._discard(running, KernelFault.of(running.id))

    def _fail_batch(self, kind: type[InternalError], error: Exception) -> None:
        """A step failed midway, so its rows can't be trusted: end them, forget their caches, and start a new batch."""
        self.generator = self._new_generator()
        self._store.close_all_but(self._registry.caches())
        batch, self.batch = self.batch, {}
        for running in batch.values():
            failure = kind.of(running.id)
            failure.__cause__ = error
            self._discard(running, failure)

    def refuse_all(self, verdict: str) -> None:
        """Too many faults: end all requests. Sessions that are not running keep their caches until a restart."""
        if self.batch:
            self.generator = self._new_generator()
        self.end_all(EngineDead(f"The server has stopped answering: {verdict}."))

    def end_all(self, error: ServerError) -> None:
        """End all requests in the batch and the queue."""
        batch, self.batch = self.batch, {}
        for running in batch.values():
            self._discard(running, error)
        for queued in self._queue:
            self._queue.remove(queued)
            self._budget.release(queued.request.request_id)
            queued.deliver(Failed(error))

    def _discard(self, running: RunningRequest, error: ServerError) -> None:
        """End a request that has left the batch, and forget its session's cache."""
        self._registry.put_back(running.session, None, [])
        self._budget.release(running.id)
        self.stats.refresh()
        running.deliver(Failed(error))
