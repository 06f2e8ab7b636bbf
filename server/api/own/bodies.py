"""The bodies of this server's own endpoints: sessions, models, status."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.http.session_name import MAX_LENGTH, NAME_PATTERN
from server.http.wire import Wire

SessionName = Annotated[str, Field(json_schema_extra={"maxLength": MAX_LENGTH, "pattern": NAME_PATTERN})]


class ForkRequest(Wire):
    """The body of POST /v1/sessions/{id}/fork."""

    id: Annotated[SessionName, Field(min_length=1)] | None = None
    """The new session's name. The server makes one up if it is null."""


class SessionBytes(BaseModel):
    """A session's memory by kind. Shared pages count for each session."""

    pages: int
    sink: int
    window: int
    recurrent: int
    checkpoints: int


class SessionRing(BaseModel):
    """A session's cache as a ring: the sink, the compressed pages, and the raw window up to `offset`."""

    offset: int
    """Tokens ever seen."""
    sink_tokens: int
    first_page: int
    """As many pages have rotated out."""
    pages: int
    pinned_pages: int
    """The first of the pages, which never rotate out: the system message and the tools."""
    page_tokens: int
    """Tokens per page."""
    window_tokens: int
    max_size: int | None
    """Largest number of tokens, null if nothing rotates."""


class SessionBody(BaseModel):
    """One session."""

    id: str
    object: Literal["session"]
    name: str | None
    """The client's name for it."""
    model: str
    state: Literal["running", "spilled", "resident"]
    tokens_seen: int
    tokens_held: int
    bytes: SessionBytes | None
    """Null unless a cache is in memory and not in use."""
    saved: bool
    rotations: int
    pinned_tokens: int | None
    """The first tokens, which are never dropped. Null without a compressed cache in memory, like the following ones."""
    dropped_tokens: int | None
    dropped_turns: int | None
    """The user's turns that the dropped tokens belong to."""
    ring: SessionRing | None
    centred_heads: int | None
    checkpoints: int
    turns: int
    last_used: float
    """Seconds since the epoch."""


class SessionList(BaseModel):
    object: Literal["list"]
    data: list[SessionBody]


class SessionDeleted(BaseModel):
    id: str
    object: Literal["session.deleted"]
    deleted: Literal[True]


class ModelBody(BaseModel):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """Longest conversation in tokens. An addition of other local servers, too."""
    license: str | None
    """From the card in the model's folder, like `origin`. Null if it does not say."""
    origin: str | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelBody]


class HealthBody(BaseModel):
    status: Literal["ok", "unavailable"]
    detail: str
    """What is wrong, and what to do."""


class RequestCounts(BaseModel):
    """Number of requests of all clients."""

    running: int
    waiting: int


class MemoryState(BaseModel):
    """The budget for the cache, and what uses it."""

    budget_bytes: int
    running_bytes: int
    """Reserved for running requests."""
    waiting_bytes: int
    """Needed by waiting requests."""
    resting_bytes: int
    """Held by sessions and checkpoints that are not in use."""
    pressure_ratio: float
    """Above 1 sessions are evicted."""


class PageCounts(BaseModel):
    """The page pool."""

    used: int
    capacity: int
    tokens: int
    """Tokens per page."""
    nbytes: int
    """Bytes per page."""


class StatusBody(BaseModel):
    """The state of the engine, now or a moment ago. Bytes are those of one rank; each rank has the same."""

    object: Literal["status"]
    model: str
    ranks: int
    requests: RequestCounts
    memory: MemoryState
    pages: PageCounts


class BackendBody(BaseModel):
    """The backend in use, and why it was chosen."""

    model_config = {"extra": "allow"}

    name: str
    requested: str
    reason: str
    layers: list[dict[str, Any]]
