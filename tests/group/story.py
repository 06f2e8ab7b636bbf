"""What one process and a group of ranks must answer alike: a day in the life of a server, in greedy answers."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.processes import patient
from tests.serving.launch import Server, filler

MAX_SIZE = 512
GO_ON = {"0": -100, "2": -100}
"""Without the tokens that end an answer, so that each has all its tokens to differ in."""


Answer = tuple[str, int, int, int]


@dataclass
class Told:
    """What a server answered, in the order of asking: each answer's text and its tokens that were read, found, drawn.
    `counts` are metrics that must be the same, `peak` the most bytes that its cache held, by rank.
    """

    answers: list[Answer] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)


class Teller:
    """Asks one server. `n` is how many ranks it has, `tokens` how many an answer has."""

    def __init__(self, server: Server, n: int = 1, tokens: int = 8) -> None:
        self.told = Told()
        self._server = server
        self._n = n
        self._tokens = tokens
        self._client = server.client()

    def ask(self, name: str, messages: list[dict[str, str]], share: float = 1.0) -> str:
        """One greedy turn of a session, with a `share` of an answer's tokens; returns the answer, which is noted."""
        answer = self._ask(name, messages, share)
        self._note(answer)
        return str(answer[0])

    def ask_together(self, asked: Sequence[tuple[str, list[dict[str, str]]]], share: float = 1.0) -> None:
        """Turns of several sessions at once; the answers are noted in the order given."""
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda one: self._ask(one[0], one[1], share), asked))
        for answer in answers:
            self._note(answer)

    def _ask(self, name: str, messages: list[dict[str, str]], share: float) -> Answer:
        asked: list[Any] = [*messages]
        answer = self._client.chat.completions.create(
            model="default", messages=asked, temperature=0, max_tokens=int(share * self._tokens), logit_bias=GO_ON,
            extra_body={"prompt_cache_key": name},
        )  # fmt: skip
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return answer.choices[0].message.content or "", usage.prompt_tokens, cached, usage.completion_tokens

    def _note(self, answer: Answer) -> None:
        self.told.answers.append(answer)
        self._server.wait_until_idle()
        for rank in range(self._n):
            held = self._server.metric("cache_bytes", rank=str(rank))
            self.told.peak[str(rank)] = max(held, self.told.peak.get(str(rank), 0.0))

    def change(self, change: str, session: str, **body: str) -> None:
        """Save, restore, fork or delete a session."""
        url = f"{self._server.url}/v1/sessions/{session}"
        with httpx.Client(timeout=patient(60)) as client:
            sent = client.delete(url) if change == "delete" else client.post(f"{url}/{change}", json=body or None)
        sent.raise_for_status()

    def count(self, *names: str) -> None:
        for name in names:
            self.told.counts[name] = self._server.metric(name)


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def single_and_batched(teller: Teller) -> None:
    """Turns of one session after the other, then four sessions at once, one of which goes on."""
    talk = [said("system", "You remember. " + filler(4, 1)), said("user", "My locker code is 5917. " + filler(6, 2))]
    for turn in range(2):
        talk.append(said("assistant", teller.ask("alone", talk)))
        talk.append(said("user", f"Go on with {turn}. {filler(5, turn + 3)}"))
    others = [(f"of-{i}", [said("user", f"Number {i}: {filler(4 + 3 * i, i + 20)}")]) for i in range(2)]
    teller.ask_together([("alone", talk), *others], share=2)


def rotation(teller: Teller) -> None:
    """A conversation of several times what a session holds."""
    talk = [said("user", "My name is Anna and my locker code is 5917.")]
    for turn in range(4):
        talk.append(said("assistant", teller.ask("long", talk)))
        talk.append(said("user", f"Please read this: {filler(30, turn + 40)}"))
    teller.count("rotated_tokens_total")


def rollback(teller: Teller) -> None:
    """The last message is edited, and the answer before it: the turn goes back to a checkpoint, past what rotated."""
    talk = [said("system", filler(8, 60)), said("user", filler(20, 61))]
    talk.append(said("assistant", teller.ask("edited", talk)))
    for seed in (62, 63):
        teller.ask("edited", [*talk, said("user", filler(16, seed))])
    talk.append(said("user", filler(30, 65)))
    answer = teller.ask("edited", talk, share=3)
    teller.ask("edited", [*talk, said("assistant", answer[:20] + " and so on."), said("user", filler(12, 66))])
    teller.count("checkpoint_hits_total")


def disk(teller: Teller, n_sessions: int = 11) -> None:
    """More sessions than memory holds: some go to disk and come back, one by the client's wish, one as a copy."""
    talks = {f"kept-{i}": [said("user", f"{i}: {filler(18, i + 80)}")] for i in range(n_sessions)}
    for name, talk in talks.items():
        talk.append(said("assistant", teller.ask(name, talk, share=0.5)))
        talk.append(said("user", "And then?"))
    teller.change("save", "kept-1")
    teller.change("restore", "kept-0")
    teller.change("fork", "kept-0", id="copy")
    teller.change("delete", "kept-2")
    for name in ("kept-0", "copy", "kept-3", "kept-5", "kept-1"):
        teller.ask(name, talks["kept-0" if name == "copy" else name])
    teller.count("spills_total", "restores_total")


CHAPTERS: dict[str, Callable[[Teller], None]] = {
    "single and batched": single_and_batched,
    "rotation": rotation,
    "rollback": rollback,
    "disk": disk,
}
