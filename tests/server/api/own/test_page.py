"""The files of the page at /, as any client gets them. What they do in a browser is in tests/page."""

import re

import httpx
import pytest

from server.api.own.page import _files
from tests.server.conftest import Serve, error_of
from tests.server.scripted_engine import ScriptedEngine

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"


@pytest.fixture
def http(serve: Serve) -> httpx.Client:
    return serve(ScriptedEngine(), api_keys=("key",)).http


def test_its_files_need_no_key_and_say_what_they_are(http: httpx.Client) -> None:
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert http.get("/").content == http.get("/page/index.html").content
    for name in _files():
        answer = http.get(f"/page/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].partition(";")[0] == types[name.rpartition(".")[2]]
        assert answer.headers["content-security-policy"].startswith(POLICY)
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_file_is_sent_again_only_when_it_has_changed(http: httpx.Client) -> None:
    first = http.get("/page/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = http.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert http.get("/page/main.js", headers={"If-None-Match": '"other"'}).content == first.content
    assert http.head("/").headers["content-length"] == first.headers["content-length"] or http.head("/").content == b""


@pytest.mark.parametrize("name", ["missing.js", "..%2Fapp.py", "%2e%2e%2fapp.py", "a%00b", "INDEX.HTML"])
def test_nothing_else_is_served(http: httpx.Client, name: str) -> None:
    answer = http.get(f"/page/{name}")
    assert answer.status_code == 404
    assert error_of(answer)["message"].startswith("Invalid URL (GET /page/")


def test_it_takes_no_posts(http: httpx.Client) -> None:
    answer = http.post("/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_what_it_shows_needs_the_key(http: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/backend", "/v1/status", "/v1/sessions"):
        assert http.get(path).status_code == 401
    assert http.get("/v1/status", headers={"Authorization": "Bearer key"}).json()["object"] == "status"


def test_it_needs_nothing_from_elsewhere_and_nothing_inline() -> None:
    """What a browser would refuse or fetch from outside is not even written."""
    for name, file in _files().items():
        text = file.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(?m)(^|\s)// .*$", "", text), name
        assert not re.search(r"@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", text), name
    index = _files()["index.html"].content.decode()
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]* src=)", index)
    named = {*re.findall(r'(?:src|href)="page/([^"]+)"', index)}
    for file in _files().values():
        named |= set(re.findall(r'from "\./([^"]+)"', file.content.decode()))
    assert named | {"index.html"} == set(_files())
