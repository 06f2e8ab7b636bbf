"""Which clang there is, and how it makes and starts programs."""

import functools
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# ziglang's clang has no C library to link with, so its programs are libraries and Python is their process.
_HOST = """
import ctypes, sys
ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)
sys.exit(ctypes.CDLL(sys.argv[1]).harness_main())
"""


@dataclass(frozen=True)
class Compiler:
    """A clang of version 19 or later."""

    version: str
    compile: tuple[str, ...]
    link: tuple[str, ...]
    host: tuple[str, ...] = ()
    has_sanitizers: bool = True


@functools.cache
def compiler() -> Compiler | None:
    """clang++-19 or a later one on PATH, else the clang inside PyPI's ziglang; None if there is neither."""
    for name in ("clang++-19", "clang++-20", "clang++-21", "clang++-22", "clang++"):
        found = shutil.which(name)
        version = output([found, "--version"]).partition("\n")[0] if found else ""
        number = version.partition("version ")[2].partition(".")[0]
        if found and number.isdecimal() and int(number) >= 19 and "Apple" not in version:
            return Compiler(version, (found,), (found, "-pthread"))
    return _zig()


def _zig() -> Compiler | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    zig = str(Path(spec.origin).parent / "zig")
    headers = Path(spec.origin).parent / "lib"
    machine = {"x86_64": "x86", "aarch64": "aarch64"}.get(platform.machine(), "")
    libc = headers / "libc" / "include"
    folders = (
        headers / "include",
        libc / f"{platform.machine()}-linux-gnu",
        libc / f"{machine}-linux-gnu",
        libc / "generic-glibc",
        libc / f"{machine}-linux-any",
        libc / "any-linux-any",
    )
    version = output([zig, "clang", "--version"]).partition("\n")[0]
    if not version:
        return None
    return Compiler(
        version=f"ziglang, {version}",
        compile=(
            *(
                zig,
                "clang",
                "-xc++",
                f"--target={platform.machine()}-linux-gnu",
                "-fPIC",
                "-nostdinc",
                "-D__GLIBC_MINOR__=17",
            ),
            *(flag for folder in folders for flag in ("-isystem", str(folder))),
        ),
        link=(zig, "ld.lld", "-shared"),
        host=(sys.executable, "-I", "-S", "-c", _HOST),
        has_sanitizers=False,
    )


def output(command: Sequence[str]) -> str:
    """What a command prints; empty if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else ""
