"""Requests that no schema describes: nesting, numbers and characters at the edge of JSON, bodies and methods of other
kinds. Each must be answered, with JSON, and not as a fault of the server.
"""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import httpx

from tests.serving.launch import Server

_CHAT: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/responses": {"model": "default", "input": "x", "max_output_tokens": 2},
    "/v1/messages": _CHAT,
    "/v1/completions": {"model": "default", "prompt": "x", "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
    "/v1/sessions/nobody/fork": {},
}
_DEPTHS = (50, 120, 190, 250, 5_000, 100_000)
_NUMBERS = ("1e999", "-1e999", "9" * 400, "1" * 5_000, "-0", "1e-400", "5e-324", "0.1e1", "NaN", "-Infinity")
_TEXTS = (r"\ud800", r"\udfff", r"\u0000", r"a\u0000b", r"\ufffe", r"\ud83d\ude00")
_BYTES = (
    b"",
    b"null",
    b"\0" * 100,
    b"\xef\xbb\xbf{}",
    json.dumps(_CHAT).encode("utf-16"),
    b'{"model": "\xe9"}',
    b"{" * 100_000,
    json.dumps({"k" * 100_000: 1}).encode(),
    json.dumps({**_CHAT, "metadata": {str(i): "" for i in range(10_000)}}).encode(),
)
_CONTENT_TYPES = (
    "text/plain",
    "application/xml",
    "multipart/form-data; boundary=x",
    "",
    "\xff/\xff",
    "x" * 5_000,
    ";;",
)
_METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD")
_NAMES = (
    "%00",
    "%ff",
    "a%2F..%2Fb",
    "%2e%2e",
    "%F0%9F%98%80",
    "x" * 300,
    "x" * 30_000,
    "%ed%a0%80",
    "//",
    "%0d%0a",
    "a b",
)


def run(server: Server, key: str, step: int = 1) -> tuple[int, list[str]]:
    """How many were sent, every `step`th of all, and what was wrong."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    n, wrong = 0, []
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        for method, path, more in islice(_requests(), 0, None, step):
            n += 1
            said = f"{method} {path:.100} {more!r:.300}"
            try:
                answer = client.request(method, path, **more)
            except httpx.HTTPError as error:
                wrong.append(f"{said}: {error!r}")
                continue
            if answer.status_code >= 500 or (method != "HEAD" and not _is_json(answer)):
                wrong.append(f"{said}: {answer.status_code} {answer.text:.300}")
    return n, wrong


def _is_json(answer: httpx.Response) -> bool:
    try:
        answer.json()
    except ValueError:
        return False
    return answer.headers["content-type"] == "application/json"


def _requests() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, body in _BODIES.items():
        for content in (*_BYTES, *(body.encode() for body in (*_nested(), *_numbered(path), *_spelled(path)))):
            yield "POST", path, {"content": content}
        for kind in _CONTENT_TYPES:
            header = [(b"Content-Type", kind.encode("latin-1"))]
            yield "POST", path, {"content": json.dumps(body), "headers": httpx.Headers(header)}
        for method in _METHODS:
            yield method, path, {}
    for name in _NAMES:
        yield "GET", f"/v1/sessions/{name}", {}
        yield "DELETE", f"/v1/sessions/{name}", {}


def _with(path: str, fields: str) -> str:
    """JSON text of a path's body with more fields, which come last and so count."""
    plain = json.dumps(_BODIES[path])[:-1]
    return f"{plain}{', ' if len(plain) > 1 else ''}{fields}}}"


def _nested() -> Iterator[str]:
    """Deep bodies, and valid ones that are deep where any JSON may stand."""
    for depth in _DEPTHS:
        anything = '{"a": ' * depth + "1" + "}" * depth
        schema = '{"type": "object", "properties": {"a": ' * depth + '{"type": "string"}' + "}}" * depth
        yield anything
        yield "[" * depth + "]" * depth
        for fields in (
            f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]',
            f'"tools": [{{"type": "function", "function": {{"name": "f", "strict": true, "parameters": {schema}}}}}]',
            f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "f", "schema": {schema}}}}}',
            f'"chat_template_kwargs": {{"text": {anything}}}',
        ):
            yield _with("/v1/chat/completions", fields)
        if depth <= 250 or depth > 10_000:  # between these it is a long prompt and nothing else
            yield _called(anything)


def _numbered(path: str) -> Iterator[str]:
    for number in _NUMBERS:
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "n",
            "logprobs",
            "repetition_penalty",
            "max_tokens",
        ):
            yield _with(path, f'"{name}": {number}')
        if path == "/v1/chat/completions":
            schema = f'{{"type": "number", "minimum": {number}}}'
            yield _with(
                path,
                f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "f", "schema": {schema}}}}}',
            )
            yield _called(f'{{"a": {number[:400]}}}')


def _spelled(path: str) -> Iterator[str]:
    for text in _TEXTS:
        for name in ("model", "prompt", "stop", "user", "prompt_cache_key", "id", text):
            yield _with(path, f'"{name}": "{text}"')
        if path == "/v1/chat/completions":
            yield _with(path, f'"messages": [{{"role": "user", "content": "{text}"}}]')
            yield _with(path, f'"metadata": {{"{text}": "{text}"}}')
            schema = f'{{"enum": ["{text}"], "description": "{text}"}}'
            yield _with(
                path,
                f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "f", "schema": {schema}}}}}',
            )
            yield _called(f'{{"a": "{text}"}}')


def _called(arguments: str) -> str:
    """A conversation with a call of these arguments."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*_CHAT["messages"], {"role": "assistant", "tool_calls": [call]}]
    return json.dumps({**_CHAT, "messages": [*messages, {"role": "tool", "tool_call_id": "1", "content": "x"}]})
