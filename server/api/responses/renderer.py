"""Renders the answer of POST /v1/responses, as a stream of events or as one body."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import JsonValue

from server.api.openai.chat import logprobs_body
from server.api.openai.chat_answer import ContentLogprob
from server.api.responses.answer import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseBody,
    ResponseError,
    ResponseUsage,
)
from server.api.responses.input import new_id
from server.api.responses.items import CallItem, Item, MessageItem, OutputText, ReasoningItem, ReasoningText, Status
from server.errors import ContextLengthExceeded, QueueFull, ServerError
from server.http.respond import Answer
from server.http.sse import data
from server.protocol import Event, Finished, TextDelta, ToolCall, Usage

EventBody = dict[str, Any]
"""An event of the API without its `sequence_number`."""


class Output:
    """The items of an answer. Each method returns the API's events for its change, in order."""

    def __init__(self, logprobs: bool) -> None:
        self.items: list[Item] = []
        self._logprobs = logprobs
        self._open: MessageItem | ReasoningItem | None = None
        self._text: list[str] = []

    def take(self, event: TextDelta | ToolCall) -> list[EventBody]:
        """Adds a text or call. Text extends the open item if that is of its kind."""
        if isinstance(event, ToolCall):
            return [*self.close("completed"), *self._call(event)]
        if event.channel == "content":
            opening = [] if isinstance(self._open, MessageItem) or not event.text else self._begin(_message())
        else:
            opening = [] if isinstance(self._open, ReasoningItem) or not event.text else self._begin(_thought())
        return [*opening, *self._extend(event)]

    def finish(self, status: Status) -> list[EventBody]:
        """Ends the answer. An empty answer is an empty message."""
        opening = [] if self.items else self._begin(_message())
        return [*opening, *self.close(status)]

    def close(self, status: Status) -> list[EventBody]:
        """Ends the open item, if any."""
        item, self._open = self._open, None
        if item is None:
            return []
        part = item.content[0]
        item.status, part.text = status, "".join(self._text)
        if isinstance(part, OutputText):
            done: EventBody = {
                "type": "response.output_text.done",
                "text": part.text,
                "logprobs": dumped(part.logprobs),
            }
        else:
            done = {"type": "response.reasoning_text.done", "text": part.text}
        return [
            {**self._at(item), "content_index": 0, **done},
            {**self._at(item), "content_index": 0, "type": "response.content_part.done", "part": part.model_dump()},
            {"type": "response.output_item.done", "output_index": self._index, "item": dump(item)},
        ]

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def _at(self, item: Item) -> EventBody:
        return {"item_id": item.id, "output_index": self._index}

    def _begin(self, item: MessageItem | ReasoningItem) -> list[EventBody]:
        """Opens an item with an empty part and ends the one before."""
        closed = self.close("completed")
        self.items.append(item)
        self._open, self._text = item, []
        return [
            *closed,
            {
                "type": "response.output_item.added",
                "output_index": self._index,
                "item": {**dump(item), "content": []},
            },
            {
                "type": "response.content_part.added",
                **self._at(item),
                "content_index": 0,
                "part": item.content[0].model_dump(),
            },
        ]

    def _extend(self, event: TextDelta) -> list[EventBody]:
        item = self._open
        if item is None or (event.channel == "content") != isinstance(item, MessageItem):
            return []  # empty text that extends no open item
        part = item.content[0]
        self._text.append(event.text)
        delta: EventBody = {"type": "response.reasoning_text.delta"}
        if isinstance(part, OutputText):
            tokens = logprobs_body(event.tokens).content if self._logprobs else []
            part.logprobs += tokens
            delta = {"type": "response.output_text.delta", "logprobs": dumped(tokens)}
        return [{**delta, **self._at(item), "content_index": 0, "delta": event.text}]

    def _call(self, call: ToolCall) -> list[EventBody]:
        item = CallItem(
            id=new_id("fc"),
            type="function_call",
            status="completed",
            call_id=call.id,
            name=call.name,
            arguments=call.arguments,
        )
        self.items.append(item)
        begun = {**dump(item), "status": "in_progress", "arguments": ""}
        kind, at = "response.function_call_arguments", self._at(item)
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": begun},
            {"type": f"{kind}.delta", **at, "delta": call.arguments},
            {"type": f"{kind}.done", **at, "name": call.name, "arguments": call.arguments},
            {"type": "response.output_item.done", "output_index": self._index, "item": dump(item)},
        ]


class ResponseRenderer:
    """Renders one response. `blank` is its body before any output. `keep` gets the complete body before the client
    does, unless the answer failed.
    """

    def __init__(self, blank: ResponseBody, logprobs: bool, keep: Callable[[ResponseBody], None]) -> None:
        self._body = blank
        self._keep = keep
        self._output = Output(logprobs)
        self._n_events = 0
        self._cut = False

    def render(self, event: Event) -> Sequence[bytes]:
        """The API's events for one event. The first one begins the response."""
        return [*self._opening(), *self._to_bytes(self._take(event))]

    def end(self, usage: Usage) -> Sequence[bytes]:
        body = self._finish(usage)
        return [*self._opening(), *self._to_bytes([{"type": f"response.{body.status}", "response": dump(body)}])]

    def fail(self, error: ServerError) -> Sequence[bytes]:
        self._output.close("incomplete")
        update: EventBody = {"status": "failed", "error": _error(error), "output": self._output.items}
        body = self._body.model_copy(update=update)
        return [*self._opening(), *self._to_bytes([{"type": "response.failed", "response": dump(body)}])]

    def body(self, answers: Sequence[Answer], usage: Usage) -> ResponseBody:
        [answer] = answers
        for event in (*answer.parts, answer.end):
            self._take(event)
        return self._finish(usage)

    def _take(self, event: Event) -> list[EventBody]:
        if isinstance(event, TextDelta | ToolCall):
            return self._output.take(event)
        if isinstance(event, Finished):
            self._cut = event.finish_reason == "length"
            return self._output.finish("incomplete" if self._cut else "completed")
        return []

    def _finish(self, usage: Usage) -> ResponseBody:
        update: EventBody = {"output": self._output.items, "usage": _usage(usage)}
        if self._cut:
            update |= {"status": "incomplete", "incomplete_details": IncompleteDetails(reason="max_output_tokens")}
        else:
            update |= {"status": "completed", "completed_at": int(time.time())}
        body = self._body.model_copy(update=update)
        self._keep(body)
        return body

    def _opening(self) -> Sequence[bytes]:
        if self._n_events:
            return []
        blank = dump(self._body)
        return self._to_bytes([{"type": f"response.{word}", "response": blank} for word in ("created", "in_progress")])

    def _to_bytes(self, events: Sequence[EventBody]) -> list[bytes]:
        chunks = []
        for event in events:
            numbered = {**event, "sequence_number": self._n_events}
            chunks.append(data(json.dumps(numbered, ensure_ascii=False), event["type"]))
            self._n_events += 1
        return chunks


def dump(body: Item | ResponseBody) -> dict[str, JsonValue]:
    """The fields that were set: absent and null differ."""
    return body.model_dump(exclude_unset=True)


def dumped(tokens: Sequence[ContentLogprob]) -> list[JsonValue]:
    return [token.model_dump() for token in tokens]


def _message() -> MessageItem:
    empty = OutputText(type="output_text", text="", annotations=[], logprobs=[])
    return MessageItem(id=new_id("msg"), type="message", role="assistant", status="in_progress", content=[empty])


def _thought() -> ReasoningItem:
    empty = ReasoningText(type="reasoning_text", text="")
    return ReasoningItem(
        id=new_id("rs"), type="reasoning", status="in_progress", summary=[], content=[empty], encrypted_content=None
    )


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _error(error: ServerError) -> ResponseError:
    """The API's error. Clients act on `context_length_exceeded`."""
    if isinstance(error, ContextLengthExceeded):
        code = "context_length_exceeded"
    else:
        code = "rate_limit_exceeded" if isinstance(error, QueueFull) else "server_error"
    return ResponseError(code=code, message=error.message)
