"""POST /v1/chat/completions: OpenAI's chat API."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.api.openai.chat_answer import (
    AnswerMessage,
    CallDelta,
    CalledFunction,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    ContentLogprob,
    Delta,
    FunctionDelta,
    Logprobs,
    MessageCall,
    PromptTokensDetails,
    TopLogprob,
    UsageBody,
)
from server.api.openai.chat_request import ChatCompletionRequest
from server.errors import ServerError
from server.http.middleware import CHAT_PATH, app_context, request_context
from server.http.respond import Answer, check_model, expand_n, prepare_prompt, respond, to_json
from server.http.routing import api_router, generates
from server.http.session_name import name_session
from server.http.sse import DONE, data
from server.protocol import (
    DrawnToken,
    Event,
    Finished,
    GenerationRequest,
    TextDelta,
    TokenLogprob,
    ToolCall,
    Usage,
)

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity in JSON, as in OpenAI's API."""

router = api_router()


@router.post(CHAT_PATH, response_model=ChatCompletion, responses=generates(ChatCompletionChunk))
async def chat_completions(request: Request, chat: ChatCompletionRequest) -> Response:
    """Generate the next message of a chat."""
    app, context = app_context(request), request_context(request)
    check_model(chat.model, app.engine.model)
    session, rules = name_session(request, chat.prompt_cache_key, bool(chat.stream)), chat.rules()
    prompt, grammar = await prepare_prompt(request, chat.conversation(), rules)
    wanted = GenerationRequest(
        request_id=context.request_id,
        prompt=prompt,
        max_tokens=chat.token_limit,
        sampling=chat.sampling(app.engine.model.sampling),
        stop=chat.stop_texts,
        session=session,
        owner=context.owner,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        rules=rules,
        grammar=grammar,
    )
    renderer = ChatRenderer(context.request_id, app.engine.model.id, chat.include_usage, bool(chat.logprobs))
    return await respond(request, expand_n(wanted, chat.n or 1), renderer, stream=bool(chat.stream))


class OpenAIRenderer(ABC):
    """The renderers of chat and text completions. All objects of a request have the same id and time."""

    def __init__(self, request_id: str, model_id: str, include_usage: bool) -> None:
        self._head: dict[str, Any] = {"id": request_id, "created": int(time.time()), "model": model_id}
        self._include_usage = include_usage

    def end(self, usage: Usage) -> Sequence[bytes]:
        """The usage, if requested, and [DONE]."""
        return [*([self._chunk([], usage_body(usage))] if self._include_usage else []), DONE]

    def fail(self, error: ServerError) -> Sequence[bytes]:
        return [data(json.dumps(error.envelope(), ensure_ascii=False))]

    @abstractmethod
    def _chunk(self, choices: list[Any], usage: UsageBody | None) -> bytes:
        """One event. It has `usage`, which may be null, only if that was requested."""


class ChatRenderer(OpenAIRenderer):
    """Renders the answers to one chat request."""

    def __init__(self, request_id: str, model_id: str, include_usage: bool, logprobs: bool) -> None:
        super().__init__(request_id, model_id, include_usage)
        self._logprobs = logprobs
        self._n_calls: dict[int, int] = {}

    def render(self, event: Event) -> Sequence[bytes]:
        """The chunks of one event: text, a call, or the finish reason."""
        if isinstance(event, TextDelta):
            content = event.channel == "content"
            delta = Delta(content=event.text) if content else Delta(reasoning_content=event.text)
            return [*self._opening(event.choice), self._chunk_of(event.choice, delta, None, event.tokens)]
        if isinstance(event, ToolCall):
            return [*self._opening(event.choice), *self._call(event)]
        if isinstance(event, Finished):
            return [*self._opening(event.choice), self._chunk_of(event.choice, Delta(), event.finish_reason)]
        return ()

    def body(self, answers: Sequence[Answer], usage: Usage) -> ChatCompletion:
        choices = [self._whole_choice(i, answer) for i, answer in enumerate(answers)]
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage_body(usage), **self._head)

    def _whole_choice(self, index: int, answer: Answer) -> Choice:
        content = answer.content if answer.text or not answer.calls else None
        message = AnswerMessage(role="assistant", content=content, refusal=None)
        if answer.reasoning:
            message.reasoning_content = answer.thought
        if answer.calls:
            message.tool_calls = [
                MessageCall(
                    id=call.id, type="function", function=CalledFunction(name=call.name, arguments=call.arguments)
                )
                for call in answer.calls
            ]
        logprobs = logprobs_body(answer.tokens) if self._logprobs else None
        return Choice(index=index, message=message, logprobs=logprobs, finish_reason=answer.end.finish_reason)

    def _opening(self, choice: int) -> list[bytes]:
        """The first chunk of an answer. It has the role."""
        if choice in self._n_calls:
            return []
        self._n_calls[choice] = 0
        return [self._chunk_of(choice, Delta(role="assistant", content=""), None)]

    def _call(self, call: ToolCall) -> list[bytes]:
        index = self._n_calls[call.choice]
        self._n_calls[call.choice] += 1
        named = CallDelta(
            index=index, id=call.id, type="function", function=FunctionDelta(name=call.name, arguments="")
        )
        rest = CallDelta(index=index, function=FunctionDelta(arguments=call.arguments))
        return [self._chunk_of(call.choice, Delta(tool_calls=[part]), None) for part in (named, rest)]

    def _chunk_of(
        self, choice: int, delta: Delta, finish_reason: str | None, tokens: Sequence[DrawnToken] = ()
    ) -> bytes:
        logprobs = logprobs_body(tokens) if tokens else None
        return self._chunk(
            [ChunkChoice(index=choice, delta=delta, logprobs=logprobs, finish_reason=finish_reason)], None
        )

    def _chunk(self, choices: list[ChunkChoice], usage: UsageBody | None) -> bytes:
        chunk = ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._head)
        if self._include_usage:
            chunk.usage = usage
        return data(to_json(chunk))


def logprobs_body(tokens: Sequence[DrawnToken]) -> Logprobs:
    """Logprobs in OpenAI's shape."""

    def fields(token: TokenLogprob) -> dict[str, Any]:
        logprob = max(token.logprob, LEAST_LOGPROB)
        return {"token": token.token.decode(errors="replace"), "logprob": logprob, "bytes": list(token.token)}

    content = [
        ContentLogprob(**fields(token), top_logprobs=[TopLogprob(**fields(other)) for other in token.top])
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
