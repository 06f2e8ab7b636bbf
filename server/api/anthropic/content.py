"""Messages of Anthropic's API and the blocks that they are made of."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, JsonValue, Tag

from server.errors import InvalidRequest
from server.http.wire import REFUSED, NonEmpty, Wire, by_field, kind_of, only

SIGNATURE = "turbocache"
"""Of a thought that is shown. It says nothing, but clients drop a thought that has no signature."""
_HOLDS = f"{SIGNATURE}:"


class CacheControl(Wire):
    """Where a client wants the prompt cached. The cache is automatic here and keeps every prefix that it has room for,
    so this changes nothing.
    """

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    # Who may share it. Claude Code says "global" of what all its users' prompts begin with.
    scope: Literal["global", "organization"] | None = None


class Block(Wire):
    """What all kinds of blocks may have."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Annotated[JsonValue, only([])] = None


class ThinkingBlock(Block):
    """What the assistant thought. It is in the signature where it was not to be shown."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""

    @property
    def thought(self) -> str:
        """Raises InvalidRequest for a damaged signature."""
        return self.thinking or hidden_in(self.signature)


class RedactedThinkingBlock(Block):
    """Thoughts that only Anthropic can read, of a conversation that began there. The model doesn't get them."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    """One call of an earlier answer."""

    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: dict[str, JsonValue]
    caller: Annotated[JsonValue, only({"type": "direct"})] = None
    toolset_name: Annotated[JsonValue, only()] = None


# Kinds of blocks that this version can't read, such as images, are refused by their `type`.


class NoText(BaseModel):
    type: Annotated[str, only("text")]


class NoUserBlock(BaseModel):
    type: Annotated[str, only("text", "tool_result")]


class NoAssistantBlock(BaseModel):
    type: Annotated[str, only("text", "thinking", "redacted_thinking", "tool_use")]


def _type_among(*kinds: str) -> Discriminator:
    """For a union of blocks: the tag is the type in angle brackets, <other> for one that is not among these."""

    def tag(value: Any) -> str | None:
        found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return None if found is None else f"<{found}>" if found in kinds else "<other>"

    tag.__name__ = "type"  # which pydantic's error names
    return Discriminator(tag)


_STRING_OR_BLOCKS = Discriminator(
    kind_of((str, "<string>"), (list, "<blocks>")),
    custom_error_type="content_type",
    custom_error_message="expected one of a string or array of objects",
)
_OnlyText = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[NoText, REFUSED, Tag("<other>")],
    _type_among("text"),
]
TextContent = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[_OnlyText], Tag("<blocks>")], _STRING_OR_BLOCKS
]


class ToolResultBlock(Block):
    """What a call of the answer before has led to."""

    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: TextContent | None = None
    is_error: bool | None = None
    toolset_name: Annotated[JsonValue, only()] = None


_UserBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[NoUserBlock, REFUSED, Tag("<other>")],
    _type_among("text", "tool_result"),
]
_AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[NoAssistantBlock, REFUSED, Tag("<other>")],
    _type_among("text", "thinking", "redacted_thinking", "tool_use"),
]


class UserMessage(Wire):
    """What the person says, and what came of the assistant's calls."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[list[_UserBlock], Field(min_length=1), Tag("<blocks>")],
        _STRING_OR_BLOCKS,
    ]


class AssistantMessage(Wire):
    """An earlier answer, or as the last message the beginning of this one."""

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
    """The signature that holds a thought which is not shown."""
    return _HOLDS + base64.b64encode(hidden.encode()).decode()


def hidden_in(signature: str) -> str:
    """The thought that a signature holds, empty for others' signatures. Raises InvalidRequest for a damaged one."""
    if not signature.startswith(_HOLDS):
        return ""
    try:
        return base64.b64decode(signature.removeprefix(_HOLDS), validate=True).decode()
    except ValueError as error:
        raise InvalidRequest("A thinking block's signature was changed on its way.", param="messages") from error
