"""The bodies of POST /v1/responses and POST /v1/responses/input_tokens."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, JsonValue, Tag, model_validator

from server.api.openai.chat_request import MetadataKey, MetadataValue, ReasoningEffort
from server.api.openai.sampling import Sampling, SessionKey, StreamOptions
from server.api.openai.tools import CHOICE_NEEDS_TOOLS, JsonObjectFormat, Name, Schema, TextFormat, checked_rules
from server.api.responses.input import Input, InputMessage, ItemReference, OtherItem
from server.api.responses.items import Item
from server.errors import InvalidRequest
from server.http.wire import (
    REFUSED,
    Condition,
    ModelName,
    Wire,
    by_field,
    by_kind,
    given,
    is_true,
    needs,
    only,
    some,
)
from server.protocol import AnswerRules, Tool, ToolChoice

LOGPROBS = "message.output_text.logprobs"


class FunctionTool(Wire):
    """A function that the model may call. `strict` is the default, as in the API: without it calls follow `parameters`
    if a grammar can enforce that schema.
    """

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None
    output_schema: Annotated[JsonValue, only()] = None
    allowed_callers: Annotated[JsonValue, only(["direct"])] = None
    defer_loading: Annotated[JsonValue, only(False)] = None
    asynchronous: Annotated[JsonValue, only(False), Field(alias="async")] = None

    def template(self) -> dict[str, Any]:
        """The tool for chat templates."""
        function = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": function}


class OtherTool(BaseModel):
    """Hosted tools, custom ones and other tools of the API. Refused by the `type`."""

    type: Annotated[str, only("function")]


ToolSpec = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[OtherTool, REFUSED, Tag("<other>")],
    by_field("type", "function"),
]


class FunctionChoice(Wire):
    type: Literal["function"]
    name: Name


class OtherChoice(BaseModel):
    type: Annotated[str, only("function", "allowed_tools")]


class OtherAllowed(BaseModel):
    type: Annotated[str, only("function")]


class AllowedTools(Wire):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[
            Annotated[
                Annotated[FunctionChoice, Tag("<function>")] | Annotated[OtherAllowed, REFUSED, Tag("<other>")],
                by_field("type", "function"),
            ]
        ],
        Field(min_length=1),
    ]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools if isinstance(tool, FunctionChoice))


Choice = Annotated[
    Annotated[ToolChoice, Tag("<word>")]
    | Annotated[
        Annotated[FunctionChoice, Tag("<function>")]
        | Annotated[AllowedTools, Tag("<allowed_tools>")]
        | Annotated[OtherChoice, REFUSED, Tag("<other>")],
        by_field("type", "function", "allowed_tools"),
        Tag("<choice>"),
    ],
    by_kind("choice_type", (str, "<word>"), (dict, "<choice>")),
]


class JsonSchemaFormat(Wire):
    """`strict` changes nothing: an answer always follows the whole schema."""

    type: Literal["json_schema"]
    name: Name
    json_schema: Annotated[Schema, Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by_field("type"),
]


class TextConfig(Wire):
    format: Format | None = None
    verbosity: Annotated[str | None, only("medium")] = None


class ReasoningConfig(Wire):
    """A `summary` of `auto` may be empty: the thought itself is in the answer."""

    effort: ReasoningEffort | None = None
    summary: Annotated[str | None, only("auto")] = None
    generate_summary: Annotated[str | None, only("auto")] = None
    context: Annotated[str | None, only("auto")] = None
    mode: Annotated[str | None, only("standard")] = None


class ResponseInput(Wire):
    """The fields that make the prompt of a response."""

    conditions: ClassVar[tuple[Condition, ...]] = (
        {
            "anyOf": [
                {"required": ["input"], "properties": {"input": {"type": "string"}}},
                some("input"),
                given("previous_response_id"),
            ]
        },
        CHOICE_NEEDS_TOOLS,
    )

    input: Input | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    # A longer input is refused. Sessions that rotate drop tokens, not items.
    truncation: Annotated[str | None, only("disabled")] = None
    conversation: Annotated[JsonValue, only()] = None

    @model_validator(mode="after")
    def _has_input(self) -> "ResponseInput":
        if not self.input and self.input != "" and self.previous_response_id is None:
            raise InvalidRequest(
                'One of "input" or "previous_response_id" must be provided.',
                param="input",
                code="missing_required_parameter",
            )
        return self

    def items(self) -> list[Item | ItemReference]:
        """The new items. An item without an id gets one."""
        given = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input or ()
        items = [item for item in given if not isinstance(item, OtherItem)]
        return [item if isinstance(item, ItemReference) else item.item() for item in items]

    @property
    def functions(self) -> list[FunctionTool]:
        return [tool for tool in self.tools or () if isinstance(tool, FunctionTool)]

    @property
    def format(self) -> TextFormat | JsonObjectFormat | JsonSchemaFormat:
        return (self.text and self.text.format) or TextFormat(type="text")

    @property
    def strict_by_default(self) -> bool:
        """Whether some function is strict only by default."""
        return any(tool.strict is None for tool in self.functions)

    def rules(self, strict: bool = True) -> AnswerRules:
        """`strict` is for functions that don't set it. Raises InvalidRequest if the fields contradict each other."""
        known = tuple(
            Tool(tool.name, tool.parameters, strict if tool.strict is None else tool.strict, f"tools[{i}].parameters")
            for i, tool in enumerate(self.functions)
        )
        parallel, schema = self.parallel_tool_calls is not False, self._schema()
        return checked_rules(known, *self._mode(), parallel=parallel, schema=schema, param="text.format.schema")

    def _mode(self) -> tuple[ToolChoice, frozenset[str] | None]:
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            return "required", frozenset({choice.name})
        if isinstance(choice, AllowedTools):
            return choice.mode, choice.names
        return choice if isinstance(choice, str) else "auto", None

    def _schema(self) -> dict[str, Any] | None:
        if isinstance(self.format, JsonSchemaFormat):
            return self.format.json_schema
        return {"type": "object"} if isinstance(self.format, JsonObjectFormat) else None


class InputTokensRequest(ResponseInput):
    """The body of POST /v1/responses/input_tokens."""

    model: ModelName | None = None
    personality: Annotated[JsonValue, only()] = None


class ResponsesRequest(ResponseInput, Sampling):
    """The body of POST /v1/responses. Null is the same as absent."""

    conditions: ClassVar[tuple[Condition, ...]] = (
        needs(given("stream_options"), is_true("stream")),
        needs(
            {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
            {"required": ["include"], "properties": {"include": {"type": "array", "contains": {"const": LOGPROBS}}}},
        ),
    )

    model: ModelName

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    # No upper limit: in a stream an event reports that it is too large, not the status.
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Thoughts are never encrypted: the item has them in plain text, which serves the same purpose.
    include: list[Annotated[str, only("reasoning.encrypted_content", LOGPROBS)]] | None = None
    prompt_cache_key: SessionKey | None = None
    # It limits calls of hosted tools. There are none.
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None

    # Labels for the client. They do not change the answer.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    client_metadata: dict[str, JsonValue] | None = None  # Codex CLI's

    # Fields of OpenAI's API that are not supported.
    background: Annotated[bool | None, only(False)] = None
    background_options: Annotated[JsonValue, only()] = None
    prompt: Annotated[JsonValue, only()] = None
    service_tier: Annotated[str | None, only("auto", "default")] = None
    prompt_cache_options: Annotated[JsonValue, only({}, {"mode": "implicit"})] = None
    prompt_cache_retention: Annotated[str | None, only("in_memory")] = None
    access_programs: Annotated[JsonValue, only()] = None
    context_management: Annotated[JsonValue, only([])] = None
    image: Annotated[JsonValue, only()] = None
    moderation: Annotated[JsonValue, only()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ResponsesRequest":
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequest(
                f"The 'top_logprobs' parameter is only allowed when 'include' has '{LOGPROBS}'.", param="top_logprobs"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def stored(self) -> bool:
        return self.store is not False
