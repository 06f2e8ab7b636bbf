"""What travels over the wire: OpenAI's chat completion request and responses as pydantic models.

Requests are parsed strictly and nothing in them is ignored: an unknown field, a wrong type or a value this version does
not honour is refused. A field whose honouring comes later stands here with `only(...)`, the values that change nothing.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequest

UNSUPPORTED_PARAMETER = "unsupported_parameter"
UNSUPPORTED_VALUE = "unsupported_value"
# Names of union branches, which show up in pydantic's error locations; no field is called like that.
BRANCHES = ("<string>", "<parts>", "<list>", "<text>", "<other>")


def only(*neutral: object) -> AfterValidator:
    """Accepts null and the given values, which change nothing; any other value is refused as not supported yet."""

    useful = [value for value in neutral if value not in ([], {})]

    def check(value: Any) -> Any:
        if value is None or any(value == other and type(value) is type(other) for other in neutral):
            return value
        if not useful:
            raise PydanticCustomError(UNSUPPORTED_PARAMETER, "is not supported by this version")
        supported = " or ".join(json.dumps(other) for other in useful)
        raise PydanticCustomError(
            UNSUPPORTED_VALUE, "is supported by this version only as {supported}", {"supported": supported}
        )

    return AfterValidator(check)


def _nonempty(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty_string", "Expected a non-empty string")
    return text


class Wire(BaseModel):
    """Strict input: no unknown fields, no coercion ("1" is not 1, true is not 1), no NaN or Infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


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


def _content_kind(content: Any) -> str | None:
    return "<string>" if isinstance(content, str) else "<parts>" if isinstance(content, list) else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[UnsupportedPart, Tag("<other>")], Discriminator(_part_kind)
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="expected one of a string or array of objects",
    ),
]


class FunctionCall(Wire):
    """What the assistant called; `arguments` is JSON text as the model wrote it."""

    name: Annotated[str, AfterValidator(_nonempty)]
    arguments: str


class ToolCall(Wire):
    """One tool call of an earlier assistant message."""

    id: Annotated[str, AfterValidator(_nonempty)]
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
    tool_call_id: Annotated[str, AfterValidator(_nonempty)]
    name: str | None = None


Message = Annotated[InstructionMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


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
StopText = Annotated[str, AfterValidator(_nonempty)]


def _stop_kind(stop: Any) -> str | None:
    return "<string>" if isinstance(stop, str) else "<list>" if isinstance(stop, list) else None


Stop = Annotated[
    Annotated[StopText, Tag("<string>")] | Annotated[list[StopText], Field(max_length=4), Tag("<list>")],
    Discriminator(
        _stop_kind, custom_error_type="stop_type", custom_error_message="expected one of a string or array of strings"
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
    prompt_cache_key: str | None = None

    # Labels for the caller's own books; they change nothing about the answer.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None

    # Fields of OpenAI's API that later versions honour.
    n: Annotated[int | None, only(1)] = None
    store: Annotated[bool | None, only(False)] = None
    response_format: Annotated[JsonValue, only({"type": "text"})] = None
    tools: Annotated[list[JsonValue] | None, only([])] = None
    tool_choice: Annotated[JsonValue, only("none", "auto")] = None
    functions: Annotated[list[JsonValue] | None, only([])] = None
    function_call: Annotated[JsonValue, only("none", "auto")] = None
    modalities: Annotated[list[str] | None, only(["text"])] = None
    service_tier: Annotated[str | None, only("auto", "default")] = None
    prompt_cache_options: Annotated[JsonValue, only({}, {"mode": "implicit"})] = None
    prompt_cache_retention: Annotated[str | None, only("in_memory")] = None
    reasoning_effort: Annotated[str | None, only()] = None
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

    def template_messages(self) -> list[dict[str, Any]]:
        """Messages as chat templates expect them: plain dicts, string contents, `system` for `developer`."""
        return [_template_message(message) for message in self.messages]


def _template_message(message: Message) -> dict[str, Any]:
    # What only clients' own echoes carry says nothing to a template.
    echoes: dict[str, Any] = {"annotations": True, "tool_calls": {"__all__": {"index"}}}
    plain = message.model_dump(exclude_unset=True, exclude_none=True, exclude=echoes)
    # Templates that don't know `developer` drop such a message without a word.
    plain["role"] = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content if isinstance(part, TextPart))
    plain.setdefault("content", "")
    return plain


class ForkRequest(Wire):
    """POST /v1/sessions/{id}/fork: the new session's `id`, or null for one that the server makes up."""

    id: Annotated[str, Field(min_length=1)] | None = None


class PromptTokensDetails(BaseModel):
    """`cached_tokens` of the prompt were found in the session's cache."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Token counts of one turn."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """The whole answer; `reasoning_content` only where the model thought aloud."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    reasoning_content: str | None = None


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


class Delta(BaseModel):
    """What is new; fields that are not set are left out of the JSON."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None


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


class ModelBody(BaseModel):
    """One model; `max_model_len` is the longest conversation in tokens (an addition other local servers have too)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelBody]
