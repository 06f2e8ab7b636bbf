"""One request while it is in the batch."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import mlx.core as mx

from server.commands import QueuedRequest
from server.engine.sampling import top_tokens
from server.protocol import Deliver, DrawnToken, GenerationRequest, TextDelta, TokenLogprob, ToolCall, Usage
from server.sessions.checkpoints import Kind
from server.sessions.prefill_reasons import Reason
from server.sessions.session import Session
from server.text.assembler import TextAssembler, Vocabulary

ANSWER_STEP = 1024
"""The promise of a request without max_tokens starts with this many tokens, and grows by as many."""


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request, its session, and how far its answer is."""

    queued: QueuedRequest
    session: Session
    cached: int
    """Prompt tokens that were in the cache."""
    prefill: dict[Reason, int]
    """Why the other prompt tokens are computed."""
    text: TextAssembler
    promised: int
    """Answer tokens that memory is promised for."""
    stops: dict[int, Kind] = field(default_factory=dict)
    """Numbers of prompt tokens after which a checkpoint is taken."""
    generated: int = 0
    answering: bool = False
    """The whole prompt is in the cache."""
    sent_ahead: bool = False
    """The text of the next token is already sent."""
    drawn: list[DrawnToken] = field(default_factory=list)
    """Tokens whose text is not yet sent, if the client asked for log-probabilities."""
    last_token: float | None = None

    @property
    def request(self) -> GenerationRequest:
        return self.queued.request

    @property
    def id(self) -> str:
        return self.queued.request.request_id

    @property
    def deliver(self) -> Deliver:
        return self.queued.deliver

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt.tokens), self.cached, self.generated, self.text.reasoned)

    @property
    def next_promise(self) -> int:
        """Answer tokens of the promise after the present one."""
        return min(self.queued.limit, self.promised + ANSWER_STEP)

    @property
    def next_size(self) -> int:
        """Tokens of the session when its answer has used the next promise."""
        return len(self.request.prompt.tokens) + self.next_promise

    def note(self, token: int, logprobs: mx.array, vocabulary: Vocabulary) -> None:
        """Keep a token for a client that asked for log-probabilities."""
        if self.request.logprobs is not None:
            own, best = top_tokens(logprobs, token, self.request.logprobs)
            top = tuple(TokenLogprob(vocabulary.token_bytes(other), value) for other, value in best)
            self.drawn.append(DrawnToken(vocabulary.token_bytes(token), own, top))

    def send(self, deltas: Iterable[TextDelta | ToolCall]) -> None:
        """Send deltas. The first text carries the drawn tokens; those of calls are not shown."""
        for delta in deltas:
            drawn, self.drawn = tuple(self.drawn), []
            self.deliver(replace(delta, tokens=drawn) if drawn and isinstance(delta, TextDelta) else delta)

    def send_rest(self, deltas: Iterable[TextDelta | ToolCall]) -> None:
        """Send the last text, then tokens that have no text, but not those of a stop string."""
        self.send(deltas)
        if self.drawn and not self.text.stopped:
            self.send([TextDelta("")])

    def token_interval(self) -> float | None:
        """Seconds since the previous token, None for the first."""
        now, before = time.monotonic(), self.last_token
        self.last_token = now
        return None if before is None else now - before
