"""Every case runs in a process of its own, because a process chooses its BLAS once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate and nothing to choose")

REPORT = """
import dataclasses, json, time
import mlx.core as mx

def gflops(n=512):
    a = mx.random.normal((n, n), stream=mx.cpu)
    mx.eval(a)
    def once():
        start = time.perf_counter()
        mx.eval(mx.matmul(a, a, stream=mx.cpu))
        return time.perf_counter() - start
    return 2 * n**3 / min(once() for _ in range(5)) / 1e9

mapped = sorted({line.split()[-1] for line in open("/proc/self/maps") if "/" in line})
print(json.dumps({**dataclasses.asdict(blas.prefer_fast()), "mapped": mapped, "gflops": gflops()}))
"""
TURBOCACHE_FIRST = "from turbocache.machine import blas" + REPORT
MLX_FIRST = "import mlx.core\nfrom turbocache.machine import blas" + REPORT


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "TURBOCACHE_BLAS")}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=60, check=False
    )


def result(code: str, **env: str) -> dict[str, Any]:
    process = run(code, **env)
    assert process.returncode == 0, process.stderr
    answer: dict[str, Any] = json.loads(process.stdout)
    return answer


@pytest.fixture(scope="module")
def fast() -> dict[str, Any]:
    answer = result(TURBOCACHE_FIRST)
    if not answer["fast"]:
        pytest.skip(answer["advice"])
    return answer


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return result(TURBOCACHE_FIRST, TURBOCACHE_BLAS="none")


def test_auto_reports_the_library_that_is_mapped(fast: dict[str, Any]) -> None:
    assert fast["name"] != "reference"
    assert fast["path"] in fast["mapped"]
    assert fast["advice"].startswith("Nothing to do")


def test_mlx_multiplies_with_the_reported_library(fast: dict[str, Any], reference: dict[str, Any]) -> None:
    if reference["path"] is None:
        pytest.skip("this build of MLX does not bring the reference BLAS")
    # Measured: 16 to 80 times. A busy machine blurs that, but not down to 3.
    assert fast["gflops"] > 3 * reference["gflops"]


def test_none_leaves_the_reference(reference: dict[str, Any]) -> None:
    assert (reference["name"], reference["fast"]) == ("reference", False)
    assert "TURBOCACHE_BLAS" in reference["advice"]
    assert reference["path"] is None or reference["path"] in reference["mapped"]


def test_none_maps_no_other_library(fast: dict[str, Any], reference: dict[str, Any]) -> None:
    assert fast["path"] not in reference["mapped"]


def test_a_path_is_taken(fast: dict[str, Any]) -> None:
    answer = result(TURBOCACHE_FIRST, TURBOCACHE_BLAS=fast["path"])
    assert (answer["name"], answer["path"], answer["fast"]) == (fast["name"], fast["path"], True)
    assert answer["path"] in answer["mapped"]


def test_ld_preload_goes_first(fast: dict[str, Any]) -> None:
    answer = result(TURBOCACHE_FIRST, LD_PRELOAD=fast["path"])
    assert (answer["path"], answer["fast"]) == (fast["path"], True)
    assert "before turbocache" in answer["advice"]


def test_none_admits_that_ld_preload_wins(fast: dict[str, Any]) -> None:
    answer = result(TURBOCACHE_FIRST, LD_PRELOAD=fast["path"], TURBOCACHE_BLAS="none")
    assert (answer["path"], answer["fast"]) == (fast["path"], True)
    assert "LD_PRELOAD" in answer["advice"]


def test_mlx_imported_first_is_reported() -> None:
    answer = result(MLX_FIRST)
    assert (answer["name"], answer["fast"]) == ("reference", False)
    assert "too late" in answer["advice"]


def test_mlx_imported_first_keeps_what_was_loaded_before_it(fast: dict[str, Any]) -> None:
    answer = result(f"import ctypes; ctypes.CDLL({fast['path']!r}, ctypes.RTLD_GLOBAL)\n" + MLX_FIRST)
    assert (answer["path"], answer["fast"]) == (fast["path"], True)


def test_a_library_loaded_after_mlx_is_not_claimed(fast: dict[str, Any], reference: dict[str, Any]) -> None:
    late = f"import mlx.core, ctypes; ctypes.CDLL({fast['path']!r}, ctypes.RTLD_GLOBAL)\n"
    answer = result(late + TURBOCACHE_FIRST)
    assert (answer["name"], answer["path"]) == ("reference", reference["path"])


def test_importing_turbocache_imports_no_mlx() -> None:
    process = run("import sys, turbocache; print([name for name in sys.modules if name.split('.')[0] == 'mlx'])")
    assert (process.returncode, process.stdout.strip()) == (0, "[]"), process.stderr


@pytest.mark.parametrize("kind", ["missing", "not a library", "no BLAS"])
def test_a_bad_value_names_key_and_value(kind: str, tmp_path: Path) -> None:
    if kind == "not a library":
        (tmp_path / "x").write_text("text")
    path = {"missing": "/nowhere/libblas.so", "not a library": str(tmp_path / "x"), "no BLAS": _extension()}[kind]
    process = run("import turbocache", TURBOCACHE_BLAS=path)
    assert process.returncode != 0
    assert f"ValueError: TURBOCACHE_BLAS={path!r}: expected 'auto', 'none', or the path" in process.stderr


def _extension() -> str:
    import pydantic_core._pydantic_core as extension

    assert extension.__file__ is not None
    return extension.__file__


CORE = """
import ctypes
from turbocache.machine import blas
library = ctypes.CDLL(blas.prefer_fast().path)
library.openblas_get_corename.restype = ctypes.c_char_p
print(library.openblas_get_corename().decode())
"""


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text().split(), reason="the processor has no AVX2")
@pytest.mark.parametrize("chosen", [None, "Prescott"])
def test_openblas_uses_avx2_unless_told_otherwise(fast: dict[str, Any], chosen: str | None) -> None:
    """Also on a processor that is newer than the library, where OpenBLAS by itself takes Prescott's kernels."""
    if fast["name"] != "OpenBLAS":
        pytest.skip(f"the fast BLAS here is {fast['name']}")
    process = run(CORE, **({} if chosen is None else {"OPENBLAS_CORETYPE": chosen}))
    assert process.returncode == 0, process.stderr
    assert (process.stdout.strip() == "Prescott") == (chosen is not None)
