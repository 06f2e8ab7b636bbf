"""The `turbocache` command: start the server, or show what this machine can run."""

import argparse
import json
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad usage, 1 when what was asked for does not work)."""
    parser = argparse.ArgumentParser(prog="turbocache", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="start the server (settings: TURBOCACHE_* variables or .env)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    serve.set_defaults(run=_serve)

    probe = commands.add_parser("probe", help="test the backends on this machine and say which one is chosen, and why")
    probe.add_argument("--model", help="a local directory or a Hugging Face id (default: the bundled model)")
    probe.add_argument("--preset", default="k4v4", help="cache preset to probe for (default %(default)s)")
    probe.add_argument("--backend", default="auto", help="auto, metal, cuda, packed or reference")
    probe.add_argument("--json", action="store_true", help="print JSON instead of a table")
    probe.set_defaults(run=_probe)

    options = parser.parse_args(arguments)
    return int(options.run(options))


def _serve(options: argparse.Namespace) -> int:
    import uvicorn

    # By name: the server's rooms import this package, never the other way round.
    uvicorn.run("server.app:app", host=options.host, port=options.port)
    return 0


def _probe(options: argparse.Namespace) -> int:
    # Here and not above: loading MLX takes a second that `--help` need not wait for.
    from turbocache.backend import BackendUnavailable, choose_backend
    from turbocache.model import ModelError, load_model
    from turbocache.presets import preset
    from turbocache.store import checked_plans

    try:
        chosen = preset(options.preset)
        backend = choose_backend(options.backend, checked_plans(load_model(options.model).model), chosen)
    except (ValueError, ModelError, BackendUnavailable) as error:
        print(f"turbocache probe: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(backend.as_json(), indent=2))
        return 0
    print(f"device   {backend.device}\nprofile  {backend.profile}")
    for check in backend.checks:
        outcome = f"error {check.max_error:.1e}, {check.microseconds:.0f} us" if check.passed else check.reason
        print(f"{'ok  ' if check.passed else 'no  '} {check.check}: {outcome}")
    print(f"backend  {backend.name} (asked for: {backend.requested})\nreason   {backend.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
