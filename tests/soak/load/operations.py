"""Clients that do anything at random, all at once, with hardly any memory for it.

After each of the engine's steps and after each thing that a client does, every page has exactly its owners, and memory
is promised only to who waits or runs. Now and then all pause, and then sessions at rest own all pages and keep within
the budget. Nothing is answered 500, what is answered 200 is well-formed, and the process does not grow.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from server.settings import MemoryBudget, Settings
from tests.soak.engines import sample, tiny_model
from tests.soak.load.clients import Client
from tests.soak.load.invariants import Watch, resident_mib
from tests.soak.served import Served, serving

MODELS = {"llama": 13 << 18, "qwen3_next": 3 << 19}
"""Architectures, plain and with recurrent layers, each with a budget for some four sessions."""

POSITIONS = 1024
_SETTINGS = Settings(
    keep=16, window=64, max_size=256, max_batch=4, queue_limit=3, prefill_chunk=128, session_disk=6 << 20,
    log_level="error",
)  # fmt: skip
_AT_A_TIME = 8
"""Things that a client does between two pauses."""

_LEAST_FOR_GROWTH = 1000
_GROWTH_MIB = 4.0
_COUNTED = ("spills", "restores", "restore_failures", "evictions", "checkpoint_drops", "rotations")
_NEVER = ("kernel_faults", "session_files_refused", "spill_failures")


@dataclass(slots=True)
class Operations:
    """What happened, and `wrong`: sentences, each a failure."""

    model: str
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """MiB by which the last quarter's memory is above that of the quarter before it, both by their medians."""
        n = len(self.memory) // 4
        return statistics.median(self.memory[-n:]) - statistics.median(self.memory[-2 * n : -n]) if n else 0.0

    def lines(self) -> list[str]:
        marks = [self.memory[len(self.memory) * quarter // 4] for quarter in range(4)] + self.memory[-1:]
        figures = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in self.figures.items())
        return [
            f"tiny {self.model}, {self.done.total()} operations",
            *(f"  {deed:<9} {said}" for deed, said in self._by_deed()),
            figures,
            f"resident MiB at each quarter {', '.join(f'{mib:.0f}' for mib in marks)}; growth {self.growth:+.1f}",
            f"failures {len(self.wrong)}",
            *(f"  {what}" for what in self.wrong[:20]),
        ]

    def _by_deed(self) -> Iterator[tuple[str, str]]:
        for deed in sorted({deed for deed, _ in self.done}):
            outcomes = sorted((outcome, n) for (of, outcome), n in self.done.items() if of == deed)
            yield deed, f"{sum(n for _, n in outcomes):>5}: {', '.join(f'{n} x {outcome}' for outcome, n in outcomes)}"


def run(
    model: str, count: int, clients: int, seed: int, say: Callable[[str], None] = print, at_a_time: int = _AT_A_TIME
) -> Operations:
    """Let clients do `count` things with a tiny model of one of `MODELS`."""
    result = Operations(model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="operations-")))
        stack.enter_context(tiny_model(model, POSITIONS))
        update = {"session_dir": folder, "kv_memory": MemoryBudget(bytes=MODELS[model])}
        served = stack.enter_context(serving(_SETTINGS.model_copy(update=update)))
        watch = Watch(served.engine)
        crowd = [stack.enter_context(closing(Client(served.url, seed * clients + i))) for i in range(clients)]
        pool = stack.enter_context(ThreadPoolExecutor(clients))
        done, begun = 0, time.monotonic()
        while done < count and not result.wrong:
            n = min(at_a_time, -(-(count - done) // clients))
            list(pool.map(lambda client, n=n: _act(client, watch, n), crowd))
            done += n * clients
            watch.rest()
            result.memory.append(resident_mib())
            result.wrong = [*watch.wrong, *(what for client in crowd for what in client.wrong), *served.errors]
            say(f"{model}: {done} of {count}, {len(result.wrong)} failures, {result.memory[-1]:.0f} MiB")
        _sum_up(result, served, watch, crowd)
        result.figures["seconds"] = round(time.monotonic() - begun)
    return result


def _act(client: Client, watch: Watch, n: int) -> None:
    for _ in range(n):
        client.act()
        watch.check()


def _sum_up(result: Operations, served: Served, watch: Watch, crowd: list[Client]) -> None:
    for client in crowd:
        result.done.update(client.done)
    health = httpx.get(f"{served.url}/health")
    if health.status_code != 200:
        result.wrong.append(f"in the end /health says {health.text}")
    for name in _NEVER:
        if n := sample(served.metrics, f"{name}_total"):
            result.wrong.append(f"{n:g} {name.replace('_', ' ')}")
    result.figures |= {
        "steps": watch.steps,
        "checks": watch.checks,
        "pauses": watch.rests,
        "most_pages": watch.most_pages,
    }
    result.figures |= {name: sample(served.metrics, f"{name}_total") for name in _COUNTED}
    if result.done.total() >= _LEAST_FOR_GROWTH and result.growth > _GROWTH_MIB:
        result.wrong.append(f"memory has grown by {result.growth:.1f} MiB in the last quarter")
