"""`make install-service` and its like in a home of their own, with recorders in place of systemctl and launchctl."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = Path(sys.executable).with_name("turbocache")

_RECORDER = '#!/bin/sh\necho "$(basename "$0") $*" >> "$CALLS"\n'
# What installing sees of launchd: a service ends a moment after it has been told to, and one that is there can't be
# put there again.
_LAUNCHCTL = (
    _RECORDER
    + """
loaded=$CALLS.loaded
case $1 in
bootstrap) if [ -e "$loaded" ]; then exit 5; fi; echo running > "$loaded" ;;
bootout) [ -e "$loaded" ] && echo ending > "$loaded" ;;
print)
    [ -e "$loaded" ] || exit 113
    if [ "$(cat "$loaded")" = ending ]; then rm "$loaded"; fi ;;
esac
"""
)


@dataclass(frozen=True)
class Home:
    """A user's home on a `system` (Linux or Darwin) that has no more of it than its name."""

    path: Path
    tools: Path
    system: str

    @property
    def settings(self) -> Path:
        return self.path / ".config/turbocache/environment"

    @property
    def state(self) -> Path:
        return self.path / ".local/state/turbocache"

    def make(self, target: str, *variables: str, command: Path = COMMAND) -> subprocess.CompletedProcess[str]:
        """What `make` says, on stderr too. The command to serve with is there, so no environment is built."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MAKE", "MFLAGS"))}
        path = f"{self.tools}:{environment['PATH']}"
        return subprocess.run(
            ["make", target, f"SERVICE_COMMAND={command}", f"PYTHON={sys.executable}", *variables],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
            env={**environment, "HOME": str(self.path), "CALLS": f"{self.tools}/calls", "PATH": path},
        )  # fmt: skip

    def calls(self) -> list[str]:
        """What the service manager has been told since the last time this was asked."""
        log = self.tools / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def answers(self, tool: str, status: int) -> None:
        """From now on `tool` ends with this status."""
        self._put(tool, f"{_RECORDER}exit {status}\n")

    def _put(self, tool: str, text: str) -> None:
        path = self.tools / tool
        path.write_text(text)
        path.chmod(0o755)


def home(folder: Path, system: str) -> Home:
    """A new home in `folder`."""
    made = Home(folder / "home", folder / "tools", system)
    made.path.mkdir()
    made.tools.mkdir()
    made._put("uname", f'#!/bin/sh\n[ "$1" != -s ] || {{ echo {system}; exit; }}\nexec /usr/bin/uname "$@"\n')
    for tool in ("systemctl", "systemd-run"):
        made.answers(tool, 0)
    made._put("launchctl", _LAUNCHCTL)
    return made
