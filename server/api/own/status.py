"""What the server says about itself: models, backend, health and metrics."""

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.own.bodies import BackendBody, HealthBody, ModelBody, ModelList, StatusBody
from server.errors import NotFound
from server.http.documented import documented
from server.http.exchange import check_model
from server.http.scope import context_of, require_key
from server.protocol import ModelInfo

router = APIRouter(dependencies=[Depends(require_key)])
# Probes and scrapers have no key; what they see names no session and no text.
open_router = APIRouter()


def _model_body(model: ModelInfo) -> ModelBody:
    return ModelBody(
        id=model.id, object="model", created=model.created, owned_by="turbocache", max_model_len=model.max_tokens
    )


@router.get("/v1/models", openapi_extra=documented(ModelList))
async def models(request: Request) -> Response:
    """The loaded model, as a list of one."""
    listing = ModelList(object="list", data=[_model_body(context_of(request).engine.model)])
    return JSONResponse(listing.model_dump())


# An id of Hugging Face has a slash in it, hence a path.
@router.get(
    "/v1/models/{model_id:path}",
    openapi_extra=documented(
        ModelBody, parameters={"model_id": {"type": "string", "minLength": 1}}, errors=(NotFound,)
    ),
)
async def model(request: Request, model_id: str) -> Response:
    """The loaded model by any name that requests may use. 404 for another."""
    loaded = context_of(request).engine.model
    check_model(model_id, loaded)
    return JSONResponse(_model_body(loaded).model_dump())


@router.get("/v1/backend", openapi_extra=documented(BackendBody))
async def backend(request: Request) -> Response:
    """The backend that runs, the reason, and what it was checked with."""
    return JSONResponse(context_of(request).engine.backend())


@router.get("/v1/status", openapi_extra=documented(StatusBody))
async def status(request: Request) -> Response:
    """What runs and waits, and the cache's memory against its budget."""
    return JSONResponse(context_of(request).engine.status())


@open_router.get("/health", openapi_extra=documented(HealthBody, others={503: HealthBody}))
async def health(request: Request) -> Response:
    """200 while the engine works, 503 with the reason when it is dead or stuck."""
    state = context_of(request).engine.health()
    body = {"status": "ok" if state.alive else "unavailable", "detail": state.detail}
    return JSONResponse(body, status_code=200 if state.alive else 503)


@open_router.get(
    "/metrics",
    openapi_extra=documented(None, media_type="text/plain", other_media_types=("application/openmetrics-text",)),
)
async def metrics(request: Request) -> Response:
    """Prometheus' text exposition, or OpenMetrics' for those that ask for it."""
    context = context_of(request)
    context.metrics.engine_up.set(context.engine.health().alive)
    body, content_type = context.metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
