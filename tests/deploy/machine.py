"""The services in a Debian that is booted, by the targets that install them: `python -m tests.deploy.machine`.

systemd-nspawn boots it, without a network. What the units forbid is in force, which reading them can't show: the server
compiles its kernels, answers, writes its sessions at a stop and goes on with them. Needs root, debootstrap and
systemd-container.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.debian import PATH, Root, bootstrap, missing, say
from tests.deploy.dockerfile import ignore_patterns, ignored

CONTEXT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("ca-certificates", "python3", "python3-venv", "make", "g++", "libopenblas0-pthread"),
    *("systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd"),
)
USER = "anna"
SECONDS = 90.0
COPIES = {"root": "/opt/turbocache/venv", USER: f"/home/{USER}/.local/share/turbocache/venv"}
# Enough tokens that a session is worth a file; says how many of them were cached.
TALK = """
import json, urllib.request as r
story = "The sailor walked to the old harbour near the mill and looked at the tower. " * 7
body = {"model": "default", "prompt_cache_key": "anna", "max_tokens": 8,
        "messages": [{"role": "user", "content": story + "My code is 5917. What is my code?"}]}
kind = {"Content-Type": "application/json"}
ask = r.Request("http://127.0.0.1:8000/v1/chat/completions", json.dumps(body).encode(), kind)
usage = json.load(r.urlopen(ask))["usage"]
assert usage["completion_tokens"] > 0 and b"turbocache_sessions" in r.urlopen("http://127.0.0.1:8000/metrics").read()
print(usage["prompt_tokens_details"]["cached_tokens"])
"""
HEALTH = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"


@dataclass(frozen=True)
class Machine:
    """A booted system; `init` is its first process, seen from here."""

    init: int

    def run(self, command: str, user: str = "root", check: bool = True) -> str:
        """The output of a shell command in /src, with a login's way to the user's systemd. Raises AssertionError."""
        home = "/root" if user == "root" else f"/home/{user}"
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        enter = ["nsenter", "--target", str(self.init), "--all", *become, "env", "-i", f"PATH={PATH}", f"HOME={home}"]
        login = 'export XDG_RUNTIME_DIR=/run/user/$(id -u); cd /src; eval "$0"'
        done = subprocess.run(
            [*enter, "sh", "-c", login, command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}"
        return done.stdout.strip()

    def until(self, command: str, user: str = "root") -> None:
        """Until a shell command has worked. Raises AssertionError when that takes longer than a start may."""
        deadline = time.monotonic() + SECONDS
        while self.run(f"({command}) >/dev/null 2>&1 && echo yes", user, check=False) != "yes":
            assert time.monotonic() < deadline, f"{command}: not within {SECONDS:.0f} s"
            time.sleep(0.2)


@dataclass(frozen=True)
class Service:
    """The service of `user` on a machine; root's is the system's."""

    machine: Machine
    user: str

    @property
    def manager(self) -> str:
        return "systemctl" if self.user == "root" else "systemctl --user"

    def make(self, target: str) -> str:
        name = target.replace("-service", "-system-service") if self.user == "root" else target
        return self.machine.run(f"make {name} ACCEL=cpu SERVICE_COMMAND={COPIES[self.user]}/bin/turbocache", self.user)

    def show(self, name: str) -> str:
        return self.machine.run(f"{self.manager} show --value --property {name} turbocache", self.user)

    def ready(self) -> float:
        """Seconds until it answers."""
        begun = time.monotonic()
        self.machine.until(f'python3 -c "{HEALTH}"')
        return time.monotonic() - begun

    def cached_tokens(self) -> int:
        """Of a prompt that is always the same, after a chat and a look at the metrics."""
        return int(self.machine.run(f"python3 -c '{TALK}'"))

    def status(self) -> dict[str, str]:
        """/proc/PID/status of the server."""
        lines = self.machine.run(f"cat /proc/{self.show('MainPID')}/status").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def goes_on_after_a_stop(service: Service) -> None:
    first = service.ready()
    assert service.cached_tokens() == 0
    begun = time.monotonic()
    service.machine.run(f"{service.manager} restart turbocache", service.user)
    stop = time.monotonic() - begun
    second = service.ready()
    cached = service.cached_tokens()
    assert cached > 100
    say(f"  first start {first:.1f} s, stop {stop:.1f} s, second start {second:.1f} s; {cached} tokens back from disk")


def may_do_little(service: Service, sandbox: bool) -> None:
    status = service.status()
    assert (status["NoNewPrivs"], status["Seccomp"], int(status["CapEff"], 16)) == ("1", "2", 0), status
    process = f"/proc/{service.show('MainPID')}"
    own = service.machine.run(f"readlink {process}/ns/mnt") != service.machine.run("readlink /proc/1/ns/mnt")
    assert own == sandbox
    compiled = service.machine.run(f"tr '\\0' '\\n' < {process}/environ | sed -n s/^TMPDIR=//p")
    assert int(service.machine.run(f"ls {compiled}/mlx/*/cpu/*.so | wc -l")) > 0, "nothing was compiled"
    if sandbox:
        assert int(status["CapBnd"], 16) == 0
        mounts = service.machine.run(f"cat {process}/mountinfo")
        assert re.search(r" /tmp rw", mounts)
        assert re.search(r" /(home|root)?(/\S*)? ro", mounts)
        # Seen from the process' own root, which follows its mounts.
        assert "nvidia" not in service.machine.run(f"ls {process}/root/dev")
        assert service.machine.run(f"ls {process}/root/home/{USER}/.ssh", check=False) != "key"


def comes_back_after_a_crash(service: Service) -> None:
    service.machine.run(f"kill -KILL {service.show('MainPID')}")
    service.machine.until(f"[ $({service.manager} show --value --property NRestarts turbocache) = 1 ]", service.user)
    service.ready()


def gives_up_on_a_wrong_setting(service: Service, settings: str) -> None:
    service.machine.run(f"echo TURBOCACHE_MODLE=x >> {settings}; {service.manager} restart turbocache", service.user)
    service.machine.until(f"[ $({service.manager} is-failed turbocache) = failed ]", service.user)
    journal = "journalctl" if service.user == "root" else "journalctl --user"
    log = service.machine.run(f"{journal} --no-pager -u turbocache", service.user)
    assert "Did you mean TURBOCACHE_MODEL?" in log
    service.machine.run(f"sed -i /MODLE/d {settings}", service.user)
    # Not a plain start: systemd would refuse it for minutes.
    service.machine.run(f"{service.manager} reset-failed turbocache; {service.manager} start turbocache", service.user)
    service.ready()


def the_systems(machine: Machine) -> None:
    service = Service(machine, "root")
    service.make("install-service")
    goes_on_after_a_stop(service)
    may_do_little(service, sandbox=True)
    assert service.status()["Uid"].split()[0] not in ("0", machine.run(f"id -u {USER}"))
    comes_back_after_a_crash(service)
    gives_up_on_a_wrong_setting(service, "/etc/turbocache/environment")
    say(f"  {machine.run('systemd-analyze security --no-pager turbocache').splitlines()[-1]}")
    service.make("uninstall-service")
    assert machine.run("systemctl is-active turbocache", check=False) == "inactive"


def the_users(machine: Machine) -> None:
    service = Service(machine, USER)
    machine.until("systemctl --user is-active default.target", USER)
    service.make("install-service")
    goes_on_after_a_stop(service)
    may_do_little(service, sandbox=True)
    gives_up_on_a_wrong_setting(service, f"/home/{USER}/.config/turbocache/environment")
    say("  without user namespaces")
    unit = "/etc/systemd/system/user@.service.d"
    machine.run(
        f"mkdir -p {unit}; printf '[Service]\\nRestrictNamespaces=~user\\n' > {unit}/none.conf; systemctl daemon-reload"
    )
    machine.run(f"systemctl restart user@$(id -u {USER})")
    assert "no namespace" in service.make("install-service")
    service.ready()
    may_do_little(service, sandbox=False)
    service.make("uninstall-service")
    assert machine.run("systemctl --user is-active turbocache", USER, check=False) == "inactive"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when all held, 2 where this machine can't try."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.machine", description=(__doc__ or "").splitlines()[0])
    parser.parse_args(argv)
    if lacks := missing() + (["systemd-nspawn"] if shutil.which("systemd-nspawn") is None else []):
        print(f"This machine lacks {', '.join(lacks)}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="turbocache-machine-"))
    try:
        root = furnished(folder / "root")
        with booted(root) as machine:
            for part in (the_systems, the_users):
                say(part.__name__.replace("_", " "))
                part(machine)
    finally:
        shutil.rmtree(folder)
    say("all held")
    return 0


def furnished(folder: Path) -> Root:
    """A root with the sources, a user, and the server's two copies, which the network is for."""
    say(f"Debian with {' '.join(PACKAGES)}")
    root = bootstrap(folder, "bookworm", PACKAGES)
    patterns = ignore_patterns((CONTEXT / ".dockerignore").read_text())

    def left_out(at: str, names: list[str]) -> set[str]:
        return {name for name in names if ignored(patterns, Path(at).relative_to(CONTEXT) / name)}

    shutil.copytree(CONTEXT, root.resolve("/src"), symlinks=True, ignore=left_out)
    home = f"/home/{USER}"
    root.run(["useradd", "--create-home", USER], {})
    lingering = "/var/lib/systemd/linger"
    script = f"mkdir -m 700 {home}/.ssh; : > {home}/.ssh/key; mkdir -p {lingering}; : > {lingering}/{USER}"
    root.run(["sh", "-c", script], {})
    say("the server's two copies")
    root.run(["make", "system-service-env", "ACCEL=cpu"], {"HOME": "/root"}, cwd="/src")
    root.run(["make", "service-env", "ACCEL=cpu"], {"HOME": home}, cwd="/src")
    root.run(["chown", "-R", f"{USER}:{USER}", home], {})
    return root


@contextmanager
def booted(root: Root) -> Iterator[Machine]:
    """The root as a machine of its own, shut down afterwards."""
    before = _groups()
    options = ["--register=no", "--keep-unit", "--private-network", "--console=pipe", "--quiet"]
    process = subprocess.Popen(
        ["systemd-nspawn", "--directory", str(root.path), *options, "--boot"], stdin=subprocess.DEVNULL
    )
    try:
        machine = Machine(_first_process(process))
        machine.until("systemctl is-system-running --wait")
        yield machine
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for group in sorted(_groups() - before, key=lambda path: -len(path.parts)):
            group.rmdir()


def _first_process(nspawn: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and nspawn.poll() is None:
        for child in Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return int(child)
        time.sleep(0.1)
    raise AssertionError("the system did not boot")


def _groups() -> set[Path]:
    """Control groups by the names that systemd-nspawn gives them; it leaves empty ones behind."""
    found = set()
    for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")):
        for name in ("payload", "supervisor"):
            found |= {Path(folder) for folder, _, _ in os.walk(top / name)}
    return found


if __name__ == "__main__":
    sys.exit(main())
