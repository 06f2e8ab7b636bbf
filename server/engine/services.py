"""What the engine's thread loads once and its parts share."""

from dataclasses import dataclass

import mlx.core as mx

from server.coordinator import Coordinator
from server.engine.budget import Budget
from server.engine.faults import FaultLog
from server.engine.queue import WaitingQueue
from server.engine.sampling import suggested_sampling
from server.engine.startup import Runtime, load_runtime
from server.errors import StartupError
from server.metrics import Metrics
from server.protocol import ModelInfo, SamplingParams
from server.sessions.clock import StepClock
from server.sessions.disk import SessionDisk
from server.sessions.registry import SessionRegistry
from server.settings import Settings
from server.text.assembler import Vocabulary
from server.text.chat_template import PromptBuilder
from server.text.grammar import GrammarCompiler
from server.text.tool_formats import ToolFormat, tool_format


@dataclass(frozen=True, slots=True)
class Services:
    """Fixed from start to stop. `queue`, `budget` and the text parts are safe to use from any thread."""

    settings: Settings
    metrics: Metrics
    coordinator: Coordinator
    runtime: Runtime
    queue: WaitingQueue
    budget: Budget
    clock: StepClock
    disk: SessionDisk | None
    registry: SessionRegistry
    faults: FaultLog
    prompts: PromptBuilder
    vocabulary: Vocabulary
    tool_format: ToolFormat | None
    grammars: GrammarCompiler
    sampling: SamplingParams
    """What the model suggests."""

    @property
    def model(self) -> ModelInfo:
        model, max_size, n_tokens = self.runtime.model, self.runtime.store.spec.ring.max_size, self.prompts.n_tokens
        limit, rotates_at = model.max_positions, max_size
        if max_size is not None and self.settings.overflow == "error":
            limit, rotates_at = max_size, None
        card = model.card
        return ModelInfo(model.id, model.created, limit, n_tokens, rotates_at, card.license, card.origin, self.sampling)


def load_services(
    settings: Settings, metrics: Metrics, coordinator: Coordinator, queue: WaitingQueue, seed: int
) -> Services:
    """Load the model and all that depends on it. Raises StartupError."""
    clock = StepClock(seed)
    mx.random.seed(seed)
    runtime = load_runtime(settings, coordinator)
    model, store, chunk = runtime.model, runtime.store, runtime.chunk
    vocabulary, format = Vocabulary(model.tokenizer), tool_format(model.tokenizer)
    disk = _open_disk(settings, metrics, coordinator, runtime)
    return Services(
        settings=settings,
        metrics=metrics,
        coordinator=coordinator,
        runtime=runtime,
        queue=queue,
        budget=Budget(
            runtime.budget, lambda n: store.session_nbytes(n, chunk), lambda n: store.prefill_nbytes(n, chunk)
        ),
        clock=clock,
        disk=disk,
        registry=SessionRegistry(store, disk, clock),
        faults=FaultLog(metrics, runtime.backend.name),
        prompts=PromptBuilder(model, outlines=store.spec.ring.max_size is not None),
        vocabulary=vocabulary,
        tool_format=format,
        grammars=GrammarCompiler(model.tokenizer, format, vocabulary),
        sampling=suggested_sampling(model.generation_config),
    )


def _open_disk(settings: Settings, metrics: Metrics, coordinator: Coordinator, runtime: Runtime) -> SessionDisk | None:
    if (folder := settings.session_dir) is None:
        return None
    try:
        return coordinator.open_disk(folder, settings.session_disk, runtime.model, runtime.store, metrics)
    except OSError as error:
        raise StartupError(f"TURBOCACHE_SESSION_DIR: {folder} can't be used: {error.strerror}.") from error
