"""/v1/sessions: list, show, delete, fork, save and restore sessions."""

import asyncio
from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import Path
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.own.bodies import ForkRequest, SessionBody, SessionDeleted, SessionList
from server.errors import Conflict, EngineDead, OutOfMemory, SessionNotFound, SessionNotSaved
from server.http.middleware import app_context, request_context
from server.http.routing import api_router, raises
from server.http.session_name import MAX_LENGTH, NAME_PATTERN, checked_name
from server.http.sse import IDLE_SECONDS
from server.protocol import Engine, SessionChange

router = api_router("/v1/sessions")

_NO_FORK_NAME = ForkRequest()
_CHANGE = (SessionNotFound, Conflict, EngineDead)
_Id = Annotated[str, Path(json_schema_extra={"minLength": 1, "maxLength": MAX_LENGTH, "pattern": NAME_PATTERN})]


@router.get("", response_model=SessionList)
async def sessions(request: Request) -> Response:
    """All sessions of the caller's API key, in memory and on disk."""
    return JSONResponse(
        {"object": "list", "data": app_context(request).engine.sessions(request_context(request).owner)}
    )


# Names may contain slashes, so the parameter is a path.
@router.get("/{session_id:path}", response_model=SessionBody, responses=raises(SessionNotFound))
async def session(request: Request, session_id: _Id) -> Response:
    """One session. 404 if it does not exist or belongs to another key."""
    checked_name(session_id, "session_id")
    for row in app_context(request).engine.sessions(request_context(request).owner):
        if row["id"] == session_id:
            return JSONResponse(row)
    raise SessionNotFound(session_id)


@router.delete("/{session_id:path}", response_model=SessionDeleted, responses=raises(*_CHANGE))
async def delete(request: Request, session_id: _Id) -> Response:
    """Delete a session, in memory and on disk. 409 while it generates."""
    return await _change(request, "delete", session_id)


@router.post(
    "/{session_id:path}/fork",
    response_model=SessionBody,
    responses=raises(*_CHANGE, OutOfMemory),
)
async def fork(request: Request, session_id: _Id, wanted: ForkRequest = _NO_FORK_NAME) -> Response:
    """Copy a session. The two share pages until their conversations differ.

    The body's `id` names the copy, or the server does.
    """
    return await _change(request, "fork", session_id, None if wanted.id is None else checked_name(wanted.id, "id"))


@router.post("/{session_id:path}/save", response_model=SessionBody, responses=raises(*_CHANGE, SessionNotSaved))
async def save(request: Request, session_id: _Id) -> Response:
    """Write a session to disk now. It stays in memory, too."""
    return await _change(request, "save", session_id)


@router.post(
    "/{session_id:path}/restore",
    response_model=SessionBody,
    responses=raises(*_CHANGE, SessionNotSaved, OutOfMemory),
)
async def restore(request: Request, session_id: _Id) -> Response:
    """Load a session from disk now, so that its next turn need not wait. Does nothing if it is in memory."""
    return await _change(request, "restore", session_id)


async def _change(request: Request, change: SessionChange, session_id: str, new_id: str | None = None) -> Response:
    checked_name(session_id, "session_id")
    engine = app_context(request).engine
    return JSONResponse(
        await _result(engine, engine.change_session(change, request_context(request).owner, session_id, new_id))
    )


async def _result(engine: Engine, future: Future[dict[str, Any]]) -> dict[str, Any]:
    """Waits for the engine's thread. Raises EngineDead if the engine dies."""
    answer = asyncio.wrap_future(future)
    while not (await asyncio.wait({answer}, timeout=IDLE_SECONDS))[0]:
        if not (health := engine.health()).alive:
            raise EngineDead(f"The engine stopped working: {health.detail}")
    return answer.result()
