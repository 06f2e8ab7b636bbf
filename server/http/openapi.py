"""GET /openapi.json: what this server accepts and answers, made of the models that do the work."""

import asyncio
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

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
from server.http.documented import KEY, Documented, documented
from server.http.exchange import model_names
from server.http.scope import context_of, require_key
from server.http.wire import MODEL_FACT
from server.protocol import ModelInfo

Schema = dict[str, Any]
Schemas = Mapping[Any, Schema]

_ABOUT = "Chat and text completions by one model in OpenAI's words, and sessions whose caches are kept."
_KEYED: Schema = {"bearer": {"type": "http", "scheme": "bearer"}}
_REQUEST_ID: Schema = {"schema": {"type": "string"}, "required": True}
_RETRY: Schema = {"type": "integer", "minimum": 1}
_HEADERS: dict[int, Schema] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    409: {"Retry-After": {"schema": _RETRY, "description": "in seconds, if it is worth another try"}},
    429: {"Retry-After": {"schema": _RETRY, "description": "in seconds", "required": True}},
    503: {"Retry-After": {"schema": _RETRY, "description": "in seconds, if it is worth another try"}},
}
"""Of errors."""


class Document(BaseModel):
    """An OpenAPI document."""

    model_config = {"extra": "allow"}

    openapi: str


def openapi_router(others: Sequence[APIRouter]) -> APIRouter:
    """The document's own route; it describes itself and the routes of `others`."""
    router = APIRouter(dependencies=[Depends(require_key)])

    @functools.lru_cache
    def made(model: ModelInfo, keys: bool) -> Schema:
        return document([*others, router], model, keys=keys)

    @router.get("/openapi.json", openapi_extra=documented(Document))
    async def openapi(request: Request) -> Response:
        """This document, true for the loaded model."""
        context = context_of(request)
        keys = bool(context.settings.api_keys)
        return JSONResponse(await asyncio.to_thread(made, context.engine.model, keys))

    return router


def document(routers: Iterable[APIRouter], model: ModelInfo, *, keys: bool) -> Schema:
    """OpenAPI 3.2 of the routes that document themselves. `keys`: most of them need an API key."""
    said: list[tuple[APIRoute, Documented]] = [
        (route, route.openapi_extra[KEY])
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute) and route.openapi_extra
    ]
    wanted = dict.fromkeys(pair for _, own in said for pair in own.models.items())
    refs, defs = models_json_schema(
        list(wanted), ref_template="#/components/schemas/{model}", schema_generator=_Generator
    )
    schemas: Schemas = {kind: ref for (kind, _), ref in refs.items()}
    paths: dict[str, Schema] = {}
    for route, own in said:
        keyed = keys and any(depends.dependency is require_key for depends in route.dependencies)
        for method in route.methods or ():
            paths.setdefault(route.path_format, {})[method.lower()] = _operation(
                route, own, schemas, keyed, method != "GET"
            )
    whole: Schema = {
        "openapi": "3.2.0",
        "info": {"title": "turbocache", "description": _ABOUT, "version": "v1"},
        "paths": paths,
        "components": {"schemas": defs["$defs"], **({"securitySchemes": _KEYED} if keys else {})},
    }
    _tell_of(model, whole)
    return whole


def _operation(route: APIRoute, own: Documented, schemas: Schemas, keyed: bool, changes: bool) -> Schema:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": schema} for name, schema in own.parameters.items()
    ] + [{"name": name, "in": "header", "schema": schema} for name, schema in own.request_headers.items()]
    parameters += _query(own)
    operation: Schema = {
        "operationId": route.name,
        "summary": route.description.split("\n\n")[0].split(". ")[0].rstrip("."),
        "description": route.description,
        "parameters": parameters,
        "responses": _responses(own, schemas, keyed, changes),
    }
    if own.body is not None:
        content = {"application/json": {"schema": schemas[own.body]}}
        operation["requestBody"] = {"content": content, "required": own.body_required}
    if keyed:
        operation["security"] = [{name: []} for name in _KEYED]
    return operation


def _query(own: Documented) -> list[Schema]:
    """What may follow the address, less what may only be null, since null can't be said there."""
    if own.query is None:
        return []
    properties = own.query.model_json_schema(schema_generator=_Generator)["properties"]
    return [
        {"name": name, "in": "query", "schema": said}
        for name, schema in properties.items()
        if (said := _less_null(schema)) is not None
    ]


def _less_null(schema: Schema) -> Schema | None:
    """None where nothing else is left."""
    if "enum" in schema:
        values = [value for value in schema["enum"] if value is not None]
        return {**schema, "enum": values} if values else None
    others = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    return others[0] if len(others) == 1 else schema


def _responses(own: Documented, schemas: Schemas, keyed: bool, changes: bool) -> Schema:
    headers = dict.fromkeys(own.request_ids, _REQUEST_ID)
    named = {name: {"schema": schema} for name, schema in own.headers.items()}
    schema = {"type": "string"} if own.answer is None else schemas[own.answer]
    content: Schema = {media_type: {"schema": schema} for media_type in (own.media_type, *own.other_media_types)}
    if own.event is not None:
        content["text/event-stream"] = {"itemSchema": _event(own, schemas)}
    found: Schema = {"200": {"description": "The answer.", "headers": {**headers, **named}, "content": content}}
    if own.links:
        found["200"]["links"] = {
            name: {"operationId": name, "parameters": {variable: "$response.body#/id"}}
            for name, variable in own.links.items()
        }
    for status, other in own.others.items():
        content = {"application/json": {"schema": schemas[other]}}
        found[str(status)] = {"description": "No answer.", "headers": headers, "content": content}
    chosen: list[type[ServerError]] = [*own.errors, InternalError, ShuttingDown, DeadlineExceeded]
    if changes:
        chosen.append(OriginNotAllowed)
    if keyed:
        chosen.append(Unauthorized)
    if own.body is not None or own.parameters or own.query is not None:
        chosen.append(InvalidRequest)
    if own.body is not None:
        chosen.append(PayloadTooLarge)
    for status in sorted({kind.status for kind in chosen}):
        found[str(status)] = {
            "description": " ".join(dict.fromkeys(_meaning(kind) for kind in chosen if kind.status == status)),
            "headers": {**headers, **_HEADERS.get(status, {})},
            "content": {"application/json": {"schema": schemas[own.envelope]}},
        }
    return found


def _event(own: Documented, schemas: Schemas) -> Schema:
    """One of a stream's events: its data is JSON, or the words that end the stream."""
    assert own.event is not None
    data: list[Schema] = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": schemas[kind]}
        for kind in (own.event, own.envelope)
    ]
    if own.last_words is not None:
        data.append({"const": own.last_words})
    properties = {"event": {"type": "string"}, "data": {"anyOf": data}}
    return {"type": "object", "properties": properties, "required": ["data"]}


def _meaning(kind: type[ServerError]) -> str:
    """What the class says of itself, less its number."""
    return (kind.__doc__ or "").split("\n\n")[0].partition(": ")[2].split(". ")[0].strip().rstrip(".") + "."


def _tell_of(model: ModelInfo, part: Any) -> None:
    """Puts what is valid for the loaded model alone where the schemas leave it open."""
    facts: dict[str, Schema] = {
        "name": {"enum": list(model_names(model))},
        "token": {"maximum": model.n_tokens - 1},
        "answer": {"maximum": model.max_tokens - 1},
    }
    if isinstance(part, dict):
        if (fact := part.pop(MODEL_FACT, None)) is not None:
            part.update(facts[fact])
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            _tell_of(model, inner)


class _Generator(GenerateJsonSchema):
    """Pydantic's own, without what says nothing, and with nothing left open."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        found = super().default_schema(schema)
        if found.get("default", ...) is None:
            del found["default"]
        return found

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        found = super().dict_schema(schema)
        if "patternProperties" in found:
            found["additionalProperties"] = False
        return found

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        found = super().model_schema(schema)
        if found.get("type") == "object" and schema.get("config", {}).get("extra_fields_behavior") != "allow":
            found["additionalProperties"] = False
        return found
