"""The bodies of POST /v1/messages and /v1/messages/count_tokens."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue, Tag, model_validator

from server.api.anthropic.content import AssistantMessage, CacheControl, Message, TextContent
from server.api.anthropic.template import template_messages
from server.api.openai.sampling import AnswerTokens, Sampling
from server.api.openai.tools import Schema, checked_rules
from server.errors import InvalidRequest
from server.http.wire import Condition, ModelName, NonEmpty, Wire, by_field, given, needs, only, some, within
from server.protocol import AnswerRules, Conversation, Tool

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]


class ToolSpec(Wire):
    """A tool of the client. Tools of Anthropic are refused by their `type`."""

    type: Annotated[str | None, only("custom")] = None
    name: Name
    description: str | None = None
    input_schema: Schema
    strict: bool | None = None
    cache_control: CacheControl | None = None
    # Permits to stream a call's input before it is complete JSON. Here it is always complete.
    eager_input_streaming: bool | None = None
    allowed_callers: Annotated[list[str] | None, only(["direct"])] = None
    defer_loading: Annotated[bool | None, only(False)] = None
    input_examples: Annotated[JsonValue, only([])] = None

    def template(self) -> dict[str, Any]:
        """The tool for chat templates."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.input_schema}}


class AutoChoice(Wire):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Wire):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoice(Wire):
    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class NoChoice(Wire):
    type: Literal["none"]


Choice = Annotated[
    Annotated[AutoChoice, Tag("<auto>")]
    | Annotated[AnyChoice, Tag("<any>")]
    | Annotated[ToolChoice, Tag("<tool>")]
    | Annotated[NoChoice, Tag("<none>")],
    by_field("type"),
]


class Thinking(Wire):
    """Whether the model may think. Templates know no budget, so any `budget_tokens` only permits to think."""

    conditions: ClassVar[tuple[Condition, ...]] = (
        {
            "if": {"properties": {"type": {"const": "enabled"}}},
            "then": given("budget_tokens"),
            "else": {"not": given("budget_tokens")},
        },
    )

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    # "summarized" shows the whole thought, "omitted" puts it into the signature.
    display: Literal["summarized", "omitted"] | None = None
    block_binding: Annotated[JsonValue, only()] = None

    @model_validator(mode="after")
    def _enabled_with_a_budget(self) -> "Thinking":
        if (self.type == "enabled") != (self.budget_tokens is not None):
            rule = "required" if self.type == "enabled" else "only allowed"
            raise InvalidRequest(
                f"'thinking.budget_tokens' is {rule} when 'thinking.type' is 'enabled'.", param="thinking.budget_tokens"
            )
        return self


class OutputFormat(Wire):
    """The JSON schema of the answer's text."""

    type: Literal["json_schema"]
    json_schema: Annotated[Schema, Field(alias="schema")]


class OutputConfig(Wire):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None
    task_budget: Annotated[JsonValue, only()] = None


class Metadata(Wire):
    """`user_id` may contain the session's name, see `server.http.session_name`."""

    user_id: str | None = None


class Diagnostics(Wire):
    """Asks why a prompt was not in the cache. Earlier prompts are not kept, so the reply is "unavailable"."""

    previous_message_id: str | None = None


class PromptBody(Wire):
    """The fields of both bodies: everything that makes a prompt. Null is the same as absent."""

    conditions: ClassVar[tuple[Condition, ...]] = (
        {"not": {"allOf": [given("output_format"), within("output_config", given("format"))]}},
        needs(within("tool_choice", {"properties": {"type": {"enum": ["any", "tool"]}}}), some("tools")),
    )

    model: ModelName
    messages: Annotated[list[Message], Field(min_length=1, max_length=100_000)]

    system: TextContent | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    # The old place of `output_config.format`.
    output_format: OutputFormat | None = None
    cache_control: CacheControl | None = None

    # Fields of Anthropic's API that are not supported.
    speed: Annotated[str | None, only("standard")] = None
    # Claude Code asks to keep all thoughts. Here the template decides, as the model was trained.
    context_management: Annotated[
        JsonValue, only({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]})
    ] = None
    mcp_servers: Annotated[JsonValue, only([])] = None
    compaction: Annotated[JsonValue, only()] = None
    billing_policy: Annotated[JsonValue, only()] = None

    @model_validator(mode="after")
    def _formats_agree(self) -> "PromptBody":
        # Not ValueErrors: pydantic passes these on unchanged, with the field that they name.
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise InvalidRequest(
                "Setting 'output_format' and 'output_config.format' at the same time is not supported.",
                param="output_format",
            )
        if self.answer_format is not None and isinstance(self.messages[-1], AssistantMessage):
            raise InvalidRequest(
                f"'{self.format_param}' can't be combined with the beginning of an answer as the last message.",
                param="messages",
            )
        return self

    @property
    def answer_format(self) -> OutputFormat | None:
        in_config = self.output_config.format if self.output_config is not None else None
        return in_config or self.output_format

    @property
    def format_param(self) -> str:
        return "output_format" if self.output_format is not None else "output_config.format"

    def conversation(self) -> Conversation:
        """The input of the chat template. Raises InvalidRequest if the messages make no prompt.

        Thinking and effort only permit: a template without a switch for them is unaffected.
        """
        messages, go_on = template_messages(self.system, self.messages)
        return Conversation(
            messages,
            tools=[tool.template() for tool in self.tools or ()],
            reasoning_effort=self.output_config.effort if self.output_config is not None else None,
            thinking=self.thinking.type != "disabled" if self.thinking is not None else None,
            ignore_unknown_effort=True,
            continue_final_message=go_on,
        )

    def rules(self) -> AnswerRules:
        """Raises InvalidRequest if the fields contradict each other."""
        tools = tuple(
            Tool(spec.name, spec.input_schema, bool(spec.strict), f"tools[{i}].input_schema")
            for i, spec in enumerate(self.tools or ())
        )
        choice = self.tool_choice
        mode: Literal["none", "auto", "required"] = "auto"
        if isinstance(choice, AnyChoice | ToolChoice):
            mode = "required"
        elif isinstance(choice, NoChoice):
            mode = "none"
        allowed = frozenset({choice.name}) if isinstance(choice, ToolChoice) else None
        return checked_rules(
            tools,
            mode,
            allowed,
            parallel=choice is None or isinstance(choice, NoChoice) or not choice.disable_parallel_tool_use,
            schema=self.answer_format.json_schema if self.answer_format is not None else None,
            param=f"{self.format_param}.schema",
        )


class CountTokensRequest(PromptBody):
    """The body of POST /v1/messages/count_tokens."""


class MessagesRequest(PromptBody, Sampling):
    """The body of POST /v1/messages."""

    max_tokens: AnswerTokens
    stream: bool | None = None
    stop_sequences: Annotated[list[NonEmpty], Field(max_length=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: Metadata | None = None
    diagnostics: Diagnostics | None = None
    # The only tier is the standard one.
    service_tier: Literal["auto", "standard_only"] | None = None

    # Fields of Anthropic's API that are not supported.
    container: Annotated[JsonValue, only()] = None
    inference_geo: Annotated[JsonValue, only()] = None
    fallbacks: Annotated[JsonValue, only([])] = None
    fallback_credit_token: Annotated[JsonValue, only()] = None
    thread: Annotated[JsonValue, only()] = None

    @property
    def user_id(self) -> str | None:
        return self.metadata.user_id if self.metadata is not None else None

    @property
    def hides_thoughts(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"
