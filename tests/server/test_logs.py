"""server.logs: the two forms of the log, in processes of their own as logging is global."""

import json
import subprocess
import sys
from typing import Any

import pytest

_SCRIPT = """
import logging, sys
{before}
from server.logs import configure_logging
from server.protocol import Usage
from server.http.request_context import RequestContext
configure_logging("info", sys.argv[1])
record = RequestContext("chatcmpl-1", status=200, session="0a1b2c3d", finish="stop", stream=True, usage=Usage(12, 8, 3))
record.times["queue"] = 0.25
logging.getLogger("server.requests").info(record.line("POST", "/v1/chat/completions"))
logging.getLogger("server.requests").debug("not this")
logging.getLogger("uvicorn.error").info("Started", extra={{"color_message": "\x1b[1mStarted"}})
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("turbocache.store").exception("it failed")
"""
_UVICORN = "import uvicorn; uvicorn.Config('x')"


def written(format: str, before: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(before=before), format], capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_text() -> None:
    line, *rest = written("text")
    assert line.split(" ", 2)[2].startswith(
        "INFO server.requests: chatcmpl-1 POST /v1/chat/completions 200 total_s=0.0"
    )
    assert line.endswith(" finish=stop stream=yes session=0a1b2c3d queue_s=0.250 cached=8 prefilled=4 generated=3")
    assert rest[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("before", ["", _UVICORN], ids=["alone", "under uvicorn"])
def test_json(before: str) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in written("json", before)]
    request, *others, error = lines
    assert request.pop("time")
    assert request.pop("total_s") >= 0
    assert request == {
        "level": "INFO", "logger": "server.requests", "message": "request",
        "request_id": "chatcmpl-1", "method": "POST", "path": "/v1/chat/completions", "status": 200,
        "finish": "stop", "stream": True, "session": "0a1b2c3d", "queue_s": 0.25,
        "cached": 8, "prefilled": 4, "generated": 3,
    }  # fmt: skip
    assert (error["level"], error["message"]) == ("ERROR", "it failed")
    assert "ZeroDivisionError" in error["exc_info"]
    if before:
        assert [(line["logger"], line["message"]) for line in others] == [("uvicorn.error", "Started")]
        assert "color_message" not in others[0]
