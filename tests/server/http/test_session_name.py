"""server.http.session_name: which name wins, and which names are refused."""

import itertools
import re

import pytest
from starlette.datastructures import Headers

from server.errors import InvalidRequest
from server.http.session_name import (
    HEADER_PATTERN,
    KEY_PATTERN,
    NAME_PATTERN,
    SESSION_HEADERS,
    checked_name,
    session_key,
)


def test_nothing_named() -> None:
    assert session_key(None, Headers()) is None
    assert session_key("", Headers({"X-Session-ID": ""})) is None


@pytest.mark.parametrize("index", range(len(SESSION_HEADERS)))
def test_headers_in_order(index: int) -> None:
    present = {name.lower(): f"from {name}" for name in reversed(SESSION_HEADERS[index:])}
    assert session_key(None, Headers(present)) == f"from {SESSION_HEADERS[index]}"


def test_prompt_cache_key_wins() -> None:
    assert session_key("mine", Headers({"X-Session-ID": "theirs"})) == "mine"


def test_header_bytes_are_utf8() -> None:
    assert session_key(None, Headers(raw=[(b"session-id", "Füße 🦶".encode())])) == "Füße 🦶"
    with pytest.raises(InvalidRequest, match="UTF-8") as caught:
        session_key(None, Headers(raw=[(b"session-id", b"\xff\xfe")]))
    assert caught.value.param == "Session-Id"


@pytest.mark.parametrize("key", ["a\nb", "a\x00", "\x1b[31m", "tab\t", "\u200b", "\x85", "\u2028"])
def test_unprintable_names_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="printable") as caught:
        session_key(key, Headers())
    assert (caught.value.status, caught.value.param) == (400, "prompt_cache_key")


@pytest.mark.parametrize(
    "key", ["/etc/passwd", "../x", "a/../../b", "..", ".", "a/./b", "\\share", "..\\x", "a\\..\\b", "a/.. ", "a/ ./b"]
)
def test_names_that_read_as_paths_are_refused(key: str) -> None:
    with pytest.raises(InvalidRequest, match="must not read as a path") as caught:
        session_key(None, Headers({"X-Session-ID": key}))
    assert (caught.value.status, caught.value.param) == (400, "X-Session-ID")


@pytest.mark.parametrize("key", ["team/a", "a..b", "v1.2", "...", "a/b...", "C:"])
def test_slashes_and_dots_alone_are_no_path(key: str) -> None:
    assert session_key(key, Headers()) == key


def test_spaces_around_a_name_do_not_count() -> None:
    assert session_key("  ", Headers({"X-Session-ID": " a b "})) == "a b"


def test_length() -> None:
    assert session_key("x" * 256, Headers()) == "x" * 256
    with pytest.raises(InvalidRequest, match="maximum length 256") as caught:
        session_key("x" * 257, Headers())
    assert caught.value.code == "string_above_max_length"


def accepted(key: str, headers: dict[str, str]) -> bool:
    try:
        session_key(key, Headers(headers))
    except InvalidRequest:
        return False
    return True


def test_patterns_take_what_the_code_takes() -> None:
    """All texts of up to six of the characters that matter."""
    for length in range(1, 7):
        for text in map("".join, itertools.product("./ a", repeat=length)):
            assert bool(re.search(KEY_PATTERN, text)) == accepted(text, {}), repr(text)
            if not text.startswith(" "):
                assert bool(re.search(HEADER_PATTERN, text)) == accepted("", {"X-Session-ID": text}), repr(text)
            try:
                checked_name(text, "session_id")
            except InvalidRequest:
                assert not re.search(NAME_PATTERN, text), repr(text)
            else:
                assert re.search(NAME_PATTERN, text), repr(text)
