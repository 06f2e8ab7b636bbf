"""Messages of Anthropic's API as chat templates take them."""

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
"""How the line begins that Claude Code puts before its system prompt for Anthropic's books."""

Names = dict[str, str]
"""Of the tools that were called, by the calls' ids."""


def template_messages(system: TextContent | None, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], bool]:
    """The messages, and whether the last one is an answer to be continued. Raises InvalidRequest where nothing is left
    of them, or the last one can't be continued.

    Messages that follow each other in one role are one turn, as Anthropic has it. Instructions within the conversation
    are the user's text, in the tags that agents use for them: many templates take a system message at the beginning
    only.
    """
    instructions = [] if system is None else list(_instructions(system))
    n_leading = 0
    for message in messages:
        if not isinstance(message, SystemMessage):
            break
        instructions += _texts(message.content)
        n_leading += 1
    found: list[dict[str, Any]] = [{"role": "system", "content": _joined(instructions)}] if any(instructions) else []
    names: Names = {}
    for answers, turn in groupby(messages[n_leading:], lambda message: isinstance(message, AssistantMessage)):
        blocks = [block for message in turn for block in _blocks(message)]
        found += [_answer(blocks, names)] if answers else _said(blocks, names)
    go_on = isinstance(messages[-1], AssistantMessage) and _begun(found[-1])
    if isinstance(messages[-1], AssistantMessage) and not go_on:
        found.pop()
    if not found:
        raise InvalidRequest("At least one message must have content.", param="messages")
    return found, go_on


def _instructions(system: TextContent) -> Iterator[str]:
    """The system prompt's texts without Claude Code's attribution. That differs from request to request, and with it no
    prompt would begin as an earlier one did, so that nothing cached could be used.
    """
    for text in _texts(system):
        yield text.partition("\n")[2] if text.startswith(_ATTRIBUTION) else text


def _begun(answer: dict[str, Any]) -> bool:
    """Whether there is anything to continue. Raises InvalidRequest where it can't be."""
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


def _said(blocks: Sequence[Any], names: Names) -> Iterator[dict[str, Any]]:
    """A user's turn: a message for each result and for the texts between them."""
    for results, run in groupby(blocks, lambda block: isinstance(block, ToolResultBlock)):
        if results:
            yield from (_result(block, names) for block in run)
        elif (text := _joined(block.text for block in run)) or all(isinstance(block, TextBlock) for block in blocks):
            yield {"role": "user", "content": text}


def _result(block: ToolResultBlock, names: Names) -> dict[str, Any]:
    text = "" if block.content is None else _joined(_texts(block.content))
    if block.is_error and not text.lower().startswith("error"):
        text = f"Error: {text}"  # templates have no other place for it
    message = {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}
    # Some templates tell results by their tools' names.
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
