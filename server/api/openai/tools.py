"""Tools, tool choice and response format of OpenAI's chat API."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, Tag

from server.errors import InvalidRequest
from server.http.wire import Condition, Wire, by_field, by_kind, needs, some
from server.protocol import AnswerRules, Tool, ToolChoice

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Schema = dict[str, JsonValue]


class FunctionSpec(Wire):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ToolSpec(Wire):
    """A function. There are no built-in tools."""

    type: Literal["function"]
    function: FunctionSpec

    def template(self) -> dict[str, Any]:
        """The tool for chat templates."""
        function = self.function.model_dump(exclude_unset=True, exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class FunctionName(Wire):
    name: Name


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedChoice(Wire):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Choice = Annotated[
    Annotated[ToolChoice, Tag("<word>")]
    | Annotated[
        Annotated[NamedTool, Tag("<function>")] | Annotated[AllowedChoice, Tag("<allowed_tools>")],
        by_field("type"),
        Tag("<choice>"),
    ],
    by_kind("choice_type", (str, "<word>"), (dict, "<choice>")),
]

CHOICE_NEEDS_TOOLS: Condition = needs(
    {
        "required": ["tool_choice"],
        "properties": {"tool_choice": {"anyOf": [{"const": "required"}, {"type": "object"}]}},
    },
    some("tools"),
)


class TextFormat(Wire):
    type: Literal["text"]


class JsonObjectFormat(Wire):
    type: Literal["json_object"]


class JsonSchema(Wire):
    """`strict` changes nothing: an answer always follows the whole schema."""

    name: Name
    description: str | None = None
    json_schema: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    by_field("type"),
]


def answer_rules(
    tools: Sequence[ToolSpec] | None,
    choice: ToolChoice | NamedTool | AllowedChoice | None,
    parallel: bool | None,
    format: ResponseFormat | None,
) -> AnswerRules:
    """The engine's rules. Raises InvalidRequest if they contradict each other."""
    known = tuple(
        Tool(spec.name, spec.parameters, bool(spec.strict), f"tools[{i}].function.parameters")
        for i, spec in enumerate(tool.function for tool in tools or ())
    )
    schema = _schema(format)
    return checked_rules(known, *_mode(choice), parallel=parallel is not False, schema=schema, param="response_format")


def checked_rules(
    tools: tuple[Tool, ...], mode: ToolChoice, allowed: frozenset[str] | None, **others: Any
) -> AnswerRules:
    """Raises InvalidRequest for two tools with one name, and for a choice of a tool that is missing."""
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"Invalid 'tools': two of them are called '{twice}'.", param="tools", code="invalid_value")
    if not tools and (mode == "required" or allowed is not None):
        raise InvalidRequest("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    if missing := next((name for name in sorted(allowed or ()) if name not in names), None):
        raise InvalidRequest(f"Tool choice '{missing}' not found in 'tools' parameter.", param="tool_choice")
    return AnswerRules(tools, mode, allowed, **others)


def _mode(choice: ToolChoice | NamedTool | AllowedChoice | None) -> tuple[ToolChoice, frozenset[str] | None]:
    if isinstance(choice, NamedTool):
        return "required", frozenset({choice.function.name})
    if isinstance(choice, AllowedChoice):
        return choice.allowed_tools.mode, frozenset(tool.function.name for tool in choice.allowed_tools.tools)
    return choice or "auto", None


def _schema(format: ResponseFormat | None) -> dict[str, Any] | None:
    if isinstance(format, JsonSchemaFormat):
        return format.json_schema.json_schema if format.json_schema.json_schema is not None else {"type": "object"}
    return {"type": "object"} if isinstance(format, JsonObjectFormat) else None
