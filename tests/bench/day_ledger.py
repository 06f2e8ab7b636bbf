"""What a day cost: of every prompt, the tokens that are new, that were cached, and that were computed again."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.day_script import KINDS, Kind, Message

DEFINITIONS = """\
- **new**: prompt tokens behind the longest beginning that the prompt shares with any earlier prompt and its answer of
  the same conversation; for a first turn or a title, of any earlier request of the day. Counted by the client, with the
  model's own tokenizer and chat template. Of an edited turn these are the tokens from the edit on.
- **cached**: `usage.prompt_tokens_details.cached_tokens`, as the server tells it.
- **recomputed**: what is neither, max(0, prompt − cached − new) of each request. **Share**: its sum by the sum of
  prompt tokens. An answer whose text tokenises otherwise than it was generated is recomputed from there on, and counts.
- **first token**: seconds from the request to the first text, median."""


class Encoder:
    """The model's tokenizer and chat template, as a client can have them."""

    def __init__(self, model: Path) -> None:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def prompt(self, messages: Sequence[Message], answer: str = "") -> list[int]:
        """Token ids of a conversation with the answer's opening and, behind it, the answer if there is one."""
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer.encode(text + answer, add_special_tokens=False))


class Ledger:
    """Everything sent and received so far, as tokens."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._said: dict[str, list[list[int]]] = {}

    def new_tokens(self, conversation: str, kind: Kind, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that is about to be sent that are new in their place."""
        if kind in ("first", "title"):
            earlier = [tokens for said in self._said.values() for tokens in said]
        else:
            earlier = self._said.get(conversation, [])
        return len(prompt) - max((_common(tokens, prompt) for tokens in earlier), default=0)

    def add(self, conversation: str, kind: Kind, messages: Sequence[Message], answer: str) -> int:
        """Note a prompt and its answer; returns the number of tokens of the answer's text. What a title's request said
        is not its conversation's.
        """
        said = self._encoder.prompt(messages, answer)
        self._said.setdefault(f"title of {conversation}" if kind == "title" else conversation, []).append(said)
        return len(said) - len(self._encoder.prompt(messages))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True, slots=True)
class Record:
    """One request. `counted` is the prompt's length as the client counts it; `events` is what the server's own counters
    said meanwhile, by name, and `resident` how many sessions it had in memory.
    """

    conversation: str
    turn: int
    kind: Kind
    prompt: int
    counted: int
    new: int
    cached: int
    answer: int
    generated: int
    first_token: float | None
    events: dict[str, float] = field(default_factory=dict)
    resident: int | None = None

    @property
    def recomputed(self) -> int:
        return max(0, self.prompt - self.cached - self.new)

    @property
    def retokenised(self) -> bool:
        """Whether the answer's text has another number of tokens than were generated, its end token apart."""
        return self.generated - self.answer not in (0, 1)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "recomputed": self.recomputed}


def share(records: Sequence[Record]) -> float:
    """Recomputed tokens by prompt tokens."""
    return sum(record.recomputed for record in records) / max(1, sum(record.prompt for record in records))


def totals(records: Sequence[Record]) -> dict[str, Any]:
    """One row of the table."""
    times = [record.first_token for record in records if record.first_token is not None]
    return {
        "requests": len(records),
        "prompt": sum(record.prompt for record in records),
        "new": sum(record.new for record in records),
        "cached": sum(record.cached for record in records),
        "recomputed": sum(record.recomputed for record in records),
        "share": share(records),
        "first_token": statistics.median(times) if times else None,
    }


def by_kind(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Rows by kind of request and, last, of all requests."""
    kinds = {kind: [record for record in records if record.kind == kind] for kind in KINDS}
    return {kind: totals(some) for kind, some in kinds.items() if some} | {"all": totals(records)}


def table(records: Sequence[Record]) -> str:
    """`by_kind` as Markdown."""
    lines = [
        "| kind | requests | prompt tokens | new | cached | recomputed | share | first token, s |",
        "| --- |" + " ---: |" * 7,
    ]
    for kind, row in by_kind(records).items():
        time = "" if row["first_token"] is None else f"{row['first_token']:.3f}"
        counts = " | ".join(f"{row[key]:,}" for key in ("requests", "prompt", "new", "cached", "recomputed"))
        lines.append(f"| {kind} | {counts} | {row['share']:.1%} | {time} |")
    return "\n".join(lines)


def doubts(records: Sequence[Record]) -> str:
    """Where the client's count and the server's differ."""
    other = [record for record in records if record.counted != record.prompt]
    most = max((abs(record.counted - record.prompt) for record in other), default=0)
    differing = f"{len(other)} (by {most} at most)" if other else "none"
    retokenised = sum(record.retokenised for record in records)
    return (
        f"Prompts whose length the server counts otherwise than the client: {differing}. "
        f"Answers whose text has another number of tokens than were generated: {retokenised}."
    )


def resident(records: Sequence[Record]) -> str:
    """How many sessions the server had in memory."""
    found = [record.resident for record in records if record.resident is not None]
    if not found:
        return "The server does not say how many sessions it has in memory."
    middle = statistics.median(found)
    return (
        f"Sessions in memory after each request, as GET /metrics tells them: median {middle:g}, at most {max(found)}."
    )


def worst(records: Sequence[Record], limit: int = 12) -> str:
    """The requests with most recomputed tokens, with what the server's counters said."""
    found = sorted((r for r in enumerate(records, 1) if r[1].recomputed), key=lambda r: -r[1].recomputed)
    lines = [
        f"{len(found)} of {len(records)} requests recomputed something"
        + (f"; the {limit} that recomputed most:" if len(found) > limit else ":" if found else "."),
    ]
    if found:
        lines += [
            "",
            "| no. | conversation, turn | kind | prompt | new | cached | recomputed | meanwhile |",
            "| ---: | --- | --- | ---: | ---: | ---: | ---: | --- |",
        ]
    for number, record in found[:limit]:
        events = ", ".join(f"{name} {count:g}" for name, count in record.events.items())
        place = f"{record.conversation}, {record.turn}"
        counts = f"{record.prompt:,} | {record.new:,} | {record.cached:,} | {record.recomputed:,}"
        lines.append(f"| {number} | {place} | {record.kind} | {counts} | {events} |")
    return "\n".join(lines)
