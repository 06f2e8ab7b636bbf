"""Shared by all APIs that generate: submits the requests and turns their events into a response."""

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
from server.http.generation import Generation, until_disconnect
from server.http.middleware import AppContext, app_context, request_context
from server.http.request_context import RequestContext
from server.http.sse import AllFinished, Renderer, write_events
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
    """One complete answer."""

    parts: list[TextDelta | ToolCall] = field(default_factory=list)
    """Its texts and calls in their order."""
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[DrawnToken] = field(default_factory=list)
    """The tokens of the text, if the request asked for logprobs."""
    finished: Finished | None = None

    @property
    def content(self) -> str:
        return "".join(self.text)

    @property
    def thought(self) -> str:
        return "".join(self.reasoning)

    @property
    def end(self) -> Finished:
        """The terminal event. A complete answer has one."""
        assert self.finished is not None
        return self.finished


class AnswerRenderer(Renderer, Protocol):
    """Renders an API's answers, as a stream or as one body."""

    def body(self, answers: Sequence[Answer], usage: Usage) -> BaseModel: ...


def model_names(model: ModelInfo) -> tuple[str, ...]:
    """Names of the loaded model that requests may use: its id, the last part of the id, or "default"."""
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


async def prepare_prompt(
    request: Request, conversation: Conversation, rules: AnswerRules
) -> tuple[Prompt, Grammar | None]:
    """A conversation's prompt and grammar. Raises what `Engine.tokenize` and `Engine.constrain` raise."""
    engine = app_context(request).engine

    def prepare() -> tuple[Prompt, Grammar | None]:
        prompt = engine.tokenize(conversation)
        return prompt, engine.constrain(rules, prompt)

    return await until_disconnect(asyncio.to_thread(prepare), request.receive)


def expand_n(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """`n` requests for one prompt. The first one prefills the prompt, the others continue from there. Each has its own
    seed.
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
    """Wraps around like a signed 64-bit integer."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def submit(app: AppContext, requests: Sequence[GenerationRequest], context: RequestContext) -> Generation:
    """Submits the requests. Raises ContextLengthExceeded, or what Engine.submit raises. Counts refusals."""
    generation, model = Generation(app.engine, app.metrics, requests, context), app.engine.model
    try:
        for wanted in requests:
            model.answer_limit(len(wanted.prompt.tokens), wanted.max_tokens, wanted.prompt.param)
            if wanted.shares_prompt_of is None and model.rotates_at is not None:
                dropped = app.engine.dropped(wanted.prompt)
                context.dropped_tokens += dropped.tokens
                context.dropped_turns += dropped.turns
        generation.submit()
    except ServerError as error:
        app.metrics.admission_refusals.labels(reason=error.code or error.type).inc()
        raise
    return generation


async def respond(
    request: Request, requests: Sequence[GenerationRequest], renderer: AnswerRenderer, *, stream: bool
) -> Response:
    """Generates the answers and returns the response. An error before the first event has its own HTTP status. A later
    one is in the stream.
    """
    app, context = app_context(request), request_context(request)
    generation = submit(app, requests, context)
    try:
        if not stream:
            body = await until_disconnect(_collect_body(generation, renderer), request.receive)
            return json_response(body)
        silent_since = asyncio.get_running_loop().time()
        keepalive = app.settings.keepalive_seconds
        # An immediate error still gets its own status. After `keepalive` the client needs a sign of life.
        await until_disconnect(generation.wait_first(keepalive), request.receive)
        events = write_events(
            generation.queue,
            renderer,
            generation.public_error,
            keepalive_seconds=keepalive,
            on_idle=generation.check_alive,
            silent_since=silent_since,
        )
        return GenerationStream(generation, events)
    except BaseException:
        generation.close()
        raise


async def _collect_body(generation: Generation, renderer: AnswerRenderer) -> BaseModel:
    """Collects all events into one body. Raises the error of a generation that failed."""
    answers = [Answer() for _ in range(generation.n_answers)]
    while not isinstance(event := await generation.next_event(), AllFinished):
        answer = answers[event.choice]
        if isinstance(event, Failed):
            raise generation.public_error(event)
        if isinstance(event, Finished):
            answer.finished = event
        elif isinstance(event, ToolCall):
            answer.parts.append(event)
            answer.calls.append(event)
        elif isinstance(event, TextDelta):
            answer.parts.append(event)
            (answer.text if event.channel == "content" else answer.reasoning).append(event.text)
            answer.tokens += event.tokens
    return renderer.body(answers, event.usage)


class GenerationStream(StreamingResponse):
    """The SSE response of a generation. Closes the generation at its end, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        # Proxies that buffer would hold back tokens and keep-alives.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The client is gone. close() records the generation as cancelled.
            with contextlib.suppress(ClientDisconnect):
                await until_disconnect(self.stream_response(send), receive)
        finally:
            self._generation.close()


def to_json(body: BaseModel) -> str:
    """JSON of the fields that were set: absent and null differ."""
    return body.model_dump_json(exclude_unset=True, by_alias=True)


def json_response(body: BaseModel) -> Response:
    return Response(to_json(body), media_type="application/json")
