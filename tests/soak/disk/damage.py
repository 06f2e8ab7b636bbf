"""One random damage to a session file: a flipped bit or a lost end."""

import json
import random
from dataclasses import dataclass

_LENGTH = 8
_CUT = 0.25


@dataclass(frozen=True, slots=True)
class Damage:
    """`bit` of byte `at` is flipped, or without a bit everything from `at` on is gone. `part` is where that is."""

    part: str
    at: int
    bit: int | None

    def __str__(self) -> str:
        what = "cut off" if self.bit is None else f"bit {self.bit} flipped"
        return f"{what} at {self.at}, in the {self.part}"

    @property
    def kind(self) -> str:
        return f"{'cut' if self.bit is None else 'flip'} in the {self.part}"

    def done_to(self, data: bytes) -> bytes:
        """The damaged file."""
        if self.bit is None:
            return data[: self.at]
        return data[: self.at] + bytes([data[self.at] ^ 1 << self.bit]) + data[self.at + 1 :]


def draw(dice: random.Random, data: bytes) -> Damage:
    """Any part of the file may be hit, the small ones more often than by their size."""
    parts = _parts(data)
    part = dice.choices(list(parts), [1, 4, 2, 5])[0]
    start, end = parts[part]
    return Damage(part, dice.randrange(start, end), None if dice.random() < _CUT else dice.randrange(8))


def _parts(data: bytes) -> dict[str, tuple[int, int]]:
    """Where a session file's length, header, first tokens and all arrays lie: start and end."""
    header = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    entries = json.loads(data[_LENGTH:header])
    name = next(name for name in entries if name.endswith("tokens"))
    start, end = entries[name]["data_offsets"]
    return {
        "length": (0, _LENGTH),
        "header": (_LENGTH, header),
        "tokens": (header + start, header + end),
        "arrays": (header, len(data)),
    }
