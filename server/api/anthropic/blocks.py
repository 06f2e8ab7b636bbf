"""Turns an answer's texts, thoughts and calls into content blocks of Anthropic's API, in their order."""

import json
import re
from collections.abc import Sequence

from server.api.anthropic.answer import (
    BlockDelta,
    BlockPart,
    BlockStart,
    BlockStop,
    ContentBlock,
    InputPart,
    SignaturePart,
    Text,
    TextPart,
    ThinkingPart,
    Thought,
    ToolUse,
)
from server.api.anthropic.content import SIGNATURE, signature_of
from server.protocol import Channel, TextDelta, ToolCall

_OURS = re.compile(r"call_([0-9a-f]{24})")
"""Ids of calls that the server made up. The model's own ids must come back unchanged."""

BlockEvent = BlockStart | BlockDelta | BlockStop


class Blocks:
    """The stream events of one answer's blocks. With `hide_thoughts` thoughts are only in their signatures.

    White space alone is no block unless it is the whole answer. Models write line breaks between thoughts, texts and
    calls, and clients and Anthropic's API take a blank block for an error.
    """

    def __init__(self, *, hide_thoughts: bool) -> None:
        self._hide = hide_thoughts
        self._index = 0
        self._channel: Channel | None = None
        self._open = False
        self._held = ""
        self._hidden = ""

    def add(self, part: TextDelta | ToolCall) -> list[BlockEvent]:
        if isinstance(part, ToolCall):
            return [*self._switch_to(None), *self._call(part)]
        events = [] if part.channel == self._channel else self._switch_to(part.channel)
        self._held += part.text
        if not self._open and self._held.strip():
            events.append(self._begin())
        return [*events, *self._release()]

    def finish(self) -> list[BlockEvent]:
        """The events after the last part."""
        if self._held and self._channel == "content" and not self._index:
            return [self._begin(), *self._release(), *self._switch_to(None)]
        return self._switch_to(None)

    def _switch_to(self, channel: Channel | None) -> list[BlockEvent]:
        """Ends the open block, if any. The next part is in another channel."""
        events: list[BlockEvent] = []
        if self._open:
            if self._channel == "reasoning":
                signature = signature_of(self._hidden) if self._hide else SIGNATURE
                events.append(self._delta(SignaturePart(type="signature_delta", signature=signature)))
                self._hidden = ""
            events.append(self._stop())
        self._channel, self._open, self._held = channel, False, ""
        return events

    def _begin(self) -> BlockEvent:
        self._open = True
        if self._channel == "content":
            return self._start(Text(type="text", text=""))
        return self._start(Thought(type="thinking", thinking="", signature=""))

    def _release(self) -> list[BlockEvent]:
        """Text of the open block that is not sent yet."""
        if not self._open or not self._held:
            return []
        text, self._held = self._held, ""
        if self._channel == "content":
            return [self._delta(TextPart(type="text_delta", text=text))]
        if self._hide:
            self._hidden += text
            return []
        return [self._delta(ThinkingPart(type="thinking_delta", thinking=text))]

    def _call(self, call: ToolCall) -> list[BlockEvent]:
        ours = _OURS.fullmatch(call.id)
        block = ToolUse(type="tool_use", id=f"toolu_{ours[1]}" if ours else call.id, name=call.name, input={})
        part = InputPart(type="input_json_delta", partial_json=call.arguments)
        return [self._start(block), self._delta(part), self._stop()]

    def _start(self, block: ContentBlock) -> BlockStart:
        return BlockStart(type="content_block_start", index=self._index, content_block=block)

    def _delta(self, part: BlockPart) -> BlockDelta:
        return BlockDelta(type="content_block_delta", index=self._index, delta=part)

    def _stop(self) -> BlockStop:
        self._index += 1
        return BlockStop(type="content_block_stop", index=self._index - 1)


def whole_blocks(parts: Sequence[TextDelta | ToolCall], *, hide_thoughts: bool) -> list[ContentBlock]:
    """The blocks of a complete answer. They are what a client builds from the events."""
    blocks = Blocks(hide_thoughts=hide_thoughts)
    content: list[ContentBlock] = []
    for event in [*(event for part in parts for event in blocks.add(part)), *blocks.finish()]:
        if isinstance(event, BlockStart):
            content.append(event.content_block)
        elif isinstance(event, BlockDelta):
            _extend(content[-1], event.delta)
    return content


def _extend(block: ContentBlock, part: BlockPart) -> None:
    if isinstance(block, Text) and isinstance(part, TextPart):
        block.text += part.text
    elif isinstance(block, Thought) and isinstance(part, ThinkingPart):
        block.thinking += part.thinking
    elif isinstance(block, Thought) and isinstance(part, SignaturePart):
        block.signature = part.signature
    elif isinstance(block, ToolUse) and isinstance(part, InputPart):
        block.input = json.loads(part.partial_json)
