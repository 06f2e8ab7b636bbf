"""The turns in the batch: started when there is room, stepped together, and put to rest with their sessions.

Everything here runs on the engine's thread.
"""

import functools
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch

from server.engine.budget import Budget, make_room
from server.engine.faults import FaultLog
from server.engine.generator import Generator
from server.engine.queue import QueuedRequest, WaitingQueue
from server.engine.running import ANSWER_STEP, RunningRequest
from server.engine.sampling import top_tokens
from server.engine.startup import Runtime
from server.engine.stats import Stats
from server.errors import (
    EngineDead,
    GrammarFailed,
    InternalError,
    KernelFault,
    OutOfMemory,
    ServerError,
    ShuttingDown,
)
from server.group.ranks import Ranks
from server.metrics import Metrics
from server.protocol import (
    DrawnToken,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    PrefillProgress,
    TokenLogprob,
)
from server.sessions.checkpoints import Kind, prompt_kind, prompt_stops
from server.sessions.registry import Claim, SessionRegistry
from server.settings import Settings
from server.text.assembler import TextAssembler, Vocabulary
from server.text.grammar import GrammarCompiler
from server.text.tool_formats import ToolFormat
from turbocache.cache.pool import PoolExhausted
from turbocache.store import evaluate

log = logging.getLogger(__name__)

_AHEAD = 2
_YIELD_SECONDS = 1e-3
"""After a first token the event loop gets the interpreter to itself, to send it before the next step is built."""


class Scheduler:
    """Runs requests from `waiting` in one batch. `runs` are those in it, by the generator's uids."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        runtime: Runtime,
        ranks: Ranks,
        waiting: WaitingQueue,
        budget: Budget,
        registry: SessionRegistry,
        vocabulary: Vocabulary,
        grammars: GrammarCompiler,
        format: ToolFormat | None,
    ) -> None:
        self.runs: dict[int, RunningRequest] = {}
        self.faults = FaultLog(metrics, runtime.backend.name)
        self.stats = Stats(metrics, runtime, ranks, registry, budget)
        self._settings = settings
        self._metrics = metrics
        self._runtime = runtime
        self._waiting = waiting
        self._budget = budget
        self._registry = registry
        self._vocabulary = vocabulary
        self._grammars = grammars
        self._format = format
        self._handed: list[tuple[int, int]] = []
        self.generator = self._new_generator()

    def _new_generator(self) -> Generator:
        return Generator(self._runtime.model, self._settings.max_batch, self._settings.prefill_chunk)

    def done(self) -> bytes:
        """What the last step handed out and what is held since, for ranks to compare."""
        return repr((self._handed, self._runtime.store.spec.pool.n_used, len(list(self._waiting)))).encode()

    def refresh(self) -> None:
        """Bring gauges and session rows up to date."""
        self.stats.refresh(len(self._waiting), self.runs, self.generator.rings)

    def refresh_now_and_then(self) -> None:
        self.stats.refresh_now_and_then(len(self._waiting), self.runs, self.generator.rings)

    # Into the batch.

    def admit(self) -> None:
        """Start waiting requests, oldest first, while the batch has room. A turn whose session runs is passed over, and
        so is one beside another whose prompt is not through.
        """
        for entry in self._waiting:
            if len(self.runs) >= self._settings.max_batch:
                return
            if not self._unread(entry.request.shares_prompt_of) and self._start(entry):
                self._waiting.remove(entry)

    def _unread(self, request_id: str | None) -> bool:
        """Whether a request still waits or reads its prompt."""
        if request_id is None:
            return False
        reading = any(run.request.request_id == request_id and not run.answering for run in self.runs.values())
        return reading or any(entry.request.request_id == request_id for entry in self._waiting)

    def _start(self, entry: QueuedRequest) -> bool:
        """Begin a turn, or refuse it for good; False when it has to wait."""
        request = entry.request
        self._budget.start(request.request_id)
        room = functools.partial(self.make_room, request)
        passing = request.shares_prompt_of is not None
        claim = self._registry.claim(request.session, request.prompt, request.owner, room, passing=passing)
        if claim is None:
            self._budget.start(request.request_id, started=False)
            return False
        if not self.make_room(request):
            self._registry.give_back(claim, request.prompt.tokens)
            self._budget.release(request.request_id)
            refusal = OutOfMemory(
                "The memory is held by named conversations that were used after this request came. Please try again."
            )
            self._metrics.admission_refusals.labels(reason="later_sessions").inc()
            entry.deliver(Failed(refusal))
            return True
        self._insert(entry, claim)
        return True

    def _insert(self, entry: QueuedRequest, claim: Claim) -> None:
        request, tokens = entry.request, entry.request.prompt.tokens
        stops = (
            prompt_stops(request.prompt, claim.cached, self._runtime.store) if request.shares_prompt_of is None else {}
        )
        grammar = self._grammars.with_matcher(request.grammar)
        uid = self.generator.insert(tokens, claim.cached, claim.cache, entry.limit, request.sampling, stops, grammar)
        text = TextAssembler(
            self._runtime.model.tokenizer,
            tokens,
            request.stop,
            request.rules,
            self._format,
            begun=request.prompt.continued,
            vocabulary=self._vocabulary,
        )
        # Not the claim itself: its cache would stay beside the batch's.
        self.runs[uid] = RunningRequest(
            request, entry.deliver, claim.session, claim.cached, claim.prefill, text, entry.limit, entry.allowed,
            stops=stops,
        )  # fmt: skip
        self._metrics.prompt_tokens.labels(source="cached").inc(claim.cached)
        self._metrics.checkpoint_hits.labels(kind=claim.source).inc()
        entry.deliver(PrefillProgress(0, len(tokens) - claim.cached))

    def make_room(self, request: GenerationRequest | None = None) -> bool:
        """Hold the budget; for an unnamed request without touching named sessions that were used after it came. False
        if that isn't enough.
        """
        before = request.arrived if request is not None and request.session is None else None
        room = make_room(self._budget, self._registry, self._runtime.store, before)
        self._metrics.evictions.labels(reason="memory").inc(room.sessions)
        self._metrics.checkpoint_drops.labels(reason="memory").inc(room.checkpoints)
        return room.enough

    # Steps.

    def step(self) -> None:
        """One step of the batch: a token for each row that answers, a chunk for those that still read."""
        try:
            prompts, tokens = self.generator.next()
        except Exception as error:
            log.error("a step failed; the requests in it are answered with an error", exc_info=error)
            if not isinstance(error, PoolExhausted):
                if not self._runtime.group.alone:  # the other ranks may wait for this one, or have lost it
                    raise
                self.faults.note(type(error).__name__)
            self._drop_batch(InternalError if isinstance(error, PoolExhausted) else KernelFault, error)
            return
        self._handed = [(response.uid, response.token) for response in tokens]
        if tokens:
            self._metrics.batch_rows.observe(len(tokens))
        bad = []
        for response in tokens:
            if (run := self.runs.get(response.uid)) is None:
                continue
            if not self.generator.finite(response.uid):
                bad.append(response.uid)
            elif failure := self.generator.grammar_error(response.uid, response.finish_reason is not None):
                self._fail_grammar(response, run, failure)
            else:
                self._take(run, response)
        for progress in prompts:
            if run := self.runs.get(progress.uid):
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
        firsts = self.generator.first_tokens(uids)
        for uid, token in firsts.items():
            run = self.runs[uid]
            self._count_prefill(run)
            if token is None:
                bad.append(uid)
            elif token not in self._runtime.model.tokenizer.eos_token_ids and not self.generator.grammar_error(uid):
                self._note(run, token, self.generator.first_logprobs(uid))
                run.send(run.text.add(token))
                run.sent_ahead = True
                time.sleep(_YIELD_SECONDS)
        for uid in firsts.keys() - bad:
            self._checkpoint_prompt(uid, self.runs[uid])
        return bad

    def _count_prefill(self, run: RunningRequest) -> None:
        run.answering = True
        self._budget.prefilled(run.request.request_id)
        self._metrics.prompt_tokens.labels(source="prefilled").inc(len(run.request.prompt.tokens) - run.cached)
        for reason, n in run.prefill.items():
            self._metrics.prefilled_tokens.labels(reason=reason).inc(n)

    def _checkpoint_stop(self, progress: PromptProcessingBatch.Response, run: RunningRequest) -> None:
        """A prompt has come to a place at which it may have to stop."""
        at = run.cached + progress.progress[0]
        if progress.end_of_segment and not progress.end_of_prompt and (kind := run.stops.get(at)):
            self._checkpoint(progress.uid, run, kind, at)

    def _checkpoint_prompt(self, uid: int, run: RunningRequest) -> None:
        """The prompt is in the cache and nothing of the answer."""
        if (
            self._runtime.store.can_checkpoint
            and self._runtime.store.can_go_back
            and run.request.shares_prompt_of is None
        ):
            self._checkpoint(uid, run, prompt_kind(run.request.prompt), len(run.request.prompt.tokens))

    def _checkpoint(self, uid: int, run: RunningRequest, kind: Kind, n_tokens: int) -> None:
        cache = self.generator.snapshot(uid)
        self._registry.checkpoint(run.session, kind, run.request.prompt.tokens[:n_tokens], cache)
        self.make_room(run.request)

    def _take(self, run: RunningRequest, response: GenerationBatch.Response) -> None:
        """One token of one run."""
        run.generated += 1
        self._metrics.generated_tokens.inc()
        if (interval := run.token_interval()) is not None:
            self._metrics.inter_token_latency_seconds.observe(interval)
        if run.sent_ahead:
            run.sent_ahead = False
        elif response.finish_reason != "stop":
            self._note(run, response.token, response.logprobs)
            run.send(run.text.add(response.token))
        if run.text.stopped or response.finish_reason is not None:
            reason: FinishReason = "length" if response.finish_reason == "length" and not run.text.stopped else "stop"
            self._finish(response.uid, run, reason, response.prompt_cache, response.all_tokens)
        elif run.generated == run.allowed:
            self._finish(response.uid, run, "length", None, None)

    def _note(self, run: RunningRequest, token: int, logprobs: mx.array) -> None:
        """Keep a token for a client that wants to see what was drawn."""
        if (n := run.request.logprobs) is not None:
            own, best = top_tokens(logprobs, token, n)
            top = tuple(TokenLogprob(self._vocabulary.token_bytes(other), value) for other, value in best)
            run.drawn.append(DrawnToken(self._vocabulary.token_bytes(token), own, top))

    # Answers that outgrow what was promised.

    def growth(self) -> dict[str, bool]:
        """Of the runs that have used up what memory was promised for, but for two tokens: whether they may go on. Their
        promises are raised with it. Two, because a group does a step before it hears of it.
        """
        due = [run for run in self.runs.values() if run.generated + _AHEAD >= run.allowed < run.limit]
        return {run.request.request_id: self._promise_more(run) for run in due}

    def grow(self, growth: Mapping[str, bool]) -> None:
        """Do what `growth` has said, here or on rank 0."""
        for run in self.runs.values():
            if growth.get(run.request.request_id):
                self._budget.raise_to(run.request.request_id, _grown(run))
                if self.make_room(run.request):
                    run.allowed = min(run.limit, run.allowed + ANSWER_STEP)

    def _promise_more(self, run: RunningRequest) -> bool:
        return self._budget.extend(run.request.request_id, _grown(run))

    # Out of the batch.

    def _finish(self, uid: int, run: RunningRequest, reason: FinishReason, cache: Any, tokens: Any) -> None:
        run.send_rest(run.text.finish())
        if cache is None:
            cache, tokens = self.generator.remove(uid)
        self._rest(uid, run, cache, tokens)
        if reason == "stop" and run.text.called:
            reason = "tool_calls"
        run.deliver(Finished(reason, run.usage, run.text.stop))

    def _rest(self, uid: int, run: RunningRequest, cache: Any, tokens: Any) -> None:
        """Give a run's session its cache back and void the run's promise."""
        evaluate(cache)
        del self.runs[uid]
        self._registry.put_back(run.session, cache, tokens)
        self._budget.release(run.request.request_id)
        # Before the client hears of the end, so that what it asks next sees this turn.
        self.refresh()

    def rest_all(self) -> None:
        """An orderly stop: what has been computed stays with its sessions."""
        for uid, run in list(self.runs.items()):
            self._rest(uid, run, *self.generator.remove(uid))
            run.deliver(Failed(ShuttingDown()))

    def cancel(self, request_id: str) -> None:
        """Stop working for a client that is gone. What its session has cached so far stays."""
        for entry in self._waiting:
            if entry.request.request_id == request_id:
                self._waiting.remove(entry)
                self._budget.release(request_id)
                return
        for uid, run in self.runs.items():
            if run.request.request_id == request_id:
                self._rest(uid, run, *self.generator.remove(uid))
                return

    def _fail_grammar(self, response: GenerationBatch.Response, run: RunningRequest, error: str) -> None:
        """What the answer has so far keeps to its grammar, but how to go on is not known."""
        log.error("%s: llguidance could not go on: %s", run.request.request_id, error)
        cache, tokens = response.prompt_cache, response.all_tokens
        if cache is None:
            cache, tokens = self.generator.remove(response.uid)
        self._rest(response.uid, run, cache, tokens)
        run.deliver(Failed(GrammarFailed.of(run.request.request_id)))

    def _fail_rows(self, uids: list[int]) -> None:
        """Rows whose logits are not finite: end them before their next token, and forget what they have cached."""
        self.faults.note(f"{len(uids)} of {len(self.runs)} rows with logits that are not finite")
        for uid in uids:
            self.generator.drop(uid)
            run = self.runs.pop(uid)
            self._give_up(run, KernelFault.of(run.request.request_id))

    def _drop_batch(self, kind: type[InternalError], error: Exception) -> None:
        """A step failed midway: its rows can't be trusted. Fail the runs, forget their sessions' caches, start anew."""
        self.generator = self._new_generator()
        self._runtime.store.close_all_but(self._registry.caches())
        runs, self.runs = self.runs, {}
        for run in runs.values():
            failure = kind.of(run.request.request_id)
            failure.__cause__ = error
            self._give_up(run, failure)

    def refuse(self, verdict: str) -> None:
        """Too many faults. What rests is kept, though nobody will be answered before a restart."""
        if self.runs:
            self.generator = self._new_generator()
        self.end_all(EngineDead(f"The server has stopped answering: {verdict}."))

    def _give_up(self, run: RunningRequest, error: ServerError) -> None:
        """End a run that is out of the batch; its session is forgotten and its promise void."""
        self._registry.put_back(run.session, None, [])
        self._budget.release(run.request.request_id)
        self.refresh()
        run.deliver(Failed(error))

    def end_all(self, error: ServerError) -> None:
        """Nothing is computed any more: end what runs and what waits."""
        runs, self.runs = self.runs, {}
        for run in runs.values():
            self._give_up(run, error)
        for entry in self._waiting:
            self._waiting.remove(entry)
            self._budget.release(entry.request.request_id)
            entry.deliver(Failed(error))


def _grown(run: RunningRequest) -> int:
    """Tokens of the session when its answer has grown by one step."""
    return len(run.request.prompt.tokens) + min(run.limit, run.allowed + ANSWER_STEP)
