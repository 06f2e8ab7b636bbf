"""What reports share: files replaced in one step, and a machine that is not named."""

import json
import platform
from pathlib import Path

import pytest

from turbocache.documents import DocumentError, machine, make_folder, write_text


def test_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    for content in ("old", "new"):
        write_text(path, content)
        assert path.read_text() == content
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]
    with pytest.raises(DocumentError, match="can't write"):
        write_text(path.parent, "x")
    with pytest.raises(DocumentError, match="can't make the folder"):
        make_folder(path / "below.json")


def test_the_machine_is_not_named() -> None:
    assert platform.node() not in json.dumps(machine())
