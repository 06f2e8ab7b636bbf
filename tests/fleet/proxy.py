"""A real nginx with deploy/nginx's own files in front of real servers, and the script that keeps its list."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes import child, patient, wait_until
from tests.serving.launch import wait_until_ready

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "nginx"
SCRIPT = DEPLOY / "turbocache-nginx"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
SERVED_BY = "X-Served-By"
"""Added for the tests: who has answered, behind those that were asked before."""

_MAIN = """
{user}
{global_parts}
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    gzip on;
    add_header {served_by} $upstream_addr always;
    include conf.d/*.conf;
}}
"""


def address(url: str) -> str:
    return url.removeprefix("http://")


def configure(folder: Path, servers: Sequence[str], port: int) -> Path:
    """A folder as /etc/nginx is: deploy's files unchanged but for the port. Returns the main file."""
    (folder / "conf.d").mkdir(parents=True)
    (folder / "turbocache").mkdir()
    (folder / "turbocache" / "servers").write_text("# ours\n" + "".join(f"{server}\n" for server in servers))
    site = (DEPLOY / "turbocache.conf").read_text()
    assert site.count("listen 8080;") == 1
    (folder / "conf.d" / "turbocache.conf").write_text(site.replace("listen 8080;", f"listen 127.0.0.1:{port};"))
    main = folder / "nginx.conf"
    global_parts = (DEPLOY / "90-turbocache.conf").read_text()
    user = "user root;" if os.geteuid() == 0 else ""  # who may use the folders of the tests
    main.write_text(_MAIN.format(folder=folder, user=user, global_parts=global_parts, served_by=SERVED_BY))
    script(folder, "write")
    return main


def script(folder: Path, *arguments: str) -> str:
    """turbocache-nginx on a folder that `configure` has made; what it says. Raises CalledProcessError."""
    command = [sys.executable, str(SCRIPT), "--folder", str(folder / "turbocache"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=patient(60)).stdout


@dataclass(frozen=True)
class Proxy:
    """A running nginx; `folder` is its configuration."""

    url: str
    folder: Path

    def script(self, *arguments: str) -> str:
        return script(self.folder, *arguments)

    def down(self) -> set[str]:
        """The servers that nginx does not ask."""
        lines = (self.folder / "turbocache" / "upstream.conf").read_text().splitlines()
        return {line.split()[1] for line in lines if " down;" in line}

    def wait_until_down(self, *servers: str) -> None:
        wait_until(
            lambda: self.down() == set(servers), 20, lambda: f"{self.down()} are down, not {servers}\n{self.said()}"
        )

    def said(self) -> str:
        return (self.folder / "watch.log").read_text()


@contextmanager
def proxied(folder: Path, servers: Sequence[str]) -> Iterator[Proxy]:
    """nginx in front of these addresses (host:port), watched every 0.2 s. Both end with the block."""
    assert NGINX is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    main = configure(folder, servers, port)
    serve = [NGINX, "-p", str(folder), "-c", str(main), "-e", str(folder / "error.log")]
    reload = f"{' '.join(serve)} -s reload"
    watch = [sys.executable, str(SCRIPT), "--folder", str(folder / "turbocache"), "watch", "--interval", "0.2"]
    log = folder / "watch.log"
    with child(serve, log, stop=True) as nginx, child([*watch, "--reload", reload], log, stop=True) as watcher:
        proxy = Proxy(f"http://127.0.0.1:{port}", folder)
        wait_until_ready(proxy.url, [nginx, watcher], proxy.said)
        yield proxy
