"""One file of named arrays and a manifest: safetensors, written piece by piece, and read only if every byte is right.

    8 bytes   length of the header
    header    JSON, as safetensors has it; under `__metadata__` the `manifest`, a digest `head` of the header itself,
              and a `digest` of everything
    arrays    in the header's order, without gaps

Any safetensors reader opens it. It is written here and not by one, because these want all arrays at once, and a session
is written when there is no memory for a copy of it; and because they do not notice a flipped bit.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import mlx.core as mx
import numpy as np

from turbocache.storage.whole_file import PARTIAL, replacing

SUFFIX = ".safetensors"
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 1 << 28
_BLOCK = 1 << 20
_DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}

Refusal = Literal[
    "missing", "unreadable", "truncated", "corrupt",
    "other_version", "other_model", "other_group", "other_layout", "other_rotation", "other_codebook",
]  # fmt: skip
"""Why a session file is not read, from a fixed set."""


class SessionFileError(RuntimeError):
    """A session file can't be used; `code` says why in a word, the message in a sentence."""

    def __init__(self, code: Refusal, message: str) -> None:
        super().__init__(message)
        self.code: Refusal = code


@dataclass(frozen=True, slots=True)
class Piece:
    """An array that will be written: what it is, and how it is made when its turn comes."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    make: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.size


def piece(array: mx.array) -> Piece:
    """An array that exists already."""
    return Piece(tuple(array.shape), array.dtype, lambda: array)


def write(path: Path, pieces: Mapping[str, Piece], manifest: Mapping[str, Any]) -> int:
    """Put a file into place, whole or not at all; returns its bytes. Each piece is made, written and let go in turn.

    What was at `path` before is replaced in the end, in one step. Raises OSError, and then leaves nothing behind.
    """
    entries, at = {}, 0
    for name, part in pieces.items():
        end = at + part.nbytes
        entries[name] = {"dtype": _DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [at, end]}
        at = end
    said = json.dumps(manifest, sort_keys=True)
    digest = _new_digest(entries, said)
    head = digest.hexdigest()
    blank = _header(entries, said, head, "0" * len(head))
    with replacing(path) as file:
        file.write(blank)
        for name, part in pieces.items():
            data = _bytes_of(part.make())
            if len(data) != part.nbytes:
                raise ValueError(f"{name} has {len(data)} bytes instead of {part.nbytes}")
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_header(entries, said, head, digest.hexdigest()))
    return len(blank) + at


def read_manifest(path: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """The manifest, which is as it was written, and the bytes of one array, which may not be: only `open_checked` looks
    at every byte. Raises SessionFileError.
    """
    with _opened(path) as file:
        entries, said, _ = _parsed(path, file)
        manifest = _manifest(path, said)
        if name not in entries:
            raise SessionFileError("other_version", f"{path.name}: there is no {name}")
        start, end = entries[name]["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        return manifest, file.read(end - start)


def open_checked(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """The manifest and the arrays, which MLX reads when they are needed, of a file whose every byte was checked. Where
    another is put in its place meanwhile, of that one.

    Raises SessionFileError.
    """
    while True:
        with _opened(path) as file:
            entries, said, claimed = _parsed(path, file)
            digest = _new_digest(entries, said)
            for block in _blocks(file):
                digest.update(block)
            if digest.hexdigest() != claimed:
                raise SessionFileError("corrupt", f"{path.name}: the contents are not what was written")
            try:
                arrays = mx.load(str(path))
                # MLX has opened what lies there, and the checked file is still open, so its inode is nobody else's.
                same = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError as error:
                raise SessionFileError("missing", f"{path.name} is not there any more") from error
            except (RuntimeError, ValueError) as error:
                raise SessionFileError("unreadable", f"{path.name}: {error}") from error
        if same:
            assert isinstance(arrays, dict)
            return _manifest(path, said), arrays


def remove_partial(
    folder: Path, lease: Callable[[str], AbstractContextManager[bool]] = lambda name: nullcontext(True)
) -> int:
    """Remove what writes that were killed have left; returns how many there were. `lease` tells, for the time of its
    block, whether a file of this name is being written by nobody else.
    """
    n = 0
    for path in folder.glob(f"*{SUFFIX}{PARTIAL}"):
        with lease(path.name.removesuffix(PARTIAL)) as mine:
            if mine:
                path.unlink(missing_ok=True)
                n += 1
    return n


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise SessionFileError("missing", f"{path.name} is not there") from error
    except OSError as error:
        raise SessionFileError("unreadable", f"{path.name}: {error.strerror}") from error


def _parsed(path: Path, file: BinaryIO) -> tuple[dict[str, Any], str, str]:
    """The header's arrays, manifest and digest, of a file that is as long as they say and then stands behind them."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(_LENGTH.size)
    if len(first) < _LENGTH.size:
        raise SessionFileError("truncated", f"{path.name}: {size} bytes")
    (length,) = _LENGTH.unpack(first)
    if length > min(_LONGEST_HEADER, size - _LENGTH.size):
        raise SessionFileError("truncated", f"{path.name}: a header of {length} bytes in a file of {size}")
    text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        if "head" not in metadata:
            raise SessionFileError("other_version", f"{path.name}: written by an earlier version")
        said, head, digest = metadata["manifest"], metadata["head"], metadata["digest"]
        needed = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        if not (isinstance(said, str) and isinstance(digest, str)):
            raise TypeError("the manifest is not text")
        if head != _new_digest(entries, said).hexdigest():
            raise ValueError("it is not what was written")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise SessionFileError("corrupt", f"{path.name}: the header is damaged ({type(error).__name__})") from error
    held = size - _LENGTH.size - length
    if held != needed:
        raise SessionFileError("truncated", f"{path.name}: {held} bytes of arrays instead of {needed}")
    return entries, said, digest


def _manifest(path: Path, said: str) -> dict[str, Any]:
    try:
        manifest = json.loads(said)
    except ValueError as error:
        raise SessionFileError("corrupt", f"{path.name}: the manifest is damaged") from error
    if not isinstance(manifest, dict):
        raise SessionFileError("corrupt", f"{path.name}: the manifest is damaged")
    return manifest


def _header(entries: Mapping[str, Any], said: str, head: str, digest: str) -> bytes:
    metadata = {"manifest": said, "head": head, "digest": digest}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _new_digest(entries: Mapping[str, Any], said: str) -> "hashlib._Hash":
    return hashlib.sha256(_header(entries, said, "", ""))


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _bytes_of(array: mx.array) -> bytes:
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(plain)).tobytes()
