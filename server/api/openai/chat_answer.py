"""What POST /v1/chat/completions answers, as OpenAI's API has it."""

from typing import Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """`cached_tokens` of the prompt were found in the session's cache."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Token counts of one turn."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CalledFunction(BaseModel):
    """`arguments` is JSON text."""

    name: str
    arguments: str


class MessageCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The whole answer; `reasoning_content` only where the model thought aloud, `content` is null beside calls only."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageCall] | None = None


class TopLogprob(BaseModel):
    """A token as text and as UTF-8 bytes, which need not be whole characters, and ln of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """A token of the answer, and the likeliest in its place."""

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
    """The answer to a request without `stream`."""

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
    """A part of a call: the first has its id and name, later ones go on with the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is new; fields that are not set are left out of the JSON."""

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
    """One SSE message. `usage` is set (null, then the counts) only when the request asked for it."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None
