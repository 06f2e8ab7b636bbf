"""What the server knows about one HTTP request, and its line in the log."""

import time
from dataclasses import dataclass, field

from server.http.open_requests import Endable
from server.protocol import Usage

_HEAD = ("request_id", "method", "path", "status")


@dataclass(slots=True)
class RequestContext:
    """One HTTP request. Nothing of this but `session_name` holds text of the client."""

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    status: int | None = None
    """HTTP status of the response, None until it begins."""
    error: str | None = None
    """Code of the error that ended the request."""
    session: str | None = None
    """Hash of the session's name, for the log."""
    session_name: str | None = None
    """Goes back to the client as X-Session-ID, never into the log."""
    owner: str = ""
    """Tells API keys apart."""
    dropped_tokens: int = 0
    """Tokens of the prompt that the answer does not see. The client sees X-Turbocache-Overflow and -Dropped-Tokens."""
    dropped_turns: int = 0
    """The user's turns that they belong to: X-Turbocache-Dropped-Turns."""
    stream: bool = False
    usage: Usage | None = None
    first_text_seconds: float | None = None
    finish: str | None = None
    """Finish reason, "cancelled" or "error"."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of each finished phase: queue, prefill, decode."""
    generations: list[Endable] = field(default_factory=list)
    """Those that the engine has accepted."""

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived

    def line(self, method: str, path: str) -> "RequestLogLine":
        """The log line. `path` is the route's template; times are in seconds."""
        line = RequestLogLine(
            {
                "message": "request",
                "request_id": self.request_id,
                "method": method,
                "path": path,
                "status": self.status,
                "total_s": round(self.elapsed(), 4),
            }
        )
        if self.finish is not None:
            line |= {"finish": self.finish, "stream": self.stream, "session": self.session}
        line |= {f"{name}_s": round(seconds, 4) for name, seconds in self.times.items()}
        if self.first_text_seconds is not None:
            line["first_s"] = round(self.first_text_seconds, 4)
        if (usage := self.usage) is not None:
            line |= {
                "cached": usage.cached_tokens,
                "prefilled": usage.prompt_tokens - usage.cached_tokens,
                "generated": usage.completion_tokens,
            }
        if self.error is not None:
            line["error"] = self.error
        return line


class RequestLogLine(dict[str, str | int | float | bool | None]):
    """A log message. As JSON it is these fields; as text it is method, path and status, then name=value."""

    def __str__(self) -> str:
        head = [str(self[name]) for name in _HEAD]
        rest = [f"{name}={_to_text(value)}" for name, value in self.items() if name not in (*_HEAD, "message")]
        return " ".join([*head, *rest])


def _to_text(value: str | int | float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
