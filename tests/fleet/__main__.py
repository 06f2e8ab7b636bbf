"""The long form of what `make test-all` does in short: three servers behind nginx, 32 clients, one kill and one stop.

`python -m tests.fleet` prints the table of docs/fleet.md; needs nginx (Debian's package).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fleet.losing_servers import Size, lose_servers
from tests.fleet.proxy import NGINX


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Exit status 0 when nothing was wrong, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet", description=__doc__)
    parser.add_argument("--save-after", type=float, default=Size.save_after, help="default: %(default)g s")
    parser.add_argument("--pause", type=float, default=Size.pause, help="between turns, default: %(default)g s")
    options = parser.parse_args()
    if NGINX is None:
        parser.error("nginx is not installed")
    with tempfile.TemporaryDirectory() as folder:
        found = lose_servers(Path(folder), Size(save_after=options.save_after, pause=options.pause), say)
    print("\n".join(found.lines()))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
