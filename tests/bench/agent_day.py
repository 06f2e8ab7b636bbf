"""An agent's day against our server and mlx_lm.server: how much of the prompts is computed again.

    python -m tests.bench.agent_day [--quick] [--json OUT] [--model DIR] [--only-ours]

Twelve named conversations of four kinds of client take turns in random order, one request at a time, with memory for
about four of them: tool results, edited messages, dropped reasoning, and side requests for titles. Real servers, the
real `openai` client, greedy answers. `day_script.py` has the script, `day_ledger.py` what is counted. Exit status 1
when our server recomputes 5 % of the prompt tokens or more, or when a server failed.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

from tests.bench.client import RequestFailed
from tests.bench.day_ledger import DEFINITIONS, Encoder, Record, by_kind, doubts, resident, share, table, worst
from tests.bench.day_play import RESIDENT, bytes_of_session, counters_of, last_prompts, play
from tests.bench.day_script import DAY, QUICK, Sizes
from tests.bench.machine import cpu_name, find_blas, fp16_bytes_per_token, make_float32, model_config, versions
from tests.bench.servers import ROOT, Server, ServerFailed, running

TARGET = 0.05
SESSIONS_IN_MEMORY = 4


def say(text: str) -> None:
    """Progress, apart from the result on stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Result:
    """A day on one server."""

    name: str
    records: list[Record]
    counters: dict[str, float]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kinds": by_kind(self.records),
            "counters": self.counters,
            "seconds": self.seconds,
            "requests": [record.as_json() for record in self.records],
        }


def play_on(server: Server, sizes: Sizes, seed: int, encoder: Encoder) -> Result:
    """Start the server, play the day, and stop it."""
    say(f"{server.name}: starting")
    with running(server), client_of(server) as client:
        read = counters_of(client) if server.kind == "turbocache" else None
        model = client.models.list().data[0].id if read is not None else "default_model"
        start = time.monotonic()
        records = play(sizes, seed, client, model, encoder, read)
        seconds = time.monotonic() - start
        say(f"{server.name}: {len(records)} requests in {seconds:.0f} s, {share(records):.1%} recomputed")
        counted = read() if read is not None else {}
        counted.pop(RESIDENT, None)
        return Result(server.name, records, counted, round(seconds, 1))


def client_of(server: Server) -> OpenAI:
    """The official client, for one server of this machine."""
    url = f"http://127.0.0.1:{server.endpoint.port}/v1"
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)


def measured_budget(ours: Server, sizes: Sizes, seed: int, encoder: Encoder) -> tuple[int, str]:
    """Bytes of SESSIONS_IN_MEMORY sessions as long as the day's conversations are at its end, and how they were found.
    Asks our server, which is started with all the memory it likes.
    """
    n_tokens = round(statistics.median(last_prompts(sizes, seed, encoder)))
    say("measuring the bytes of a session")
    with running(ours), client_of(ours) as client:
        one = bytes_of_session(client, client.models.list().data[0].id, encoder, n_tokens)
    budget = SESSIONS_IN_MEMORY * one
    return budget, (
        f"{SESSIONS_IN_MEMORY} x {one / 1e6:.2f} MB = {budget / 1e6:.1f} MB; {one / 1e6:.2f} MB is what "
        f"GET /v1/sessions tells of one of {n_tokens:,} tokens, the median of the conversations' last prompts, without "
        "checkpoints"
    )


def contestants(arguments: argparse.Namespace, ours: Server, budget: int) -> list[Server]:
    """Our server with `budget` bytes and a folder for sessions, and, unless only ours is asked for, mlx_lm.server with
    the same bytes and as it is by default.
    """
    folder = ours.log.parent
    memory = {"TURBOCACHE_KV_MEMORY": str(budget), "TURBOCACHE_SESSION_DIR": str(folder / "sessions")}
    servers = [dataclasses.replace(ours, settings=memory | ours.settings)]
    if not arguments.only_ours:
        name, log = "mlx_lm.server", folder / "theirs.log"
        theirs = Server(f"{name}, same bytes", "mlx-lm", ours.model, ours.blas, "", log, greet=False)
        servers.append(dataclasses.replace(theirs, options=("--prompt-cache-bytes", str(budget))))
        servers.append(dataclasses.replace(theirs, name=f"{name}, its defaults (10 sequences, any bytes)"))
    return servers


def describe(arguments: argparse.Namespace, sizes: Sizes, ours: Server, budget: int) -> dict[str, str]:
    """What ran where, for the lines under the tables and the JSON."""
    per_token = 2 * fp16_bytes_per_token(model_config(ours.model))
    settings = {"TURBOCACHE_KV_MEMORY": str(budget), "TURBOCACHE_SESSION_DIR": "an empty folder"} | ours.settings
    return {
        "day": f"{'quick' if arguments.quick else 'whole'}, {sizes}, seed {arguments.seed}",
        "ours": ", ".join([f"preset {ours.preset}", *(f"{name}={value}" for name, value in settings.items())]),
        "theirs": f"no disk; that memory is {budget // per_token:,} tokens in float32, {per_token:,} bytes each",
        "cpu": cpu_name(),
        "blas": ours.blas.name,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def run(arguments: argparse.Namespace, folder: Path) -> bool:
    """Play the day on all servers, print the tables and write the JSON. Whether our server met the target."""
    sizes, blas = (QUICK if arguments.quick else DAY), find_blas(arguments.blas)
    model = folder / "float32" / Path(arguments.model).name
    model.parent.mkdir()
    say(f"writing {arguments.model} as float32")
    proof = make_float32(Path(arguments.model), model, blas)
    encoder = Encoder(model)

    log = folder / "ours.log"
    settings = {f"TURBOCACHE_{name}": value for name, value in arguments.setting}
    ours = Server("our server", "turbocache", model, blas, arguments.preset, log, greet=False, settings=settings)
    budget, how = measured_budget(ours, sizes, arguments.seed, encoder)
    about = {"model": f"{model.name} as float32 ({proof})", "memory": how}
    about |= describe(arguments, sizes, ours, budget)
    servers = contestants(arguments, ours, budget)
    results = [play_on(server, sizes, arguments.seed, encoder) for server in servers]
    met = share(results[0].records) < TARGET
    print(report(results, about), flush=True)
    if arguments.json is not None:
        played = [result.as_json() for result in results]
        written = {"about": about, "target": TARGET, "met": met, "servers": played}
        arguments.json.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n")
    return met


def report(results: Sequence[Result], about: dict[str, str]) -> str:
    """Tables, definitions and verdict; our server's result comes first."""
    parts: list[str] = []
    for result in results:
        parts += [f"## {result.name}", table(result.records), doubts(result.records)]
        if result.counters:
            parts.append("Counters: " + ", ".join(f"{name} {count:g}" for name, count in result.counters.items()) + ".")
            parts += [resident(result.records), worst(result.records)]
    parts += [DEFINITIONS, "\n".join(f"- {key}: {value}" for key, value in about.items())]
    ours = share(results[0].records)
    others = ", ".join(f"{result.name} {share(result.records):.1%}" for result in results[1:])
    verdict = "met" if ours < TARGET else "**missed**"
    parts.append(
        f"Recomputed beyond what is new: {ours:.2%} of the prompt tokens; target below {TARGET:.0%}: {verdict}."
        + (f" In the same run: {others}." if others else "")
    )
    return "\n\n".join(parts)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.removeprefix("TURBOCACHE_"), value


def main(argv: Sequence[str] | None = None) -> int:
    """0 when our server met the target, 1 when it missed it or a server failed, 2 on bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.agent_day", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything as JSON to this file")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter turns; first ones weigh more")
    parser.add_argument("--only-ours", action="store_true", help="without mlx_lm.server")
    parser.add_argument("--seed", type=int, default=0, help="another day (default: 0)")
    parser.add_argument(
        "--model", default=str(ROOT / "turbocache/bundled/tiny-recall-4bit"), help="model directory (default: bundled)"
    )
    parser.add_argument("--preset", default="k4v4", help="our cache preset (default: k4v4)")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="a setting of our server without its TURBOCACHE_, such as MAX_SIZE=1024; may be given again",
    )
    parser.add_argument("--blas", default="auto", help="auto, none, or a library to preload for the servers")
    arguments = parser.parse_args(argv)
    if not Path(arguments.model, "config.json").is_file():
        parser.error(f"--model {arguments.model}: no config.json there")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the servers are stopped
    try:
        with tempfile.TemporaryDirectory(prefix="agent-day-") as folder:
            return 0 if run(arguments, Path(folder)) else 1
    except (ServerFailed, RequestFailed, OpenAIError, RuntimeError, ValueError) as error:
        print(f"the day ended early: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
