"""The processes that serve one model together, over MLX's distributed runtime. `mlx.launch` starts them.

Each process is a rank. Rank 0 decides and serves. All ranks compute. They exchange a few bytes here, at the same points
in the same order. The sums within the model are mlx-lm's own (`Model.shard`).
"""

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from turbocache.machine.launched import is_launched, launched_rank


class GroupError(RuntimeError):
    """The ranks can't continue together. The message says which rank is the cause."""


class RankLost(GroupError):
    """A collective failed: another rank ended, or the link to it broke. MLX does not say which rank."""


class Group:
    """This process among its ranks. A process without a launcher is rank 0 of 1, and every method returns at once.

    All methods are collective: every rank calls the same ones in the same order, on the thread that owns MLX. They wait
    for slow ranks without a limit, and raise RankLost when another rank is gone.
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
        """Whether this rank decides for all."""
        return self.rank == 0

    def gather(self, data: bytes) -> list[bytes]:
        """The data of all ranks, by rank."""
        if self.alone:
            return [data]
        lengths = self._all(np.array([len(data)], dtype=np.int64))
        longest = int(lengths.max())
        if not longest:
            return [b""] * self.size
        rows = self._all(np.frombuffer(data.ljust(longest, b"\0"), dtype=np.uint8))
        return [rows[i, : int(n)].tobytes() for i, n in enumerate(lengths[:, 0])]

    def gather_row(self, row: bytes) -> list[bytes]:
        """As `gather`, for data of the same length on all ranks: one message instead of two."""
        return self.rows(self.send_row(row))

    def send_row(self, row: bytes) -> mx.array:
        """Start `gather_row` after the work that MLX has queued. `rows` returns its result."""
        rows = self._gathered(np.frombuffer(row, dtype=np.uint8))
        mx.async_eval(rows)
        return rows

    def rows(self, sent: mx.array) -> list[bytes]:
        """The result of a `send_row`: the rows of all ranks."""
        return [row.tobytes() for row in self._read(sent)]

    def share(self, data: bytes) -> bytes:
        """Rank 0's data, on every rank."""
        return self.gather(data if self.leads else b"")[0]

    def agree(self, yes: bool) -> bool:
        """Whether `yes` is true on all ranks."""
        return all(row == b"\1" for row in self.gather_row(b"\1" if yes else b"\0"))

    def _all(self, row: np.ndarray) -> np.ndarray:
        return self._read(self._gathered(row))

    def _gathered(self, row: np.ndarray) -> mx.array:
        """`[ranks, *row]`, on the stream of mlx-lm's generator: collectives of two streams have no order."""
        with mx.stream(generation_stream):
            mine = mx.array(row)[None]
            return mine if self.alone else mx.distributed.all_gather(mine, group=self.ranks)

    def _read(self, rows: mx.array) -> np.ndarray:
        try:
            return np.array(rows)
        except RuntimeError as error:
            raise RankLost(f"the connection to another rank is lost ({error})") from error


def join_group() -> Group:
    """The launcher's group, or this process alone. Waits for all ranks. Raises GroupError."""
    if not is_launched():
        return Group()
    try:
        ranks = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise GroupError(f"this process is rank {launched_rank()} of a group that can't be joined: {error}") from error
    return Group(ranks if ranks.size() > 1 else None)
