"""The small bodies: models, sessions."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.schemas.base import Wire


class ForkRequest(Wire):
    """POST /v1/sessions/{id}/fork: the new session's `id`, or null for one that the server makes up."""

    id: Annotated[str, Field(min_length=1)] | None = None


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
