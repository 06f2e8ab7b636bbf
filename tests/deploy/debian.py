"""A bare Debian in a folder, for what a test would otherwise need a container engine or a second machine for.

Needs root, debootstrap and a Debian-like machine. Each command has mounts and processes of its own, so nothing of it is
left behind. Packages come from where this machine's own configuration says.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

# How this machine reaches its mirrors and registries: into every command that runs in the root.
_FORWARDED = re.compile(
    r"(PIP|UV)_((EXTRA_|DEFAULT_)?INDEX(_\w+)?|FIND_LINKS|CERT|CONSTRAINTS?|TRUSTED_HOST|\w*TIMEOUT|NATIVE_TLS|SYSTEM_CERTS)"
    r"|NPM_CONFIG_(REGISTRY|CAFILE)|(SSL_CERT|REQUESTS_CA|CURL_CA|NODE_EXTRA_CA)\w+|(https?|no|all)_proxy",
    re.IGNORECASE,
)
_SYSTEM_FILES = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/ssl/certs",
    "/etc/pip.conf",
    "/etc/xdg/pip",
    "/etc/uv",
    "/etc/npmrc",
)
# A user's own files, and the variable by which another user's tool finds them.
_USER_FILES = {
    "PIP_CONFIG_FILE": (".config/pip/pip.conf", ".pip/pip.conf"),
    "UV_CONFIG_FILE": (".config/uv/uv.toml",),
    "NPM_CONFIG_USERCONFIG": (".npmrc",),
}
_PATHS = re.compile(r"(?:file://)?(/[\w.+/-]+)")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def missing() -> list[str]:
    """What this machine lacks for a root, in words."""
    tools = [name for name in ("debootstrap", "unshare", "nsenter", "apt-get") if shutil.which(name) is None]
    return [*(["root's rights"] if os.geteuid() else []), *tools]


@dataclass(frozen=True)
class Root:
    """A Debian in `path`."""

    path: Path

    def inside(
        self, command: Sequence[str], environment: Mapping[str, str], user: str = "root", cwd: str = "/"
    ) -> list[str]:
        """The command line that runs `command` in here with this machine's configuration, over which `environment`
        wins. `command` is the first process that it sees, as in a container.
        """
        given = _forwarded() | {name: f"/run/machine/{name}" for name in _user_files()} | dict(environment)
        pairs = [f"{name}={value}" for name, value in given.items()]
        steps = ["set -eu", 'cd "$1"', "mount -t proc proc proc", "mount --rbind /dev dev", "mkdir -p run/machine"]
        # Files with tokens in them, perhaps: not to stay.
        steps.append("mount -t tmpfs tmpfs run/machine")
        steps += [f"install -m 644 {quote(str(path))} run/machine/{name}" for name, path in _user_files().items()]
        steps += [_bind(path) for path in _configuration()]
        steps += [f'exec chroot --userspec={user} . env -i "${{@:2}}"']
        return [
            "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
            "bash", "-c", "\n".join(steps), "bash", str(self.path), f"PATH={PATH}", *pairs,
            "sh", "-c", 'cd "$0" && exec "$@"', cwd, *command,
        ]  # fmt: skip

    def run(self, command: Sequence[str], environment: Mapping[str, str], user: str = "root", cwd: str = "/") -> None:
        """Runs `command` in here, its output on stderr. Raises CalledProcessError."""
        subprocess.run(self.inside(command, environment, user, cwd), check=True, stdout=sys.stderr)

    def apt(self, *packages: str) -> None:
        """Installs packages."""
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        self.run(["apt-get", "update", "-qq"], quiet)
        self.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], quiet)

    def resolve(self, path: str) -> Path:
        """An absolute path of the root, seen from outside."""
        return self.path / path.lstrip("/")


def bootstrap(folder: Path, codename: str, packages: Sequence[str]) -> Root:
    """The smallest Debian of this name with `packages`, in the new folder `folder`. Raises CalledProcessError."""
    sources = _sources(codename)
    mirror = [sources[0].split()[1]] if sources else []
    include = [f"--include={','.join(packages)}"] if packages else []
    command = ["debootstrap", "--variant=minbase", *include, codename, str(folder), *mirror]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    root = Root(folder)
    if sources:
        root.resolve("/etc/apt/sources.list").write_text("\n".join(sources) + "\n")
    root.resolve("/etc/apt/apt.conf.d/00machine").write_text("\n".join(_apt_settings()) + "\n")
    return root


def _output(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _sources(codename: str) -> list[str]:
    """This machine's own sources of that Debian, the archive itself first; none on another system."""
    targets = _output(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)", "Created-By: Packages"
    )
    rows = sorted(
        {tuple(line.split()) for line in targets if line.endswith(" Debian")}, key=lambda row: (len(row[1]), row)
    )
    return [
        f"deb {uri} {suite} {component}" for uri, suite, component, _ in rows if suite.partition("-")[0] == codename
    ]


def _apt_settings() -> list[str]:
    """Proxies and certificates of this machine's apt."""
    return [
        line for line in _output("apt-config", "dump", "Acquire") if re.search("::(Proxy|Ca[A-Z])", line, re.IGNORECASE)
    ]


def _forwarded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _FORWARDED.fullmatch(name)}


def _user_files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, places in _USER_FILES.items():
        paths = [Path(os.environ[name])] if os.environ.get(name) else [Path.home() / place for place in places]
        if path := next((path for path in paths if path.is_file()), None):
            found[name] = path
    return found


def _configuration() -> list[Path]:
    """Files and folders of configuration, and what is named in them or in the environment (certificates, wheels)."""
    files = [path for path in map(Path, _SYSTEM_FILES) if path.exists()]
    texts = list(_forwarded().values())
    for path in [*files[2:], *_user_files().values()]:
        inner = (
            [path] if path.is_file() else [child for child in path.rglob("*") if child.suffix in {".conf", ".toml", ""}]
        )
        texts += [child.read_text(errors="replace") for child in inner if child.is_file() and "ssl" not in child.parts]
    named = {Path(match) for text in texts for match in _PATHS.findall(text)}
    roomy = [path for path in sorted(named) if path.exists() and len(path.parts) > 2]
    return files + [path for path in roomy if not any(path.is_relative_to(file) for file in files)]


def _bind(path: Path) -> str:
    """Shell: `path` is seen, not to be written, in the root that is the working folder."""
    inside, folder = quote(str(path).lstrip("/")), quote(str(path.parent).lstrip("/") or ".")
    make = f"mkdir -p {inside}" if path.is_dir() else f"mkdir -p {folder}; [ -e {inside} ] || : > {inside}"
    return f"{make}; mount --bind {quote(str(path))} {inside}; mount -o remount,bind,ro {inside}"
