"""Models, backend, status, health and metrics."""

from typing import Annotated

from fastapi import Path
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.api.own.bodies import BackendBody, HealthBody, ModelBody, ModelList, StatusBody
from server.errors import NotFound
from server.http.middleware import app_context
from server.http.respond import check_model
from server.http.routing import api_router, raises
from server.protocol import ModelInfo

router = api_router()
# Probes and scrapers have no key. They see no session's name and no text.
open_router = api_router(keyed=False)


def _model_body(model: ModelInfo) -> ModelBody:
    return ModelBody(
        id=model.id,
        object="model",
        created=model.created,
        owned_by="turbocache",
        max_model_len=model.max_tokens,
        license=model.license,
        origin=model.origin,
    )


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """A list of the loaded model."""
    listing = ModelList(object="list", data=[_model_body(app_context(request).engine.model)])
    return JSONResponse(listing.model_dump())


# Ids of Hugging Face contain a slash, so the parameter is a path.
@router.get("/v1/models/{model_id:path}", response_model=ModelBody, responses=raises(NotFound))
async def model(request: Request, model_id: Annotated[str, Path(json_schema_extra={"minLength": 1})]) -> Response:
    """The loaded model, by any name that requests may use. 404 for another name."""
    loaded = app_context(request).engine.model
    check_model(model_id, loaded)
    return JSONResponse(_model_body(loaded).model_dump())


@router.get("/v1/backend", response_model=BackendBody)
async def backend(request: Request) -> Response:
    """The backend in use, why it was chosen, and the layers that it was checked with."""
    return JSONResponse(app_context(request).engine.backend())


@router.get("/v1/status", response_model=StatusBody)
async def status(request: Request) -> Response:
    """Running and waiting requests, and the cache's memory and its budget."""
    return JSONResponse(app_context(request).engine.status())


@open_router.get("/health", response_model=HealthBody, responses={503: {"model": HealthBody}})
async def health(request: Request) -> Response:
    """200 while the engine works, 503 with the reason if it is dead or stuck."""
    state = app_context(request).engine.health()
    body = {"status": "ok" if state.alive else "unavailable", "detail": state.detail}
    return JSONResponse(body, status_code=200 if state.alive else 503)


@open_router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Metrics as Prometheus text, or as OpenMetrics if the client accepts that."""
    app = app_context(request)
    app.metrics.engine_up.set(app.engine.health().alive)
    body, content_type = app.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
