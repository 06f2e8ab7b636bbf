"""Dockerfile.dev without an engine: what can be seen by reading. `make test-image` does its steps."""

import re
from pathlib import Path

import pytest

from tests.deploy.dockerfile import ignore_patterns, ignored, parse, read
from tests.deploy.installing import ROOT

STEPS, IGNORE = read(ROOT)


def test_the_base_is_named_to_its_release() -> None:
    assert re.fullmatch(r"python:3\.11-slim-[a-z]+", STEPS[0].text)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    for step in STEPS:
        if step.name == "COPY":
            for source in map(Path, step.flags()[1][:-1]):
                assert (ROOT / source).exists(), str(step)
                assert not ignored(IGNORE, source), str(step)


def test_what_git_ignores_stays_out_of_the_image() -> None:
    names = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert {f"**/{name}" for name in names} <= {f"**/{pattern.removeprefix('**/')}" for pattern in IGNORE}
    assert ignored(IGNORE, Path(".git"))


def test_the_server_is_the_containers_process_and_not_roots() -> None:
    last = {step.name: step for step in STEPS}
    assert last["USER"].text != "root"
    assert last["CMD"].command()[0].endswith("bin/turbocache")
    assert last["HEALTHCHECK"].command()[0] == "python3"


def test_packages_are_those_of_the_checks() -> None:
    """`make test-all` in the image finds what .ci/run installs, or is a different test."""
    ci = (ROOT / ".ci" / "run").read_text()
    installed = next(step.text for step in STEPS if step.name == "RUN").split()
    wanted = re.findall(r"packages\+?=\(([^)]*)\)|--no-install-recommends ([a-z0-9. -]+)", ci)
    names = {name for pair in wanted for name in " ".join(pair).split()} - {
        "python3-venv"
    }  # the base has a Python of its own
    assert {"libopenblas0-pthread", "make", "clang-19"} <= names
    assert names <= set(installed)


def test_the_reader_knows_what_it_reads() -> None:
    steps = parse(
        '# note\nFROM a:1\n\nRUN one \\\n    # between\n    && two\nCOPY --chown=u:u a b/ c/\nCMD ["x", "y z"]\n'
    )
    assert [(step.name, step.line) for step in steps] == [("FROM", 2), ("RUN", 4), ("COPY", 7), ("CMD", 8)]
    assert steps[1].command() == ["/bin/sh", "-c", "one && two"]
    assert steps[2].flags() == ({"chown": "u:u"}, ["a", "b/", "c/"])
    assert steps[3].command() == ["x", "y z"]
    with pytest.raises(ValueError, match="line 1: ADD"):
        parse("ADD a b")
    with pytest.raises(ValueError, match="!keep"):
        ignore_patterns("!keep")
    patterns = ["**/.venv", "**/*.pyc", ".git"]
    out = [".venv/bin/python", "a/.venv", "a/b.pyc", ".git/HEAD"]
    assert [ignored(patterns, Path(path)) for path in [*out, "a/.git", "venv", "a.py"]] == [True] * 4 + [False] * 3
