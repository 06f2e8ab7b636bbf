"""The renderer of POST /v1/responses: a response as it grows, item by item, as events and whole."""

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
from server.protocol import DrawnToken, Event, Finished, TextDelta, ToolCall, Usage

EventBody = dict[str, Any]
"""An event of the API, without its `sequence_number`."""


class Output:
    """The items of an answer. Each method returns the API's events for what it does, in their order."""

    def __init__(self, logprobs: bool) -> None:
        self.items: list[Item] = []
        self._logprobs = logprobs
        self._open: MessageItem | ReasoningItem | None = None
        self._text: list[str] = []

    def take(self, event: TextDelta | ToolCall) -> list[EventBody]:
        """What is new. Text goes on with the item that is open, if that is of its kind."""
        if isinstance(event, ToolCall):
            return [*self.close("completed"), *self._call(event)]
        if event.channel == "content":
            begun = [] if isinstance(self._open, MessageItem) or not event.text else self._begin(_message())
        else:
            begun = [] if isinstance(self._open, ReasoningItem) or not event.text else self._begin(_thought())
        return [*begun, *self._extend(event)]

    def finish(self, status: Status) -> list[EventBody]:
        """The end. An answer that says nothing at all is an empty message."""
        begun = [] if self.items else self._begin(_message())
        return [*begun, *self.close(status)]

    def close(self, status: Status) -> list[EventBody]:
        """The end of the item that is open, if there is one."""
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
        """Opens an item with an empty part; what was open is complete."""
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
            return []  # no text, and nothing that it goes on with
        part = item.content[0]
        self._text.append(event.text)
        delta: EventBody = {"type": "response.reasoning_text.delta"}
        if isinstance(part, OutputText):
            tokens = self._shown(event.tokens)
            part.logprobs += tokens
            delta = {"type": "response.output_text.delta", "logprobs": dumped(tokens)}
        return [{**delta, **self._at(item), "content_index": 0, "delta": event.text}]

    def _shown(self, tokens: Sequence[DrawnToken]) -> list[ContentLogprob]:
        return logprobs_body(tokens).content if self._logprobs else []

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
    """One response. `blank` is its body before anything has come of it; `keep` gets the whole one, before the client
    does. An answer that failed is not kept.
    """

    def __init__(self, blank: ResponseBody, logprobs: bool, keep: Callable[[ResponseBody], None]) -> None:
        self._body = blank
        self._keep = keep
        self._output = Output(logprobs)
        self._n_events = 0
        self._cut = False

    def render(self, event: Event) -> Sequence[bytes]:
        """The API's events of one event. The first of any kind begins the response."""
        return [*self._opening(), *self._written(self._taken(event))]

    def end(self, usage: Usage) -> Sequence[bytes]:
        body = self._ended(usage)
        return [*self._opening(), *self._written([{"type": f"response.{body.status}", "response": dump(body)}])]

    def fail(self, error: ServerError) -> Sequence[bytes]:
        self._output.close("incomplete")
        update: EventBody = {"status": "failed", "error": _error(error), "output": self._output.items}
        body = self._body.model_copy(update=update)
        return [*self._opening(), *self._written([{"type": "response.failed", "response": dump(body)}])]

    def body(self, answers: Sequence[Answer], usage: Usage) -> ResponseBody:
        [answer] = answers
        for event in (*answer.parts, answer.end):
            self._taken(event)
        return self._ended(usage)

    def _taken(self, event: Event) -> list[EventBody]:
        if isinstance(event, TextDelta | ToolCall):
            return self._output.take(event)
        if isinstance(event, Finished):
            self._cut = event.finish_reason == "length"
            return self._output.finish("incomplete" if self._cut else "completed")
        return []

    def _ended(self, usage: Usage) -> ResponseBody:
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
        return self._written([{"type": f"response.{word}", "response": blank} for word in ("created", "in_progress")])

    def _written(self, events: Sequence[EventBody]) -> list[bytes]:
        written = []
        for event in events:
            numbered = {**event, "sequence_number": self._n_events}
            written.append(data(json.dumps(numbered, ensure_ascii=False), event["type"]))
            self._n_events += 1
        return written


def dump(body: Item | ResponseBody) -> dict[str, JsonValue]:
    """Only fields that were set: absent and null mean different things."""
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
    """In one of the few words that the API has for it; by `context_length_exceeded` clients know what to do."""
    if isinstance(error, ContextLengthExceeded):
        code = "context_length_exceeded"
    else:
        code = "rate_limit_exceeded" if isinstance(error, QueueFull) else "server_error"
    return ResponseError(code=code, message=error.message)
