"""What the server says about itself: models, backend, health and metrics."""

from typing import Annotated

from fastapi import Path
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.api.own.bodies import BackendBody, HealthBody, ModelBody, ModelList, StatusBody
from server.errors import NotFound
from server.http.exchange import check_model
from server.http.routing import api_router, raises
from server.http.scope import context_of
from server.protocol import ModelInfo

router = api_router()
# Probes and scrapers have no key; what they see names no session and no text.
open_router = api_router(keyed=False)


def _model_body(model: ModelInfo) -> ModelBody:
    return ModelBody(
        id=model.id, object="model", created=model.created, owned_by="turbocache", max_model_len=model.max_tokens
    )


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> Response:
    """The loaded model, as a list of one."""
    listing = ModelList(object="list", data=[_model_body(context_of(request).engine.model)])
    return JSONResponse(listing.model_dump())


# An id of Hugging Face has a slash in it, hence a path.
@router.get("/v1/models/{model_id:path}", response_model=ModelBody, responses=raises(NotFound))
async def model(request: Request, model_id: Annotated[str, Path(json_schema_extra={"minLength": 1})]) -> Response:
    """The loaded model by any name that requests may use. 404 for another."""
    loaded = context_of(request).engine.model
    check_model(model_id, loaded)
    return JSONResponse(_model_body(loaded).model_dump())


@router.get("/v1/backend", response_model=BackendBody)
async def backend(request: Request) -> Response:
    """The backend that runs, the reason, and what it was checked with."""
    return JSONResponse(context_of(request).engine.backend())


@router.get("/v1/status", response_model=StatusBody)
async def status(request: Request) -> Response:
    """What runs and waits, and the cache's memory against its budget."""
    return JSONResponse(context_of(request).engine.status())


@open_router.get("/health", response_model=HealthBody, responses={503: {"model": HealthBody}})
async def health(request: Request) -> Response:
    """200 while the engine works, 503 with the reason when it is dead or stuck."""
    state = context_of(request).engine.health()
    body = {"status": "ok" if state.alive else "unavailable", "detail": state.detail}
    return JSONResponse(body, status_code=200 if state.alive else 503)


@open_router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus' text exposition, or OpenMetrics' for those that ask for it."""
    context = context_of(request)
    context.metrics.engine_up.set(context.engine.health().alive)
    body, content_type = context.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
