"""What the servers run on: the BLAS put in front of both, the float32 model, and the names of things for the report.

`python -m tests.bench.machine SOURCE TARGET` writes the float32 model; it runs as a process of its own, so that the
benchmark itself never loads MLX.
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

PACKAGES = ("mlx", "mlx-cpu", "mlx-cuda-13", "mlx-metal", "mlx-lm", "uvicorn", "fastapi", "transformers")


@dataclass(frozen=True, slots=True)
class Blas:
    """A BLAS to preload (`path` None: MLX's own) and how the report names it."""

    path: str | None
    name: str


def find_blas(choice: str) -> Blas:
    """The BLAS for both servers. `choice` is "auto", "none" or the path of a library.

    "auto" takes libopenblas through the system's loader, else MKL from this environment. Raises ValueError where a
    named library does not load.
    """
    if choice == "none" or (choice == "auto" and sys.platform != "linux"):
        return Blas(None, "as MLX is built" + (" (Accelerate)" if sys.platform == "darwin" else ""))
    if choice != "auto":
        return _describe(choice)
    candidates = ["libopenblas.so.0", *(str(path) for path in sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*")))]
    for candidate in candidates:
        try:
            return _describe(candidate)
        except ValueError:
            continue
    return Blas(None, "as MLX is built (no fast BLAS found: expect very low figures)")


def _describe(library: str) -> Blas:
    try:
        handle = ctypes.CDLL(library)
    except OSError as error:
        raise ValueError(f"--blas {library}: {error}") from error
    name = Path(library).name
    if hasattr(handle, "openblas_get_config"):
        handle.openblas_get_config.restype = ctypes.c_char_p
        name = f"{handle.openblas_get_config().decode().strip()} ({name})"
    return Blas(library, name)


def child_environment(blas: Blas, extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a server process: this one's, offline, unbuffered, with the BLAS preloaded."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if blas.path is not None:
        environment["LD_PRELOAD"] = " ".join(filter(None, [blas.path, os.environ.get("LD_PRELOAD")]))
    return {**environment, **(extra or {})}


def cpu_name() -> str:
    """The processor as the system names it, with its core count."""
    name = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or name
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def model_config(model: Path) -> dict[str, Any]:
    """The text model's part of config.json."""
    config = json.loads((model / "config.json").read_text())
    return dict(config.get("text_config", config))


def fp16_bytes_per_token(config: dict[str, Any]) -> int:
    """Bytes of one token in a plain fp16 cache: keys and values, every layer and KV head, 2 bytes a number."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim * 2)


def make_float32(source: Path, target: Path, blas: Blas) -> str:
    """Write `source` as float32 to `target` in a child process; returns its line of proof. Raises RuntimeError."""
    command = [sys.executable, "-m", "tests.bench.machine", str(source), str(target)]
    result = subprocess.run(command, env=child_environment(blas), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"could not write {source} as float32:\n{result.stderr[-4000:]}")
    return result.stdout.splitlines()[-1]


def _convert(source: str, target: str) -> None:
    """Dequantise and cast with mlx-lm's own converter, then load the result and see that it computes in float32."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.convert import convert

    convert(source, target, dtype="float32", dequantize=True)
    path = Path(target, "config.json")
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})):
        part.update({key: "float32" for key in ("torch_dtype", "dtype") if key in part})
    path.write_text(json.dumps(config, indent=2) + "\n")
    # Our server takes what requests leave open from here, mlx_lm.server does not: both shall draw in the same way.
    suggested = Path(target, "generation_config.json")
    if suggested.exists():
        said = json.loads(suggested.read_text())
        suggested.write_text(json.dumps({key: value for key, value in said.items() if key.endswith("_token_id")}))

    model = load(target)[0]
    flat = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    parameters = {str(value.dtype) for _, value in flat}
    logits = str(model(mx.array([[1, 2, 3]])).dtype)
    if parameters != {"mlx.core.float32"} or logits != "mlx.core.float32":
        raise SystemExit(f"not float32: parameters {sorted(parameters)}, logits {logits}")
    print("float32: all parameters as loaded, and the logits computed from them")


if __name__ == "__main__":
    _convert(sys.argv[1], sys.argv[2])
