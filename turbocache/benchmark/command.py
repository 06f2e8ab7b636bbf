"""`turbocache bench`: its options and the files that it writes."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from turbocache.backends import one_of
from turbocache.evaluation.command import integers_of, names_of


def add_to(commands: Any) -> None:
    """Add the command to an argument parser's commands. Nothing heavy is imported."""
    parser = commands.add_parser(
        "bench", help="measure memory and speed of caches on this device, next to mlx-lm's own caches"
    )
    parser.add_argument("--model", help="a local directory or a Hugging Face id (default: the bundled model)")
    parser.add_argument(
        "--shape", help="random weights in a real model's geometry instead: 1b, 3b, 8b or 70b (Llama 3.1 and 3.2)"
    )
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), help="quantise a shape's weights (default: not)")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="dtype of a shape (default bfloat16, on a CPU float32)",
    )
    parser.add_argument("--contexts", type=integers_of, help="prompt lengths, separated by commas (default 512,2048)")
    parser.add_argument(
        "--presets",
        type=_names,
        help="rows of this project, separated by commas, as in `turbocache eval` (default k4v4,turbo2_5), or none; "
        "PRESET:BACKEND sets one row's backend; the first row is also measured as a rotating cache",
    )
    parser.add_argument(
        "--against",
        type=_names,
        help="mlx-lm's caches, separated by commas: kv, rotating, quantized, rotating-quantized (default all), or none",
    )
    parser.add_argument("--batch", type=int, help="sessions that run together (default 1)")
    parser.add_argument("--budget", help="memory for sessions (default 4GiB)")
    parser.add_argument("--generate", type=int, help="tokens to time (default 32)")
    parser.add_argument("--repeat", type=int, help="runs of each case (default 1)")
    parser.add_argument(
        "--warm-up",
        type=int,
        metavar="TOKENS",
        help="tokens of each prompt that a warm-up reads (default: all on a GPU, 64 on a CPU)",
    )
    parser.add_argument("--chunk", type=int, help="tokens of a forward pass in prefill (default 512)")
    parser.add_argument("--keep", type=int, help="sink tokens of this project's caches (default 64)")
    parser.add_argument("--window", type=int, help="raw newest tokens of this project's caches (default 128)")
    parser.add_argument(
        "--max-size", type=int, help="tokens of every rotating cache (default half of the shortest context)"
    )
    parser.add_argument("--backend", help=one_of(default="auto"))
    parser.add_argument("--timeout", type=float, help="seconds until a run is stopped (default 600)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for bench.json, bench.md and the plots")
    parser.add_argument(
        "--matrix",
        type=Path,
        metavar="DIR",
        help="measure nothing: rewrite the table in DIR/README.md and the runs' pages from DIR/*/bench.json",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and write files. Returns the exit status: 1 if a cache of this project did not run."""
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
    # Imported here, so that `--help` does not wait for MLX.
    from turbocache.benchmark import report
    from turbocache.benchmark.run import Benchmark
    from turbocache.documents import as_json, make_folder, write_text

    settings = _settings(options)
    if options.out:  # a folder that can't be written must fail before minutes of work
        make_folder(options.out / "bench.json")
    load = _load()
    benchmark = Benchmark(settings)

    def document() -> dict[str, Any]:
        return report.document(benchmark.results(), settings, command_line(options), [*load, *_load()])

    for line in benchmark.run():
        print(line, file=sys.stderr, flush=True)
        if options.out:  # kept if the benchmark is interrupted
            write_text(options.out / "bench.json", as_json(document()))
    results = document()
    if options.out:
        write_text(options.out / "bench.json", as_json(results))
        write_text(options.out / "bench.md", report.markdown(results, _plots(results, options.out)))
    print(f"{report.machine_line(results)}\n\n{report.tables(results)}")
    failed = [case for case in results["cases"] if case["ours"] and "unavailable" in case]
    for case in failed:
        print(f"turbocache bench: {case['label']} did not run: {case['unavailable']}", file=sys.stderr)
    return 1 if failed else 0


def _plots(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw the figures. Returns their names. Without matplotlib: prints one line and returns none."""
    from turbocache.benchmark.plots import draw
    from turbocache.documents import PlotsUnavailable

    try:
        return draw(results, folder)
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
    """The command line that repeats this run. A model's directory has no folder."""
    words = ["turbocache", "bench"]
    for name in _OPTIONS:
        value = getattr(options, name)
        if value is not None:
            if name == "model" and Path(value).exists():
                value = Path(value).name
            text = ",".join(str(part) for part in value) or "none" if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def _load() -> list[float]:
    return [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []


def _names(text: str) -> tuple[str, ...]:
    names = names_of(text)
    return () if names == ("none",) else names
