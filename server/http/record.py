"""What is known of one HTTP request, and the one line that the log has of it."""

import hashlib
import time
from dataclasses import dataclass, field

from server.http.open_requests import Endable
from server.protocol import Usage

_HEAD = ("request_id", "method", "path", "status")


@dataclass(slots=True)
class RequestRecord:
    """Who asks, and what the log says of a request: no text of a prompt or an answer, and of a session's name only a
    hash. `session_name` goes back to the client, as X-Session-ID. `owner` tells API keys apart. `rotated`: the prompt
    is longer than a session holds, which the client is told as X-Turbocache-Overflow. `turns` are those that the engine
    has accepted. `times` are seconds of what is over: queue (from its acceptance to its start), prefill, decode.
    """

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    status: int | None = None
    error: str | None = None
    session: str | None = None
    session_name: str | None = None
    owner: str = ""
    rotated: bool = False
    stream: bool = False
    usage: Usage | None = None
    first_text_seconds: float | None = None
    finish: str | None = None
    times: dict[str, float] = field(default_factory=dict)
    turns: list[Endable] = field(default_factory=list)

    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived

    def line(self, method: str, path: str) -> "RequestLine":
        """What is known by now. `path` is the route's template; times are in seconds."""
        found = RequestLine(
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
            found |= {"finish": self.finish, "stream": self.stream, "session": self.session}
        found |= {f"{name}_s": round(seconds, 4) for name, seconds in self.times.items()}
        if self.first_text_seconds is not None:
            found["first_s"] = round(self.first_text_seconds, 4)
        if (usage := self.usage) is not None:
            found |= {
                "cached": usage.cached_tokens,
                "prefilled": usage.prompt_tokens - usage.cached_tokens,
                "generated": usage.completion_tokens,
            }
        if self.error is not None:
            found["error"] = self.error
        return found


class RequestLine(dict[str, str | int | float | bool | None]):
    """A log message that JSON shows field by field, and text as what was asked and answered, then name=value."""

    def __str__(self) -> str:
        head = [str(self[name]) for name in _HEAD]
        rest = [f"{name}={_shown(value)}" for name, value in self.items() if name not in (*_HEAD, "message")]
        return " ".join([*head, *rest])


def _shown(value: str | int | float | bool | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def session_hash(name: str | None) -> str | None:
    """Eight hex digits to tell sessions apart in a log without telling their names."""
    return None if name is None else hashlib.blake2s(name.encode(), digest_size=4).hexdigest()
