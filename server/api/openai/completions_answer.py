"""What POST /v1/completions answers, as OpenAI's older API has it."""

from typing import Literal

from pydantic import BaseModel

from server.api.openai.chat_answer import UsageBody


class CompletionLogprobs(BaseModel):
    """The tokens of a text, ln of their probabilities, the likeliest in their places with theirs (null when none were
    asked for), and where each begins in the text, in characters. A token that is no whole character is
    "bytes:" with its bytes as "\\\\x..".
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """`finish_reason` is null only within a stream."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The whole answer, and each SSE message. In a stream `usage` is set (null, then the counts) only when the request
    asked for it.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None
