"""Which conversation a request belongs to, from what clients already send."""

import json
import re
from collections.abc import Mapping

from server.errors import InvalidRequest

MAX_LENGTH = 256
SESSION_HEADERS = ("X-Session-ID", "Session-Id", "X-Session-Affinity", "X-Claude-Code-Session-Id")
_IN_USER_ID = re.compile(r"user_\S*_session_([0-9a-fA-F-]{36})")
"""`metadata.user_id` of Claude Code before it was JSON."""


def _pattern(never: str) -> str:
    """Of names without some characters: parts between slashes, none of them '.' or '..' with or without spaces around,
    the first not only spaces.
    """
    other, start, visible = rf"[^/\\{never}]", rf"[^./\\ {never}]", rf"[^/\\ {never}]"
    part = rf"(?:[.]?{start}{other}*|[.]{{1,2}} +{visible}{other}*|[.][.]{visible}{other}*)"
    return rf"{part}(?:[/\\] *{part}?)*"


# For JSON schemas, in which the characters that can't be printed are too many to name all of them.
_BEYOND_ASCII = r"\x00-\x1f\x7f-\uffff"
_NEVER = r"\x00-\x1f\x7f-\xa0\xad\u2028-\u202e\ufffd"
NAME_PATTERN = f"^ *{_pattern(_NEVER)}$"
KEY_PATTERN = f"^ *(?:{_pattern(_NEVER)})?$"
# No client sends a header with spaces before it.
HEADER_PATTERN = rf"^(?:{_pattern(_BEYOND_ASCII)})?$"


def session_key(prompt_cache_key: str | None, headers: Mapping[str, str], user_id: str | None = None) -> str | None:
    """The session's name: `prompt_cache_key`, else the first of SESSION_HEADERS that is present, else the session in an
    Anthropic client's `metadata.user_id`, else None.

    An empty name counts as none, and spaces around it do not count. `headers` must look names up without regard to
    case. Raises InvalidRequest when the chosen name can't be one, as `checked_name` says.
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
    """The session that a user id carries, empty if it carries none: users are no sessions."""
    if (found := _IN_USER_ID.fullmatch(user_id)) is not None:
        return found[1]
    try:
        fields = json.loads(user_id)
    except (ValueError, RecursionError):
        return ""
    session = fields.get("session_id") if isinstance(fields, dict) else None
    return session if isinstance(session, str) else ""


def checked_name(key: str, param: str) -> str:
    """The name itself. Raises InvalidRequest when it is longer than 256 characters, holds a character that can't be
    printed, or reads as the path of a file: whoever sends that has mistaken what the name is for.
    """
    if len(key) > MAX_LENGTH:
        raise InvalidRequest(
            f"Invalid '{param}': string too long. Expected a string with maximum length {MAX_LENGTH}, but got a string "
            f"with length {len(key)} instead.",
            param=param,
            code="string_above_max_length",
        )
    if not key.isprintable() or "\ufffd" in key:  # what bytes that are no UTF-8 become in an address
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
    """Header bytes arrive read as latin-1; clients mean UTF-8."""
    try:
        return raw.encode("latin-1").decode("utf-8")
    except UnicodeError as error:
        raise InvalidRequest(
            f"Invalid '{name}': a session name must be UTF-8 text.", param=name, code="invalid_value"
        ) from error
