"""The body of POST /v1/chat/completions, as OpenAI's API has it with what other local servers add."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequest
from server.protocol import AnswerRules, Conversation, SamplingParams
from server.schemas.base import NonEmpty, Wire, by_field, kind_of, only
from server.schemas.tools import Choice, ResponseFormat, ToolSpec, answer_rules

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Wire):
    """One text part of a message's content."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Annotated[JsonValue, only()] = None


class UnsupportedPart(BaseModel):
    """A part kind of OpenAI's API that this version can't read, such as an image; refused by its `type`."""

    type: Annotated[str, only("text")]


def _part_kind(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    return "<other>" if kind in ("image_url", "input_audio", "file", "refusal") else "<text>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[UnsupportedPart, Tag("<other>")], Discriminator(_part_kind)
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
    Discriminator(
        kind_of((str, "<string>"), (list, "<parts>")),
        custom_error_type="content_type",
        custom_error_message="expected one of a string or array of objects",
    ),
]


class FunctionCall(Wire):
    """What the assistant called; `arguments` is JSON text as the model wrote it."""

    name: NonEmpty
    arguments: str


class ToolCall(Wire):
    """One tool call of an earlier assistant message."""

    id: NonEmpty
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class InstructionMessage(Wire):
    """`developer` is the newer name of `system`; templates know only the older one."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Wire):
    """What the person says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Wire):
    """An earlier answer, also as clients send back what they received (with empty `refusal`, `audio`, ...)."""

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


class StreamOptions(Wire):
    """Only with `stream: true`."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, only(False)] = None


def _token_id(text: str) -> str:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise PydanticCustomError("token_id", "Expected a token id")
    return text


TokenId = Annotated[str, AfterValidator(_token_id)]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Stop = Annotated[
    Annotated[NonEmpty, Tag("<string>")] | Annotated[list[NonEmpty], Field(max_length=4), Tag("<list>")],
    Discriminator(
        kind_of((str, "<string>"), (list, "<list>")),
        custom_error_type="stop_type",
        custom_error_message="expected one of a string or array of strings",
    ),
]


class ChatCompletionRequest(Wire):
    """The body of POST /v1/chat/completions. A field that is null counts as not given."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    prompt_cache_key: str | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None

    # Labels for the caller's own books; they change nothing about the answer.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None

    # Fields of OpenAI's API that this version does not honour.
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
        # Not ValueErrors: pydantic lets these pass as they are, with the field they name.
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
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """Completion tokens asked for at most; None for as far as the model reaches."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def conversation(self) -> Conversation:
        """For the chat template: plain dicts, string contents, `system` for `developer`."""
        return Conversation(
            [_template_message(message) for message in self.messages],
            tools=[tool.template() for tool in self.tools or ()],
            options=dict(self.chat_template_kwargs or {}),
            reasoning_effort=self.reasoning_effort,
        )

    def rules(self) -> AnswerRules:
        """Raises InvalidRequest when they contradict each other."""
        return answer_rules(self.tools, self.tool_choice, self.parallel_tool_calls, self.response_format)

    def sampling(self) -> SamplingParams:
        """Given values, or OpenAI's defaults."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=tuple(sorted((int(token), bias) for token, bias in (self.logit_bias or {}).items())),
            seed=self.seed,
        )


def _template_message(message: Message) -> dict[str, Any]:
    # What only clients' own echoes carry says nothing to a template.
    echoes: dict[str, Any] = {"annotations": True, "tool_calls": {"__all__": {"index"}}}
    plain = message.model_dump(exclude_unset=True, exclude_none=True, exclude=echoes)
    # Templates that don't know `developer` drop such a message without a word.
    plain["role"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content if isinstance(part, TextPart))
    plain.setdefault("content", "")
    for call in plain.get("tool_calls", ()):
        call["function"]["arguments"] = arguments_of(call["function"]["arguments"])
    return plain


def arguments_of(text: str) -> Any:
    """A call's arguments as templates want them: an object if the text is one, else the text as it was written."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text
