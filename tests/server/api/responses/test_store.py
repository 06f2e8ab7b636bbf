"""server.api.responses.store: what is kept, what goes, and the files."""

import logging
import shutil
import stat
from pathlib import Path

import pytest

from server.api.responses.answer import ResponseBody
from server.api.responses.files import ResponseFiles
from server.api.responses.input import InputMessage
from server.api.responses.store import PreviousResponseNotFound, ResponseStore, StoredResponse, open_store
from server.errors import NotFound, StartupError
from server.sessions.leases import NAME, Leases


def stored(id: str, previous: str | None = None, text: str = "hi", owner: str = "anna") -> StoredResponse:
    body = {
        **dict.fromkeys(ResponseBody.model_fields),
        "id": id, "previous_response_id": previous, "object": "response", "created_at": 1, "status": "completed",
        "background": False, "metadata": {}, "model": "m", "parallel_tool_calls": True, "reasoning": {},
        "service_tier": "default", "store": True, "temperature": 1.0, "text": {}, "tools": [], "top_logprobs": 0,
        "top_p": 1.0, "truncation": "disabled",
        "output": [InputMessage(role="assistant", content=f"answer {id}", id=f"msg_{id}").item()],
    }  # fmt: skip
    item = InputMessage(role="user", content=text, id=f"in_{id}").item()
    return StoredResponse(owner=owner, session=None, input=[item], response=ResponseBody.model_validate(body))


def has(store: ResponseStore, id: str) -> bool:
    """Without using it."""
    return id in store._kept


def test_the_conversation_that_was_unused_for_longest_goes_first_and_from_its_end() -> None:
    store = ResponseStore(most=4)
    for id, previous in (("a1", None), ("a2", "a1"), ("b1", None), ("b2", "b1")):
        store.add(stored(id, previous))
    store.add(stored("c1"))
    assert [id for id in ("a1", "a2", "b1", "b2", "c1") if has(store, id)] == ["a1", "b1", "b2", "c1"]
    assert [found.id for found in store.chain("anna", "b2")] == ["b1", "b2"]
    store.chain("anna", "a1")
    store.add(stored("c2", "c1"))
    assert [id for id in ("a1", "b1", "b2", "c1", "c2") if has(store, id)] == ["a1", "b1", "c1", "c2"]


def test_bytes_are_bounded_too() -> None:
    size = len(stored("r0", text="x" * 10_000).model_dump_json(exclude_unset=True))
    store = ResponseStore(most_bytes=3 * size + 10)
    for i in range(9):
        store.add(stored(f"r{i}", text="x" * 10_000))
        assert store.n_bytes <= 3 * size + 10
    assert (len(store), store.n_bytes) == (3, 3 * size)
    for i in range(6, 9):
        store.remove("anna", f"r{i}")
    assert (len(store), store.n_bytes) == (0, 0)
    with pytest.raises(NotFound):
        store.item("anna", "msg_r8")


def test_items_are_found_in_the_latest_response_that_has_them() -> None:
    store = ResponseStore()
    store.add(stored("a"))
    again = stored("b", text="more")
    again.input = [*stored("a").response.output, *again.input]
    store.add(again)
    store.add(stored("a_of_boris", owner="boris"))
    assert store.item("anna", "msg_a") == again.input[0]
    store.remove("anna", "a")
    assert store.item("anna", "msg_a") == again.input[0]
    with pytest.raises(NotFound):
        store.item("boris", "msg_a")


def test_a_conversation_without_its_beginning_can_not_be_gone_on_with() -> None:
    store = ResponseStore()
    store.add(stored("a"))
    store.add(stored("b", "a"))
    store.remove("anna", "a")
    with pytest.raises(PreviousResponseNotFound, match="'a'"):
        store.chain("anna", "b")
    with pytest.raises(PreviousResponseNotFound):
        store.chain("boris", "b")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {NAME}


def test_files_follow_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    store = ResponseStore(ResponseFiles(folder), most=2)
    for id in "abc":
        store.add(stored(id))
    store.remove("anna", "b")
    store.close()
    assert names(folder) == {"c.json"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "c.json").stat().st_mode) == 0o600
    again = ResponseStore(ResponseFiles(folder))
    assert again.get("anna", "c") == stored("c")
    again.close()


def test_a_start_knows_which_conversation_was_used_last(tmp_path: Path) -> None:
    first = ResponseStore(ResponseFiles(tmp_path))
    for id, previous in (("a1", None), ("b1", None), ("a2", "a1")):
        first.add(stored(id, previous))
    first.close()
    again = ResponseStore(ResponseFiles(tmp_path), most=2)
    assert (has(again, "b1"), [found.id for found in again.chain("anna", "a2")]) == (False, ["a1", "a2"])
    again.close()
    assert names(tmp_path) == {"a1.json", "a2.json"}


def test_damaged_files_are_left_out_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ResponseStore(ResponseFiles(tmp_path))
    for id in ("cut", "flipped", "whole"):
        store.add(stored(id))
    store.close()
    cut, flipped = tmp_path / "cut.json", tmp_path / "flipped.json"
    cut.write_bytes(cut.read_bytes()[:-20])
    flipped.write_bytes(flipped.read_bytes().replace(b'"hi"', b'"ho"'))
    (tmp_path / "killed.json.partial").write_bytes(b"half")
    (tmp_path / "empty.json").write_bytes(b"")
    other = stored("other").model_dump_json().replace('"store":true', '"store":7').encode()
    files = ResponseFiles(tmp_path)
    files.write("other", other)
    files.close()
    caplog.set_level(logging.WARNING)
    again = ResponseStore(ResponseFiles(tmp_path))
    again.close()
    assert (len(again), has(again, "whole")) == (1, True)
    assert len([record for record in caplog.records if "left out" in record.message]) == 4
    refused = {f"{id}.json.refused" for id in ("cut", "flipped", "empty", "other")}
    assert names(tmp_path) == {"whole.json", *refused}
    ResponseStore(ResponseFiles(tmp_path)).close()
    assert names(tmp_path) == {"whole.json"}


def test_what_another_server_has_written_is_found_and_what_was_removed_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    one, two = (ResponseStore(ResponseFiles(folder), most=3) for _ in range(2))
    one.add(stored("a1"))
    one.add(stored("a2", "a1"))
    one.close()
    shutil.copy(folder / "a1.json", tmp_path / "a1.json")
    assert [found.id for found in two.chain("anna", "a2")] == ["a1", "a2"]
    assert two.item("anna", "msg_a2").id == "msg_a2"
    for owner, id in (("boris", "a2"), ("anna", "../a1"), ("anna", "a3"), ("anna", "x" * 5000)):
        with pytest.raises(NotFound):
            two.get(owner, id)
    two.add(stored("b1"))
    two.add(stored("c1"))
    assert len(two) == 3
    two.remove("anna", "a1")
    with pytest.raises(NotFound):
        two.get("anna", "a1")
    two.close()


def test_a_start_leaves_what_another_server_is_writing(tmp_path: Path) -> None:
    half = tmp_path / "a.json.partial"
    half.write_bytes(b"half")
    theirs = Leases(tmp_path)
    theirs.take("a.json")
    ResponseStore(ResponseFiles(tmp_path)).close()
    assert half.exists()
    theirs.close()
    ResponseStore(ResponseFiles(tmp_path)).close()
    assert not half.exists()


def test_a_disk_that_fails_costs_the_file_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "responses"
    store = ResponseStore(ResponseFiles(folder))
    shutil.rmtree(folder)
    store.add(stored("a"))
    store.close()
    assert store.get("anna", "a").id == "a"
    assert "could not be kept" in caplog.text


def test_a_folder_that_can_not_be_used_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="TURBOCACHE_SESSION_DIR"):
        open_store(tmp_path / "file")
    open_store(None).close()
