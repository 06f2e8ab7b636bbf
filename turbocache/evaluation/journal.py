"""A file of results, one line each, so that a killed run can continue, and the progress that a person sees."""

import json
import os
from pathlib import Path
from typing import Any, Protocol

from turbocache.evaluation.settings import EvaluationError


class Progress(Protocol):
    """A progress bar: a description of the current part, and the number of new tokens."""

    def set_description(self, desc: str, refresh: bool) -> object: ...

    def update(self, n: int, /) -> object: ...


class Journal:
    """A file of JSON lines: the circumstances of all results, then each result. Drops an incomplete last line."""

    def __init__(self, path: Path, circumstances: dict[str, Any], *, restart: bool = False) -> None:
        """Open or create the journal. Raises EvaluationError if it has other circumstances."""
        self._path = path
        self.results: dict[str, Any] = {}
        header = json.loads(json.dumps(circumstances))
        try:
            whole = self._whole_lines() if path.exists() and not restart else []
            if whole:
                self._check(whole[0], header)
                self.results = {line["key"]: line["result"] for line in whole[1:]}
            self._file = open(path, "ab" if whole else "wb")  # noqa: SIM115  (held until close)
        except OSError as error:
            raise EvaluationError(f"can't write {str(path)!r}: {error.strerror}") from error
        if not whole:
            self._append(header)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def record(self, key: str, result: Any) -> None:
        """Write a result. Floats are read back exactly."""
        self._append({"key": key, "result": result})
        self.results[key] = result

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        try:
            lines = [json.loads(line) for line in content[:end].splitlines()]
            if any(not isinstance(line, dict) for line in lines) or any("key" not in line for line in lines[1:]):
                raise ValueError("lines of another form")
        except ValueError as error:
            raise EvaluationError(
                f"{str(self._path)!r} is no record of an evaluation: remove it or run with --restart"
            ) from error
        if end < len(content):
            os.truncate(self._path, end)
        return lines

    def _check(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if names:
            differs = "; ".join(f"{name} {old.get(name)!r} then, {new.get(name)!r} now" for name in names)
            raise EvaluationError(
                f"{str(self._path)!r} holds results of other settings ({differs}): "
                "run with --restart to start over, or with another --json"
            )
