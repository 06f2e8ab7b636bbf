"""The processes that serve one model together, over MLX's distributed runtime (`mlx.launch` starts them).

Each process is a rank. Rank 0 decides and serves; all of them compute. What they tell each other here are a few bytes
at places that all of them come to in the same order; the sums within the model are mlx-lm's own (`Model.shard`).
"""

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from turbocache.machine.launched import is_launched, launched_rank


class GroupError(RuntimeError):
    """The ranks can't go on together; the message says which one is why."""


class RankLost(GroupError):
    """A collective has failed: another rank has ended, or the link to it. Which one, MLX does not say."""


class Group:
    """This process among its ranks. By itself it is rank 0 of 1, and everything here returns at once.

    All methods are collective: every rank calls the same ones in the same order, on the thread that owns MLX. They
    raise RankLost when another rank is gone. They wait for a rank that is slow, however long it takes.
    """

    def __init__(self, ranks: mx.distributed.Group | None = None) -> None:
        self.ranks = ranks
        self.rank: int = 0 if ranks is None else ranks.rank()
        self.size: int = 1 if ranks is None else ranks.size()

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that decides."""
        return self.rank == 0

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank has given, in their order."""
        if self.alone:
            return [data]
        lengths = self._all(np.array([len(data)], dtype=np.int64))
        longest = int(lengths.max())
        if not longest:
            return [b""] * self.size
        rows = self._all(np.frombuffer(data.ljust(longest, b"\0"), dtype=np.uint8))
        return [rows[i, : int(n)].tobytes() for i, n in enumerate(lengths[:, 0])]

    def gather_row(self, row: bytes) -> list[bytes]:
        """What each rank has given, all of the same length: one message instead of two."""
        return self.rows(self.send_row(row))

    def send_row(self, row: bytes) -> mx.array:
        """Begin `gather_row`, behind what MLX has been asked for already; `rows` ends it."""
        rows = self._gathered(np.frombuffer(row, dtype=np.uint8))
        mx.async_eval(rows)
        return rows

    def rows(self, sent: mx.array) -> list[bytes]:
        """What all ranks have given to a `send_row`."""
        return [row.tobytes() for row in self._read(sent)]

    def share(self, data: bytes) -> bytes:
        """What rank 0 has given; the others' is not looked at."""
        return self.gather(data if self.leads else b"")[0]

    def agree(self, yes: bool) -> bool:
        """Whether all ranks say yes."""
        return all(row == b"\1" for row in self.gather_row(b"\1" if yes else b"\0"))

    def _all(self, row: np.ndarray) -> np.ndarray:
        return self._read(self._gathered(row))

    def _gathered(self, row: np.ndarray) -> mx.array:
        """`[ranks, *row]`. On the stream of mlx-lm's generator: collectives of two streams would meet in any order."""
        with mx.stream(generation_stream):
            mine = mx.array(row)[None]
            return mine if self.alone else mx.distributed.all_gather(mine, group=self.ranks)

    def _read(self, rows: mx.array) -> np.ndarray:
        try:
            return np.array(rows)
        except RuntimeError as error:
            raise RankLost(f"the connection to another rank is lost ({error})") from error


def join_group() -> Group:
    """The group that the launcher has made, or this process by itself. Waits until all ranks are there. Raises
    GroupError.
    """
    if not is_launched():
        return Group()
    try:
        ranks = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise GroupError(f"this process is rank {launched_rank()} of a group that can't be joined: {error}") from error
    return Group(ranks if ranks.size() > 1 else None)
