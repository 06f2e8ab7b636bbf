"""One request while it is in the batch."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from server.protocol import Deliver, DrawnToken, GenerationRequest, TextDelta, ToolCall, Usage
from server.sessions.checkpoints import Kind
from server.sessions.prefill_reasons import Reason
from server.sessions.session import Session
from server.text.assembler import TextAssembler

ANSWER_STEP = 1024
"""Tokens by which the promise of a request without max_tokens grows as it goes on."""


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request, its session, and how far it has come.

    Of the prompt's tokens the first `cached` were in the cache, the others are prefilled for the reasons in `prefill`.
    `allowed` is the number of answer tokens that memory is promised for; `limit` the most that the request wants.
    `answering`: the prompt is through. `sent_ahead`: the next token's text has gone out already. `stops`: after how
    many of the prompt's tokens to take checkpoints. `drawn`: tokens whose text has not been sent yet, if the client
    wants to see them.
    """

    request: GenerationRequest
    deliver: Deliver
    session: Session
    cached: int
    prefill: dict[Reason, int]
    text: TextAssembler
    limit: int
    allowed: int
    generated: int = 0
    answering: bool = False
    sent_ahead: bool = False
    stops: dict[int, Kind] = field(default_factory=dict)
    drawn: list[DrawnToken] = field(default_factory=list)
    last_token: float | None = None

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt.tokens), self.cached, self.generated, self.text.reasoned)

    def send(self, deltas: Iterable[TextDelta | ToolCall]) -> None:
        """To the client, the first text with the tokens that were `drawn` for it. Those of calls are not shown."""
        for delta in deltas:
            drawn, self.drawn = tuple(self.drawn), []
            self.deliver(replace(delta, tokens=drawn) if drawn and isinstance(delta, TextDelta) else delta)

    def send_rest(self, deltas: Iterable[TextDelta | ToolCall]) -> None:
        """The last text. Tokens without any come after it, but not those of a stop string."""
        self.send(deltas)
        if self.drawn and not self.text.stopped:
            self.send([TextDelta("")])

    def token_interval(self) -> float | None:
        """Seconds since the token before this one, None for the first."""
        now, before = time.monotonic(), self.last_token
        self.last_token = now
        return None if before is None else now - before
