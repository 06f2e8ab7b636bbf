"""The server's settings: `TURBOCACHE_*` environment variables and a `.env` file in the working directory.

The environment wins over the file. An empty value counts as unset. Each unknown name or bad value stops the start with
a sentence that names the key, the value and what was expected. docs/settings.md describes all settings.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.errors import StartupError
from turbocache.backends import CHOICES
from turbocache.cache import PAGE
from turbocache.presets import DEFAULT_PRESET

PREFIX = "TURBOCACHE_"
# Read when the package turbocache is imported, before any .env file.
_EARLY = "TURBOCACHE_BLAS"
_MIN_BUDGET_BYTES = 1 << 20
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}
# Browser extensions and desktop applications have schemes of their own.
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")
_DEFAULT_PORTS = {("http", "80"), ("https", "443")}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


class SettingsError(StartupError):
    """Settings are unknown or have bad values. The text has one line for each."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Memory for the cache: either a number of bytes or a fraction of the device's memory."""

    bytes: int | None = None
    fraction: float | None = None
    """Above 0 and at most 1."""

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.fraction is None):
            raise ValueError("a memory budget is either bytes or a fraction")
        if self.bytes is not None and self.bytes < _MIN_BUDGET_BYTES:
            raise ValueError("a memory budget is at least 1 MiB")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ValueError("a fraction of memory is above 0 and at most 1")

    def resolve(self, device_bytes: int) -> int:
        """The budget in bytes on a device with `device_bytes` of memory."""
        if self.bytes is not None:
            return self.bytes
        assert self.fraction is not None  # __post_init__ checks it
        return int(self.fraction * device_bytes)


def parse_bytes(text: str) -> int:
    """'4096', '512MB' (powers of 1000) or '4GiB' (powers of 1024) in bytes. Raises ValueError for anything else.

    pydantic.ByteSize would also accept '1.5' and bits.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (unit := match[2].upper()) not in _UNITS or ("." in match[1] and not unit):
        raise ValueError(f"{text!r} is not a number of bytes")
    if "." in match[1]:
        return int(float(match[1]) * _UNITS[unit])
    return int(match[1]) * _UNITS[unit]


def parse_memory(text: str) -> MemoryBudget:
    """A number with a decimal point is a fraction ('0.5', '1.0'). Everything else is bytes. Raises ValueError."""
    stripped = text.strip()
    if re.fullmatch(r"[0-9]*\.[0-9]+", stripped):
        return MemoryBudget(fraction=float(stripped))
    return MemoryBudget(bytes=parse_bytes(stripped))


def _from_text(parse: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _split(text: str) -> tuple[str, ...]:
    return tuple(item for part in text.split(",") if (item := part.strip()))


def _split_origins(text: str) -> tuple[str, ...]:
    """Origins as browsers send them. Raises ValueError for a text that no browser sends."""
    origins = _split(text)
    for origin in origins:
        match = _ORIGIN.fullmatch(origin)
        if origins != ("*",) and (match is None or (match["scheme"], match["port"]) in _DEFAULT_PORTS):
            raise ValueError(f"{origin!r} is no origin")
    return origins


def _own(**options: Any) -> Any:
    """A field that each process of a group keeps. All other fields have rank 0's value in the whole group."""
    return Field(json_schema_extra={"scope": "process"}, **options)


class Settings(BaseSettings):
    """Validated settings. Each field's description completes the sentence "expected ..." and names the unit.

    Use `load_settings` to start a server: it refuses unknown names and words the errors for a person.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, protected_namespaces=()
    )

    model: str | None = Field(default=None, description="a local path or a Hugging Face id (unset: the default model)")
    backend: str = Field(default="auto", pattern=f"^({'|'.join(CHOICES)})$", description=f"one of {', '.join(CHOICES)}")
    kv_preset: str = Field(default=DEFAULT_PRESET, min_length=1, description="a cache preset such as off, k6v4 or k4v4")
    kv_condition: Literal["auto", "off"] = Field(
        default="auto", description="auto (keys are centred where their mean dominates) or off"
    )
    kv_protect: int = Field(
        default=0, ge=0, description="a number of layers at each end of the model to store at 8 bits, 0 or more"
    )
    max_size: int | None = Field(
        default=None,
        ge=1,
        description="a positive number of tokens a session holds before it rotates, at least keep + window + 64",
    )
    overflow: Literal["rotate", "error"] = Field(
        default="rotate",
        description="rotate (a session at TURBOCACHE_MAX_SIZE continues without its oldest tokens) or error",
    )
    keep: int = Field(default=64, ge=0, description="a number of tokens, 0 or more")
    window: int = Field(default=128, gt=0, multiple_of=PAGE, description="a positive multiple of 64 (tokens)")
    pin_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="the largest part of TURBOCACHE_MAX_SIZE that the system message and the tools may keep, 0 to 1",
    )
    kv_memory: Annotated[MemoryBudget | None, NoDecode, _from_text(parse_memory)] = _own(
        default=None,
        description="bytes (at least 1 MiB), a size such as 512MB or 4GiB, or a fraction of memory such as 0.5 or 1.0",
    )
    max_batch: int = Field(default=8, ge=1, description="a number of requests, 1 or more")
    queue_limit: int = _own(default=64, ge=1, description="a number of waiting requests, 1 or more")
    api_keys: Annotated[tuple[str, ...], NoDecode, _from_text(_split)] = _own(
        default=(), repr=False, description="API keys separated by commas"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, _from_text(_split_origins)] = _own(
        default=(),
        description="* or origins separated by commas, each as browsers send it, such as http://localhost:3000 "
        "(lower case, no path, no slash at the end, no default port)",
    )
    deadline: float | None = _own(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="a number of seconds above 0 after which a request that has not ended is ended (unset: never)",
    )
    stop_grace: float = _own(
        default=5.0,
        ge=0,
        allow_inf_nan=False,
        description="a number of seconds that open requests have to end when the server is stopped, 0 or more",
    )
    session_dir: Path | None = _own(
        default=None, description="a folder for sessions on disk (unset: sessions live in memory only)"
    )
    session_disk: Annotated[int, _from_text(parse_bytes)] = _own(
        default=16 << 30, ge=1 << 20, description="a number of bytes, at least 1 MiB, or a size such as 16GiB"
    )
    session_save_after: float = Field(
        default=60.0,
        ge=0,
        allow_inf_nan=False,
        description="a number of seconds at rest after which a session is written to TURBOCACHE_SESSION_DIR, 0 or more",
    )
    session_ttl: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="a number of seconds above 0 after which an unused session leaves memory (unset: never)",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], _from_text(str.lower)] = _own(
        default="info", description="one of debug, info, warning, error, critical"
    )
    log_format: Literal["text", "json"] = _own(
        default="text", description="text (lines for a person) or json (one object per line)"
    )
    metrics_exemplars: bool = _own(
        default=False, description="true or false: whether histograms name requests for scrapers of OpenMetrics"
    )
    blas: str | None = _own(default=None, description="a BLAS library (read before MLX is loaded)")
    rank_timeout: float = _own(
        default=5.0,
        gt=0,
        allow_inf_nan=False,
        description="a number of seconds above 0 for which a rank of a group may not answer the others",
    )
    rank_address: str | None = _own(
        default=None,
        min_length=1,
        description="an IP address of this machine under which the other ranks of a group reach it (unset: the "
        "launcher's)",
    )
    prefill_chunk: int = Field(default=512, ge=1, description="a number of tokens per prefill step, 1 or more")
    keepalive_seconds: float = _own(default=10.0, gt=0, allow_inf_nan=False, description="a number of seconds above 0")
    stall_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False, description="a number of seconds above 0")
    body_limit: Annotated[int, _from_text(parse_bytes)] = _own(
        default=16 << 20, ge=1024, description="a number of bytes, at least 1024, or a size such as 16MiB"
    )


KNOWN_NAMES = frozenset(f"{PREFIX}{name.upper()}" for name in Settings.model_fields)


def load_settings(env_file: Path | None = Path(".env")) -> Settings:
    """Settings from the environment and `env_file`. Without a file, from the environment only.

    Raises SettingsError with every unknown key, or else with every bad value.
    """
    from_file = dotenv_values(env_file) if env_file is not None else {}
    unknown = [
        *_unknown_names(os.environ, "the environment"),
        *_unknown_names(from_file, str(env_file)),
    ]
    if unknown:
        raise SettingsError("\n".join(unknown))
    if from_file.get(_EARLY) and not os.environ.get(_EARLY):
        raise SettingsError(f"{_EARLY} in {env_file} comes too late: set it in the environment of the process.")
    try:
        build: Callable[..., Settings] = Settings  # type checkers don't know `_env_file`
        settings = build(_env_file=env_file)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(error))) from error
    _check_together(settings)
    return settings


def shared_settings(settings: Settings) -> dict[str, Any]:
    """The values that all processes of a group must share."""
    fields = type(settings).model_fields.items()
    return {name: getattr(settings, name) for name, field in fields if field.json_schema_extra is None}


def _unknown_names(names: Mapping[str, str | None], where: str) -> list[str]:
    found = sorted(name for name in names if name.upper().startswith(PREFIX) and name.upper() not in KNOWN_NAMES)
    return [f"{name} in {where} is not a setting of this version.{_closest(name.upper())}" for name in found]


def _closest(name: str) -> str:
    """A hint at the nearest known name. Names are compared without their common prefix."""
    tails = [known.removeprefix(PREFIX) for known in KNOWN_NAMES]
    close = difflib.get_close_matches(name.removeprefix(PREFIX), tails, n=1, cutoff=0.5)
    return f" Did you mean {PREFIX}{close[0]}?" if close else f" Known names: {', '.join(sorted(KNOWN_NAMES))}."


def _explain(error: ValidationError) -> list[str]:
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_context=False):
        name = str(detail["loc"][0])
        field = Settings.model_fields[name]
        shown = f"={detail['input']!r}" if field.repr else ""
        lines.setdefault(name, f"{PREFIX}{name.upper()}{shown} is not valid: expected {field.description}.")
    return list(lines.values())


def _check_together(settings: Settings) -> None:
    """A session holds at least its sink, its window, and one page that fills from the window."""
    least = settings.keep + settings.window + PAGE
    if settings.max_size is not None and settings.max_size < least:
        raise SettingsError(
            f"{PREFIX}MAX_SIZE={settings.max_size} is not valid: expected at least {least} tokens "
            f"({PREFIX}KEEP={settings.keep} + {PREFIX}WINDOW={settings.window} + one page of {PAGE})."
        )
