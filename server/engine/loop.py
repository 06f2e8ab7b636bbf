"""The loop of the engine's thread: plan a step, obey its commands, compute it."""

import logging
import queue
import time
from queue import SimpleQueue

from server.commands import Cancel, ChangeSession, Command, QueuedRequest, StepPlan
from server.engine.scheduler import Scheduler
from server.engine.services import Services
from server.engine.session_changes import SessionChanges
from server.errors import ServerError, ShuttingDown
from server.protocol import Failed
from server.sessions.starts import LEAST_SHARED

log = logging.getLogger(__name__)


class EngineLoop:
    """Runs on the engine's thread. Other threads put into `commands`, set `stopping`, read `beat`, and may call
    `report_failure`.
    """

    def __init__(self, services: Services, commands: SimpleQueue[Command | None]) -> None:
        self.services = services
        self.scheduler = Scheduler(services)
        self.changes = SessionChanges(services, self.scheduler.stats, self.scheduler.make_room)
        self.stopping = False
        self.beat = time.monotonic()
        """When the thread last did something."""
        self._commands = commands

    def run(self) -> None:
        """Take steps until the stop, then write the sessions to disk."""
        while not self._step():
            self.scheduler.stats.refresh_if_due()
        if self.services.faults.verdict is None:
            self._save_all()
        self.services.coordinator.leave()
        self.close(ShuttingDown())

    def close(self, error: ServerError) -> None:
        """End all that runs, waits or is asked for."""
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, ChangeSession):
                if command.done.set_running_or_notify_cancel():
                    command.done.set_exception(error)
            elif isinstance(command, QueuedRequest):
                self.services.queue.add(command)
        self.scheduler.end_all(error)
        self.changes.close()

    def report_failure(self, error: ServerError) -> None:
        """Tell all requests of an error, from a thread other than the engine's, which may never return from MLX."""
        for request in [*self.scheduler.batch.values(), *self.services.queue]:
            request.deliver(Failed(error))

    def _step(self) -> bool:
        """One step. Returns whether it was the last."""
        self.beat = time.monotonic()
        services, scheduler = self.services, self.scheduler
        idle = not scheduler.batch and services.queue.empty
        plan = services.coordinator.next(self._plan, idle)
        services.clock.set(plan.now)
        for command in plan.commands:
            self._obey(command)
        if plan.stop:
            self.stopping = True
            return True
        scheduler.extend_promises(plan.extensions)
        if services.faults.verdict is not None:
            scheduler.refuse_all(services.faults.verdict)
        scheduler.admit()
        if scheduler.batch:
            services.coordinator.plan_ahead(self._plan)
            scheduler.step()
            self.changes.save_between_steps()
        elif services.queue.empty:
            self.changes.maintain()
        services.coordinator.verify(scheduler.result)
        return False

    def _plan(self, timeout: float | None) -> StepPlan:
        """All commands that have come. With `timeout` it waits up to this many seconds for the first."""
        commands: list[Command] = []
        while True:
            try:
                command = self._commands.get(block=timeout is not None, timeout=timeout)
            except queue.Empty:
                break
            timeout = None
            if isinstance(command, ChangeSession) and not command.done.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            if command is not None:
                commands.append(command)
        return StepPlan(time.time(), tuple(commands), self.scheduler.wanted_extensions(), self.stopping)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Cancel):
            self.scheduler.cancel(command.request_id)
        elif isinstance(command, ChangeSession):
            self._change(command)
        else:
            if command.remote:
                n_prompt = len(command.request.prompt.tokens)
                self.services.budget.record(command.request.request_id, n_prompt + command.promised, n_prompt)
            self.services.queue.add(command)

    def _change(self, command: ChangeSession) -> None:
        try:
            command.done.set_result(self.changes.make(command))
        except Exception as error:
            command.done.set_exception(error)
            if not isinstance(error, ServerError):
                self.services.coordinator.check_failure(error)

    def _save_all(self) -> None:
        """An orderly stop: end all requests, keep what they have computed, and write all sessions to disk."""
        self.scheduler.stop_all()
        if self.services.disk is None:
            return
        n_saved, registry = 0, self.services.registry
        for session in registry.idle()[::-1]:  # most useful first, in case that the process is killed meanwhile
            self.beat = time.monotonic()
            n_saved += len(session.tokens) >= LEAST_SHARED and registry.save(session)
        log.info("%d sessions of this run are on disk in %s", n_saved, self.services.settings.session_dir)
