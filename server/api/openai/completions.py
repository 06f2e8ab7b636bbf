"""POST /v1/completions: OpenAI's older API, which continues texts or token ids without a chat template."""

import asyncio
import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.api.openai.chat import LEAST_LOGPROB, OpenAIRenderer, usage_body
from server.api.openai.chat_answer import UsageBody
from server.api.openai.completions_request import DEFAULT_TOKENS, CompletionRequest
from server.errors import InvalidRequest
from server.http.generation import until_disconnect
from server.http.middleware import COMPLETIONS_PATH, app_context, request_context
from server.http.respond import Answer, check_model, expand_n, respond, to_json
from server.http.routing import api_router, generates
from server.http.session_name import name_session
from server.http.sse import data
from server.protocol import (
    AnswerRules,
    DrawnToken,
    Engine,
    Event,
    Finished,
    GenerationRequest,
    Prompt,
    TextDelta,
    Usage,
)

_RULES = AnswerRules(raw=True)

router = api_router()


class CompletionLogprobs(BaseModel):
    """The tokens of a text. Each list has one item per token."""

    tokens: list[str]
    """A token that is not complete characters is "bytes:" with its bytes as "\\\\x..". """
    token_logprobs: list[float]
    """ln of the probabilities."""
    top_logprobs: list[dict[str, float]] | None
    """The likeliest tokens at each position, null if not requested."""
    text_offset: list[int]
    """Where the token begins in the text, in characters."""


class CompletionChoice(BaseModel):
    """`finish_reason` is null only in a stream."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The response, and each SSE message. In a stream `usage` is absent unless requested."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


@router.post(COMPLETIONS_PATH, response_model=Completion, responses=generates(Completion))
async def completions(request: Request, wanted: CompletionRequest) -> Response:
    """Continue each prompt `n` times. The choices of the first prompt come first."""
    app, context = app_context(request), request_context(request)
    check_model(wanted.model, app.engine.model)
    session = name_session(request, wanted.prompt_cache_key, bool(wanted.stream))
    prompts, echoes = await until_disconnect(asyncio.to_thread(_prompts, app.engine, wanted), request.receive)
    n, requests = wanted.n or 1, list[GenerationRequest]()
    for i, prompt in enumerate(prompts):
        first = GenerationRequest(
            request_id=f"{context.request_id}.{i}" if i else context.request_id,
            prompt=prompt,
            max_tokens=wanted.max_tokens or DEFAULT_TOKENS,
            sampling=wanted.sampling(app.engine.model.sampling),
            stop=wanted.stop_texts,
            session=session,
            owner=context.owner,
            logprobs=wanted.logprobs,
            rules=_RULES,
            choice=i * n,
        )
        requests += expand_n(first, n)
    renderer = CompletionRenderer(
        context.request_id, app.engine.model.id, wanted, [echo for echo in echoes for _ in range(n)]
    )
    return await respond(request, requests, renderer, stream=bool(wanted.stream))


def _prompts(engine: Engine, wanted: CompletionRequest) -> tuple[list[Prompt], list[str]]:
    """The prompts, and with `echo` their texts. Raises InvalidRequest for an empty prompt or unknown tokens."""
    prompts, echoes = [], []
    for asked in wanted.prompts:
        tokens = engine.encode(asked) if isinstance(asked, str) else asked
        if not tokens:
            raise InvalidRequest("Invalid 'prompt': the model's tokenizer makes no tokens of it.", param="prompt")
        prompts.append(Prompt(tokens, continued=True, param="prompt"))
        if wanted.echo:
            echoes.append(asked if isinstance(asked, str) else engine.decode(asked, "prompt"))
    engine.constrain(_RULES, prompts[0])
    return prompts, echoes


class CompletionRenderer(OpenAIRenderer):
    """Renders the answers to one request. `echoes` are the texts to send before each answer, or empty."""

    def __init__(self, request_id: str, model_id: str, wanted: CompletionRequest, echoes: Sequence[str]) -> None:
        super().__init__(request_id, model_id, wanted.include_usage)
        self._n_top = wanted.logprobs
        self._echoes = echoes
        self._begun: set[int] = set()
        self._states: dict[int, _LogprobState] = {}

    def render(self, event: Event) -> Sequence[bytes]:
        """A chunk for a piece of text or the finish reason."""
        if isinstance(event, TextDelta):
            logprobs = self._logprobs(event.choice, event.tokens) if event.tokens else None
            return [*self._opening(event.choice), self._chunk_of(event.choice, event.text, logprobs)]
        if isinstance(event, Finished):
            end = CompletionChoice(text="", index=event.choice, logprobs=None, finish_reason=_reason(event))
            return [*self._opening(event.choice), self._chunk([end], None)]
        return ()

    def body(self, answers: Sequence[Answer], usage: Usage) -> Completion:
        choices = [self._whole_choice(i, answer) for i, answer in enumerate(answers)]
        return Completion(object="text_completion", choices=choices, usage=usage_body(usage), **self._head)

    def _whole_choice(self, index: int, answer: Answer) -> CompletionChoice:
        echo = self._echoes[index] if self._echoes else ""
        logprobs = None if self._n_top is None else self._logprobs(index, answer.tokens)
        return CompletionChoice(
            text=echo + answer.content, index=index, logprobs=logprobs, finish_reason=_reason(answer.end)
        )

    def _opening(self, choice: int) -> list[bytes]:
        """The echoed prompt, once."""
        if not self._echoes or choice in self._begun:
            return []
        self._begun.add(choice)
        return [self._chunk_of(choice, self._echoes[choice], None)]

    def _logprobs(self, choice: int, tokens: Sequence[DrawnToken]) -> CompletionLogprobs:
        return self._states.setdefault(choice, _LogprobState(self._n_top or 0)).logprobs(tokens)

    def _chunk_of(self, choice: int, text: str, logprobs: CompletionLogprobs | None) -> bytes:
        return self._chunk([CompletionChoice(text=text, index=choice, logprobs=logprobs, finish_reason=None)], None)

    def _chunk(self, choices: list[CompletionChoice], usage: UsageBody | None) -> bytes:
        chunk = Completion(object="text_completion", choices=choices, **self._head)
        if self._include_usage:
            chunk.usage = usage
        return data(to_json(chunk))


@dataclass(slots=True)
class _LogprobState:
    """Position in an answer's text up to which logprobs were sent."""

    n_top: int
    offset: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def logprobs(self, tokens: Sequence[DrawnToken]) -> CompletionLogprobs:
        """The next tokens in the older API's shape. The token itself is always among the likeliest."""
        shown = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self.n_top else None, text_offset=[]
        )
        for token in tokens:
            text, logprob = _spelled(token.token), max(token.logprob, LEAST_LOGPROB)
            shown.tokens.append(text)
            shown.token_logprobs.append(logprob)
            shown.text_offset.append(self.offset)
            self.offset += len(self.decoder.decode(token.token))
            if shown.top_logprobs is not None:
                best = {_spelled(other.token): max(other.logprob, LEAST_LOGPROB) for other in token.top}
                shown.top_logprobs.append(best | {text: logprob})
        return shown


def _spelled(token: bytes) -> str:
    """A token's text, or its bytes if they are not complete characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _reason(event: Finished) -> str:
    """A text completion calls no tools."""
    return "length" if event.finish_reason == "length" else "stop"
