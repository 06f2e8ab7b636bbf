"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

import json
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from server.api.anthropic.answer import (
    CacheMiss,
    ContentBlock,
    DiagnosticsBody,
    Ending,
    MessageBody,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTokensDetails,
    Ping,
    StopReason,
    StreamEvent,
    StreamEventBody,
    TokenCount,
)
from server.api.anthropic.blocks import Blocks, whole_blocks
from server.api.anthropic.request import CountTokensRequest, MessagesRequest
from server.errors import NotFound, ServerError
from server.http.envelopes import MESSAGES_PATH, AnthropicErrorEnvelope, anthropic_envelope
from server.http.middleware import app_context, request_context
from server.http.respond import Answer, check_model, json_response, prepare_prompt, respond, to_json
from server.http.routing import api_router, generates, raises
from server.http.session_name import name_session
from server.http.sse import data
from server.protocol import Event, Finished, GenerationRequest, PrefillProgress, TextDelta, ToolCall, Usage

router = api_router(envelope=AnthropicErrorEnvelope)


@router.post(MESSAGES_PATH, response_model=MessageBody, responses=generates(StreamEventBody))
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Generate the next message of a conversation."""
    app, context = app_context(request), request_context(request)
    check_model(body.model, app.engine.model)
    session, rules = name_session(request, None, bool(body.stream), user_id=body.user_id), body.rules()
    prompt, grammar = await prepare_prompt(request, body.conversation(), rules)
    wanted = GenerationRequest(
        request_id=context.request_id,
        prompt=prompt,
        max_tokens=body.max_tokens,
        sampling=body.sampling(app.engine.model.sampling),
        stop=tuple(body.stop_sequences or ()),
        session=session,
        owner=context.owner,
        rules=rules,
        grammar=grammar,
    )
    renderer = MessagesRenderer(context.request_id, app.engine.model.id, len(prompt.tokens), body)
    return await respond(request, [wanted], renderer, stream=bool(body.stream))


@router.post(f"{MESSAGES_PATH}/count_tokens", response_model=TokenCount, responses=raises(NotFound))
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """Count the tokens of a prompt. Nothing is computed."""
    check_model(body.model, app_context(request).engine.model)
    prompt, _ = await prepare_prompt(request, body.conversation(), body.rules())
    return json_response(TokenCount(input_tokens=len(prompt.tokens)))


class MessagesRenderer:
    """Renders the answer to one request: a message with the request's id. The events of a stream:

    message_start, ping, (content_block_start, content_block_delta..., content_block_stop)..., message_delta,
    message_stop; or error if the answer failed.
    """

    def __init__(self, request_id: str, model_id: str, n_prompt: int, body: MessagesRequest) -> None:
        self._id = request_id
        self._model = model_id
        self._n_prompt = n_prompt
        self._body = body
        self._blocks: Blocks | None = None

    def render(self, event: Event) -> Sequence[bytes]:
        """The message begins with the first prefill chunk: then its cached tokens are known."""
        if isinstance(event, PrefillProgress):
            return [] if self._blocks is not None else self._start(self._n_prompt - event.total)
        opening = [] if self._blocks is not None else self._start(0)
        assert self._blocks is not None
        if isinstance(event, TextDelta | ToolCall):
            return [*opening, *map(_event, self._blocks.add(event))]
        if isinstance(event, Finished):
            ending = Ending(stop_reason=_stop_reason(event), stop_sequence=event.stop)
            delta = MessageDelta(type="message_delta", delta=ending, usage=usage_body(event.usage))
            return [*opening, *map(_event, self._blocks.finish()), _event(delta)]
        return opening

    def end(self, usage: Usage) -> Sequence[bytes]:
        return [_event(MessageStop(type="message_stop"))]

    def fail(self, error: ServerError) -> Sequence[bytes]:
        return [data(json.dumps(anthropic_envelope(error, error.status, self._id), ensure_ascii=False), "error")]

    def body(self, answers: Sequence[Answer], usage: Usage) -> MessageBody:
        [answer] = answers
        blocks = whole_blocks(answer.parts, hide_thoughts=self._body.hides_thoughts)
        return self._message(blocks, usage_body(usage), answer.end)

    def _start(self, cached: int) -> list[bytes]:
        self._blocks = Blocks(hide_thoughts=self._body.hides_thoughts)
        message = self._message([], usage_body(Usage(self._n_prompt, cached, 0)), None)
        return [_event(MessageStart(type="message_start", message=message)), _event(Ping(type="ping"))]

    def _message(self, content: list[ContentBlock], usage: MessageUsage, end: Finished | None) -> MessageBody:
        message = MessageBody(
            id=self._id,
            type="message",
            role="assistant",
            model=self._model,
            content=content,
            stop_reason=None if end is None else _stop_reason(end),
            stop_sequence=None if end is None else end.stop,
            usage=usage,
        )
        if self._body.diagnostics is not None and self._body.diagnostics.previous_message_id is not None:
            message.diagnostics = DiagnosticsBody(cache_miss_reason=CacheMiss(type="unavailable"))
        return message


def usage_body(usage: Usage) -> MessageUsage:
    return MessageUsage(
        input_tokens=usage.prompt_tokens - usage.cached_tokens,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(thinking_tokens=usage.reasoning_tokens),
    )


def _stop_reason(end: Finished) -> StopReason:
    if end.finish_reason == "stop":
        return "end_turn" if end.stop is None else "stop_sequence"
    return "tool_use" if end.finish_reason == "tool_calls" else "max_tokens"


def _event(event: StreamEvent) -> bytes:
    return data(to_json(event), event.type)
