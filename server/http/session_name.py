"""Finds the session of a request in what clients already send."""

import hashlib
import json
import re
from collections.abc import Mapping

from starlette.requests import Request

from server.errors import InvalidRequest
from server.http.middleware import request_context

MAX_LENGTH = 256
SESSION_HEADERS = ("X-Session-ID", "Session-Id", "X-Session-Affinity", "X-Claude-Code-Session-Id")
_IN_USER_ID = re.compile(r"user_\S*_session_([0-9a-fA-F-]{36})")
"""Claude Code's `metadata.user_id` before it became JSON."""


def _pattern(never: str) -> str:
    """Pattern of a name without the characters `never`. No part between slashes is '.' or '..', also not with spaces
    around it, and the first part is not blank.
    """
    other, start, visible = rf"[^/\\{never}]", rf"[^./\\ {never}]", rf"[^/\\ {never}]"
    part = rf"(?:[.]?{start}{other}*|[.]{{1,2}} +{visible}{other}*|[.][.]{visible}{other}*)"
    return rf"{part}(?:[/\\] *{part}?)*"


# For JSON schemas. They name only some of the many characters that can't be printed.
_BEYOND_ASCII = r"\x00-\x1f\x7f-\uffff"
_NEVER = r"\x00-\x1f\x7f-\xa0\xad\u2028-\u202e\ufffd"
NAME_PATTERN = f"^ *{_pattern(_NEVER)}$"
KEY_PATTERN = f"^ *(?:{_pattern(_NEVER)})?$"
# No client sends a header with leading spaces.
HEADER_PATTERN = rf"^(?:{_pattern(_BEYOND_ASCII)})?$"


def name_session(
    request: Request, key: str | None, stream: bool, *, user_id: str | None = None, default: str | None = None
) -> str | None:
    """Finds the session's name, else takes `default`. Notes it for the response's header and the log."""
    session, context = session_key(key, request.headers, user_id) or default, request_context(request)
    context.session_name, context.stream = session, stream
    if session is not None:  # eight hex digits tell sessions apart in the log, which must not hold their names
        context.session = hashlib.blake2s(session.encode(), digest_size=4).hexdigest()
    return session


def session_key(prompt_cache_key: str | None, headers: Mapping[str, str], user_id: str | None = None) -> str | None:
    """The session's name. The first of these that is not blank: `prompt_cache_key`, SESSION_HEADERS in order, the
    session in an Anthropic client's `metadata.user_id`. None if there is none.

    Spaces around a name are dropped. `headers` must ignore case. Raises InvalidRequest like `checked_name`.
    """
    if prompt_cache_key and (key := prompt_cache_key.strip(" ")):
        return checked_name(key, "prompt_cache_key")
    for name in SESSION_HEADERS:
        if raw := headers.get(name, "").strip(" "):
            return checked_name(_decoded(raw, name), name)
    if user_id and (key := _session_in(user_id).strip(" ")):
        return checked_name(key, "metadata.user_id")
    return None


def _session_in(user_id: str) -> str:
    """The session within a user id, or an empty string. The user alone names no session."""
    if (match := _IN_USER_ID.fullmatch(user_id)) is not None:
        return match[1]
    try:
        fields = json.loads(user_id)
    except (ValueError, RecursionError):
        return ""
    session = fields.get("session_id") if isinstance(fields, dict) else None
    return session if isinstance(session, str) else ""


def checked_name(key: str, param: str) -> str:
    """Returns the name. Raises InvalidRequest if it is longer than 256 characters, has a character that can't be
    printed, or looks like the path of a file: then the client has mistaken what the name is for.
    """
    if len(key) > MAX_LENGTH:
        raise InvalidRequest(
            f"Invalid '{param}': string too long. Expected a string with maximum length {MAX_LENGTH}, but got a string "
            f"with length {len(key)} instead.",
            param=param,
            code="string_above_max_length",
        )
    if not key.isprintable() or "\ufffd" in key:  # invalid UTF-8 in a URL becomes U+FFFD
        raise InvalidRequest(
            f"Invalid '{param}': a session name must hold printable characters only.", param=param, code="invalid_value"
        )
    parts = [part.strip(" ") for part in key.replace("\\", "/").split("/")]
    if not parts[0] or {".", ".."} & set(parts):
        raise InvalidRequest(
            f"Invalid '{param}': a session name must not read as a path: it can't begin with a slash, nor have '.' or "
            "'..' between slashes.",
            param=param,
            code="invalid_value",
        )
    return key


def _decoded(raw: str, name: str) -> str:
    """Headers arrive decoded as latin-1, but clients send UTF-8."""
    try:
        return raw.encode("latin-1").decode("utf-8")
    except UnicodeError as error:
        raise InvalidRequest(
            f"Invalid '{name}': a session name must be UTF-8 text.", param=name, code="invalid_value"
        ) from error
