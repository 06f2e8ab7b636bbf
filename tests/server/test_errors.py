"""server.errors and server.http.error_handlers: the envelope, the words, and where a fault is located."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from server import errors
from server.http.error_handlers import install, param_of


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.InvalidRequest("m"), 400, "invalid_request_error", None),
        (errors.UnsupportedField("m"), 400, "invalid_request_error", "unsupported_parameter"),
        (errors.Unauthorized("m"), 401, "invalid_request_error", "invalid_api_key"),
        (errors.NotFound("m", code="model_not_found"), 404, "invalid_request_error", "model_not_found"),
        (errors.MethodNotAllowed("m"), 405, "invalid_request_error", "method_not_allowed"),
        (errors.PayloadTooLarge("m"), 413, "invalid_request_error", "request_too_large"),
        (errors.QueueFull(), 429, "requests", "rate_limit_exceeded"),
        (errors.OutOfMemory(), 503, "server_error", "out_of_memory"),
        (errors.EngineDead("m"), 503, "server_error", "engine_dead"),
        (errors.DeadlineExceeded(3, "waiting"), 504, "server_error", "deadline_exceeded"),
        (errors.ShuttingDown(), 503, "server_error", "shutting_down"),
        (errors.InternalError("m"), 500, "server_error", "internal_error"),
    ],
)
def test_the_tree(error: errors.ServerError, status: int, kind: str, code: str | None) -> None:
    assert error.status == status
    assert error.envelope() == {"error": {"message": error.message, "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.2, "2"), (30.0, "30")])
def test_retry_after_is_whole_seconds_rounded_up(seconds: float, header: str) -> None:
    assert errors.QueueFull(retry_after=seconds).headers() == {"Retry-After": header}
    assert errors.OutOfMemory(retry_after=seconds).headers() == {"Retry-After": header}
    assert errors.InvalidRequest("m").headers() == {}


def test_context_length_in_openais_words() -> None:
    error = errors.ContextLengthExceeded(limit=4097, prompt_tokens=4012, max_tokens=256)
    assert error.message == (
        "This model's maximum context length is 4097 tokens. However, you requested 4268 tokens (4012 in the messages, "
        "256 in the completion). Please reduce the length of the messages or completion."
    )
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    open_ended = errors.ContextLengthExceeded(limit=10, prompt_tokens=12, max_tokens=None)
    assert "your messages resulted in 12 tokens" in open_ended.message


@pytest.mark.parametrize(
    ("location", "param"),
    [
        ((), ""),
        (("temperature",), "temperature"),
        (("messages", 0, "<user>", "content"), "messages[0].content"),
        (("messages", 3, "<assistant>", "content", "<parts>", 1, "<text>", "type"), "messages[3].content[1].type"),
        (("messages", 0, "<user>", "user"), "messages[0].user"),
        (("stop", "<list>", 2), "stop[2]"),
        (("stream_options", "include_usage"), "stream_options.include_usage"),
    ],
)
def test_locations(location: tuple[str | int, ...], param: str) -> None:
    assert param_of(location) == param


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI(openapi_url=None)
    install(app)

    @app.get("/ours")
    async def ours() -> None:
        raise errors.OutOfMemory(retry_after=2.5)

    @app.get("/teapot")
    async def teapot() -> None:
        raise HTTPException(418, "short and stout", headers={"X-Tea": "yes"})

    @app.get("/numbers/{number}")
    async def numbers(number: int, limit: int) -> int:
        return number * limit

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_our_errors(client: httpx.AsyncClient) -> None:
    response = await client.get("/ours")
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert response.json()["error"]["code"] == "out_of_memory"


async def test_starlettes_errors(client: httpx.AsyncClient) -> None:
    missing = await client.get("/nowhere")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "Invalid URL (GET /nowhere)")
    wrong = await client.post("/ours")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET")
    assert wrong.json()["error"]["message"] == "Not allowed to POST on /ours."
    teapot = await client.get("/teapot")
    assert (teapot.status_code, teapot.headers["x-tea"]) == (418, "yes")
    assert teapot.json()["error"] == {
        "message": "short and stout",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


async def test_fastapis_errors(client: httpx.AsyncClient) -> None:
    missing = (await client.get("/numbers/3")).json()["error"]
    assert (missing["param"], missing["code"]) == ("limit", "missing_required_parameter")
    wrong = await client.get("/numbers/x?limit=2")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "number")
