"""Stored responses, which clients continue by their ids.

Memory holds at most MOST of them and MOST_BYTES of their JSON; Python's objects take a few times as much. The least
recently used conversations go first. A conversation that exceeds the limits alone can't be continued. With a folder
each response is in a file as well, and a start reads the files back. A file of another server is read on demand.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from server.api.responses.answer import ResponseBody
from server.api.responses.files import ResponseFiles
from server.api.responses.items import Item
from server.errors import InvalidRequest, NotFound, StartupError

MOST = 10_000
MOST_BYTES = 64 << 20


class StoredResponse(BaseModel):
    """A response with its own input. Only `owner` gets it."""

    owner: str
    session: str | None
    """Name of the KV session."""
    input: list[Item]
    response: ResponseBody

    @property
    def id(self) -> str:
        return self.response.id

    @property
    def previous(self) -> str | None:
        return self.response.previous_response_id


class PreviousResponseNotFound(InvalidRequest):
    """400, as in OpenAI's API: the conversation can't be continued because one of its responses is missing."""

    default_code = "previous_response_not_found"

    def __init__(self, id: str) -> None:
        super().__init__(f"Previous response with id '{id[:100]}' not found.", param="previous_response_id")


class ResponseStore:
    """Only the event loop's thread uses it. Another thread writes the files."""

    def __init__(self, files: ResponseFiles | None = None, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._files = files
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        """Least recently used first, and within a conversation the latest first: a conversation without its end can be
        continued, one without its beginning can't.
        """
        self._sizes: dict[str, int] = {}
        self.n_bytes = 0
        self._with_item: dict[tuple[str, str], str] = {}
        """The latest response with an item, by owner and item id."""
        if files is not None:
            self._read(files)
        followed = {stored.previous for stored in self._kept.values()}
        for id in [id for id in self._kept if id not in followed]:
            self._use(id)
        self._evict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, owner: str, id: str) -> StoredResponse:
        """Raises NotFound if it is missing or belongs to another key."""
        if (stored := self._find(id)) is None or stored.owner != owner:
            raise NotFound(f"Response with id '{id[:100]}' not found.", param="response_id", code="response_not_found")
        self._use(id)
        self._evict()
        return stored

    def chain(self, owner: str, id: str | None) -> list[StoredResponse]:
        """A response and all earlier ones of its conversation, the first one first. Raises PreviousResponseNotFound."""
        chain: list[StoredResponse] = []
        while id is not None:
            if (stored := self._find(id)) is None or stored.owner != owner:
                raise PreviousResponseNotFound(id)
            chain.append(stored)
            id = stored.previous
        if chain:
            self._use(chain[0].id)
            self._evict()
        return chain[::-1]

    def item(self, owner: str, id: str) -> Item:
        """An item of a response, by the item's id. Raises NotFound."""
        if (stored := self._kept.get(self._with_item.get((owner, id), ""))) is not None:
            self._use(stored.id)
            return next(item for item in _items(stored) if item.id == id)
        raise NotFound(
            f"Item with id '{id[:100]}' not found. Items are not persisted when `store` is set to false. Try again "
            "with `store` set to true, or send the item itself.",
            param="input",
        )

    def add(self, stored: StoredResponse) -> None:
        """Stores a response. Evicts others if there are too many."""
        text = stored.model_dump_json(exclude_unset=True).encode()
        self._keep(stored, len(text))
        self._use(stored.id)
        if self._files is not None:
            self._files.write(stored.id, text)
        self._evict()

    def remove(self, owner: str, id: str) -> None:
        """Raises NotFound. Later responses of the conversation can't be continued any more."""
        self.get(owner, id)
        self._drop(id)

    def close(self) -> None:
        """Waits for the files."""
        if self._files is not None:
            self._files.close()

    def _read(self, files: ResponseFiles) -> None:
        for id, text in files.read():
            self._take(files, id, text)

    def _find(self, id: str) -> StoredResponse | None:
        """A response from memory, or from a file of another server."""
        if (stored := self._kept.get(id)) is None and self._files is not None and (text := self._files.find(id)):
            return self._take(self._files, id, text)
        return stored

    def _take(self, files: ResponseFiles, id: str, text: bytes) -> StoredResponse | None:
        """Stores a file's response if this version understands it."""
        try:
            stored = StoredResponse.model_validate_json(text)
        except ValidationError:
            files.refuse(id, "another version has written it")
            return None
        self._keep(stored, len(text))
        return stored

    def _keep(self, stored: StoredResponse, n_bytes: int) -> None:
        self._kept[stored.id], self._sizes[stored.id] = stored, n_bytes
        self.n_bytes += n_bytes
        for item in _items(stored):
            self._with_item[stored.owner, item.id] = stored.id

    def _use(self, id: str | None) -> None:
        while id is not None and (stored := self._kept.get(id)) is not None:
            self._kept.move_to_end(id)
            id = stored.previous

    def _evict(self) -> None:
        while len(self._kept) > self._most or self.n_bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, id: str) -> None:
        stored = self._kept.pop(id)
        self.n_bytes -= self._sizes.pop(id)
        for item in _items(stored):
            if self._with_item.get((stored.owner, item.id)) == id:
                del self._with_item[stored.owner, item.id]
        if self._files is not None:
            self._files.remove(id)


def _items(stored: StoredResponse) -> Iterator[Item]:
    yield from stored.input
    yield from stored.response.output


def open_store(session_dir: Path | None) -> ResponseStore:
    """The store in a session folder. Raises StartupError if the folder can't be used."""
    if session_dir is None:
        return ResponseStore()
    folder = session_dir / "responses"
    try:
        files = ResponseFiles(folder)
    except OSError as error:
        raise StartupError(f"TURBOCACHE_SESSION_DIR: {folder} can't be used: {error.strerror}.") from error
    return ResponseStore(files)


def store_of(request: Request) -> ResponseStore:
    """The server's store, which the application puts on its state."""
    return cast(ResponseStore, request.app.state.responses)
