"""POST /tokenize and /detokenize over a real socket."""

from typing import Any

import pytest

from tests.server.conftest import Serve, error_of
from tests.server.scripted_engine import ScriptedEngine

CHAT = [{"role": "user", "content": "ab"}]


def test_shapes(serve: Serve) -> None:
    server = serve(ScriptedEngine())
    whole = {"count": 2, "max_model_len": 1000, "tokens": [97, 98], "token_strs": None}
    assert server.http.post("/tokenize", json={"prompt": "ab"}).json() == whole
    spelled = {**whole, "token_strs": ["a", "b"]}
    asked = {"model": "default", "prompt": "ab", "return_token_strs": True, "add_special_tokens": False}
    assert server.http.post("/tokenize", json=asked).json() == spelled
    assert server.http.post("/tokenize", json={"messages": CHAT}).json() == whole
    assert server.http.post("/detokenize", json={"tokens": [97, 98]}).json() == {"prompt": "ab"}
    assert server.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("/tokenize", {}, 400, "prompt", "missing_required_parameter"),
        ("/tokenize", 3, 400, None, "invalid_type"),
        ("/tokenize", {"prompt": "a", "foo": 1}, 400, "foo", "unknown_parameter"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, 400, "prompt", "unknown_parameter"),
        ("/tokenize", {"messages": CHAT, "add_special_tokens": True}, 400, "add_special_tokens", "unsupported_value"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model", "model_not_found"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens[0]", "invalid_type"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]", "integer_below_min_value"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens", "invalid_type"),
    ],
)
def test_refused(serve: Serve, path: str, body: Any, status: int, param: str | None, code: str) -> None:
    response = serve(ScriptedEngine()).http.post(path, json=body)
    assert response.status_code == status
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    if code == "unknown_parameter":
        assert error["message"] == f"Unrecognized request argument supplied: {param}"
