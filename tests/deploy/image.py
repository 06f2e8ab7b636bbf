"""The steps of Dockerfile.dev on a bare Debian, then its CMD and a chat: `python -m tests.deploy.image`.

What is different from Docker: FROM is Debian of the image's release with Debian's own Python 3.11 (and venv, which
python:3.11 has built in) instead of a build in /usr/local; layers are not kept; the network while building is this
machine's, with its mirrors, proxies and certificates.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.debian import PATH, bootstrap, missing, say
from tests.deploy.dockerfile import Build, read

CONTEXT = Path(__file__).resolve().parents[2]
# ca-certificates, netbase and tzdata are in python:3.11-slim too.
BASE = ("ca-certificates", "netbase", "tzdata", "python3", "python3-venv")
START_SECONDS, DOCKER_STOP_SECONDS = 120.0, 10.0
# Run by the image's own Python next to the server.
TALK = """
import httpx, openai
from prometheus_client.parser import text_string_to_metric_families
with openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none") as client:
    messages = [{"role": "user", "content": "My locker code is 5917. What is my locker code?"}]
    answer = client.chat.completions.create(model="default", messages=messages, max_tokens=16)
print("answer:", repr(answer.choices[0].message.content), answer.usage.completion_tokens, "tokens")
text = httpx.get("http://127.0.0.1:8000/metrics").raise_for_status().text
samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
ended = sum(sample.value for sample in samples if sample.name == "turbocache_requests_finished_total")
print("metrics:", len(samples), "samples,", int(ended), "request")
assert answer.usage.completion_tokens > 0 and ended == 1, samples
"""
# The network of one command: only itself. Docker gives a container a loopback that is up.
LOOPBACK = """
import fcntl, socket, struct, sys, os
with socket.socket() as one:
    fcntl.ioctl(one, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, bytes(14)))  # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING
os.execvp(sys.argv[1], sys.argv[1:])
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when every step worked, 2 where this machine can't try."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.image", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="build here and leave it (default: a temporary folder)")
    parser.add_argument(
        "--run", action="append", default=[], metavar="COMMAND", help="a shell command in the image, as by docker run"
    )
    options = parser.parse_args(argv)
    if lacks := missing():
        print(f"This machine lacks {', '.join(lacks)}", file=sys.stderr)
        return 2
    folder = options.folder or Path(tempfile.mkdtemp(prefix="turbocache-image-"))
    try:
        build = built(folder / "root")
        talk(build)
        for command in options.run:
            with timed(f"docker run ... {command}"):
                build.root.run(["sh", "-c", command], build.whole_environment(), build.user, build.cwd)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    return 0


@contextmanager
def timed(what: str) -> Iterator[None]:
    say(what)
    begun = time.monotonic()
    yield
    say(f"    {time.monotonic() - begun:.1f} s")


def built(folder: Path) -> Build:
    """Every instruction done, in order."""
    (base, *steps), ignore = read(CONTEXT)
    codename = base.text.rpartition("-")[2]
    with timed(f"{base}: Debian {codename} with {' '.join(BASE)}"):
        build = Build(CONTEXT, bootstrap(folder, codename, BASE), ignore)
    for step in steps:
        with timed(f"line {step.line}: {step}"):
            build.do(step)
    return build


def talk(build: Build) -> None:
    """CMD as the first process of a container without a network; a chat, the metrics, and `docker stop`."""
    alone = ["unshare", "--net", sys.executable, "-c", LOOPBACK]
    whole = build.whole_environment()
    with timed(str(build.instructions["CMD"])):
        process = subprocess.Popen(
            [*alone, *build.root.inside(build.instructions["CMD"].command(), whole, build.user, build.cwd)],
            stdout=sys.stderr,
        )
        try:
            server = _wait_until_healthy(build, process)
            subprocess.run(_beside(build, server, [".venv/bin/python", "-c", TALK]), check=True)
            os.kill(server, signal.SIGTERM)
            if status := process.wait(DOCKER_STOP_SECONDS):
                raise AssertionError(f"a stop ended with status {status}")
        finally:
            process.kill()
            process.wait()


def _wait_until_healthy(build: Build, process: subprocess.Popen[bytes]) -> int:
    """The server's process id here, once HEALTHCHECK says yes."""
    check = build.instructions["HEALTHCHECK"].command()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/root").resolve() == build.root.path.resolve():
            done = subprocess.run(_beside(build, int(children[0]), check), stderr=subprocess.DEVNULL, check=False)
            if done.returncode == 0:
                return int(children[0])
        time.sleep(0.5)
    raise AssertionError("the server did not become healthy")


def _beside(build: Build, server: int, command: list[str]) -> list[str]:
    """`command` where the process `server` is, as `docker exec` does it."""
    pairs = [f"{name}={value}" for name, value in build.whole_environment().items()]
    enter = ["nsenter", "--target", str(server), "--mount", "--net", "--pid", "--root", "--wd"]
    become = ["setpriv", f"--reuid={build.user}", f"--regid={build.user}", "--init-groups", "env", "-i", f"PATH={PATH}"]
    return [*enter, *become, *pairs, "sh", "-c", 'cd "$0" && exec "$@"', build.cwd, *command]


if __name__ == "__main__":
    sys.exit(main())
