"""Programs by the hash of their text, and the sanitizers that they can be built with."""

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tests.metal.compilers import Compiler, compiler, output
from tests.metal.errors import CompileError

Mode = Literal["plain", "asan", "tsan"]

_KEPT_SECONDS = 7 * 86400
SHIM = Path(__file__).parent / "shim"

# Bits shifted out, indices past an array's end and misaligned vectors have no defined result on a GPU either.
_UNDEFINED = "shift,bounds,alignment,integer-divide-by-zero,null,bool"
_MODES: dict[Mode, list[str]] = {
    "plain": ["-ftrivial-auto-var-init=pattern"],
    "asan": [f"-fsanitize=address,{_UNDEFINED}", "-fno-sanitize-recover=all", "-DHARNESS_ASAN"],
    "tsan": ["-fsanitize=thread", "-DHARNESS_TSAN"],
}
# The runtime's own accesses are nobody's business, so it is not instrumented.
_RUNTIME: dict[Mode, list[str]] = {"plain": [], "asan": ["-DHARNESS_ASAN"], "tsan": ["-DHARNESS_TSAN"]}
_LINK: dict[Mode, list[str]] = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined"],
    "tsan": ["-fsanitize=thread"],
}
_COMMON = ["-std=c++17", "-O1", "-gline-tables-only", "-gdwarf-4", "-fno-exceptions", "-fno-rtti"]
KERNEL_FLAGS = [
    "-Wno-unknown-attributes",
    "-Wno-unused-command-line-argument",
    "-Wno-duplicate-decl-specifier",
    "-fconvergent-functions",
    "-fno-math-errno",
    "-ffp-contract=on",
]
# In Metal a number such as 1.5 is a float.
_LANGUAGE = {"metal": ["-Xclang", "-cl-single-precision-constant"], "cuda": []}


@functools.cache
def why_not(mode: Mode) -> str:
    """Why this machine cannot run in `mode`; empty if it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the harness runs on Linux, x86-64 or aarch64"
    if compiler() is None:
        return "no clang >= 19: install clang-19, or ziglang into the environment"
    if mode != "plain" and not _clang().has_sanitizers:
        return f"{_clang().version} has no sanitizers: install clang-19 and libclang-rt-19-dev"
    probe = 'extern "C" void harness_entry(void* const*) {}\n'
    try:
        done = execute(build(probe, mode), b"", 60)
    except CompileError as error:
        return f"{mode} does not link (Debian: libclang-rt-19-dev): {str(error).splitlines()[-1]}"
    # The dispatch is missing, which the program says once it runs.
    return (
        "" if b"cut short" in done.stderr else f"{mode} does not start: {done.stderr.decode(errors='replace')[-300:]}"
    )


def has_mode(mode: Mode) -> bool:
    return not why_not(mode)


@functools.cache
def cache_folder() -> Path:
    """Where executables are kept between runs: $TURBOCACHE_HARNESS_CACHE, or a temporary folder of this user."""
    named = os.environ.get("TURBOCACHE_HARNESS_CACHE")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"turbocache-harness-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # gone, or a folder of a build in progress
            if time.time() - file.stat().st_mtime > _KEPT_SECONDS:
                file.unlink()
    return folder


@functools.cache
def environment() -> dict[str, str]:
    """How the sanitizers are to behave."""
    symbolizer = next((s for s in map(shutil.which, ("llvm-symbolizer-19", "llvm-symbolizer", "addr2line")) if s), None)
    symbols = f":external_symbolizer_path={symbolizer}:allow_addr2line=1" if symbolizer else ""
    return {
        **os.environ,
        "ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=0:exitcode=73{symbols}",
        "UBSAN_OPTIONS": f"print_stacktrace=1{symbols}",
        "TSAN_OPTIONS": f"exitcode=74:halt_on_error=1:report_thread_leaks=0:history_size=4{symbols}",
    }


@functools.lru_cache(maxsize=2048)
def build(text: str, mode: Mode, includes: tuple[str, ...] = (), language: str = "metal") -> Path:
    """The executable of a kernel's text, which has been made into C++, linked with the runtime. Raises CompileError."""
    flags = [*_COMMON, *KERNEL_FLAGS, *_LANGUAGE[language], *_MODES[mode], *_target()]
    flags += [flag for name in includes for flag in ("-include", name)]
    runtime = _runtime(mode)
    stem = _hash(text, *flags, str(runtime), _shim_hash())
    program = cache_folder() / stem
    if not program.exists():
        source = program.with_suffix(".cpp")
        source.write_text(text)
        made = _compile([*flags, f"-I{SHIM}", "-c", str(source)], program.with_suffix(".o"))
        # clang wants libm; a library finds it in its host.
        _run([*_clang().link, *_LINK[mode], str(made), str(runtime), *([] if _clang().host else ["-lm"])], program)
        made.unlink()
    return program


def execute(program: Path, dispatch: bytes, timeout: float) -> subprocess.CompletedProcess[bytes]:
    """Runs a program on a dispatch. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        [*_clang().host, str(program)],
        input=dispatch,
        capture_output=True,
        timeout=timeout,
        env=environment(),
        cwd=os.sep,
    )


def syntax_errors(text: str, flags: Sequence[str]) -> str:
    """What the compiler has against a text, without making anything of it; empty if nothing."""
    stem = _hash("syntax", text, *flags, _shim_hash())
    verdict = cache_folder() / f"{stem}.txt"
    if not verdict.exists():
        source = cache_folder() / f"{stem}.cpp"
        source.write_text(text)
        command = [*_clang().compile, "-std=c++17", "-fsyntax-only", f"-I{SHIM}", *KERNEL_FLAGS, *_LANGUAGE["metal"]]
        done = subprocess.run([*command, *flags, str(source)], capture_output=True, text=True, timeout=120)
        _write(verdict, done.stderr if done.returncode else "")
    return verdict.read_text()


def preprocess(text: str, flags: Sequence[str]) -> str:
    """The text with its own macros expanded and line marks left in."""
    command = [*_clang().compile, "-std=c++17", "-E", "-nostdinc", "-nostdinc++", f"-I{SHIM / 'empty'}", *flags]
    done = subprocess.run([*command, "-xc++", "-"], input=text, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


def line_of(program: Path, offset: str) -> str:
    """Where in the text an address of the program is, callers of inlined functions after their callees."""
    tool = shutil.which("addr2line")
    if tool is None:
        return ""
    lines = output([tool, "-s", "-i", "-e", str(program), offset]).split()
    return " < ".join(line.rpartition("/")[2] for line in lines if not line.startswith("?"))


def _runtime(mode: Mode) -> Path:
    flags = [*_COMMON, "-O2", *_RUNTIME[mode]]
    made = cache_folder() / f"runtime-{_hash(*flags, _shim_hash())}.o"
    if not made.exists():
        _compile([*flags, "-c", str(SHIM / "runtime.cpp")], made)
    return made


def _clang() -> Compiler:
    found = compiler()
    if found is None:
        raise CompileError("no clang >= 19")
    return found


def _target() -> list[str]:
    """Conversions of half need their instruction, or functions that only newer libraries have."""
    if platform.machine() != "x86_64":
        return []
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [f"-m{flag}" for flag in ("f16c", "fma", "avx2") if flag in cpu]


def _compile(arguments: Sequence[str], made: Path) -> Path:
    return _run([*_clang().compile, *arguments], made)


def _run(command: Sequence[str], made: Path) -> Path:
    # Under a name of its own first: another process may be at the same.
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        fresh = Path(folder) / made.name
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise CompileError(done.stderr)
        return fresh.replace(made)


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


@functools.cache
def _shim_hash() -> str:
    files = sorted(f for f in SHIM.rglob("*") if f.is_file())
    return _hash(*(f"{f.relative_to(SHIM)}\0{f.read_text()}" for f in files))


def _hash(*parts: str) -> str:
    version = found.version if (found := compiler()) else ""
    return hashlib.sha256("\0".join((version, *parts)).encode()).hexdigest()[:24]
