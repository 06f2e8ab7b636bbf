"""The ranks of a group, step by step: rank 0 decides, all do the same, and each step proves that they did.

One message a step. In it each rank gives the length of what it has to say, a checksum of all that it was told and did
so far, and the first bytes of the decisions, which are rank 0's; only decisions that are longer need a second message.

A message that is sent behind a running forward pass arrives behind it. So while the batch runs, the next step's message
goes ahead of this step's pass (`send`), and what it says is a step old when it is done: the device never waits for it.
"""

import struct
import zlib
from collections.abc import Callable

import mlx.core as mx

from server.group.commands import Decisions, decode, encode
from turbocache.mlxlm.group import Group, GroupError

_HEAD = struct.Struct("<QI")
_ROW = 512


class Lockstep:
    """`step` counts the steps that were agreed on."""

    def __init__(self, group: Group) -> None:
        self.step = 0
        self._group = group
        self._checksum = 0
        self._sent: tuple[Decisions | None, bytes, mx.array] | None = None

    def note(self, done: bytes) -> None:
        """What this rank has done since the last step, such as the tokens it drew: the ranks must agree on it."""
        self._checksum = zlib.crc32(done, self._checksum)

    def send(self, decide: Callable[[], Decisions]) -> None:
        """Send the next step's message ahead of what MLX is asked for from here on. Every rank does, or none."""
        if self._group.alone:
            return
        decided = decide() if self._group.leads else None
        data = b"" if decided is None else encode(decided)
        row = (_HEAD.pack(len(data), self._checksum) + data)[:_ROW].ljust(_ROW, b"\0")
        self._sent = decided, data, self._group.send_row(row)

    def next(self, decide: Callable[[], Decisions]) -> Decisions:
        """The next step's decisions: those that were sent ahead, else what is decided now. Only rank 0 is asked to
        decide. Raises GroupError when a rank has done something else than rank 0 since the start, or is gone.
        """
        if self._group.alone:
            self.step += 1
            return decide()
        if self._sent is None:
            self.send(decide)
        assert self._sent is not None
        (decided, data, sent_row), self._sent = self._sent, None
        rows = self._group.rows(sent_row)
        (length, ours), *others = (_HEAD.unpack_from(row) for row in rows)
        for rank, (_, theirs) in enumerate(others, start=1):
            if theirs != ours:
                raise GroupError(
                    f"rank {rank} disagrees with rank 0 about what step {self.step} did (checksums {theirs:08x} and "
                    f"{ours:08x}), so what they would answer together can't be trusted"
                )
        sent = rows[0][_HEAD.size : _HEAD.size + length]
        if length > len(sent):
            sent = self._group.share(data)
        self.step += 1
        self.note(sent)
        return decided if decided is not None else decode(sent)
