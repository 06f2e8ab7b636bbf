"""Items of a response: as returned, stored and listed, and as messages for chat templates."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue

from server.api.openai.chat_answer import ContentLogprob
from server.api.openai.chat_request import arguments_of

Status = Literal["in_progress", "completed", "incomplete"]
Role = Literal["user", "assistant", "system", "developer"]
Phase = Literal["commentary", "final_answer"]


class InputText(BaseModel):
    type: Literal["input_text"]
    text: str


class OutputText(BaseModel):
    """`annotations` cite files and pages. They are empty here."""

    type: Literal["output_text"]
    text: str
    annotations: list[JsonValue] = Field(default_factory=list)
    logprobs: list[ContentLogprob] = Field(default_factory=list)


Text = Annotated[InputText | OutputText, Field(discriminator="type")]


class MessageItem(BaseModel):
    """A message. `phase` is the client's label of an earlier answer. Templates have no field for it."""

    id: str
    type: Literal["message"]
    role: Role
    status: Status
    content: list[Text]
    phase: Phase | None = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(BaseModel):
    type: Literal["summary_text"]
    text: str


class ReasoningItem(BaseModel):
    """A thought of the model in plain text. `summary` is empty and `encrypted_content` null, even if requested: a
    client that keeps the state itself sends the thought back in `content`.
    """

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: None = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary)


class CallItem(BaseModel):
    """A call of a function. `arguments` is JSON text."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class CallOutputItem(BaseModel):
    """The result of a function."""

    id: str
    type: Literal["function_call_output"]
    status: Status
    call_id: str
    output: str | list[InputText]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "\n".join(part.text for part in self.output)


Item = Annotated[MessageItem | ReasoningItem | CallItem | CallOutputItem, Field(discriminator="type")]


def messages_of(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """The messages for the chat template: plain dicts, string contents, `system` for `developer`."""
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    for item in items:
        if isinstance(item, CallOutputItem):
            name = {} if item.name is None else {"name": item.name}
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text, **name})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": "user" if item.role == "user" else "system", "content": item.text})
        else:
            if _begins_an_answer(messages, item):
                messages.append({"role": "assistant", "content": ""})
            _add(messages[-1], item)
    return _one_system_message(messages)


def _begins_an_answer(messages: Sequence[dict[str, Any]], item: Item) -> bool:
    """Whether the item begins a new message. In a template one message holds a thought, a text and calls, also text
    that comes after a call.
    """
    if not messages or messages[-1]["role"] != "assistant":
        return True
    last = messages[-1]
    return not isinstance(item, CallItem) and bool(last["content"]) and "tool_calls" not in last


def _add(message: dict[str, Any], item: Item) -> None:
    if isinstance(item, MessageItem):
        message["content"] += item.text
    elif isinstance(item, ReasoningItem):
        message["reasoning_content"] = message.get("reasoning_content", "") + item.text
    elif isinstance(item, CallItem):
        function = {"name": item.name, "arguments": arguments_of(item.arguments)}
        message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _one_system_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges the instructions with the developer messages behind them: many templates refuse a second one."""
    n = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if n < 2:
        return messages
    return [{"role": "system", "content": "\n\n".join(m["content"] for m in messages[:n])}, *messages[n:]]
