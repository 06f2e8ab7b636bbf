"""Step plans as JSON, which rank 0 sends to the other ranks."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from server.commands import Cancel, ChangeSession, Command, QueuedRequest, StepPlan
from server.protocol import Event, GenerationRequest, SessionChange


@dataclass(frozen=True, slots=True)
class _Accepted:
    request: GenerationRequest
    limit: int
    promised: int


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
    extensions: dict[str, bool]
    stop: bool


_MESSAGES = TypeAdapter(_Message)


def encode(plan: StepPlan) -> bytes:
    """A plan without its callbacks and futures, which exist on rank 0 only."""
    commands = tuple(_to_message(command) for command in plan.commands)
    return _MESSAGES.dump_json(_Message(plan.now, commands, plan.extensions, plan.stop))


def decode(data: bytes) -> StepPlan:
    """A plan of rank 0. Nobody receives the events and results of its requests here."""
    message = _MESSAGES.validate_json(data)
    return StepPlan(message.now, tuple(map(_to_command, message.commands)), message.extensions, message.stop)


def _to_message(command: Command) -> _Accepted | _Changed | Cancel:
    if isinstance(command, QueuedRequest):
        return _Accepted(command.request, command.limit, command.promised)
    if isinstance(command, ChangeSession):
        return _Changed(command.change, command.owner, command.id, command.new_id)
    return command


def _to_command(message: _Accepted | _Changed | Cancel) -> Command:
    if isinstance(message, _Accepted):
        return QueuedRequest(message.request, _ignore, message.limit, message.promised, remote=True)
    if isinstance(message, _Changed):
        return ChangeSession(message.change, message.owner, message.id, message.new_id)
    return message


def _ignore(event: Event) -> None:
    """Only rank 0 has clients."""
