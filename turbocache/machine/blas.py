"""Give MLX's CPU backend a fast BLAS.

The mlx-cpu wheel is linked against the reference BLAS, which reaches 2 to 6 GFLOP/s where OpenBLAS reaches 100 to 200.
libmlx.so leaves `cblas_sgemm` undefined, and the loader looks in the process's global scope before it looks in the
libraries that libmlx.so names. So a library opened with RTLD_GLOBAL before mlx is imported is the one that MLX binds.
Python opens extension modules with RTLD_NOW: after the import the choice is final.
"""

import _ctypes
import ctypes
import glob
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

ENV = "TURBOCACHE_BLAS"

_SYMBOL = "cblas_sgemm"

_CORE_TYPE = "OPENBLAS_CORETYPE"
_OLD_CORES = (b"Prescott", b"Generic", b"Core2")
"""Cores whose kernels OpenBLAS uses for a processor that is newer than itself. They know no AVX."""

# The threaded builds under Fedora's names come first: there libopenblas.so.0 is the single-threaded one.
_SYSTEM_LIBRARIES = ("libopenblasp.so.0", "libopenblaso.so.0", "libopenblas.so.0", "libblis.so.4", "libblis.so")
# Conda keeps its OpenBLAS in the environment's lib folder, PyPI's mkl its single dynamic library.
_PREFIX_LIBRARIES = ("libopenblas.so.0", "libmkl_rt.so*")

_FAST_NAMES = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS", "nvpl": "NVPL", "armpl": "ArmPL", "atlas": "ATLAS"}


@dataclass(frozen=True)
class BlasReport:
    """What MLX's CPU backend multiplies matrices with."""

    name: str
    """"OpenBLAS", "MKL", "BLIS", "Accelerate", ..., "reference", or the file name of an unknown library."""
    path: str | None
    """The library's file with symbolic links resolved, if it is known."""
    fast: bool
    """Whether the library is known to be optimised."""
    advice: str
    """One sentence: how to get a fast BLAS, or why nothing needs doing."""


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("library", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class _ObjectInfo(ctypes.Structure):
    """The head of struct dl_phdr_info of dl_iterate_phdr(3)."""

    _fields_ = (("base", ctypes.c_size_t), ("library", ctypes.c_char_p))


_report: BlasReport | None = None


def prefer_fast() -> BlasReport:
    """Open the machine's best BLAS before mlx, once per process. Returns which one MLX uses.

    Order: a library that is already global (LD_PRELOAD), the system's OpenBLAS or BLIS, OpenBLAS or MKL in the Python
    environment, the system's MKL, and last the reference BLAS that comes with MLX. The environment variable
    TURBOCACHE_BLAS is `auto` (this order), `none` (open nothing), or the path of a library with the standard symbol
    names and 32-bit integers.

    Mutates the process: the chosen library's symbols become global.
    Raises ValueError when TURBOCACHE_BLAS has another value.
    """
    global _report
    if _report is None:
        choice = os.environ.get(ENV, "auto")
        if choice not in ("auto", "none"):
            _check_library(choice)
        if sys.platform == "darwin":
            _report = BlasReport("Accelerate", None, True, "Nothing to do: MLX uses Accelerate on macOS.")
        else:
            _report = _prefer_on_linux(choice)
    return _report


def _prefer_on_linux(choice: str) -> BlasReport:
    if "mlx.core" in sys.modules:
        return _too_late()
    if (preloaded := _global_blas()) is not None:
        return _preloaded(preloaded, choice)
    if choice == "none":
        return _reference(f"Unset {ENV}=none to have a fast BLAS looked for.")
    for library in _candidates() if choice == "auto" else (choice,):
        if (path := _open_globally(library)) is not None:
            return _in_use(path, f"Nothing to do: it was loaded ahead of mlx ({ENV}={choice}).")
    return _reference(_how_to_install())


def _candidates() -> list[str]:
    """Names that the loader searches for, and files of the Python environment, best first."""
    lib = Path(sys.prefix) / "lib"
    local = [path for pattern in _PREFIX_LIBRARIES for path in sorted(glob.glob(str(lib / pattern)), reverse=True)]
    return [*_SYSTEM_LIBRARIES, *local, "libmkl_rt.so"]


def _open_globally(library: str) -> str | None:
    """Open `library` for the whole process. Returns the file that now provides `cblas_sgemm`, or None if that fails."""
    try:
        # Open it privately first: a library without the symbol must not stay in the global scope.
        private = ctypes.CDLL(library)
        if not hasattr(private, _SYMBOL):
            return None
        if _mistakes_the_processor(private):
            _ctypes.dlclose(private._handle)
            os.environ[_CORE_TYPE] = "Haswell"  # read again when the library is opened
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    except OSError:
        return None
    return _global_blas()


def _mistakes_the_processor(library: ctypes.CDLL) -> bool:
    """Whether this is an OpenBLAS that does not know the processor and leaves its AVX2 unused: Debian 12's did prefill
    at a fifth of its speed on an Intel Xeon of 2024. A core type that the user has set is kept.
    """
    if _CORE_TYPE in os.environ or not hasattr(library, "openblas_get_corename"):
        return False
    library.openblas_get_corename.restype = ctypes.c_char_p
    if library.openblas_get_corename() not in _OLD_CORES:
        return False
    try:
        return {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def _check_library(path: str) -> None:
    expected = f"{ENV}={path!r}: expected 'auto', 'none', or the path of a BLAS library"
    if not Path(path).is_file():
        raise ValueError(f"{expected}; there is no such file")
    try:
        library = ctypes.CDLL(os.path.abspath(path))
    except OSError as error:
        raise ValueError(f"{expected}; the file cannot be loaded: {error}") from error
    if not hasattr(library, _SYMBOL):
        raise ValueError(f"{expected}; the file does not export {_SYMBOL}")


def _global_blas() -> str | None:
    """The file that an undefined `cblas_sgemm` binds to through the global scope, if any."""
    process = ctypes.CDLL(None)
    try:
        function = process[_SYMBOL]
    except AttributeError:
        return None
    info = _SymbolInfo()
    process.dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return os.path.realpath(os.fsdecode(info.library)) if info.library else None


def _loaded_libraries() -> list[str]:
    """Every shared library of the process, in the order of loading."""
    paths: list[str] = []

    def note(info: "ctypes._Pointer[_ObjectInfo]", _size: int, _data: int | None) -> int:
        paths.append(os.path.realpath(os.fsdecode(info.contents.library or b"")))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_ObjectInfo), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(callback(note), None)
    return paths


def _too_late() -> BlasReport:
    """mlx is imported already: it has bound what was global at that moment."""
    libraries = _loaded_libraries()
    mlx = next((i for i, path in enumerate(libraries) if Path(path).name == "libmlx.so"), len(libraries))
    if (path := _global_blas()) is not None and path in libraries[:mlx]:
        return _in_use(path, "Nothing to do: it was loaded before mlx.")
    return _reference("Import turbocache before mlx: mlx was imported first, which is too late for a fast BLAS.")


def _preloaded(path: str, choice: str) -> BlasReport:
    if choice == "auto" or os.path.realpath(choice) == path:
        return _in_use(path, "Nothing to do: it was loaded before turbocache.")
    return _in_use(path, f"Remove it from LD_PRELOAD: while it is there, {ENV}={choice} has no effect.")


def _in_use(path: str, advice: str) -> BlasReport:
    # Debian's libraries differ by folder: openblas-pthread/libblas.so.3, blas/libblas.so.3.
    file = Path(path)
    hint = f"{file.parent.name}/{file.name}".lower()
    if (name := next((name for key, name in _FAST_NAMES.items() if key in hint), None)) is not None:
        return BlasReport(name, path, True, advice)
    if file.name.startswith("libblas"):
        return BlasReport("reference", path, False, f"Remove {path} from LD_PRELOAD: it keeps a fast BLAS away.")
    return BlasReport(file.name, path, False, advice)


def _reference(advice: str) -> BlasReport:
    for entry in sys.path:
        if libraries := sorted(glob.glob(str(Path(entry) / "mlx_cpu.libs" / "libblas*.so*"))):
            return BlasReport("reference", os.path.realpath(libraries[0]), False, advice)
    return BlasReport("reference", None, False, advice)


def _how_to_install() -> str:
    also = " or `pip install mkl`" if platform.machine() == "x86_64" else ""
    return f"Matrix products on the CPU are slow: run `apt install libopenblas0-pthread`{also} and start again."
