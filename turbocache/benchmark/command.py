"""`turbocache bench`: the options, and the way from them to files."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from turbocache.backends import one_of


def add_to(commands: Any) -> None:
    """Add the command to an argument parser's commands. Nothing heavy is imported."""
    parser = commands.add_parser(
        "bench", help="measure memory and speed of caches on this device, next to mlx-lm's own caches"
    )
    parser.add_argument("--model", help="a local directory or a Hugging Face id (default: the bundled model)")
    parser.add_argument(
        "--shape", help="random weights of a real model's geometry instead: 1b, 3b, 8b or 70b (Llama 3.1 and 3.2)"
    )
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), help="quantise a shape's weights (default: not)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="what a shape computes in (default bfloat16, on a CPU float32)",
    )
    parser.add_argument("--contexts", type=_integers, help="prompts' lengths in tokens, by commas (default 512,2048)")
    parser.add_argument(
        "--presets",
        type=_names,
        help="rows of this project, by commas, as `turbocache eval` names them (default k4v4,turbo2_5); PRESET:BACKEND "
        "sets one row's backend; the first one also rotates. none for none",
    )
    parser.add_argument(
        "--against",
        type=_names,
        help="mlx-lm's caches, by commas: kv, rotating, quantized, rotating-quantized (default all), or none",
    )
    parser.add_argument("--batch", type=int, help="sessions that are read and decoded together (default 1)")
    parser.add_argument("--budget", help="memory that sessions shall fit into (default 4GiB)")
    parser.add_argument("--generate", type=int, help="tokens that are timed (default 32)")
    parser.add_argument("--repeat", type=int, help="runs of each case, in turn (default 1)")
    parser.add_argument(
        "--warm-up",
        type=int,
        metavar="TOKENS",
        help="of each prompt, read once before it is measured (default: all on a GPU, 64 on a CPU)",
    )
    parser.add_argument("--chunk", type=int, help="tokens a forward pass of a prompt (default 512)")
    parser.add_argument("--keep", type=int, help="sink tokens of this project's caches (default 64)")
    parser.add_argument("--window", type=int, help="their raw newest tokens (default 128)")
    parser.add_argument(
        "--max-size", type=int, help="tokens that every rotating cache holds (default half of the shortest context)"
    )
    parser.add_argument("--backend", help=one_of(default="auto"))
    parser.add_argument("--timeout", type=float, help="seconds after which a run is given up (default 600)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where bench.json, bench.md and the plots go")
    parser.add_argument(
        "--matrix",
        type=Path,
        metavar="DIR",
        help="measure nothing: make the table in DIR/README.md and the runs' pages anew from DIR/*/bench.json",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and write; returns the exit status: 1 where a cache of this project did not run."""
    from turbocache.benchmark.settings import BenchmarkError
    from turbocache.documents import DocumentError

    try:
        return _matrix(options.matrix) if options.matrix else _measure(options)
    except (BenchmarkError, DocumentError) as error:
        print(f"turbocache bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"what was measured is in {options.out / 'bench.json'}" if options.out else "nothing was written"
        print(f"turbocache bench: interrupted; {kept}", file=sys.stderr)
        return 130


def _matrix(folder: Path) -> int:
    from turbocache.benchmark.matrix import update

    print(update(folder))
    return 0


def _measure(options: argparse.Namespace) -> int:
    # Here and not above: `--help` need not wait for what these import.
    from turbocache.benchmark import report
    from turbocache.benchmark.run import Benchmark
    from turbocache.documents import as_json, make_folder, write_text

    settings = _settings(options)
    if options.out:  # a folder that is missing or read-only is told before minutes of work
        make_folder(options.out / "bench.json")
    load = _load()
    benchmark = Benchmark(settings)

    def told_so_far() -> dict[str, Any]:
        return report.document(benchmark.found(), settings, command_line(options), [*load, *_load()])

    for line in benchmark.run():
        print(line, file=sys.stderr, flush=True)
        if options.out:  # whatever ends the benchmark, what was measured is there
            write_text(options.out / "bench.json", as_json(told_so_far()))
    told = told_so_far()
    if options.out:
        write_text(options.out / "bench.json", as_json(told))
        write_text(options.out / "bench.md", report.markdown(told, _plots(told, options.out)))
    print(f"{report.machine_line(told)}\n\n{report.tables(told)}")
    failed = [case for case in told["cases"] if case["ours"] and "unavailable" in case]
    for case in failed:
        print(f"turbocache bench: {case['label']} did not run: {case['unavailable']}", file=sys.stderr)
    return 1 if failed else 0


def _plots(told: dict[str, Any], folder: Path) -> list[str]:
    """Names of the figures drawn; none, and one line that says why, without matplotlib."""
    from turbocache.benchmark.plots import draw
    from turbocache.documents import PlotsUnavailable

    try:
        return draw(told, folder)
    except PlotsUnavailable as error:
        print(f"turbocache bench: no plots: {error}", file=sys.stderr)
        return []


_MODEL = ("model", "shape", "weight_bits", "dtype")
_CASES = ("contexts", "presets", "against", "batch", "budget", "generate", "repeat", "warm_up", "timeout")
_CACHES = ("chunk", "keep", "window", "max_size", "backend")
_OPTIONS = (*_MODEL, *_CASES, *_CACHES)


def _settings(options: argparse.Namespace) -> Any:
    from turbocache.benchmark.settings import BenchmarkError, Settings, parse_bytes

    given = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    if "budget" in given:
        try:
            given["budget"] = parse_bytes(given["budget"])
        except ValueError as error:
            raise BenchmarkError(f"--budget: {error}") from error
    return Settings(**given)


def command_line(options: argparse.Namespace) -> str:
    """The command that measures this, with a model's directory by its name."""
    words = ["turbocache", "bench"]
    for name in _OPTIONS:
        value = getattr(options, name)
        if value is not None:
            if name == "model" and Path(value).exists():
                value = Path(value).name
            said = ",".join(str(part) for part in value) or "none" if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", said]
    return shlex.join(words)


def _load() -> list[float]:
    return [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("no names given; none stands for none")
    return () if names == ("none",) else names


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from error
