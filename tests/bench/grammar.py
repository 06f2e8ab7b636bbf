"""What a grammar costs: time between tokens with and without one, on one server in one run.

    python -m tests.bench.grammar [--pairs N] [--streams N]

Each pair is the same prompt twice, one answer free and one held to a JSON schema, in turns; the order changes with
every pair. The figure is the median over pairs of the ratio of their median times between two tokens.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tests.bench.client import Answer, Endpoint, Message
from tests.bench.prompts import long_answers
from tests.serving.launch import running

MOST = 1.15
_GENERATE = 128
_SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 40, "maxLength": 60},
        "words": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{3,12}$"}, "minItems": 100},
    },
    "required": ["title", "words"],
    "additionalProperties": False,
}


def between(answers: Sequence[Answer]) -> float:
    """Median seconds between two texts of a stream."""
    return statistics.median(late - early for answer in answers for early, late in pairwise(answer.stamps))


def ratios(free: Endpoint, prompts: Sequence[list[Message]], n_pairs: int) -> list[float]:
    """Held against free, for each pair. All prompts run at once."""
    format = {"type": "json_schema", "json_schema": {"name": "list", "schema": _SCHEMA}}
    held = replace(free, body={**free.body, "response_format": format})
    found = []
    for i in range(n_pairs):
        sides = [free, held] if i % 2 == 0 else [held, free]
        times = {side is held: between(side.chat_together(prompts, _GENERATE)) for side in sides}
        found.append(times[True] / times[False])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when the cost is within its limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.grammar", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs of answers (default: 15)")
    parser.add_argument("--streams", type=int, default=8, help="streams at once, besides one alone (default: 8)")
    options = parser.parse_args(argv)
    wrong = False
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        endpoint = Endpoint(int(server.url.rpartition(":")[2]), {"model": "default"}, names_sessions=True)
        prompts = long_answers([endpoint], [], 60, options.streams, _GENERATE, options.streams, "grammar")
        for streams in (1, options.streams):
            found = sorted(ratios(endpoint, prompts[:streams], options.pairs))
            median = statistics.median(found)
            wrong = wrong or median > MOST
            print(
                f"{streams} streams, time between tokens, held to a schema over free: {median:.3f} "
                f"({found[0]:.3f} to {found[-1]:.3f}, {len(found)} pairs; must be at most {MOST})",
                flush=True,
            )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
