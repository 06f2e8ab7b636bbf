"""Turns messages of Anthropic's API into messages for chat templates."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from server.api.anthropic.content import (
    AssistantMessage,
    Message,
    SystemMessage,
    TextBlock,
    TextContent,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from server.errors import InvalidRequest

_ATTRIBUTION = "x-anthropic-billing-header:"
"""Beginning of a line that Claude Code puts before its system prompt, for Anthropic's accounting."""

Names = dict[str, str]
"""Names of the called tools, by the calls' ids."""


def template_messages(system: TextContent | None, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], bool]:
    """Returns the messages, and whether the last one is an answer to continue. Raises InvalidRequest if there are none,
    or if the last one can't be continued.

    Consecutive messages of one role are one turn, as in Anthropic's API. Instructions within the conversation become
    text of the user in the tags that agents use, because many templates take a system message only at the beginning.
    """
    instructions = [] if system is None else list(_instructions(system))
    n_leading = 0
    for message in messages:
        if not isinstance(message, SystemMessage):
            break
        instructions += _texts(message.content)
        n_leading += 1
    result: list[dict[str, Any]] = [{"role": "system", "content": _joined(instructions)}] if any(instructions) else []
    names: Names = {}
    for answers, turn in groupby(messages[n_leading:], lambda message: isinstance(message, AssistantMessage)):
        blocks = [block for message in turn for block in _blocks(message)]
        result += [_answer(blocks, names)] if answers else _user_turn(blocks, names)
    go_on = isinstance(messages[-1], AssistantMessage) and _has_text(result[-1])
    if isinstance(messages[-1], AssistantMessage) and not go_on:
        result.pop()
    if not result:
        raise InvalidRequest("At least one message must have content.", param="messages")
    return result, go_on


def _instructions(system: TextContent) -> Iterator[str]:
    """The system prompt's texts without Claude Code's attribution line. That line differs in each request, so no prompt
    would continue a cached one.
    """
    for text in _texts(system):
        yield text.partition("\n")[2] if text.startswith(_ATTRIBUTION) else text


def _has_text(answer: dict[str, Any]) -> bool:
    """Whether the answer has text to continue. Raises InvalidRequest if it can't be continued."""
    if "tool_calls" in answer:
        raise InvalidRequest(
            "The last message calls tools: each `tool_use` block must have a `tool_result` block in the next message.",
            param="messages",
        )
    if "reasoning_content" in answer and not answer["content"]:
        raise InvalidRequest("An answer can be continued from its text only, not from a thought.", param="messages")
    return bool(answer["content"])


def _answer(blocks: Sequence[Any], names: Names) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": _joined(block.text for block in blocks if isinstance(block, TextBlock)),
    }
    if thought := _joined(block.thought for block in blocks if isinstance(block, ThinkingBlock)):
        message["reasoning_content"] = thought
    if calls := [block for block in blocks if isinstance(block, ToolUseBlock)]:
        names |= {call.id: call.name for call in calls}
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.input}}
            for call in calls
        ]
    return message


def _user_turn(blocks: Sequence[Any], names: Names) -> Iterator[dict[str, Any]]:
    """A user's turn: one message per result, and one per run of texts between them."""
    for results, run in groupby(blocks, lambda block: isinstance(block, ToolResultBlock)):
        if results:
            yield from (_result(block, names) for block in run)
        elif (text := _joined(block.text for block in run)) or all(isinstance(block, TextBlock) for block in blocks):
            yield {"role": "user", "content": text}


def _result(block: ToolResultBlock, names: Names) -> dict[str, Any]:
    text = "" if block.content is None else _joined(_texts(block.content))
    if block.is_error and not text.lower().startswith("error"):
        text = f"Error: {text}"  # templates have no field for it
    message = {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}
    # Some templates identify results by the tool's name.
    return message | ({"name": names[block.tool_use_id]} if block.tool_use_id in names else {})


def _blocks(message: Message) -> list[Any]:
    if isinstance(message, SystemMessage):
        text = _joined(_texts(message.content))
        return [TextBlock(type="text", text=f"<system-reminder>\n{text}\n</system-reminder>")]
    content = message.content
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else list(content)


def _texts(content: TextContent) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [block.text for block in content if isinstance(block, TextBlock)]


def _joined(texts: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(text for text in texts if text)
