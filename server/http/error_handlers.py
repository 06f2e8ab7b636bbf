"""Turns every error that reaches the web framework into the error envelope of the path's API."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from server.errors import InvalidRequest, MethodNotAllowed, NotFound, ServerError, UnsupportedField
from server.http.envelopes import anthropic_envelope, is_anthropic_path
from server.http.wire import UNSUPPORTED_PARAMETER, UNSUPPORTED_VALUE

# nginx's status for a client that closed the connection. Only the log and the metrics see it.
CLIENT_CLOSED = 499
_SHOWN = 100
_BRANCH = re.compile("<[a-z_]+>")

_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a decimal number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "content_type": "one of a string or array of objects",
    "stop_type": "one of a string or array of strings",
    "choice_type": "one of a string or an object",
    "prompt_type": "one of a string, array of strings, array of integers or array of arrays of integers",
}
_BOUNDS = {
    "less_than_equal": ("above maximum", "above_max", "le", "<="),
    "greater_than_equal": ("below minimum", "below_min", "ge", ">="),
    "less_than": ("above maximum", "above_max", "lt", "<"),
    "greater_than": ("below minimum", "below_min", "gt", ">"),
}


def error_response(error: ServerError, scope: Scope, status: int | None = None) -> JSONResponse:
    """An error's JSON body, status and headers. `status` replaces the error's own."""
    status, body = status or error.status, error.envelope()
    if is_anthropic_path(scope["path"]):
        context = scope.get("state", {}).get("context")
        body = anthropic_envelope(error, status, None if context is None else context.request_id)
    return JSONResponse(body, status_code=status, headers=error.headers())


def invalid_body(error: ValidationError) -> InvalidRequest:
    """The first error of a JSON body in OpenAI's words. It names the field ("messages[0].role")."""
    details = error.errors(include_url=False)
    if details[0]["type"] == "json_invalid":
        where = details[0]["ctx"]["error"]
        return InvalidRequest(f"We could not parse the JSON body of your request: {where}.", code="invalid_json")
    return invalid_field(details[0])


def invalid_field(detail: ErrorDetails) -> InvalidRequest:
    """Translates one of pydantic's errors."""
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    param = param_of(detail["loc"])
    if kind == "extra_forbidden":
        # OpenAI has one wording for fields of the request and one for fields inside them.
        nested = sum(not (isinstance(step, str) and _BRANCH.fullmatch(step)) for step in detail["loc"]) > 1
        text = f"Unknown parameter: '{param}'." if nested else f"Unrecognized request argument supplied: {param}"
        return InvalidRequest(text, param=param, code="unknown_parameter")
    if kind in (UNSUPPORTED_PARAMETER, UNSUPPORTED_VALUE):
        noun = "value" if kind == UNSUPPORTED_VALUE else "parameter"
        return UnsupportedField(f"Unsupported {noun}: '{param}' {detail['msg']}.", param=param, code=kind)
    if kind == "union_tag_not_found" and not isinstance(value, dict):
        kind = "model_type"
    if kind in ("missing", "union_tag_not_found"):
        param = param if kind == "missing" else f"{param}.{_discriminator(context)}"
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "union_tag_invalid":
        tag, tags = (re.sub(r"(?<!\w)<|>(?!\w)", "", context[key]) for key in ("tag", "expected_tags"))
        text = f"Invalid value: '{_shown(tag)}'. Supported values are: {tags}."
        return InvalidRequest(text, param=f"{param}.{_discriminator(context)}", code="invalid_value")
    if kind == "literal_error":
        text = f"Invalid value: '{_shown(value)}'. Supported values are: {context['expected']}."
        return InvalidRequest(text, param=param, code="invalid_value")
    if kind in _EXPECTED:
        text = f"Invalid type for '{param}': expected {_EXPECTED[kind]}, but got {_type_name(value)} instead."
        return InvalidRequest(
            text if param else f"The body must be an object, but is {_type_name(value)}.",
            param=param or None,
            code="invalid_type",
        )
    return _invalid_value(kind, param, value, context, detail["msg"])


def _invalid_value(kind: str, param: str, value: Any, context: Mapping[str, Any], message: str) -> InvalidRequest:
    if kind in _BOUNDS:
        words, side, key, sign = _BOUNDS[kind]
        bound = context[key]
        number = "decimal" if isinstance(bound, float) else "integer"
        shown = f"{bound:g}" if isinstance(bound, float) else bound
        text = f"{number} {words} value. Expected a value {sign} {shown}, but got {_shown(value)} instead."
        code = f"{number}_{side}_value"
    elif kind in ("too_short", "too_long", "string_too_long"):
        text, code = _wrong_length(value, context)
    elif kind == "finite_number":
        text, code = "expected a finite number, but got NaN or Infinity instead.", "invalid_value"
    else:
        text, code = f"{message[:1].lower()}{message[1:]}.", "invalid_value"
    return InvalidRequest(f"Invalid '{param}': {text}", param=param, code=code)


def _wrong_length(value: Any, context: Mapping[str, Any]) -> tuple[str, str]:
    """Message and code for a list, object or string of a wrong length."""
    noun = "string" if isinstance(value, str) else "object" if isinstance(value, dict) else "array"
    article = "an" if noun != "string" else "a"
    if "min_length" in context:
        wanted, side, adjective = f"minimum length {context['min_length']}", "below_min", "short"
    else:
        wanted, side, adjective = f"maximum length {context['max_length']}", "above_max", "long"
    if not value:
        text = f"empty {noun}. Expected {article} {noun} with {wanted}, but got an empty {noun} instead."
        return text, f"empty_{noun}"
    got = f"{article} {noun} with length {len(value)}"
    return f"{noun} too {adjective}. Expected {article} {noun} with {wanted}, but got {got} instead.", (
        f"{noun}_{side}_length"
    )


def param_of(location: Sequence[str | int]) -> str:
    """Pydantic's location in OpenAI's style: ("messages", 0, "<user>", "content", "<parts>", 1) is
    "messages[0].content[1]".

    Pydantic's locations include tags of unions, which are in angle brackets here, and `[key]` for a wrong key.
    """
    param = ""
    for step in location:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not (_BRANCH.fullmatch(step) or step == "[key]"):
            param += f".{step}" if param else step
    return _shown(param)


def _discriminator(context: Mapping[str, Any]) -> str:
    return str(context["discriminator"]).strip("'()")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _type_name(value: Any) -> str:
    """JSON's name for a value's type, with an article."""
    names: dict[type, str] = {
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a decimal number",
        list: "an array",
    }
    return "null" if value is None else names.get(type(value), "an object")


async def _server_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    if (context := getattr(request.state, "context", None)) is not None:
        context.error = error.code or error.type
    return error_response(error, request.scope)


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors: an unknown path, a wrong method."""
    assert isinstance(error, HTTPException)
    method, path, headers = request.method, _shown(request.url.path), dict(error.headers or {})
    if error.status_code == 404:
        response = error_response(NotFound(f"Invalid URL ({method} {path})"), request.scope)
    elif error.status_code == 405:
        response = error_response(MethodNotAllowed(f"Not allowed to {method} on {path}."), request.scope)
        # Starlette names only the methods of the path's first route.
        if (methods_at := getattr(request.app.state, "methods_at", None)) is not None:
            headers["Allow"] = ", ".join(methods_at(request.url.path))
    else:
        plain = ServerError if error.status_code >= 500 else InvalidRequest
        response = error_response(plain(str(error.detail)), request.scope, error.status_code)
    response.headers.update(headers)
    return response


async def _request_validation(request: Request, error: Exception) -> Response:
    """FastAPI's validation of paths and queries. `server.http.routing` parses the bodies."""
    assert isinstance(error, RequestValidationError)
    detail = cast(ErrorDetails, error.errors()[0])
    # The first step says "path" or "query".
    return error_response(invalid_field({**detail, "loc": detail["loc"][1:]}), request.scope)


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


def install(app: FastAPI) -> None:
    """Installs the handlers. RequestMiddleware, further out, catches unexpected exceptions."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _request_validation)
    app.add_exception_handler(ClientDisconnect, _client_gone)
