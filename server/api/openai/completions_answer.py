"""Response bodies of POST /v1/completions, in the shape of OpenAI's older API."""

from typing import Literal

from pydantic import BaseModel

from server.api.openai.chat_answer import UsageBody


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
