"""The `turbocache` command: start the server, test the backends, measure quality, memory and speed."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from turbocache.backends import one_of
from turbocache.benchmark import command as benchmark
from turbocache.evaluation import command as evaluation
from turbocache.models import STARTER, default_model
from turbocache.presets import DEFAULT_PRESET


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 for bad usage, 1 if the command fails."""
    parser = argparse.ArgumentParser(prog="turbocache", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser(
        "serve", help="start the server, or one rank of it under mlx.launch (settings: TURBOCACHE_* variables or .env)"
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    serve.set_defaults(run=_serve)

    probe = commands.add_parser("probe", help="test the backends on this machine and show which one is chosen and why")
    for flag, kind, setting, default, meaning in (
        ("--model", str, "MODEL", None, "a local directory or a Hugging Face id"),
        ("--preset", str, "KV_PRESET", DEFAULT_PRESET, "cache preset to probe for"),
        ("--protect", int, "KV_PROTECT", "0", "layers at each end of the model that are stored at 8 bits"),
        ("--backend", str, "BACKEND", "auto", one_of()),
    ):
        known = f"default: TURBOCACHE_{setting} of the environment, else {default or 'the one that `serve` takes'}"
        value = os.environ.get(f"TURBOCACHE_{setting}") or default
        probe.add_argument(flag, type=kind, default=value, help=f"{meaning} ({known})")
    probe.add_argument("--json", action="store_true", help="print JSON instead of a table")
    probe.set_defaults(run=_probe)

    starter = commands.add_parser(
        "starter", help="fetch a small model, which the server takes when TURBOCACHE_MODEL is not set"
    )
    starter.add_argument("--lock", type=Path, default=Path("requirements/starter.txt"), help="its pin (%(default)s)")
    starter.add_argument("--uv", default="uv", help="the uv that fetches it (default: the one on PATH)")
    starter.add_argument("--if-needed", action="store_true", help="not if TURBOCACHE_MODEL is set, or if it is there")
    starter.set_defaults(run=_starter)

    evaluation.add_to(commands)
    benchmark.add_to(commands)

    options = parser.parse_args(arguments)
    return int(options.run(options))


def _serve(options: argparse.Namespace) -> int:
    import uvicorn

    from server.process.watchdog import keep_alive
    from turbocache.machine.launched import launched_rank

    keep_alive()
    if launched_rank() > 0:
        # Not at the top: it loads MLX.
        from server.follower import follow

        return follow()
    # After its shutdown uvicorn raises the signal that stopped it again. An orderly stop is no failure, so exit with 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # No access log: the server logs a line for each request itself.
    uvicorn.run("server.app:app", host=options.host, port=options.port, access_log=False)
    return 0


def _starter(options: argparse.Namespace) -> int:
    from server.settings import SettingsError, load_settings
    from turbocache.starter.install import StarterError, install

    try:
        needed = load_settings().model is None and default_model().is_fallback
    except SettingsError:  # `turbocache serve` will say it
        needed = False
    if options.if_needed and not needed:
        return 0
    try:
        install(options.lock, options.uv, partial(print, flush=True))
    except StarterError as error:
        print(f"{STARTER.name} could not be fetched: {error}.", file=sys.stderr)
        return 1
    return 0


def _probe(options: argparse.Namespace) -> int:
    # Not at the top: loading MLX takes a second, which `--help` does not need.
    from turbocache.backend import BackendUnavailable, choose_backend
    from turbocache.mlxlm.model import ModelError, load_model
    from turbocache.presets import preset
    from turbocache.store import checked_plans

    try:
        chosen = replace(preset(options.preset), protect=options.protect)
        model = options.model or default_model().path
        backend = choose_backend(options.backend, checked_plans(load_model(model).model), chosen)
    except (ValueError, ModelError, BackendUnavailable) as error:
        print(f"turbocache probe: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(backend.summary(), indent=2))
    else:
        print(backend.as_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
