"""`python -m tests.models` writes docs/models.md; names as arguments only print their rows."""

import sys

import turbocache  # noqa: F401  (before everything that imports mlx)
from tests.models.checks import examine
from tests.models.report import DOCUMENT, document, row
from tests.models.tiny import architectures, build


def main(names: list[str]) -> None:
    outcomes = {}
    for name in names or architectures():
        outcomes[name] = examine(build(name))
        print(" | ".join(row(name, outcomes[name])), flush=True)
    if not names:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
