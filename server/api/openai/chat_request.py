"""The body of POST /v1/chat/completions: OpenAI's fields, and some of other local servers."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic_core import PydanticCustomError, from_json

from server.api.openai.sampling import AnswerTokens, SampledRequest
from server.api.openai.tools import CHOICE_NEEDS_TOOLS, Choice, ResponseFormat, ToolSpec, answer_rules
from server.errors import InvalidRequest
from server.http.wire import (
    REFUSED,
    Condition,
    NonEmpty,
    Wire,
    by_field,
    by_kind,
    given,
    is_true,
    needs,
    only,
    some,
)
from server.protocol import AnswerRules, Conversation

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Wire):
    """One text part of a message's content."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Annotated[JsonValue, only()] = None


class UnsupportedPart(BaseModel):
    """A kind of part that is not supported, such as an image. Refused by its `type`."""

    type: Annotated[str, only("text")]


def _part_kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    return "<other>" if kind in ("image_url", "input_audio", "file", "refusal") else "<text>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[UnsupportedPart, REFUSED, Tag("<other>")],
    Discriminator(_part_kind),
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
    by_kind("content_type", (str, "<string>"), (list, "<parts>")),
]


class FunctionCall(Wire):
    """A call of the assistant. `arguments` is JSON text as the model wrote it."""

    name: NonEmpty
    arguments: str


class ToolCall(Wire):
    """One tool call of an earlier assistant message."""

    id: NonEmpty
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class InstructionMessage(Wire):
    """`developer` is the new name of `system`. Templates know only the old one."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Wire):
    """A message of the user."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Wire):
    """An earlier answer. Clients may send it back as they received it, with empty `refusal`, `audio` and so on."""

    conditions: ClassVar[tuple[Condition, ...]] = ({"anyOf": [given("content"), some("tool_calls")]},)

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: Annotated[str | None, only()] = None
    audio: Annotated[JsonValue, only()] = None
    function_call: Annotated[JsonValue, only()] = None
    annotations: Annotated[JsonValue, only([])] = None

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content_or_tool_calls", "Expected content, or tool_calls with content null")
        return self


class ToolMessage(Wire):
    """The result of one tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: NonEmpty
    name: str | None = None


Message = Annotated[
    Annotated[InstructionMessage, Tag("<system>")]
    | Annotated[InstructionMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by_field("role"),
]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class ChatCompletionRequest(SampledRequest):
    """The body of POST /v1/chat/completions. Null is the same as absent."""

    conditions: ClassVar[tuple[Condition, ...]] = (
        {"not": given("max_tokens", "max_completion_tokens")},
        needs(
            {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
            is_true("logprobs"),
        ),
        CHOICE_NEEDS_TOOLS,
    )

    messages: Annotated[list[Message], Field(min_length=1)]

    max_completion_tokens: AnswerTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    # Labels for the client. They do not change the answer.
    safety_identifier: str | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None

    # Fields of OpenAI's API that are not supported.
    store: Annotated[bool | None, only(False)] = None
    functions: Annotated[list[JsonValue] | None, only([])] = None
    function_call: Annotated[JsonValue, only("none", "auto")] = None
    modalities: Annotated[list[str] | None, only(["text"])] = None
    service_tier: Annotated[str | None, only("auto", "default")] = None
    prompt_cache_options: Annotated[JsonValue, only({}, {"mode": "implicit"})] = None
    prompt_cache_retention: Annotated[str | None, only("in_memory")] = None
    verbosity: Annotated[str | None, only("medium")] = None
    audio: Annotated[JsonValue, only()] = None
    moderation: Annotated[JsonValue, only()] = None
    prediction: Annotated[JsonValue, only()] = None
    web_search_options: Annotated[JsonValue, only()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatCompletionRequest":
        # Not ValueErrors: pydantic passes these on unchanged, with the field that they name.
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                param="max_tokens",
                code="invalid_parameter_combination",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", param="top_logprobs"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Largest number of completion tokens, None for as many as the model has positions."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def conversation(self) -> Conversation:
        """The input of the chat template."""
        return Conversation(
            [template_message(message) for message in self.messages],
            tools=[tool.template() for tool in self.tools or ()],
            options=dict(self.chat_template_kwargs or {}),
            reasoning_effort=self.reasoning_effort,
        )

    def rules(self) -> AnswerRules:
        """Raises InvalidRequest if the fields contradict each other."""
        return answer_rules(self.tools, self.tool_choice, self.parallel_tool_calls, self.response_format)


def template_message(message: Message) -> dict[str, Any]:
    """A message for chat templates: a plain dict with string content and `system` for `developer`."""
    # Only clients that send an answer back have these. Templates have no use for them.
    echoes: dict[str, Any] = {"annotations": True, "tool_calls": {"__all__": {"index"}}}
    plain = message.model_dump(exclude_unset=True, exclude_none=True, exclude=echoes)
    # Templates that don't know `developer` drop such a message silently.
    plain["role"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content if isinstance(part, TextPart))
    plain.setdefault("content", "")
    for call in plain.get("tool_calls", ()):
        call["function"]["arguments"] = arguments_of(call["function"]["arguments"])
    return plain


def arguments_of(text: str) -> Any:
    """A call's arguments for templates: an object if the text is one, else the text."""
    try:
        # Not `json`: it accepts lone surrogates and endless nesting, on which the tokenizer and the template fail.
        arguments = from_json(text, allow_inf_nan=False)
    except ValueError:
        return text
    return arguments if isinstance(arguments, dict) else text
