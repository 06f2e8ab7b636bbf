"""nginx takes deploy/nginx as it is, sends every session to one server, and hears of servers that come and go."""

import http.server
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.session_name import SESSION_HEADERS
from server.settings import Settings
from tests.deploy.test_systemd import analyze, analyzed, entries
from tests.fleet.proxy import DEPLOY, NGINX, SCRIPT, SERVED_BY, Proxy, configure, proxied, script

SITE = (DEPLOY / "turbocache.conf").read_text()
installed = pytest.mark.skipif(NGINX is None, reason="nginx (Debian's package) is not installed")


class Backend:
    """Answers every request with what it has heard. `health` is the status of /health; `dies`: it hangs up instead."""

    def __init__(self) -> None:
        backend = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path == "/health":
                    self.answer(backend.health, b"")
                    return
                backend.heard += 1
                if backend.dies:
                    self.close_connection = True
                    return
                heard = {"path": self.path, "headers": dict(self.headers), "bytes": len(body)}
                self.answer(backend.status, json.dumps(heard).encode())

            do_POST = do_DELETE = do_GET

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None: ...

        self.health = self.status = 200
        self.dies = False
        self.heard = 0
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def end(self) -> None:
        """Connections are refused from now on."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def backends() -> Iterator[list[Backend]]:
    three = [Backend() for _ in range(3)]
    yield three
    for backend in three:
        backend.end()


@pytest.fixture
def proxy(tmp_path: Path, backends: list[Backend]) -> Iterator[Proxy]:
    with proxied(tmp_path / "nginx", [backend.address for backend in backends]) as running:
        yield running


def ask(proxy: Proxy, path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> httpx.Response:
    content = b"{}" if method == "POST" else None
    said = {name.encode(): value.encode() for name, value in headers.items()}
    return httpx.request(method, proxy.url + path, headers=said, content=content)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def server_of(proxy: Proxy, name: str) -> str:
    return ask(proxy, **{"X-Session-ID": name}).headers[SERVED_BY].split(", ")[-1]


@installed
def test_nginx_takes_the_files(tmp_path: Path, backends: list[Backend]) -> None:
    assert NGINX is not None
    main = configure(tmp_path / "nginx", [backend.address for backend in backends], 8080)
    done = subprocess.run(
        [NGINX, "-t", "-q", "-c", str(main), "-e", str(tmp_path / "error.log")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@installed
def test_a_session_s_requests_meet_whatever_header_or_address_names_it(proxy: Proxy) -> None:
    homes = {f"s{i}": server_of(proxy, f"s{i}") for i in range(60)}
    assert len(set(homes.values())) == 3
    for name, home in list(homes.items())[:3]:
        for header in SESSION_HEADERS:
            assert ask(proxy, **{header: name}).headers[SERVED_BY] == home
        addresses = [("GET", name), ("DELETE", name), ("POST", f"{name}/fork"), ("GET", f"{name}~0123abcd")]
        for method, path in addresses:
            assert ask(proxy, f"/v1/sessions/{path}", method).headers[SERVED_BY] == home, path
        # The server's order decides, not the request's.
        both = {header: (name if i == 0 else "s-other") for i, header in enumerate(SESSION_HEADERS)}
        assert ask(proxy, **dict(reversed(both.items()))).headers[SERVED_BY] == home
    assert ask(proxy, "/v1/sessions/two%20w%C3%B6rter", "GET").headers[SERVED_BY] == server_of(proxy, "two wörter")


@installed
def test_who_names_no_session_stays_by_client_and_key(proxy: Proxy) -> None:
    by_key = {key: ask(proxy, Authorization=f"Bearer {key}").headers[SERVED_BY] for key in map(str, range(12))}
    assert len(set(by_key.values())) == 3
    assert all(ask(proxy, Authorization=f"Bearer {key}").headers[SERVED_BY] == home for key, home in by_key.items())


@installed
def test_what_the_servers_hear(proxy: Proxy) -> None:
    heard = ask(proxy, **{"Authorization": "Bearer k", "X-Forwarded-For": "1.2.3.4", "X-Api-Key": "k2"}).json()
    headers = {name.lower(): value for name, value in heard["headers"].items()}
    assert headers["host"] == proxy.url.removeprefix("http://")
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "http"
    assert (headers["authorization"], headers["x-api-key"]) == ("Bearer k", "k2")
    limit = Settings.model_fields["body_limit"].default
    big = httpx.post(f"{proxy.url}/v1/chat/completions", content=b"x" * (limit + 1))
    assert big.json()["bytes"] == limit + 1  # the server refuses it in its own words
    assert httpx.get(f"{proxy.url}/metrics").status_code == 404


@installed
def test_a_server_that_dies_before_its_answer_is_passed_over_once_and_a_503_is_an_answer(
    proxy: Proxy, backends: list[Backend]
) -> None:
    by_address = {backend.address: backend for backend in backends}
    home = by_address[server_of(proxy, "a")]
    home.status = 503
    answer = ask(proxy, **{"X-Session-ID": "a"})
    assert (answer.status_code, answer.headers[SERVED_BY]) == (503, home.address)
    home.dies = True
    answer = ask(proxy, **{"X-Session-ID": "a"})
    first, second = answer.headers[SERVED_BY].split(", ")
    assert (answer.status_code, first) == (200, home.address)
    home.dies, home.status = False, 200
    assert server_of(proxy, "a") == home.address  # one failure moves nothing
    for backend in backends:
        backend.dies, backend.heard = True, 0
    answer = ask(proxy, **{"X-Session-ID": "a"})
    assert sum(backend.heard for backend in backends) == 2
    assert (answer.status_code, answer.headers["Retry-After"]) == (502, "2")
    assert answer.json()["error"]["code"] == "no_server"
    assert second != home.address


@installed
def test_servers_go_out_and_come_back_and_only_their_sessions_move(proxy: Proxy, backends: list[Backend]) -> None:
    names = [f"s{i}" for i in range(12)]
    before = {name: server_of(proxy, name) for name in names}
    one, two, three = (backend.address for backend in backends)

    def servers() -> dict[str, str]:
        return {name: server_of(proxy, name) for name in names}

    backends[0].health = 503
    until(lambda: one not in servers().values())
    assert proxy.down() == {one}
    assert all(server == before[name] for name, server in servers().items() if before[name] != one)
    backends[0].health = 200
    until(lambda: servers() == before)

    assert "gets no new requests" in proxy.script("drain", two)
    assert set(servers().values()) == {one, three}
    proxy.script("undrain", two)
    until(lambda: servers() == before)
    backends[2].end()
    until(lambda: proxy.down() == {three})
    assert f"{three}  refuses connections" in proxy.script("status")
    backends[0].health = backends[1].health = 503
    until(lambda: not proxy.down())  # none is well: better to ask than to refuse


@installed
def test_what_can_t_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "nginx" / "turbocache"
    configure(tmp_path / "nginx", ["127.0.0.1:1", "127.0.0.1:2"], 8080)

    def refusal(*arguments: str) -> str:
        with pytest.raises(subprocess.CalledProcessError) as refused:
            script(tmp_path / "nginx", *arguments)
        return str(refused.value.stderr)

    assert "is none of 127.0.0.1:1, 127.0.0.1:2" in refusal("drain", "127.0.0.1:3")
    (folder / "drained").write_text("127.0.0.1:1\n")
    assert "is the last one" in refusal("drain", "127.0.0.1:2")
    (folder / "servers").write_text("127.0.0.1:1; include /etc/passwd\n")
    assert "is not host:port" in refusal("write")
    (folder / "servers").write_text("# none yet\n")
    assert "names no server" in refusal("write")


def test_the_configuration_names_the_headers_of_the_server_in_its_order() -> None:
    named = re.findall(r"^map \$http_(\w+)", SITE, re.MULTILINE)
    assert named == [header.lower().replace("-", "_") for header in SESSION_HEADERS]


def test_silence_in_a_stream_is_shorter_than_what_nginx_bears() -> None:
    (hours,) = re.findall(r"proxy_read_timeout (\d+)h;", SITE)
    assert Settings.model_fields["keepalive_seconds"].default * 10 < int(hours) * 3600


@analyzed
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "turbocache-nginx.service"
    text = (DEPLOY / unit.name).read_text()
    assert dict(entries(DEPLOY / unit.name))["ExecStart"] == "/usr/local/sbin/turbocache-nginx watch"
    unit.write_text(text.replace("/usr/local/sbin/turbocache-nginx", str(SCRIPT)))
    analyze(tmp_path, "verify", "--man=no", str(unit))
    assert shutil.which("python3")
