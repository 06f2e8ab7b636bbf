"""`turbocache eval`: its options and the files that it writes."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from turbocache.backends import one_of

_DEFAULT_BACKEND = "reference"
_DEFAULT_WINDOWS = 3
_DEFAULT_LENGTHS = (150, 300)
"""Of long answers."""


def add_to(commands: Any) -> None:
    """Add the command to an argument parser's commands. Nothing heavy is imported."""
    parser = commands.add_parser(
        "eval", help="measure what compression does to a model: KL divergence, perplexity, recall"
    )
    parser.add_argument("model", help="a local directory or a Hugging Face id")
    parser.add_argument("--text", required=True, type=Path, help="text to read, UTF-8")
    parser.add_argument("--json", required=True, type=Path, help="file for the results; a killed run continues")
    parser.add_argument(
        "--presets",
        type=names_of,
        help="rows, separated by commas: presets, mlx-lm-BITS, mlx-vlm-BITS, kvarn-BITS, full; or the groups presets, "
        "mlx-lm, mlx-vlm, kvarn, all (default all; with --suite off, the default preset, and 8 and 4 bits of mlx-lm). "
        "PRESET:BACKEND, PRESET@KEEP/WINDOW and PRESET@KEEP/WINDOW/SIZE set one row's own",
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window (default %(default)s)")
    parser.add_argument(
        "--windows", type=int, help="windows from the start of the text (default 3, with --suite 0); 0 for needles only"
    )
    parser.add_argument("--score-from", type=int, default=0, help="first position that is scored (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a forward pass (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of needles made from the text (default %(default)s)")
    parser.add_argument("--backend", default=_DEFAULT_BACKEND, help=one_of(_DEFAULT_BACKEND))
    parser.add_argument("--keep", type=integers_of, help="sink tokens (default 64); a list is a sweep")
    parser.add_argument("--window", type=integers_of, help="raw newest tokens (default 128); a list is a sweep")
    parser.add_argument(
        "--needles",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="ask for needles from JSON-lines files; without a file, from needles made from the text",
    )
    parser.add_argument("--lengths", type=integers_of, help="needle contexts in tokens, separated by commas")
    parser.add_argument(
        "--depths", type=_floats, default=(0.1, 0.5, 0.9), help="depths of made needles, as shares of the context"
    )
    parser.add_argument(
        "--trials",
        type=integers_of,
        help="needles for each depth: one number, or one for each of --lengths (default: 5 made ones, or all of files)",
    )
    parser.add_argument(
        "--suite",
        type=names_of,
        default=(),
        metavar="NAMES",
        help="what users see break: drift, facts, sums, arguments, cycles, separated by commas, or all",
    )
    parser.add_argument(
        "--suite-trials", type=int, default=1, help="documents of each suite, and long answers (default %(default)s)"
    )
    parser.add_argument(
        "--suite-context", type=int, default=768, help="tokens of a suite's documents (default %(default)s)"
    )
    parser.add_argument(
        "--answer-lengths",
        type=integers_of,
        default=_DEFAULT_LENGTHS,
        help="lengths at which drift compares answers (default 150,300)",
    )
    parser.add_argument("--markdown", type=Path, help="file for a page of results")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="folder for figures; needs turbocache[plots]")
    parser.add_argument("--restart", action="store_true", help="drop the results of an earlier run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate and write files. Returns the exit status. Without matplotlib the numbers are still written."""
    from turbocache.documents import DocumentError
    from turbocache.evaluation.settings import EvaluationError
    from turbocache.mlxlm.model import ModelError

    try:
        return _evaluate(options)
    except (DocumentError, EvaluationError, ModelError) as error:
        print(f"turbocache eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("turbocache eval: interrupted; the same command continues from here", file=sys.stderr)
        return 130


def _evaluate(options: argparse.Namespace) -> int:
    # Imported here, so that `--help` does not wait a second for MLX.
    from tqdm import tqdm

    from turbocache.documents import as_json, make_folder, write_text
    from turbocache.evaluation import report
    from turbocache.evaluation.journal import Journal
    from turbocache.evaluation.run import journal_path, prepare, run
    from turbocache.evaluation.text import read_text
    from turbocache.mlxlm.model import load_model

    complete(options)
    settings = _settings(options)
    read_text(settings.text)  # checked before the model, which takes longer to load
    work = prepare(load_model(options.model), settings)
    # Fewer lines if the output is not a terminal.
    seconds = 0.5 if sys.stderr.isatty() else 60
    # A folder that can't be written must fail before hours of work.
    make_folder(options.json)
    with (
        Journal(journal_path(options.json), work.circumstances(), restart=options.restart) as journal,
        tqdm(total=work.todo(journal.results), unit="tok", unit_scale=True, mininterval=seconds) as progress,
    ):
        rows = run(work, journal, progress)
    results = report.document(work, rows, command_line(options))
    write_text(options.json, as_json(results))
    print(report.table(rows))
    return _write_pages(options, results)


def complete(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on `--suite`."""
    from turbocache.presets import DEFAULT_PRESET

    if options.presets is None:
        options.presets = ("off", DEFAULT_PRESET, "mlx-lm-8", "mlx-lm-4") if options.suite else ("all",)
    if options.windows is None:
        options.windows = 0 if options.suite else _DEFAULT_WINDOWS


def _write_pages(options: argparse.Namespace, results: dict[str, Any]) -> int:
    from turbocache.documents import PlotsUnavailable, write_text
    from turbocache.evaluation import report
    from turbocache.evaluation.plots import draw

    images: list[str] = []
    status = 0
    if options.plots:
        try:
            images = draw(results, options.plots)
        except PlotsUnavailable as error:
            print(f"turbocache eval: {error} (the numbers are in {options.json})", file=sys.stderr)
            status = 1
    if options.markdown:
        links = [_link(options.plots / name, options.markdown) for name in images]
        write_text(options.markdown, report.markdown(results, links))
    return status


def _settings(options: argparse.Namespace) -> Any:
    from turbocache.evaluation.settings import Settings

    same = ["text", "context", "windows", "score_from", "chunk", "seed", "backend", "lengths", "depths", "trials"]
    same += ["suite_trials", "suite_context", "answer_lengths"]
    given = {name: getattr(options, name) for name in ("keep", "window") if getattr(options, name) is not None}
    needles = None if options.needles is None else tuple(options.needles)
    return Settings(
        rows=options.presets,
        needles=needles,
        suites=options.suite,
        **{name: getattr(options, name) for name in same},
        **given,
    )


def command_line(options: argparse.Namespace) -> str:
    """The command line that repeats this run. Files have no folder."""
    words = ["turbocache", "eval", Path(options.model).name if Path(options.model).exists() else options.model]
    plain: dict[str, Any] = {"context": 2048, "windows": 0 if options.suite else _DEFAULT_WINDOWS}
    plain |= {
        "score_from": 0,
        "chunk": 512,
        "seed": 0,
        "backend": _DEFAULT_BACKEND,
        "suite_trials": 1,
        "suite_context": 768,
    }
    words += ["--text", options.text.name, "--presets", ",".join(options.presets)]
    for name, default in plain.items():
        if getattr(options, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("keep", "window", "lengths", "trials", "suite", "answer_lengths"):
        given = getattr(options, name)
        if given and given != _DEFAULT_LENGTHS:
            words += [f"--{name.replace('_', '-')}", ",".join(str(value) for value in given)]
    if options.needles is not None:
        words += ["--needles", *(path.name for path in options.needles)]
        words += ["--depths", ",".join(f"{depth:g}" for depth in options.depths)] if not options.needles else []
    return shlex.join([*words, "--json", options.json.name])


def _link(image: Path, page: Path) -> str:
    image, folder = image.resolve(), page.resolve().parent
    return image.relative_to(folder).as_posix() if image.is_relative_to(folder) else image.name


def names_of(text: str) -> tuple[str, ...]:
    """The names in a list separated by commas. Raises ArgumentTypeError if there are none."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("no names given")
    return names


def integers_of(text: str) -> tuple[int, ...]:
    """The integers in a list separated by commas. Raises ArgumentTypeError."""
    return tuple(_number(part, int) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(_number(part, float) for part in text.split(","))


def _number(text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
