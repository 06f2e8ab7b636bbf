"""What a step of the engine does, as plain data. Everything else a step does follows from this and from its state."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from server.protocol import Deliver, GenerationRequest, SessionChange


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """An accepted request."""

    request: GenerationRequest
    deliver: Deliver
    limit: int
    """Most answer tokens that it may have."""
    promised: int
    """Answer tokens that it has memory for when it starts."""
    remote: bool = False
    """Another process accepted it, so it is not yet counted in the queue and the budget of this one."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request whose client has left."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ChangeSession:
    """Change a session that is not running. See `server.protocol.Engine.change_session`."""

    change: SessionChange
    owner: str
    id: str
    new_id: str | None = None
    done: Future[dict[str, Any]] = field(default_factory=Future)


Command = QueuedRequest | Cancel | ChangeSession


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All input of one step."""

    now: float
    """The time of the step, from `time.time`."""
    commands: tuple[Command, ...] = ()
    extensions: dict[str, bool] = field(default_factory=dict)
    """Requests that have almost used the memory promised to them: whether they get more."""
    stop: bool = False
    """This step is the last."""
