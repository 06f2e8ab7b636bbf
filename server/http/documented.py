"""What a route says of itself for the OpenAPI document: its models and its errors, in one line beside its address."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from server.errors import EngineDead, NotFound, OutOfMemory, QueueFull, ServerError
from server.http.envelopes import AnthropicErrorEnvelope, ErrorEnvelope
from server.http.session_name import HEADER_PATTERN, MAX_LENGTH, SESSION_HEADERS

KEY = "documented"
Errors = tuple[type[ServerError], ...]

# A session name that comes with a request; what can't be one is refused.
_NAME_HEADERS: dict[str, dict[str, Any]] = {
    name: {"type": "string", "maxLength": MAX_LENGTH, "pattern": HEADER_PATTERN} for name in SESSION_HEADERS
}
_NAMED: dict[str, dict[str, Any]] = {
    "X-Session-ID": {"type": "string", "description": "the session's name, if it has one"},
    "X-Turbocache-Overflow": {
        "type": "string",
        "enum": ["rotate"],
        "description": "the prompt is longer than a session holds",
    },
}


@dataclass(frozen=True, slots=True)
class Documented:
    """`answer` is the body of a 200, None where that is no JSON but of `media_type`, or of
    `other_media_types` where they are asked for; `others` are bodies of other
    statuses that are no errors. `event` is the data of a stream's events, and `last_words` what ends one that is no
    JSON. `errors` come besides those that every route has. `parameters` are schemas of the address's variables,
    `query` is the model of what may follow it, `request_headers` and `headers` of the 200's. `links` are routes, by
    their functions' names, whose variable of the address is the answer's `id`. `envelope` is the form of errors.
    """

    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None
    body_required: bool = True
    media_type: str = "application/json"
    other_media_types: tuple[str, ...] = ()
    others: Mapping[int, type[BaseModel]] = field(default_factory=dict)
    event: type[BaseModel] | None = None
    last_words: str | None = None
    errors: Errors = ()
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    request_headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    query: type[BaseModel] | None = None
    links: Mapping[str, str] = field(default_factory=dict)
    envelope: type[BaseModel] = ErrorEnvelope

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The headers that name the request."""
        return ("x-request-id", *(("request-id",) if self.envelope is AnthropicErrorEnvelope else ()))

    @property
    def models(self) -> dict[type[BaseModel], Literal["validation", "serialization"]]:
        """All of them: bodies are validated, the others serialised."""
        found: dict[type[BaseModel], Literal["validation", "serialization"]] = {}
        for model in (self.body, self.query):
            if model is not None:
                found[model] = "validation"
        for model in (self.answer, self.event, self.envelope, *self.others.values()):
            if model is not None:
                found[model] = "serialization"
        return found


def documented(answer: type[BaseModel] | None, **more: Any) -> dict[str, Any]:
    """For a route's `openapi_extra`; see `Documented`."""
    return {KEY: Documented(answer, **more)}


def answering(
    body: type[BaseModel],
    answer: type[BaseModel],
    event: type[BaseModel],
    *,
    last_words: str | None = None,
    errors: Errors = (),
    **more: Any,
) -> dict[str, Any]:
    """`documented` for a route that has the model answer, whole or as a stream."""
    return documented(
        answer,
        body=body,
        event=event,
        last_words=last_words,
        errors=(NotFound, QueueFull, OutOfMemory, EngineDead, *errors),
        request_headers=_NAME_HEADERS,
        headers=_NAMED,
        **more,
    )
