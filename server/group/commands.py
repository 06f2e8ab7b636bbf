"""What a step of the engine decides on: the commands that came in, the time, how far answers may grow.

Everything else follows from these, so ranks that are given the same decisions do the same. `encode` and `decode` take
them from rank 0 to the others.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from server.engine.queue import QueuedRequest
from server.protocol import Event, GenerationRequest, SessionChange


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop working for a client that is gone."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Change:
    """A change to a session at rest; see `server.protocol.Engine.change_session`."""

    change: SessionChange
    owner: str
    id: str
    new_id: str | None = None
    done: Future[dict[str, Any]] = field(default_factory=Future)


Command = QueuedRequest | Cancel | Change


@dataclass(frozen=True, slots=True)
class Decisions:
    """Of one step. `now` is its time, as `time.time` gives it; `commands` in their order; `growth` says of requests
    whose promised answer is all but written whether they may go on; `stop`: this step is the last.
    """

    now: float
    commands: tuple[Command, ...] = ()
    growth: dict[str, bool] = field(default_factory=dict)
    stop: bool = False


@dataclass(frozen=True, slots=True)
class _Accepted:
    request: GenerationRequest
    limit: int
    allowed: int


@dataclass(frozen=True, slots=True)
class _Changed:
    change: SessionChange
    owner: str
    id: str
    new_id: str | None


@dataclass(frozen=True, slots=True)
class _Message:
    now: float
    commands: tuple[_Accepted | _Changed | Cancel, ...]
    growth: dict[str, bool]
    stop: bool


_MESSAGES = TypeAdapter(_Message)


def encode(decisions: Decisions) -> bytes:
    """As JSON, without what only rank 0 has: where events and results go."""
    commands = tuple(_sent(command) for command in decisions.commands)
    return _MESSAGES.dump_json(_Message(decisions.now, commands, decisions.growth, decisions.stop))


def decode(data: bytes) -> Decisions:
    """What rank 0 has decided. Events and results of its requests go nowhere here."""
    message = _MESSAGES.validate_json(data)
    return Decisions(message.now, tuple(map(_received, message.commands)), message.growth, message.stop)


def _sent(command: Command) -> _Accepted | _Changed | Cancel:
    if isinstance(command, QueuedRequest):
        return _Accepted(command.request, command.limit, command.allowed)
    if isinstance(command, Change):
        return _Changed(command.change, command.owner, command.id, command.new_id)
    return command


def _received(command: _Accepted | _Changed | Cancel) -> Command:
    if isinstance(command, _Accepted):
        return QueuedRequest(command.request, _nowhere, command.limit, command.allowed)
    if isinstance(command, _Changed):
        return Change(command.change, command.owner, command.id, command.new_id)
    return command


def _nowhere(event: Event) -> None:
    """Clients are rank 0's."""
