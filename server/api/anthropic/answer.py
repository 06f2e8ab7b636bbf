"""Response bodies of POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shape."""

from typing import Any, Literal

from pydantic import BaseModel, RootModel

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Thought(BaseModel):
    """A thought. `signature` holds its text if the client does not want to see it."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUse(BaseModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


ContentBlock = Text | Thought | ToolUse


class OutputTokensDetails(BaseModel):
    thinking_tokens: int


class MessageUsage(BaseModel):
    """Token counts of one request. `input_tokens` excludes the tokens that were cached."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    """Tokens of the prompt that were in the session's cache."""
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class CacheMiss(BaseModel):
    type: Literal["unavailable"]


class DiagnosticsBody(BaseModel):
    cache_miss_reason: CacheMiss


class MessageBody(BaseModel):
    """The response. A stream begins with one without content."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    diagnostics: DiagnosticsBody | None = None


class TokenCount(BaseModel):
    input_tokens: int


# Events of a stream. The event's name is its type.


class MessageStart(BaseModel):
    type: Literal["message_start"]
    message: MessageBody


class Ping(BaseModel):
    type: Literal["ping"]


class BlockStart(BaseModel):
    type: Literal["content_block_start"]
    index: int
    content_block: ContentBlock


class TextPart(BaseModel):
    type: Literal["text_delta"]
    text: str


class ThinkingPart(BaseModel):
    type: Literal["thinking_delta"]
    thinking: str


class SignaturePart(BaseModel):
    type: Literal["signature_delta"]
    signature: str


class InputPart(BaseModel):
    type: Literal["input_json_delta"]
    partial_json: str


BlockPart = TextPart | ThinkingPart | SignaturePart | InputPart


class BlockDelta(BaseModel):
    type: Literal["content_block_delta"]
    index: int
    delta: BlockPart


class BlockStop(BaseModel):
    type: Literal["content_block_stop"]
    index: int


class Ending(BaseModel):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """The end of the answer. `usage` counts all of it."""

    type: Literal["message_delta"]
    delta: Ending
    usage: MessageUsage


class MessageStop(BaseModel):
    type: Literal["message_stop"]


StreamEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class StreamEventBody(RootModel[StreamEvent]):
    """The data of any event."""
