"""Response bodies of POST /v1/chat/completions, in OpenAI's shape."""

from typing import Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    """Tokens of the prompt that were in the session's cache."""


class UsageBody(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CalledFunction(BaseModel):
    name: str
    arguments: str
    """JSON text."""


class MessageCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """A complete answer."""

    role: Literal["assistant"]
    content: str | None
    """Null only beside calls."""
    refusal: None = None
    reasoning_content: str | None = None
    """Only present if the model wrote a thought."""
    tool_calls: list[MessageCall] | None = None


class TopLogprob(BaseModel):
    """A token as text and as UTF-8 bytes, and ln of its probability. The bytes may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """A token of the answer, and the likeliest tokens at its position."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    """The response without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    """A part of a call. The first has the id and name, later ones continue the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is new. Fields that are not set are absent from the JSON."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None


class ChatCompletionChunk(BaseModel):
    """One SSE message. `usage` is absent unless requested: null, and in the last chunk the counts."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None
