"""server.api.anthropic.blocks: parts of an answer as blocks, the same in a stream and whole."""

from typing import Any

import pytest

from server.api.anthropic.blocks import Blocks, whole_blocks
from server.api.anthropic.content import SIGNATURE, hidden_in
from server.protocol import Channel, TextDelta, ToolCall

Parts = list[TextDelta | ToolCall]
OWN = "0123456789abcdef01234567"


def thought(text: str) -> TextDelta:
    channel: Channel = "reasoning"
    return TextDelta(text, channel)


def text(of: str) -> dict[str, Any]:
    return {"type": "text", "text": of}


def thinking(of: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": of, "signature": SIGNATURE}


CALL = ToolCall(f"call_{OWN}", "f", '{"a": 1}')
USE = {"type": "tool_use", "id": f"toolu_{OWN}", "name": "f", "input": {"a": 1}}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([TextDelta("He"), TextDelta("llo")], [text("Hello")]),
        ([thought("h"), thought("m"), TextDelta("\n\n"), TextDelta("Yes")], [thinking("hm"), text("\n\nYes")]),
        ([TextDelta("See: "), CALL, CALL, TextDelta("done")], [text("See: "), USE, USE, text("done")]),
        ([thought("\n"), TextDelta("a"), TextDelta(" "), thought("b"), TextDelta(" ")], [text("a "), thinking("b")]),
        ([TextDelta("\n"), CALL, TextDelta("\n"), CALL], [USE, USE]),
        # Nothing else was said.
        ([TextDelta(" "), TextDelta("\n")], [text(" \n")]),
        ([thought(" ")], []),
        (
            [ToolCall("functions.f:0", "f", "{}")],
            [{"type": "tool_use", "id": "functions.f:0", "name": "f", "input": {}}],
        ),
    ],
)
def test_whole(parts: Parts, expected: list[dict[str, Any]]) -> None:
    assert [block.model_dump() for block in whole_blocks(parts, hide_thoughts=False)] == expected


def test_hidden_thoughts_are_in_their_signatures() -> None:
    parts: Parts = [thought("sec"), thought("ret 🙂"), TextDelta("Yes"), thought("more")]
    first, said, second = (block.model_dump() for block in whole_blocks(parts, hide_thoughts=True))
    assert (first["thinking"], second["thinking"], said) == ("", "", text("Yes"))
    assert [hidden_in(block["signature"]) for block in (first, second)] == ["secret 🙂", "more"]


def test_every_block_is_ended_before_the_next_begins() -> None:
    blocks = Blocks(hide_thoughts=False)
    parts: Parts = [thought("hm"), TextDelta("\n"), TextDelta("Yes"), CALL, TextDelta("\n")]
    events = [event for part in parts for event in blocks.add(part)] + blocks.finish()
    assert [(event.type.removeprefix("content_block_"), event.index) for event in events] == [
        ("start", 0),
        ("delta", 0),
        ("delta", 0),  # the signature
        ("stop", 0),
        ("start", 1),
        ("delta", 1),
        ("stop", 1),
        ("start", 2),
        ("delta", 2),
        ("stop", 2),
    ]
