"""`cycles`: what a server does with a session. Ten times it grows, is forked, edited, written to a file and read back;
then its next tokens are compared with those of a fresh prefill of the same tokens, over the same kind of cache.

Two sessions: one that keeps everything, and one that rotates. A session that can't go back (it has rotated, or mlx-lm's
own cache of a layer has) returns to a fork from before, as the server returns to a checkpoint.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from turbocache.evaluation.divergence import score
from turbocache.evaluation.rows import OpenCache, Row
from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.suites.answers import Reader
from turbocache.evaluation.suites.documents import chance_of, some_hay
from turbocache.evaluation.suites.suite import Figures, Material, Suite, Task, task_key
from turbocache.storage.session_codec import SessionFiles, State
from turbocache.store import can_trim_to, fork, trim

N_CYCLES = 10
N_SCORED = 64
"""Next tokens that are compared."""
MAX_SIZE = 512
"""Tokens that a query of the rotating session sees."""
KINDS = ("kept", "rotating")
_N_FORKS = 2
"""A checkpoint and a side request live beside the session."""
_START = 320
_N_SIDE = 16
"""Tokens that only a fork reads."""
_N_STEPS = 2
"""Tokens of each cycle that are read one by one, as an answer is."""


class CyclesTask(Task):
    """One session through ten cycles."""

    def __init__(self, material: Material, kind: str) -> None:
        name = f"cycles-{kind}"
        chance = chance_of(material, name)
        self._sizes = [(chance.randrange(24, 48), chance.randrange(4, 24)) for _ in range(N_CYCLES)]
        n_hay = _START + sum(grown + edited for grown, edited in self._sizes) + N_SCORED + 1
        if n_hay > material.loaded.max_positions:
            raise EvaluationError(f"the suite cycles needs {n_hay} positions, and {material.loaded.id} has fewer")
        self._tokens = some_hay(material, chance, n_hay)
        self._kind, self._material = kind, material
        self.key = task_key(name, self._tokens, self._sizes)
        self.n_tokens = 2 * n_hay

    def measure(self, row: Row, reference: Any) -> Any:
        reader, supply = self._material.reader, iter(self._tokens)
        opened = self._open(row)
        assert opened.store is not None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session.safetensors"
            session = Session(reader, opened, SessionFiles(self._material.loaded, opened.store), path)
            session.grow(list(islice(supply, _START)))
            for i, (grown, edited) in enumerate(self._sizes):
                session.cycle(supply, grown, edited, in_fork=bool(i % 2))
        following = list(supply)[: N_SCORED + 1]
        fresh = self._open(row).layers
        reader.read(fresh, session.tokens)
        expected, got = (reader.logits(layers, following[:-1], N_SCORED) for layers in (fresh, session.layers))
        scores = score(expected, got, np.array(following[1:]))
        return {"kld": float(scores.kld.mean()), "top1": float(scores.agree.mean()), "tokens": len(session.tokens)}

    def _open(self, row: Row) -> OpenCache:
        opener = row.open if self._kind == "kept" or row.rotating is None else row.rotating(MAX_SIZE)
        return opener(len(self._tokens), _N_FORKS)


class Session:
    """A cache and the tokens in it."""

    def __init__(self, reader: Reader, opened: OpenCache, files: SessionFiles, path: Path) -> None:
        self.tokens: list[int] = []
        self.layers = opened.layers
        self._reader, self._files, self._path = reader, files, path

    def cycle(self, supply: Iterator[int], grown: int, edited: int, in_fork: bool) -> None:
        """Grow, fork, replace the newest `edited` tokens, and go to the disk and back. `in_fork`: the fork goes on."""
        before, n_before = fork(self.layers), len(self.tokens)
        self.grow(list(islice(supply, grown)))
        side, self.layers = (self.layers, fork(self.layers)) if in_fork else (fork(self.layers), self.layers)
        self._reader.read(side, self.tokens[:_N_SIDE])
        kept = len(self.tokens) - edited
        if can_trim_to(self.layers, kept, len(self.tokens)):
            trim(self.layers, edited)
        else:
            self.layers = before
            self._reader.read(self.layers, self.tokens[n_before:kept])
        del before, side
        self.tokens = self.tokens[:kept]
        self.grow(list(islice(supply, edited)))
        self._spill_and_restore()

    def grow(self, ids: Sequence[int]) -> None:
        """Read tokens, the last ones one by one."""
        self._reader.read(self.layers, ids[:-_N_STEPS])
        for token in ids[-_N_STEPS:]:
            self._reader.read(self.layers, [token])
        self.tokens += ids

    def _spill_and_restore(self) -> None:
        self._files.save(self._path, [State("session", np.array(self.tokens), self.layers)])
        self.layers = []
        (state,) = self._files.load(self._path)
        self.layers = list(state.cache)


def _figures(results: Sequence[Any], full: Sequence[Any]) -> Figures:
    return dict(zip(KINDS, results, strict=True))


CYCLES = Suite(
    "cycles",
    lambda material: [CyclesTask(material, kind) for kind in KINDS],
    _figures,
    lambda figures: {f"cycles KLD, {kind}": f"{figures[kind]['kld']:.3g}" for kind in KINDS},
    own_only=True,
)
