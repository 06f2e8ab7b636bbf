"""GET /openapi.json: FastAPI's document, with what FastAPI does not know: errors, streams, the loaded model."""

import asyncio
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from server.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    OriginNotAllowed,
    PayloadTooLarge,
    ServerError,
    ShuttingDown,
    Unauthorized,
)
from server.http.envelopes import is_anthropic_path
from server.http.middleware import app_context
from server.http.respond import model_names
from server.http.routing import STREAM, add_meaning, api_router
from server.http.session_name import HEADER_PATTERN, MAX_LENGTH, SESSION_HEADERS
from server.http.wire import MODEL_FACT
from server.protocol import ModelInfo

Schema = dict[str, Any]

router = api_router()

_TITLE = "turbocache"
_ABOUT = "Chat and text completions by one model in OpenAI's words, and sessions whose caches are kept."
_REQUEST_ID: Schema = {"schema": {"type": "string"}, "required": True}
_RETRY: Schema = {"schema": {"type": "integer", "minimum": 1}, "description": "in seconds, if it is worth another try"}
_ERROR_HEADERS: dict[str, Schema] = {
    "401": {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    "409": {"Retry-After": _RETRY},
    "429": {"Retry-After": {**_RETRY, "required": True}},
    "503": {"Retry-After": _RETRY},
}
_NAME_HEADERS = [
    {"name": name, "in": "header", "schema": {"type": "string", "maxLength": MAX_LENGTH, "pattern": HEADER_PATTERN}}
    for name in SESSION_HEADERS
]


class Document(BaseModel):
    """An OpenAPI document."""

    model_config = {"extra": "allow"}

    openapi: str


@router.get("/openapi.json", response_model=Document)
async def openapi(request: Request) -> Response:
    """This document, true for the loaded model."""
    app = app_context(request)
    model, keys = app.engine.model, bool(app.settings.api_keys)
    return JSONResponse(await asyncio.to_thread(_document, request.app, model, keys))


@functools.lru_cache(maxsize=1)
def _document(app: FastAPI, model: ModelInfo, keys: bool) -> Schema:
    return document(app.routes, model, keys=keys)


def document(routes: Sequence[BaseRoute], model: ModelInfo, *, keys: bool) -> Schema:
    """OpenAPI 3.2 of the routes. `keys`: those of keyed routers need an API key."""
    whole = get_openapi(title=_TITLE, description=_ABOUT, version="v1", openapi_version="3.2.0", routes=routes)
    for path, methods in whole["paths"].items():
        for method, operation in methods.items():
            if not keys:
                operation.pop("security", None)
            _complete(operation, path, [*_common_errors(method, operation)])
    components = whole["components"]
    if not keys:
        del components["securitySchemes"]
    for name in ("HTTPValidationError", "ValidationError"):
        del components["schemas"][name]
    for schema in components["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    _fill_in(model, whole)
    return whole


def _common_errors(method: str, operation: Schema) -> Iterator[type[ServerError]]:
    yield from (InternalError, ShuttingDown, DeadlineExceeded)
    if method != "get":
        yield OriginNotAllowed
    if "security" in operation:
        yield Unauthorized
    if operation["responses"].pop("422", None) is not None:  # FastAPI adds it where there are parameters or a body
        yield InvalidRequest
    if "requestBody" in operation:
        yield PayloadTooLarge


def _complete(operation: Schema, path: str, errors: list[type[ServerError]]) -> None:
    """Adds error responses and headers, moves the stream to its place, and takes null out of the query."""
    responses = operation["responses"]
    content = responses["500"].pop("content")
    del responses["500"]["description"]
    if (event := responses.pop(STREAM, None)) is not None:
        schemas = [one["application/json"]["schema"] for one in (event["content"], content)]
        data = [{"type": "string", "contentMediaType": "application/json", "contentSchema": one} for one in schemas]
        properties = {"event": {"type": "string"}, "data": {"anyOf": data}}
        item = {"type": "object", "properties": properties, "required": ["data"]}
        responses["200"]["content"]["text/event-stream"] = {"itemSchema": item}
        operation.setdefault("parameters", []).extend(_NAME_HEADERS)
    for error in errors:
        add_meaning(responses.setdefault(str(error.status), {}), error)
    request_ids = ("x-request-id", "request-id") if is_anthropic_path(path) else ("x-request-id",)
    for status, response in responses.items():
        headers = {**dict.fromkeys(request_ids, _REQUEST_ID), **_ERROR_HEADERS.get(status, {})}
        response["headers"] = {**response.get("headers", {}), **headers}
        if not status.startswith("2"):
            response.setdefault("content", content)
    operation["parameters"] = [
        one for one in operation.get("parameters", ()) if one["in"] != "query" or _without_null(one)
    ]


def _without_null(parameter: Schema) -> bool:
    """Takes null out of a query parameter's schema, since a query can't say it. False if nothing else is left."""
    schema = parameter["schema"]
    schema.pop("title", None)
    if "enum" in schema:
        schema["enum"] = [value for value in schema["enum"] if value is not None]
    elif len(others := [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]) == 1:
        parameter["schema"] = others[0]
    return bool(schema.get("enum", True))


def _fill_in(model: ModelInfo, part: Any) -> None:
    """Replaces MODEL_FACT in schemas by what is valid for the loaded model, and makes them as strict as the parser."""
    facts: dict[str, Schema] = {
        "name": {"enum": list(model_names(model))},
        "token": {"maximum": model.n_tokens - 1},
        "answer": {"maximum": model.max_tokens - 1},
    }
    if isinstance(part, dict):
        if (fact := part.pop(MODEL_FACT, None)) is not None:
            part.update(facts[fact])
        if "patternProperties" in part:  # keys of another renderer are refused
            part["additionalProperties"] = False
        # FastAPI turns limits into floats, and 2**63 as one is not compared exactly.
        part |= {key: int(value) for key, value in part.items() if isinstance(value, float) and value.is_integer()}
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            _fill_in(model, inner)
