"""What all APIs that answer have in common: from bytes to accepted requests, and from their events to a response."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import NotFound, ServerError
from server.http.record import RequestRecord, session_hash
from server.http.scope import AppContext, context_of, record_of
from server.http.session_name import session_key
from server.http.sse import Ended, Renderer, write_events
from server.http.turn import Turn, until_gone
from server.protocol import (
    AnswerRules,
    Conversation,
    DrawnToken,
    Failed,
    Finished,
    GenerationRequest,
    Grammar,
    ModelInfo,
    Prompt,
    TextDelta,
    ToolCall,
    Usage,
)


@dataclass(slots=True)
class Answer:
    """One whole answer. `parts` are its texts and calls as they came, `tokens` those of its text, where they were asked
    for.
    """

    parts: list[TextDelta | ToolCall] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[DrawnToken] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def content(self) -> str:
        return "".join(self.text)

    @property
    def thought(self) -> str:
        return "".join(self.reasoning)

    @property
    def end(self) -> Finished:
        """How it ended. Only of a whole answer."""
        assert self.finished is not None
        return self.finished


class AnswerForm(Renderer, Protocol):
    """An API's form of answers: as a stream, and whole."""

    def whole(self, answers: Sequence[Answer], usage: Usage) -> BaseModel: ...


def model_names(model: ModelInfo) -> tuple[str, ...]:
    """What requests may call the loaded model: its id, the last part of it, or "default"."""
    return tuple(dict.fromkeys((model.id, model.id.rstrip("/").rsplit("/", 1)[-1], "default")))


def check_model(name: str, model: ModelInfo) -> None:
    """Raises NotFound unless `name` is one of `model_names`."""
    if name not in model_names(model):
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise NotFound(
            f"The model `{shown}` does not exist or you do not have access to it.",
            param="model",
            code="model_not_found",
        )


def name_session(
    request: Request, key: str | None, stream: bool, *, user_id: str | None = None, default: str | None = None
) -> str | None:
    """The session's name, from the body's own key, a header or a user id, else `default`; noted for the answer's header
    and the log.
    """
    session, record = session_key(key, request.headers, user_id) or default, record_of(request)
    record.session, record.session_name, record.stream = session_hash(session), session, stream
    return session


async def prepared(request: Request, conversation: Conversation, rules: AnswerRules) -> tuple[Prompt, Grammar | None]:
    """A conversation's prompt, and what holds its answer. Raises what `Engine.tokenize` and `constrain` raise."""
    engine = context_of(request).engine

    def prepare() -> tuple[Prompt, Grammar | None]:
        prompt = engine.tokenize(conversation)
        return prompt, engine.constrain(rules, prompt)

    return await until_gone(asyncio.to_thread(prepare), request.receive)


def several(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """`n` requests for answers to one prompt. Those after the first start where that has read the prompt, and draw from
    seeds of their own.
    """
    others = []
    for i in range(1, n):
        seed = request.sampling.seed
        sampling = request.sampling if seed is None else replace(request.sampling, seed=_wrapped(seed + i))
        id, choice = f"{request.request_id}-{i}", request.choice + i
        others.append(
            replace(request, request_id=id, choice=choice, sampling=sampling, shares_prompt_of=request.request_id)
        )
    return [request, *others]


def _wrapped(seed: int) -> int:
    """As a signed integer of 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def accept(context: AppContext, requests: Sequence[GenerationRequest], record: RequestRecord) -> Turn:
    """Submits the requests. Raises ContextLengthExceeded, or what the engine refuses with; refusals are counted."""
    turn, model = Turn(context.engine, context.metrics, requests, record), context.engine.model
    try:
        for wanted in requests:
            record.rotated |= model.rotates_at is not None and len(wanted.prompt.tokens) > model.rotates_at
            model.answer_limit(wanted)
        turn.submit()
    except ServerError as error:
        context.metrics.admission_refusals.labels(reason=error.code or error.type).inc()
        raise
    return turn


async def respond(
    request: Request, requests: Sequence[GenerationRequest], form: AnswerForm, *, stream: bool
) -> Response:
    """Has the requests answered. Errors before the first event have their own HTTP status, later ones are in the
    stream.
    """
    context, record = context_of(request), record_of(request)
    turn = accept(context, requests, record)
    try:
        if not stream:
            body = await until_gone(_whole(turn, form), request.receive)
            return Response(to_json(body), media_type="application/json")
        silent_since = asyncio.get_running_loop().time()
        keepalive = context.settings.keepalive_seconds
        # An engine that refuses at once still gets its proper status; after that the client needs a sign of life.
        await until_gone(turn.wait_first(keepalive), request.receive)
        events = write_events(
            turn.queue,
            form,
            turn.public_error,
            keepalive_seconds=keepalive,
            on_idle=turn.check_alive,
            silent_since=silent_since,
        )
        return TurnStream(turn, events)
    except BaseException:
        turn.close()
        raise


async def _whole(turn: Turn, form: AnswerForm) -> BaseModel:
    """All events of a turn as one body. Raises the error of a turn that failed."""
    answers = [Answer() for _ in range(turn.n_answers)]
    while not isinstance(event := await turn.next_event(), Ended):
        answer = answers[event.choice]
        if isinstance(event, Failed):
            raise turn.public_error(event)
        if isinstance(event, Finished):
            answer.finished = event
        elif isinstance(event, ToolCall):
            answer.parts.append(event)
            answer.calls.append(event)
        elif isinstance(event, TextDelta):
            answer.parts.append(event)
            (answer.text if event.channel == "content" else answer.reasoning).append(event.text)
            answer.tokens += event.tokens
    return form.whole(answers, event.usage)


class TurnStream(StreamingResponse):
    """The SSE response of a turn; the turn is closed when it ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, turn: Turn, events: AsyncIterator[bytes]) -> None:
        # Proxies that buffer would hold back tokens and keep-alives.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Nobody is left to hear of it; closing the turn records it as cancelled.
            with contextlib.suppress(ClientDisconnect):
                await until_gone(self.stream_response(send), receive)
        finally:
            self._turn.close()


def to_json(body: BaseModel) -> str:
    """Only fields that were set: absent and null mean different things."""
    return body.model_dump_json(exclude_unset=True, by_alias=True)
