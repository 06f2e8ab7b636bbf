"""Routers of endpoints: FastAPI's, which check the API key and parse the body before FastAPI looks at a request."""

from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar, cast

from fastapi import APIRouter, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from server.errors import EngineDead, NotFound, OutOfMemory, PayloadTooLarge, QueueFull, ServerError
from server.http.envelopes import ErrorEnvelope
from server.http.error_handlers import invalid_body
from server.http.middleware import app_context, require_key

Body = TypeVar("Body", bound=BaseModel)
Responses = dict[int | str, dict[str, Any]]

STREAM = "2XX"
"""Key in `responses` for the data of a stream's events. FastAPI takes one model per status, so the OpenAPI document
moves this one into the 200.
"""
_BEARER = HTTPBearer(scheme_name="bearer", auto_error=False)
"""Only for the OpenAPI document. `KeyedRoute` checks the key."""
_ANSWER_HEADERS = {
    "X-Session-ID": {"schema": {"type": "string"}, "description": "the session's name, if it has one"},
    "X-Turbocache-Overflow": {
        "schema": {"type": "string", "enum": ["rotate"]},
        "description": "the prompt is longer than a session holds",
    },
    "X-Turbocache-Dropped-Tokens": {
        "schema": {"type": "integer", "minimum": 1},
        "description": "tokens of the prompt that the answer does not see, with X-Turbocache-Overflow",
    },
    "X-Turbocache-Dropped-Turns": {
        "schema": {"type": "integer", "minimum": 0},
        "description": "the user's turns that these tokens belong to",
    },
}


class KeyedRoute(APIRoute):
    """Checks the key, then reads and parses the body once, and hands FastAPI the parsed model.

    FastAPI alone reads and decodes the whole body before any dependency runs, so before a key check. It fixes the size
    limit when the route is built, before the settings are read. It decodes with `json`, and only bodies with a JSON
    content type.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            await require_key(request)
            if (field := self.body_field) is not None:
                body = await read_body(request, app_context(request).settings.body_limit)
                optional = not body and not field.field_info.is_required()
                model = cast(type[BaseModel], field.field_info.annotation)
                request = _ParsedRequest(request, body if optional else parse(model, body))
            return await handle(request)

        return checked


class _ParsedRequest(Request):
    """A request whose body is a parsed model, or empty bytes."""

    def __init__(self, request: Request, body: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed = body

    async def body(self) -> Any:
        return self._parsed

    json = body


def api_router(prefix: str = "", *, keyed: bool = True, envelope: type[BaseModel] = ErrorEnvelope) -> APIRouter:
    """A router whose errors have the form of `envelope`. Its endpoints need an API key unless `keyed` is false."""
    return APIRouter(
        prefix=prefix,
        responses={500: {"model": envelope}},
        route_class=KeyedRoute if keyed else APIRoute,
        dependencies=[Security(_BEARER)] if keyed else [],
        generate_unique_id_function=lambda route: route.name,
    )


def raises(*errors: type[ServerError]) -> Responses:
    """For a route's `responses`: errors that not every endpoint has."""
    responses: Responses = {}
    for error in errors:
        add_meaning(responses.setdefault(error.status, {}), error)
    return responses


def generates(event: type[BaseModel], links: Iterable[str] = ()) -> Responses:
    """For the `responses` of a route that generates an answer, whole or as a stream of `event`. `links` name routes
    whose `response_id` is the answer's `id`.
    """
    parameters = {"response_id": "$response.body#/id"}
    return {
        200: {
            "headers": _ANSWER_HEADERS,
            "links": {name: {"operationId": name, "parameters": parameters} for name in links},
        },
        STREAM: {"model": event},
        **raises(NotFound, QueueFull, OutOfMemory, EngineDead),
    }


def add_meaning(response: dict[str, Any], error: type[ServerError]) -> None:
    """Puts the first sentence of an error class, without its status, into a response's description."""
    meaning = (error.__doc__ or "").split("\n\n")[0].partition(": ")[2].split(". ")[0].strip().rstrip(".") + "."
    before = response.get("description", "")
    if meaning not in before:
        response["description"] = f"{before} {meaning}".strip()


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes of it. Raises PayloadTooLarge as soon as more is announced or has come."""
    too_large = PayloadTooLarge(f"The request body is larger than the server's limit of {limit} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def parse(kind: type[Body], body: bytes) -> Body:
    """Raises InvalidRequest or UnsupportedField that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid_body(error) from error
