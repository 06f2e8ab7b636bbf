"""The long form of what `make test-all` does in short: `python -m tests.soak RUN` (`--help` names the runs)."""

import turbocache  # noqa: F401, I001  (before everything that imports mlx)

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from tests.soak.disk import corruption, kills
from tests.soak.fuzz import schemas
from tests.soak.load import crowd, operations
from tests.soak.engines import leave


class Result(Protocol):
    """What a run has to say; it has failed if anything is wrong."""

    @property
    def wrong(self) -> list[str]: ...

    def lines(self) -> list[str]: ...


def say(text: str) -> None:
    """Progress, apart from the result on stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when nothing was wrong, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    runs = parser.add_subparsers(dest="run", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="the dice (default: any)")
    one = runs.add_parser("kills", parents=[common], help="SIGKILL during spills and stops")
    one.add_argument("--times", type=int, default=100, help="servers to kill (default: 100)")
    one = runs.add_parser("corruption", parents=[common], help="flipped bits and lost ends")
    one.add_argument("--times", type=int, default=500, help="files to damage (default: 500)")
    one = runs.add_parser("operations", parents=[common], help="random requests to a server with little memory")
    one.add_argument("--count", type=int, default=5000, help="operations with each model (default: 5000)")
    one.add_argument("--clients", type=int, default=8, help="clients at once (default: 8)")
    one.add_argument("--model", choices=operations.MODELS, help="one of the tiny models (default: each in turn)")
    one = runs.add_parser("crowd", parents=[common], help="many clients at once, a third of whose requests are left")
    one.add_argument("--clients", type=int, default=64, help="clients at once (default: 64)")
    one.add_argument("--count", type=int, default=20, help="requests of each client (default: 20)")
    one = runs.add_parser("schemas", parents=[common], help="answers held to random JSON schemas by a hot model")
    one.add_argument("--count", type=int, default=300, help="schemas (default: 300)")
    one = runs.add_parser("openapi", parents=[common], help="schemathesis over the server's own document")
    one.add_argument("--cases", type=int, default=5000, help="requests at least (default: 5000)")
    arguments = parser.parse_args(argv)
    logging.getLogger("server.sessions.disk").setLevel(logging.ERROR)  # it warns of every damaged file
    say(f"seed {arguments.seed}")
    failed = False
    for run in _runs(arguments):
        begun = time.monotonic()
        result = run()
        print(f"{arguments.run}, seed {arguments.seed}, {time.monotonic() - begun:.0f} s")
        print("\n".join(result.lines()), flush=True)
        failed = failed or bool(result.wrong)
    leave()
    return int(failed)


def _runs(arguments: argparse.Namespace) -> list[Callable[[], Result]]:
    seed = arguments.seed
    if arguments.run == "kills":
        return [partial(kills.run, arguments.times, seed, say=say)]
    if arguments.run == "corruption":
        return [partial(corruption.run, arguments.times, seed, say=say)]
    if arguments.run == "crowd":
        return [partial(crowd.run, arguments.clients, arguments.count, seed, say=say)]
    if arguments.run == "schemas":
        return [partial(schemas.run, arguments.count, seed, say=say)]
    if arguments.run == "openapi":
        from tests.soak.fuzz import openapi  # schemathesis is slow to import

        return [partial(openapi.run, arguments.cases, seed, say=say)]
    models = [arguments.model] if arguments.model else operations.MODELS
    return [partial(operations.run, model, arguments.count, arguments.clients, seed, say=say) for model in models]


if __name__ == "__main__":
    sys.exit(main())
