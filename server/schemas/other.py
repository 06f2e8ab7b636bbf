"""The small bodies: errors, models, sessions, and what the server says about itself."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.identity import MAX_LENGTH, NAME_PATTERN
from server.schemas.base import Wire

SessionName = Annotated[str, Field(json_schema_extra={"maxLength": MAX_LENGTH, "pattern": NAME_PATTERN})]


class ErrorDetail(BaseModel):
    """`param` is the field that is wrong, `code` a stable word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail


class ForkRequest(Wire):
    """POST /v1/sessions/{id}/fork: the new session's `id`, or null for one that the server makes up."""

    id: Annotated[SessionName, Field(min_length=1)] | None = None


class SessionBytes(BaseModel):
    """Memory by kind. Pages that sessions share count for each of them."""

    pages: int
    sink: int
    window: int
    recurrent: int
    checkpoints: int


class SessionBody(BaseModel):
    """One session. `name` is the client's; `last_used` a time in seconds. `bytes` and `centred_heads` are null where no
    cache at rest is in memory.
    """

    id: str
    object: Literal["session"]
    name: str | None
    model: str
    state: Literal["running", "spilled", "resident"]
    tokens_seen: int
    tokens_held: int
    bytes: SessionBytes | None
    saved: bool
    rotations: int
    centred_heads: int | None
    checkpoints: int
    turns: int
    last_used: float


class SessionList(BaseModel):
    object: Literal["list"]
    data: list[SessionBody]


class SessionDeleted(BaseModel):
    id: str
    object: Literal["session.deleted"]
    deleted: Literal[True]


class ModelBody(BaseModel):
    """One model; `max_model_len` is the longest conversation in tokens (an addition other local servers have too)."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelBody]


class HealthBody(BaseModel):
    """`detail` says what is wrong and what to do."""

    status: Literal["ok", "unavailable"]
    detail: str


class BackendBody(BaseModel):
    """The backend that runs, and how it was chosen."""

    model_config = {"extra": "allow"}

    name: str
    requested: str
    reason: str
    layers: list[dict[str, Any]]


class Document(BaseModel):
    """An OpenAPI document."""

    model_config = {"extra": "allow"}

    openapi: str
