"""A file of named arrays and a manifest: safetensors, written array by array and checked by digests.

    8 bytes   length of the header
    header    JSON of safetensors. `__metadata__` has the `manifest`, a digest `head` of the header, and a `digest` of
              everything
    arrays    in the header's order, without gaps

Any safetensors reader opens it. We write the file ourselves: safetensors writers take all arrays at once, and a session
is written when there is no memory for a copy. We check it ourselves: safetensors readers miss a flipped bit.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
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
"""Why a session file is refused."""


class SessionFileError(RuntimeError):
    """A session file can't be used. The message says why, and `code` says it in a word."""

    def __init__(self, code: Refusal, message: str) -> None:
        super().__init__(message)
        self.code: Refusal = code


@dataclass(frozen=True, slots=True)
class Piece:
    """An array to write."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    make: Callable[[], mx.array]
    """Makes the array when it is written."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.size


def piece(array: mx.array) -> Piece:
    """The piece of an array that exists."""
    return Piece(tuple(array.shape), array.dtype, lambda: array)


def write(path: Path, pieces: Mapping[str, Piece], manifest: Mapping[str, Any]) -> int:
    """Write a file and return its size in bytes. Makes, writes and frees one piece after the other.

    The last step replaces what is at `path`. Leaves nothing behind if it raises OSError.
    """
    entries, at = {}, 0
    for name, part in pieces.items():
        end = at + part.nbytes
        entries[name] = {"dtype": _DTYPES[part.dtype], "shape": list(part.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(manifest, sort_keys=True)
    digest = _new_digest(entries, text)
    head = digest.hexdigest()
    blank = _header(entries, text, head, "0" * len(head))
    with replacing(path) as file:
        file.write(blank)
        for name, part in pieces.items():
            data = _bytes_of(part.make())
            if len(data) != part.nbytes:
                raise ValueError(f"{name} has {len(data)} bytes instead of {part.nbytes}")
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(_header(entries, text, head, digest.hexdigest()))
    return len(blank) + at


def read_manifest(path: Path, name: str) -> tuple[dict[str, Any], bytes]:
    """The manifest, which is checked, and the bytes of one array, which only `open_checked` checks.

    Raises SessionFileError.
    """
    with _opened(path) as file:
        entries, text, _ = _parsed(path, file)
        manifest = _manifest(path, text)
        if name not in entries:
            raise SessionFileError("other_version", f"{path.name}: there is no {name}")
        start, end = entries[name]["data_offsets"]
        file.seek(start, os.SEEK_CUR)
        return manifest, file.read(end - start)


def open_checked(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Check every byte of a file. Returns the manifest and the arrays, which MLX reads when they are needed.

    If another file replaces it during the check, checks and returns that one. Raises SessionFileError.
    """
    while True:
        with _opened(path) as file:
            entries, text, expected = _parsed(path, file)
            digest = _new_digest(entries, text)
            while block := file.read(_BLOCK):
                digest.update(block)
            if digest.hexdigest() != expected:
                raise SessionFileError("corrupt", f"{path.name}: the contents are not what was written")
            try:
                arrays = mx.load(str(path))
                # MLX has opened the file at `path`. The checked file is still open, so no other file has its inode.
                same = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError as error:
                raise SessionFileError("missing", f"{path.name} is not there any more") from error
            except (RuntimeError, ValueError) as error:
                raise SessionFileError("unreadable", f"{path.name}: {error}") from error
        if same:
            assert isinstance(arrays, dict)
            return _manifest(path, text), arrays


def remove_partial(
    folder: Path, lease: Callable[[str], AbstractContextManager[bool]] = lambda name: nullcontext(True)
) -> int:
    """Remove the partial files of killed writers. Returns their number.

    `lease` takes a file's name for its block. It yields False if another process is writing that file.
    """
    n = 0
    for path in folder.glob(f"*{SUFFIX}{PARTIAL}"):
        with lease(path.name.removesuffix(PARTIAL)) as taken:
            if taken:
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
    """Check the header and the file's length. Returns the arrays' entries, the manifest's text and the digest.

    Leaves `file` behind the header.
    """
    size = os.fstat(file.fileno()).st_size
    first = file.read(_LENGTH.size)
    if len(first) < _LENGTH.size:
        raise SessionFileError("truncated", f"{path.name}: {size} bytes")
    (length,) = _LENGTH.unpack(first)
    if length > min(_LONGEST_HEADER, size - _LENGTH.size):
        raise SessionFileError("truncated", f"{path.name}: a header of {length} bytes in a file of {size}")
    header = file.read(length)
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__")
        if "head" not in metadata:
            raise SessionFileError("other_version", f"{path.name}: written by an earlier version")
        text, head, digest = metadata["manifest"], metadata["head"], metadata["digest"]
        needed = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        if not (isinstance(text, str) and isinstance(digest, str)):
            raise TypeError("the manifest is not text")
        if head != _new_digest(entries, text).hexdigest():
            raise ValueError("it is not what was written")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise SessionFileError("corrupt", f"{path.name}: the header is damaged ({type(error).__name__})") from error
    held = size - _LENGTH.size - length
    if held != needed:
        raise SessionFileError("truncated", f"{path.name}: {held} bytes of arrays instead of {needed}")
    return entries, text, digest


def _manifest(path: Path, text: str) -> dict[str, Any]:
    try:
        if isinstance(manifest := json.loads(text), dict):
            return manifest
        raise TypeError("it is no object")
    except (ValueError, TypeError) as error:
        raise SessionFileError("corrupt", f"{path.name}: the manifest is damaged") from error


def _header(entries: Mapping[str, Any], manifest: str, head: str, digest: str) -> bytes:
    metadata = {"manifest": manifest, "head": head, "digest": digest}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _new_digest(entries: Mapping[str, Any], manifest: str) -> "hashlib._Hash":
    return hashlib.sha256(_header(entries, manifest, "", ""))


def _bytes_of(array: mx.array) -> bytes:
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(plain)).tobytes()
