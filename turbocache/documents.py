"""Shared parts of measurement reports: machine, versions, atomic files, Markdown cells and plots."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx


class DocumentError(Exception):
    """A file of results can't be written or drawn. The message says which one and why."""


class PlotsUnavailable(Exception):
    """matplotlib is not installed. The message says how to install it."""


def machine() -> dict[str, Any]:
    """The machine's system, device and cores, without its host name."""
    device = mx.device_info()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": device.get("device_name", str(mx.default_device())),
        "architecture": device.get("architecture", ""),
    }


def versions() -> dict[str, str]:
    """Versions of the installed packages that compute."""
    installed = {"mlx": version("mlx"), "mlx-lm": version("mlx-lm"), "turbocache": version("turbocache")}
    try:
        return installed | {"mlx-vlm": version("mlx-vlm")}
    except ModuleNotFoundError:
        return installed


def make_folder(path: Path) -> None:
    """Make the folder of a file. Raises DocumentError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DocumentError(f"can't make the folder of {str(path)!r}: {error.strerror}") from error


def write_text(path: Path, content: str) -> None:
    """Replace a file in one step. Raises DocumentError."""
    make_folder(path)
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise DocumentError(f"can't write {str(path)!r}: {error.strerror}") from error


def as_json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def inline(text: str) -> str:
    """Text for a table's cell or a list's item: one line, with `|` escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def figure_class(extra: str) -> Any:
    """matplotlib's Figure. Raises PlotsUnavailable, which names the package's `extra` to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsUnavailable(f"plots need matplotlib: pip install 'turbocache[{extra}]'") from error
    return Figure


def save_figures(figures: dict[str, Any], folder: Path) -> list[str]:
    """Save each figure as PNG and SVG. None is skipped. Returns the PNG files' names. Raises DocumentError."""
    from matplotlib import rc_context

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "turbocache"}):
            for name, figure in figures.items():
                if figure is not None:
                    # Without a date and random ids, the same numbers give the same bytes.
                    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                    figure.savefig(folder / f"{name}.png", dpi=120)
    except OSError as error:
        raise DocumentError(f"can't write plots to {str(folder)!r}: {error.strerror}") from error
    return [f"{name}.png" for name, figure in figures.items() if figure is not None]
