"""Our server against mlx_lm.server over HTTP, in one run, on one float32 model and one BLAS.

    python -m tests.bench.serving [--quick] [--json OUT] [--model DIR]

The two take turns, one of them busy at a time; every figure is a median, every ratio the median over pairs taken close
together. Nothing is downloaded. With `--ours mlx-lm` the other server is compared with itself: the spread of the
ratios is then the noise of the machine.
"""

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.client import RequestFailed
from tests.bench.machine import Blas, cpu_name, find_blas, make_float32, versions
from tests.bench.measures import (
    QUICK,
    Pair,
    Plan,
    bytes_per_token,
    first_tokens,
    long_context,
    many_streams,
    single_stream,
)
from tests.bench.prompts import long_answers, tokens_per_word
from tests.bench.report import Row, Target, markdown
from tests.bench.servers import MLX_LM_DEFAULTS, ROOT, Server, ServerFailed, running

SINGLE = Target("at least", 0.9)
STREAMS = Target("at least", 1.0)
WARM = Target("at most", 0.5)
BYTES = Target("at most", 0.32)


def say(text: str) -> None:
    """Progress, apart from the result on stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def measure(pair: Pair, plan: Plan, seeded: bool) -> list[Row]:
    """All rows, in the order of the table. Starts and stops the servers."""
    with running(pair.ours, pair.theirs):
        per_word = tokens_per_word(pair.theirs.endpoint)
        say(f"both ready; {per_word:.2f} tokens a word; single stream on {plan.long_tokens} tokens")
        prompts = long_context(pair, plan, per_word)
        long_row = single_stream(pair, plan, f"{plan.long_tokens} tokens of context", prompts, "context-0", SINGLE)
        say(f"looking for {plan.streams} prompts with long answers")
        n_words = round(plan.short_tokens / per_word)
        prompts = long_answers(pair.both, [], n_words, plan.streams, plan.generate, plan.streams, "short")
        say("single stream, short prompt")
        rows = [single_stream(pair, plan, "short prompt", prompts, "single", SINGLE), long_row]
        say(f"{plan.streams} streams")
        rows += many_streams(pair, plan, prompts, STREAMS)
        say("time to first token")
        rows += first_tokens(pair, plan, per_word, seeded, WARM)
    if pair.ours.kind == "turbocache":
        say("bytes per token")
        alone = dataclasses.replace(pair.ours, greet=False)
        with running(alone):
            rows.append(bytes_per_token(alone, plan, per_word, BYTES))
    return rows


def describe(arguments: argparse.Namespace, blas: Blas, proof: str) -> dict[str, Any]:
    """What ran where, for the lines under the table and the JSON."""
    return {
        "model": f"{Path(arguments.model).name} as float32 ({proof})",
        "cpu": cpu_name(),
        "blas": blas.name,
        "versions": versions(),
        "ours": {"server": arguments.ours, "preset": arguments.preset if arguments.ours == "turbocache" else None},
        "theirs": {"server": "mlx_lm.server", "settings": MLX_LM_DEFAULTS, "warm turns": arguments.baseline_shape},
        "quick": arguments.quick,
        "load average before": round(os.getloadavg()[0], 2),
    }


def run(arguments: argparse.Namespace) -> list[Row]:
    """Prepare the model, measure, print the table and write the JSON."""
    plan = QUICK if arguments.quick else Plan()
    blas = find_blas(arguments.blas)
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as folder:
        model = Path(folder, "float32", Path(arguments.model).name)
        model.parent.mkdir()
        say(f"writing {arguments.model} as float32")
        proof = make_float32(Path(arguments.model), model, blas)
        about = describe(arguments, blas, proof)
        ours = Server("our server", arguments.ours, model, blas, arguments.preset, Path(folder, "ours.log"))
        theirs = Server("mlx_lm.server", "mlx-lm", model, blas, "", Path(folder, "theirs.log"))
        started = time.monotonic()
        rows = measure(Pair(ours, theirs), plan, arguments.baseline_shape == "seeded")
        about["load average after"] = round(os.getloadavg()[0], 2)
        about["seconds"] = round(time.monotonic() - started)
    name = f"{arguments.ours} {arguments.preset}" if arguments.ours == "turbocache" else "mlx_lm.server (itself)"
    print(markdown(rows, name, "mlx_lm.server"))
    print()
    for key, value in about.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, dict) else value
        print(f"- {key}: {text}")
    if arguments.json is not None:
        result = {"about": about, "rows": [row.as_json() for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when the run ended, whether or not targets were met; 1 when a server failed; 2 on bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything as JSON to this file")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and shorter answers")
    parser.add_argument(
        "--model", default=str(ROOT / "turbocache/bundled/tiny-recall-4bit"), help="model directory (default: bundled)"
    )
    parser.add_argument("--preset", default="k4v4", help="our cache preset (default: k4v4)")
    parser.add_argument("--blas", default="auto", help="auto, none, or a library to preload for both servers")
    parser.add_argument("--ours", choices=["turbocache", "mlx-lm"], default="turbocache", help="what to measure")
    parser.add_argument(
        "--baseline-shape", choices=["seeded", "plain"], default="seeded", help="mlx_lm.server's requests in warm turns"
    )
    arguments = parser.parse_args(argv)
    if not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model {arguments.model}: no config.json there")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the servers are stopped
    try:
        run(arguments)
    except (ServerFailed, RequestFailed, RuntimeError, ValueError) as error:
        print(f"benchmark stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
