"""Processes that tests start: each in a process group of its own, which is gone when the test is over."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_MOST_LOAD = 6.0
_STOP_SECONDS = 30.0
_KILL_SECONDS = 10.0
_POLL_SECONDS = 0.05


def load() -> float:
    """How many times longer than on an idle machine a process may take now: between 1 and 6."""
    try:
        waiting = os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        waiting = 1.0
    return min(max(1.0, waiting), _MOST_LOAD)


def patient(seconds: float) -> float:
    """A time limit of `seconds` on an idle machine, longer on a loaded one."""
    return seconds * load()


class Deadline:
    """The end of a wait of `seconds` on an idle machine. It moves back when the load grows during the wait."""

    def __init__(self, seconds: float) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._load = load()

    def passed(self) -> bool:
        self._load = max(self._load, load())
        return time.monotonic() - self._began > self._seconds * self._load


def wait_until(
    true: Callable[[], object], seconds: float, why: str | Callable[[], str] = "a wait took too long"
) -> None:
    """Poll until `true()` holds. Raises AssertionError with `why` after `seconds` on an idle machine."""
    deadline = Deadline(seconds)
    while not true():
        if deadline.passed():
            raise AssertionError(why if isinstance(why, str) else why())
        time.sleep(_POLL_SECONDS)


def wait_for_end(process: "subprocess.Popen[Any]", seconds: float) -> int:
    """The exit status. Raises TimeoutExpired after `seconds` on an idle machine."""
    deadline = Deadline(seconds)
    while process.poll() is None:
        if deadline.passed():
            raise subprocess.TimeoutExpired(process.args, seconds)
        time.sleep(_POLL_SECONDS)
    return process.returncode


@contextmanager
def child(
    command: Sequence[str | Path],
    log: Path | None = None,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stop: bool = False,
    **options: Any,
) -> Iterator["subprocess.Popen[Any]"]:
    """A process in a group of its own. Its output is appended to `log`, if there is one.

    Afterwards nothing of the group is left: it is killed and waited for, whatever the block raised. With `stop` the
    process first gets SIGTERM and time to end; one that needs more raises TimeoutExpired, after it was killed.
    """
    sink: IO[bytes] | None = log.open("ab") if log else None
    try:
        if sink is not None:
            options |= {"stdout": sink, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **options)
    finally:
        if sink is not None:
            sink.close()
    try:
        yield process
    finally:
        try:
            if stop and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                wait_for_end(process, _STOP_SECONDS)
        finally:
            kill_group(process)


def kill_group(process: "subprocess.Popen[Any]") -> None:
    """Kill what is left of a process and of all that it started in its group, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(BrokenPipeError):  # something is still in the buffer, and nobody is left to read it
                pipe.close()
    # What the process has started is not this process's child: it cannot be waited for, only be looked for.
    with suppress(AssertionError):
        wait_until(lambda: not alive(process.pid), _KILL_SECONDS)


def alive(group: int) -> bool:
    """Whether a process of the group still exists."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so of a group of zombies
        return True
    return True
