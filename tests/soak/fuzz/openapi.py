"""schemathesis (https://schemathesis.readthedocs.io) over the server's own OpenAPI document: a real server process with
the bundled model, valid and invalid requests, one after another and in sequences, and every check.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.engine import events, from_schema
from schemathesis.hooks import unregister
from schemathesis.openapi.checks import AllowHeaderMismatch, RejectedPositiveData

from tests.serving.launch import Server, running
from tests.soak.fuzz import odd_requests
from tests.soak.fuzz.openapi_bodies import sendable, unforeseeable

KEY = "one"
REQUEST_SECONDS = 60
ALL_PHASES = ("examples", "coverage", "fuzzing", "stateful")
LATER_PHASES = ("fuzzing", "stateful")
"""Of further rounds: the other phases have no dice."""
EXAMPLES = 60
"""Cases of each operation and round."""


@dataclass(slots=True)
class Result:
    """What has been sent and answered, by operation and status, and what was wrong."""

    cases: int = 0
    odd: int = 0
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        operations: dict[str, list[str]] = {}
        for (operation, status), n in sorted(self.answers.items()):
            operations.setdefault(operation, []).append(f"{status}: {n}")
        return [
            f"{self.cases} cases, {self.odd} odd requests, {len(self.wrong)} wrong",
            *(f"  {operation}  {', '.join(statuses)}" for operation, statuses in operations.items()),
            *self.wrong,
        ]


def run(
    cases: int,
    seed: int,
    *,
    say: Callable[[str], None],
    phases: Iterable[str] = ALL_PHASES,
    examples: int = EXAMPLES,
    step: int = 1,
) -> Result:
    """At least so many cases, in rounds, and every `step`th of the odd requests."""
    result = Result()
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        with running(Path(folder), API_KEYS=f"{KEY},two", SESSION_DIR=str(kept)) as server:
            _rounds(server, result, cases, seed, say, tuple(phases), examples)
            result.odd, wrong = odd_requests.run(server, KEY, step)
            result.wrong += [*wrong, *_afterwards(server)]
    return result


def _rounds(
    server: Server,
    result: Result,
    cases: int,
    seed: int,
    say: Callable[[str], None],
    phases: tuple[str, ...],
    examples: int,
) -> None:
    while result.cases < cases:
        before = result.cases
        schema = _schema(server, seed, phases, examples)
        with _shortened(schema):
            for event in from_schema(schema).execute():
                result.wrong += _look(event, result)
        say(f"{result.cases} cases, {len(result.wrong)} wrong")
        if result.cases == before:
            result.wrong.append("a round had no cases")
            return
        seed, phases = seed + 1, LATER_PHASES


def _schema(server: Server, seed: int, phases: tuple[str, ...], examples: int) -> schemathesis.BaseSchema:
    """The document as the server gives it, all checks on."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "continue-on-failure": True,
            "request-timeout": REQUEST_SECONDS,
            # That cases are made slowly tells of the machine, not of the server.
            "suppress-health-check": ["too_slow"],
            "auth": {"openapi": {"bearer": {"bearer": KEY}}},
            "generation": {"max-examples": examples, "database": "none", "no-shrink": True},
            "phases": {name: {"enabled": name in phases} for name in ALL_PHASES},
        }
    )
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config, headers=headers)
    # Of a body OpenAPI's own links can only say the whole.
    answered = schema.raw_schema["paths"]["/v1/responses"]["post"]["responses"]["200"]
    answered["links"]["go_on"] = {
        "operationId": "create_response",
        "requestBody": {"previous_response_id": "$response.body#/id"},
    }

    @schema.hook
    def filter_failure(
        context: schemathesis.HookContext,
        failure: Failure,
        case: schemathesis.Case[Any],
        response: schemathesis.Response,
    ) -> bool:
        if isinstance(failure, AllowHeaderMismatch):
            # A session's name may end like an action of another, so that its address takes more methods; and the
            # address of a count reads like one of a response.
            return not case.operation.path.startswith(("/v1/sessions/{session_id}/", "/v1/responses/input_tokens"))
        return not (isinstance(failure, RejectedPositiveData) and unforeseeable(response.status_code, response.content))

    return schema


@contextmanager
def _shortened(schema: schemathesis.BaseSchema) -> Iterator[None]:
    """Answers are short while this lasts."""
    tokens = schema.raw_schema["components"]["schemas"]["CompletionRequest"]["properties"]
    limits = {
        "max_tokens": tokens["max_tokens"]["anyOf"][0]["maximum"],
        "token": tokens["prompt"]["oneOf"][2]["items"]["maximum"],
    }

    def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
        positive = case.meta is not None and case.meta.generation.mode.is_positive
        sent = sendable(case.operation.path, case.body, positive=positive, limits=limits)
        # A body that is set is looked at anew, and no body at all would count as an invalid one.
        if sent is not case.body:
            case.body = sent

    schemathesis.hook(before_call)
    try:
        yield
    finally:
        unregister(before_call)


def _look(event: events.EngineEvent, result: Result) -> Iterator[str]:
    """Counts what an event brings; yields what is wrong."""
    if isinstance(event, events.ScenarioFinished):
        for id, interaction in event.recorder.interactions.items():
            result.cases += 1
            case = event.recorder.cases[id].value
            if interaction.response is None:
                yield f"{case.operation.label}: no answer to {case.body!r}"
            else:
                result.answers[case.operation.label, interaction.response.status_code] += 1
            for check in event.recorder.checks.get(id, ()):
                if check.failure_info is not None:
                    failure = check.failure_info.failure
                    answer = interaction.response.content[:300] if interaction.response is not None else b""
                    yield (
                        f"{case.operation.label}: {check.name}: {failure.title}: {failure.message}\n"
                        f"    {case.method} {case.path_parameters} {case.headers} {case.body!r:.1000}\n    {answer!r}"
                    )
    elif isinstance(event, events.NonFatalError):
        yield f"{event.label}: {event.value!r:.1000}"
    elif isinstance(event, events.FatalError):
        yield f"{event.exception!r:.1000}"


def _afterwards(server: Server) -> Iterator[str]:
    """Nothing runs, the server is well, and its log has no traceback."""
    deadline = time.monotonic() + REQUEST_SECONDS
    while server.metric("requests_running") + server.metric("requests_waiting") and time.monotonic() < deadline:
        time.sleep(0.05)
    if (left := server.metric("requests_running") + server.metric("requests_waiting")) > 0:
        yield f"{left:g} requests still run or wait"
    if (health := httpx.get(f"{server.url}/health")).status_code != 200:
        yield f"the server is not well: {health.text}"
    if (faults := server.metric("kernel_faults_total")) > 0:
        yield f"{faults:g} steps failed"
    log = server.log.read_text()
    if (at := log.find("Traceback")) >= 0:
        yield log[at : at + 4000]
