"""`turbocache eval`: the options, and the way from them to files."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from turbocache.backends import one_of

_DEFAULT_BACKEND = "reference"


def add_to(commands: Any) -> None:
    """Add the command to an argument parser's commands. Nothing heavy is imported."""
    parser = commands.add_parser(
        "eval", help="measure what compression does to a model: KL divergence, perplexity, recall"
    )
    parser.add_argument("model", help="a local directory or a Hugging Face id")
    parser.add_argument("--text", required=True, type=Path, help="text to read, UTF-8")
    parser.add_argument("--json", required=True, type=Path, help="where the results go; a run that was killed goes on")
    parser.add_argument(
        "--presets",
        type=_names,
        default=("all",),
        help="rows, by commas: presets, mlx-lm-BITS, mlx-vlm-BITS, full; or the groups presets, mlx-lm, mlx-vlm, all "
        "(default all). PRESET:BACKEND and PRESET@KEEP/WINDOW or PRESET@KEEP/WINDOW/SIZE set one row's own",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens a window (default %(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="windows, from the text's start; 0 for needles only")
    parser.add_argument("--score-from", type=int, default=0, help="first position that is scored (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens a forward pass (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for needles made from the text (default %(default)s)")
    parser.add_argument("--backend", default=_DEFAULT_BACKEND, help=one_of(_DEFAULT_BACKEND))
    parser.add_argument("--keep", type=_integers, help="sink tokens (default 64); several, by commas, are a sweep")
    parser.add_argument("--window", type=_integers, help="raw newest tokens (default 128); several are a sweep")
    parser.add_argument(
        "--needles",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="ask for needles: of JSON-lines files, or without a file made from the text",
    )
    parser.add_argument("--lengths", type=_integers, help="needle contexts in tokens, by commas")
    parser.add_argument(
        "--depths", type=_floats, default=(0.1, 0.5, 0.9), help="of made needles, as shares of the context"
    )
    parser.add_argument(
        "--trials",
        type=_integers,
        help="needles for each depth: one number, or one for each of --lengths (default: 5 made ones, all of files)",
    )
    parser.add_argument("--markdown", type=Path, help="a page of results")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="figures, PNG and SVG; needs turbocache[plots]")
    parser.add_argument("--restart", action="store_true", help="drop what an earlier run has left instead of going on")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate and write; returns the exit status. Numbers are written also where plots can't be."""
    from turbocache.documents import DocumentError
    from turbocache.evaluation.settings import EvaluationError
    from turbocache.mlxlm.model import ModelError

    try:
        return _evaluate(options)
    except (DocumentError, EvaluationError, ModelError) as error:
        print(f"turbocache eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("turbocache eval: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _evaluate(options: argparse.Namespace) -> int:
    # Here and not above: loading MLX takes a second that `--help` need not wait for.
    from tqdm import tqdm

    from turbocache.documents import as_json, make_folder, write_text
    from turbocache.evaluation import report
    from turbocache.evaluation.journal import Journal
    from turbocache.evaluation.run import journal_path, prepare, run
    from turbocache.evaluation.text import read_text
    from turbocache.mlxlm.model import load_model

    settings = _settings(options)
    read_text(settings.text)  # before the model, which takes longer
    work = prepare(load_model(options.model), settings)
    # A line now and then where the output is no terminal.
    seconds = 0.5 if sys.stderr.isatty() else 60
    # The first thing written: a folder that is missing or read-only is told before hours of work.
    make_folder(options.json)
    with (
        Journal(journal_path(options.json), work.circumstances(), restart=options.restart) as journal,
        tqdm(total=work.todo(journal.results), unit="tok", unit_scale=True, mininterval=seconds) as progress,
    ):
        rows = run(work, journal, progress)
    told = report.document(work, rows, command_line(options))
    write_text(options.json, as_json(told))
    print(report.table(rows))
    return _write_pages(options, told)


def _write_pages(options: argparse.Namespace, told: dict[str, Any]) -> int:
    from turbocache.documents import PlotsUnavailable, write_text
    from turbocache.evaluation import report
    from turbocache.evaluation.plots import draw

    images: list[str] = []
    status = 0
    if options.plots:
        try:
            images = draw(told, options.plots)
        except PlotsUnavailable as error:
            print(f"turbocache eval: {error} (the numbers are in {options.json})", file=sys.stderr)
            status = 1
    if options.markdown:
        shown = [_beside(options.plots / name, options.markdown) for name in images]
        write_text(options.markdown, report.markdown(told, shown))
    return status


def _settings(options: argparse.Namespace) -> Any:
    from turbocache.evaluation.settings import Settings

    same = ("text", "context", "windows", "score_from", "chunk", "seed", "backend", "lengths", "depths", "trials")
    given = {name: getattr(options, name) for name in ("keep", "window") if getattr(options, name) is not None}
    needles = None if options.needles is None else tuple(options.needles)
    return Settings(rows=options.presets, needles=needles, **{name: getattr(options, name) for name in same}, **given)


def command_line(options: argparse.Namespace) -> str:
    """The command that measures this, with files by their names."""
    words = ["turbocache", "eval", Path(options.model).name if Path(options.model).exists() else options.model]
    plain = {"context": 2048, "windows": 3, "score_from": 0, "chunk": 512, "seed": 0, "backend": _DEFAULT_BACKEND}
    words += ["--text", options.text.name, "--presets", ",".join(options.presets)]
    for name, default in plain.items():
        if getattr(options, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("keep", "window", "lengths", "trials"):
        if getattr(options, name):
            words += [f"--{name}", ",".join(str(value) for value in getattr(options, name))]
    if options.needles is not None:
        words += ["--needles", *(path.name for path in options.needles)]
        words += ["--depths", ",".join(f"{depth:g}" for depth in options.depths)] if not options.needles else []
    return shlex.join([*words, "--json", options.json.name])


def _beside(image: Path, page: Path) -> str:
    image, folder = image.resolve(), page.resolve().parent
    return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else image.name


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("no names given")
    return names


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_number(part, int) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(_number(part, float) for part in text.split(","))


def _number(text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
