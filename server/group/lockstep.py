"""The steps of a group: rank 0 plans, all ranks do the same, and each step checks that they did.

A step takes one message of a fixed size. It holds the length of the plan, a checksum of all that the rank was told and
did so far, and the first bytes of the plan. Only rank 0 has a plan. A longer plan needs a second message.

A message sent behind a running forward pass arrives after it. So while the batch runs, the message of the next step is
sent before this step's forward pass (`send`). Its plan is one step old when it is used, but the device never waits.
"""

import struct
import zlib
from collections.abc import Callable

import mlx.core as mx

from server.commands import StepPlan
from server.group.messages import decode, encode
from turbocache.mlxlm.group import Group, GroupError

_HEAD = struct.Struct("<QI")
_ROW = 512


class Lockstep:
    """Every rank calls the same methods in the same order."""

    def __init__(self, group: Group) -> None:
        self.step = 0
        """Steps that the ranks agreed on."""
        self._group = group
        self._checksum = 0
        self._sent: tuple[StepPlan | None, bytes, mx.array] | None = None

    def note(self, result: bytes) -> None:
        """Add what this rank did in the last step, such as the tokens it drew. The ranks must agree on it."""
        self._checksum = zlib.crc32(result, self._checksum)

    def send(self, make_plan: Callable[[], StepPlan]) -> None:
        """Send the message of the next step before MLX gets more work."""
        plan = make_plan() if self._group.leads else None
        data = b"" if plan is None else encode(plan)
        row = (_HEAD.pack(len(data), self._checksum) + data)[:_ROW].ljust(_ROW, b"\0")
        self._sent = plan, data, self._group.send_row(row)

    def next(self, make_plan: Callable[[], StepPlan]) -> StepPlan:
        """The plan that was sent ahead, or else a new one. Only rank 0 calls `make_plan`.

        Raises GroupError when a rank is lost, or has done something else than rank 0 since the start.
        """
        if self._sent is None:
            self.send(make_plan)
        assert self._sent is not None
        (plan, data, sent_row), self._sent = self._sent, None
        rows = self._group.rows(sent_row)
        (length, expected), *others = (_HEAD.unpack_from(row) for row in rows)
        for rank, (_, actual) in enumerate(others, start=1):
            if actual != expected:
                raise GroupError(
                    f"rank {rank} disagrees with rank 0 about what step {self.step} did (checksums {actual:08x} and "
                    f"{expected:08x}), so what they would answer together can't be trusted"
                )
        message = rows[0][_HEAD.size : _HEAD.size + length]
        if length > len(message):
            message = self._group.share(data)
        self.step += 1
        self.note(message)
        return plan if plan is not None else decode(message)
