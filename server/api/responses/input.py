"""The input of POST /v1/responses: text, or items in all forms that clients send."""

import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, Tag

from server.api.responses.items import (
    CallItem,
    CallOutputItem,
    InputText,
    MessageItem,
    OutputText,
    Phase,
    ReasoningItem,
    ReasoningText,
    Role,
    Status,
    SummaryText,
)
from server.http.wire import REFUSED, NonEmpty, Wire, by_field, by_kind, only

DIRECT = {"type": "direct"}
"""The caller of functions: the model itself, not a program of OpenAI."""


class InputTextPart(Wire):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Annotated[JsonValue, only()] = None


class OutputTextPart(Wire):
    """Text of an earlier answer. The model does not see its `logprobs`."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[JsonValue, only([])] = None
    logprobs: list[dict[str, JsonValue]] | None = None


class OtherPart(BaseModel):
    """Images, files and other parts of the API. Refused by the `type`."""

    type: Annotated[str, only("input_text", "output_text")]


class OtherOutput(BaseModel):
    type: Annotated[str, only("input_text")]


Part = Annotated[
    Annotated[InputTextPart, Tag("<input_text>")]
    | Annotated[OutputTextPart, Tag("<output_text>")]
    | Annotated[OtherPart, REFUSED, Tag("<other>")],
    by_field("type", "input_text", "output_text"),
]
OutputPart = Annotated[
    Annotated[InputTextPart, Tag("<input_text>")] | Annotated[OtherOutput, REFUSED, Tag("<other>")],
    by_field("type", "input_text"),
]
_string_or_list = by_kind("content_type", (str, "<string>"), (list, "<list>"))
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(min_length=1), Tag("<list>")], _string_or_list
]
Output = Annotated[Annotated[str, Tag("<string>")] | Annotated[list[OutputPart], Tag("<list>")], _string_or_list]


class InputMessage(Wire):
    """A message: in short form (a string, no `type`), in full, or as an earlier answer had it."""

    role: Role
    content: Content
    type: Literal["message"] | None = None
    id: str | None = None
    status: Status | None = None
    phase: Phase | None = None

    def item(self) -> MessageItem:
        parts = (
            [self.content]
            if isinstance(self.content, str)
            else [part.text for part in self.content if not isinstance(part, OtherPart)]
        )
        part = _output_text if self.role == "assistant" else _input_text
        content: list[InputText | OutputText] = [part(text) for text in parts]
        item = MessageItem(
            id=self.id or new_id("msg"), type="message", role=self.role, status=_status(self.status), content=content
        )
        if self.phase is not None:
            item.phase = self.phase
        return item


class FunctionCall(Wire):
    type: Literal["function_call"]
    call_id: NonEmpty
    name: NonEmpty
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: Annotated[JsonValue, only()] = None
    caller: Annotated[JsonValue, only(DIRECT)] = None
    asynchronous: Annotated[JsonValue, only(False), Field(alias="async")] = None

    def item(self) -> CallItem:
        return CallItem(
            id=self.id or new_id("fc"),
            type="function_call",
            status=_status(self.status),
            call_id=self.call_id,
            name=self.name,
            arguments=self.arguments,
        )


class FunctionCallOutput(Wire):
    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: Output
    name: str | None = None
    id: str | None = None
    status: Status | None = None
    namespace: Annotated[JsonValue, only()] = None
    caller: Annotated[JsonValue, only(DIRECT)] = None

    def item(self) -> CallOutputItem:
        if isinstance(self.output, str):
            output: str | list[InputText] = self.output
        else:
            output = [_input_text(part.text) for part in self.output if isinstance(part, InputTextPart)]
        item = CallOutputItem(
            id=self.id or new_id("fco"),
            type="function_call_output",
            status=_status(self.status),
            call_id=self.call_id,
            output=output,
        )
        if self.name is not None:
            item.name = self.name
        return item


class Summary(Wire):
    type: Literal["summary_text"]
    text: str


class Thought(Wire):
    type: Literal["reasoning_text"]
    text: str


class Reasoning(Wire):
    """An earlier thought in plain text. A thought that another server encrypted can't be read."""

    type: Literal["reasoning"]
    summary: list[Summary] | None = None
    content: list[Thought] | None = None
    encrypted_content: Annotated[str | None, only()] = None
    id: str | None = None
    status: Status | None = None

    def item(self) -> ReasoningItem:
        return ReasoningItem(
            id=self.id or new_id("rs"),
            type="reasoning",
            status=_status(self.status),
            summary=[SummaryText(type="summary_text", text=part.text) for part in self.summary or ()],
            content=[ReasoningText(type="reasoning_text", text=part.text) for part in self.content or ()],
            encrypted_content=None,
        )


class ItemReference(Wire):
    """Refers to a stored item."""

    id: NonEmpty
    type: Literal["item_reference"] | None = None


class OtherItem(BaseModel):
    """Calls of hosted tools and other items of the API. Refused by the `type`."""

    type: Annotated[str, only("message", "function_call", "function_call_output", "reasoning", "item_reference")]


def _untyped(value: dict[str, Any]) -> str | None:
    return "message" if "role" in value else "item_reference" if "id" in value else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[FunctionCall, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[Reasoning, Tag("<reasoning>")]
    | Annotated[ItemReference, Tag("<item_reference>")]
    | Annotated[OtherItem, REFUSED, Tag("<other>")],
    by_field(
        "type", "message", "function_call", "function_call_output", "reasoning", "item_reference", missing=_untyped
    ),
]
Input = Annotated[Annotated[str, Tag("<string>")] | Annotated[list[InputItem], Tag("<list>")], _string_or_list]


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _status(given: Status | None) -> Status:
    return given or "completed"


def _input_text(text: str) -> InputText:
    return InputText(type="input_text", text=text)


def _output_text(text: str) -> OutputText:
    return OutputText(type="output_text", text=text, annotations=[], logprobs=[])
