"""The log's destination and format: text for people, or one JSON object per line for a collector."""

import logging
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

_OURS = ("server", "turbocache", "kernels")
_UVICORNS = ("uvicorn", "uvicorn.access")


def configure_logging(level: str, format: LogFormat) -> None:
    """Set the level of our loggers. They write to stderr unless they have handlers (uvicorn sets up only its own).

    The JSON format applies to uvicorn's lines too.
    """
    formatter = _formatter(format)
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        if not logger.hasHandlers():
            logger.addHandler(ours := logging.StreamHandler())
            ours.setFormatter(formatter)
    if format == "json":
        for name in _UVICORNS:
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(formatter)


def _formatter(format: LogFormat) -> logging.Formatter:
    if format == "text":
        return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    # `color_message` repeats uvicorn's message with escapes for a terminal.
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],
    )
