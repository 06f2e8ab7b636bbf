"""POST /v1/chat/completions: from bytes to an accepted turn, and from its events to a stream or one JSON."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.error_handlers import invalid_body
from server.errors import ContextLengthExceeded, NotFound, PayloadTooLarge, ServerError
from server.identity import session_key
from server.protocol import (
    DrawnToken,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ModelInfo,
    SamplingParams,
    TextDelta,
    TokenLogprob,
    Usage,
)
from server.routes.scope import CHAT_PATH, AppContext, RequestRecord, context_of, record_of, require_key, session_hash
from server.routes.turn import Turn, until_gone
from server.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    ContentLogprob,
    Delta,
    Logprobs,
    PromptTokensDetails,
    TopLogprob,
    UsageBody,
)
from server.sse import data, write_events

_LEAST_LOGPROB = -9999.0
"""In JSON for minus infinity, as OpenAI's API has it."""

router = APIRouter(dependencies=[Depends(require_key)])


@router.post(CHAT_PATH)
async def chat_completions(request: Request) -> Response:
    """One chat turn. Errors before the first event have their own HTTP status, later ones are in the stream."""
    context, record = context_of(request), record_of(request)
    chat = parse_chat(await read_body(request, context.settings.body_limit))
    check_model(chat.model, context.engine.model)
    session = session_key(chat.prompt_cache_key, request.headers)
    record.session, record.session_name, record.stream = session_hash(session), session, bool(chat.stream)
    tokenizing = asyncio.to_thread(context.engine.tokenize, chat.template_messages())
    prompt = await until_gone(tokenizing, request.receive)
    turn = accept(
        context,
        chat,
        GenerationRequest(
            request_id=record.request_id,
            prompt=prompt,
            max_tokens=chat.token_limit,
            sampling=sampling(chat),
            stop=chat.stop_texts,
            session=session,
            owner=record.owner,
            logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        ),
        record,
    )
    answer = Answer(record.request_id, context.engine.model.id, chat.include_usage)
    try:
        if not chat.stream:
            return await until_gone(collect(turn, answer), request.receive)
        silent_since = asyncio.get_running_loop().time()
        keepalive = context.settings.keepalive_seconds
        # An engine that refuses at once still gets its proper status; after that the client needs a sign of life.
        await until_gone(turn.wait_first(keepalive), request.receive)
        events = write_events(
            turn.queue,
            answer.render,
            lambda failed: turn.public_error(failed).envelope(),
            keepalive_seconds=keepalive,
            on_idle=turn.check_alive,
            silent_since=silent_since,
        )
        return TurnStream(turn, events)
    except BaseException:
        turn.close()
        raise


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes of it. Raises PayloadTooLarge as soon as more is announced or has come."""
    too_large = PayloadTooLarge(f"The request body is larger than the server's limit of {limit} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """Raises InvalidRequest or UnsupportedField naming the first field that is wrong."""
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error) from error


def check_model(name: str, model: ModelInfo) -> None:
    """Raises NotFound unless `name` is the loaded model's id, the last part of it, or "default"."""
    if name not in (model.id, model.id.rstrip("/").rsplit("/", 1)[-1], "default"):
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        raise NotFound(
            f"The model `{shown}` does not exist or you do not have access to it.",
            param="model",
            code="model_not_found",
        )


def sampling(chat: ChatCompletionRequest) -> SamplingParams:
    """Given values, or OpenAI's defaults."""
    return SamplingParams(
        temperature=1.0 if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        top_k=chat.top_k or 0,
        min_p=chat.min_p or 0.0,
        presence_penalty=chat.presence_penalty or 0.0,
        frequency_penalty=chat.frequency_penalty or 0.0,
        repetition_penalty=1.0 if chat.repetition_penalty is None else chat.repetition_penalty,
        logit_bias=tuple(sorted((int(token), bias) for token, bias in (chat.logit_bias or {}).items())),
        seed=chat.seed,
    )


def accept(context: AppContext, chat: ChatCompletionRequest, wanted: GenerationRequest, record: RequestRecord) -> Turn:
    """Submits the request. Raises ContextLengthExceeded, or what the engine refuses with; refusals are counted."""
    turn = Turn(context.engine, context.metrics, wanted, record)
    model, prompt_tokens = context.engine.model, len(wanted.prompt.tokens)
    record.rotated = model.rotates_at is not None and prompt_tokens > model.rotates_at
    try:
        # Without max_tokens at least one new token must fit.
        if prompt_tokens + (wanted.max_tokens or 1) > model.max_tokens:
            raise ContextLengthExceeded(
                limit=model.max_tokens, prompt_tokens=prompt_tokens, max_tokens=wanted.max_tokens
            )
        turn.submit()
    except ServerError as error:
        context.metrics.admission_refusals.labels(reason=error.code or error.type).inc()
        raise
    return turn


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


class Answer:
    """Builds the wire objects of one turn; all carry the same id and time."""

    def __init__(self, request_id: str, model_id: str, include_usage: bool) -> None:
        self._id = request_id
        self._model = model_id
        self._created = int(time.time())
        self._include_usage = include_usage
        self._begun = False

    def render(self, event: Event) -> Sequence[bytes]:
        """The chunks of one event: text, and at the end the finish reason and the usage that was asked for."""
        if isinstance(event, TextDelta):
            return [*self._opening(), self._choice(_delta(event), None, event.tokens)]
        if isinstance(event, Finished):
            chunks = [*self._opening(), self._choice(Delta(), event.finish_reason)]
            if self._include_usage:
                chunks.append(self._chunk([], usage_body(event.usage)))
            return chunks
        return ()

    def whole(
        self, content: str, reasoning: str, tokens: Sequence[DrawnToken] | None, finished: Finished
    ) -> ChatCompletion:
        logprobs = None if tokens is None else logprobs_body(tokens)
        message = AnswerMessage(role="assistant", content=content, refusal=None)
        if reasoning:
            message.reasoning_content = reasoning
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[Choice(index=0, message=message, logprobs=logprobs, finish_reason=finished.finish_reason)],
            usage=usage_body(finished.usage),
        )

    def _opening(self) -> list[bytes]:
        """The first chunk names the role, once."""
        if self._begun:
            return []
        self._begun = True
        return [self._choice(Delta(role="assistant", content=""), None)]

    def _choice(self, delta: Delta, finish_reason: str | None, tokens: Sequence[DrawnToken] = ()) -> bytes:
        logprobs = logprobs_body(tokens) if tokens else None
        return self._chunk([ChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=finish_reason)], None)

    def _chunk(self, choices: list[ChunkChoice], usage: UsageBody | None) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._id, object="chat.completion.chunk", created=self._created, model=self._model, choices=choices
        )
        if self._include_usage:
            chunk.usage = usage
        return data(to_json(chunk))


def to_json(body: BaseModel) -> str:
    """Only fields that were set: in deltas absent and null mean different things."""
    return body.model_dump_json(exclude_unset=True)


def logprobs_body(tokens: Sequence[DrawnToken]) -> Logprobs:
    """Drawn tokens as OpenAI shows them."""

    def shown(token: TokenLogprob) -> dict[str, Any]:
        logprob = max(token.logprob, _LEAST_LOGPROB)
        return {"token": token.token.decode(errors="replace"), "logprob": logprob, "bytes": list(token.token)}

    content = [
        ContentLogprob(**shown(token), top_logprobs=[TopLogprob(**shown(other)) for other in token.top])
        for token in tokens
    ]
    return Logprobs(content=content, refusal=None)


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def _delta(event: TextDelta) -> Delta:
    return Delta(content=event.text) if event.channel == "content" else Delta(reasoning_content=event.text)


async def collect(turn: Turn, answer: Answer) -> Response:
    """All events of a turn as one JSON. Raises the error of a failed turn."""
    texts: dict[str, list[str]] = {"content": [], "reasoning": []}
    tokens: list[DrawnToken] = []
    while not isinstance(event := await turn.next_event(), Finished):
        if isinstance(event, Failed):
            raise turn.public_error(event)
        if isinstance(event, TextDelta):
            texts[event.channel].append(event.text)
            tokens += event.tokens
    wanted = tokens if turn.wants_logprobs else None
    body = answer.whole("".join(texts["content"]), "".join(texts["reasoning"]), wanted, event)
    return Response(to_json(body), media_type="application/json")
