"""The small bodies: models, sessions, and what the server says about itself."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.http.session_name import MAX_LENGTH, NAME_PATTERN
from server.http.wire import Wire

SessionName = Annotated[str, Field(json_schema_extra={"maxLength": MAX_LENGTH, "pattern": NAME_PATTERN})]


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


class SessionRing(BaseModel):
    """A session's cache as a ring, in tokens but for `first_page` and `pages`: the sink, pages (the oldest is
    `first_page`, as many as have rotated out) of `page_tokens` each, and the raw window up to `offset`, the tokens that
    have ever come. `max_size` is null where nothing rotates.
    """

    offset: int
    sink_tokens: int
    first_page: int
    pages: int
    page_tokens: int
    window_tokens: int
    max_size: int | None


class SessionBody(BaseModel):
    """One session. `name` is the client's; `last_used` a time in seconds. `bytes` is null where no cache at rest is in
    memory, `ring` and `centred_heads` where no compressed cache is.
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
    ring: SessionRing | None
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


class RequestCounts(BaseModel):
    """Requests of all clients."""

    running: int
    waiting: int


class MemoryState(BaseModel):
    """The budget for the cache and what has a claim on it: promises to requests that run and that wait, and what rests.
    Above a pressure of 1 sessions must go.
    """

    budget_bytes: int
    running_bytes: int
    waiting_bytes: int
    resting_bytes: int
    pressure_ratio: float


class PageCounts(BaseModel):
    """The page pool; a page holds `tokens` tokens and `nbytes` bytes."""

    used: int
    capacity: int
    tokens: int
    nbytes: int


class StatusBody(BaseModel):
    """The engine now, or a moment ago. Bytes are those of one of its `ranks`; the others have as many."""

    object: Literal["status"]
    model: str
    ranks: int
    requests: RequestCounts
    memory: MemoryState
    pages: PageCounts


class BackendBody(BaseModel):
    """The backend that runs, and how it was chosen."""

    model_config = {"extra": "allow"}

    name: str
    requested: str
    reason: str
    layers: list[dict[str, Any]]
