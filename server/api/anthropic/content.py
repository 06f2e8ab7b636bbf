"""Messages of Anthropic's API, their blocks, and the signatures of thoughts.

Anthropic's signatures hold a thought encrypted, so that a hidden thought comes back with the next request. No thought
is secret here: these hold it in plain text.
"""

import base64
from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue, Tag

from server.errors import InvalidRequest
from server.http.wire import REFUSED, NonEmpty, Wire, by_field, by_kind, only

SIGNATURE = "turbocache"
"""Signature of a visible thought. It holds nothing, but clients drop a thought without a signature."""
_HOLDS = f"{SIGNATURE}:"


class CacheControl(Wire):
    """Where a client wants the prompt cached. It changes nothing: the cache here is automatic."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    # Who may share it. Claude Code sets "global" on the part that all its users' prompts share.
    scope: Literal["global", "organization"] | None = None


class Block(Wire):
    """Fields of all blocks."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Annotated[JsonValue, only([])] = None


class ThinkingBlock(Block):
    """A thought of the assistant. A hidden thought is in the signature."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""

    @property
    def thought(self) -> str:
        """Raises InvalidRequest for a damaged signature."""
        return self.thinking or hidden_in(self.signature)


class RedactedThinkingBlock(Block):
    """A thought that only Anthropic can read. The model does not get it."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    """A call in an earlier answer."""

    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: dict[str, JsonValue]
    caller: Annotated[JsonValue, only({"type": "direct"})] = None
    toolset_name: Annotated[JsonValue, only()] = None


# Blocks that are not supported, such as images. Refused by their `type`.


class NoText(BaseModel):
    type: Annotated[str, only("text")]


class NoUserBlock(BaseModel):
    type: Annotated[str, only("text", "tool_result")]


class NoAssistantBlock(BaseModel):
    type: Annotated[str, only("text", "thinking", "redacted_thinking", "tool_use")]


_STRING_OR_BLOCKS = by_kind("content_type", (str, "<string>"), (list, "<blocks>"))
_OnlyText = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[NoText, REFUSED, Tag("<other>")],
    by_field("type", "text"),
]
TextContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[_OnlyText], Tag("<blocks>")], _STRING_OR_BLOCKS
]


class ToolResultBlock(Block):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: TextContent | None = None
    is_error: bool | None = None
    toolset_name: Annotated[JsonValue, only()] = None


_UserBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[NoUserBlock, REFUSED, Tag("<other>")],
    by_field("type", "text", "tool_result"),
]
_AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[NoAssistantBlock, REFUSED, Tag("<other>")],
    by_field("type", "text", "thinking", "redacted_thinking", "tool_use"),
]


class UserMessage(Wire):
    """A message of the user, with results of calls."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[_UserBlock], Field(min_length=1), Tag("<blocks>")],
        _STRING_OR_BLOCKS,
    ]


class AssistantMessage(Wire):
    """An earlier answer. As the last message it is the beginning of the new answer."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[_AssistantBlock], Tag("<blocks>")], _STRING_OR_BLOCKS
    ]


class SystemMessage(Wire):
    """Instructions within a conversation."""

    role: Literal["system"]
    content: TextContent
    clear_at: Annotated[str | None, only("never")] = None
    output_config: Annotated[JsonValue, only({})] = None


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    by_field("role"),
]


def signature_of(hidden: str) -> str:
    """The signature that holds a hidden thought."""
    return _HOLDS + base64.b64encode(hidden.encode()).decode()


def hidden_in(signature: str) -> str:
    """The hidden thought in a signature, empty for foreign signatures. Raises InvalidRequest for a damaged one."""
    if not signature.startswith(_HOLDS):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_HOLDS), validate=True).decode()
    except ValueError as error:
        raise InvalidRequest("A thinking block's signature was changed on its way.", param="messages") from error
