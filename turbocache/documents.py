"""What reports of measurements have in common: what computed, files replaced in one step, cells of Markdown tables."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx


class DocumentError(Exception):
    """A file of results can't be written or drawn; the message says which and why."""


class PlotsUnavailable(Exception):
    """matplotlib is not installed; the message says how to get it."""


def machine() -> dict[str, Any]:
    """What computed, without its name."""
    device = mx.device_info()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "device": device.get("device_name", str(mx.default_device())),
        "architecture": device.get("architecture", ""),
    }


def versions() -> dict[str, str]:
    """Versions of what computes, those that are installed."""
    found = {"mlx": version("mlx"), "mlx-lm": version("mlx-lm"), "turbocache": version("turbocache")}
    try:
        return found | {"mlx-vlm": version("mlx-vlm")}
    except ModuleNotFoundError:
        return found


def make_folder(path: Path) -> None:
    """The folder of a file to come. Raises DocumentError where it can't be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DocumentError(f"can't make the folder of {str(path)!r}: {error.strerror}") from error


def write_text(path: Path, content: str) -> None:
    """Replace a file in one step. Raises DocumentError where that can't be."""
    make_folder(path)
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise DocumentError(f"can't write {str(path)!r}: {error.strerror}") from error


def as_json(told: dict[str, Any]) -> str:
    return json.dumps(told, indent=1, allow_nan=False) + "\n"


def inline(text: str) -> str:
    """Text for a cell or an item: one line, without a table's own sign."""
    return " ".join(text.split()).replace("|", "\\|")


def figure_class(extra: str) -> Any:
    """matplotlib's Figure. Raises PlotsUnavailable, which names the package's `extra` that brings it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsUnavailable(f"plots need matplotlib: pip install 'turbocache[{extra}]'") from error
    return Figure


def save_figures(figures: dict[str, Any], folder: Path) -> list[str]:
    """Each figure as PNG and SVG, by name; None is left out. Returns the PNG files' names. Raises DocumentError."""
    from matplotlib import rc_context

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "turbocache"}):
            for name, figure in figures.items():
                if figure is not None:
                    # Without a date and chance the same numbers give the same bytes.
                    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                    figure.savefig(folder / f"{name}.png", dpi=120)
    except OSError as error:
        raise DocumentError(f"can't write plots to {str(folder)!r}: {error.strerror}") from error
    return [f"{name}.png" for name, figure in figures.items() if figure is not None]
