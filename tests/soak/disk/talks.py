"""Conversations that are the same every time, and what a server that nothing ever happened to answers in them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from server.engine.engine import MlxEngine
from server.protocol import Conversation
from server.sessions.starts import common_prefix
from tests.server.engine.answers import Answer
from tests.serving.launch import filler

MAX_TOKENS = 12
QUESTION = "What is my locker code?"
_NAMES = ("Anna", "Boris", "Carla", "Dora", "Emil", "Frank", "Greta", "Hugo")
_SENTENCES = 6


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation of some turns. `prompts[t]` are the tokens of turn t with all that goes before it, `answers[t]`
    its text; `said` are the tokens of all turns with all answers. `name` is the session's, None for an unnamed one.

    Answers depend on a code that was told turns ago, so a state with wrong contents gives a wrong text.
    """

    name: str | None
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    prompts: tuple[np.ndarray, ...]
    said: np.ndarray

    def __len__(self) -> int:
        return len(self.asks)

    def messages(self, turn: int) -> list[dict[str, str]]:
        """What a client sends as turn `turn`."""
        return _messages(self.asks[: turn + 1], self.answers)

    def has(self, tokens: np.ndarray) -> bool:
        """Whether a session of this talk can hold these tokens: the talk begins with them."""
        return common_prefix(tokens, self.said) == len(tokens)

    def next_turn(self, tokens: np.ndarray) -> int:
        """The first turn that goes on from a state of these tokens, so that nothing in it has to be undone."""
        return sum(len(prompt) <= len(tokens) for prompt in self.prompts)


def _messages(asks: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """All asks, with the answers between them."""
    messages = [{"role": "user", "content": asks[0]}]
    for answer, ask in zip(answers, asks[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": ask}]
    return messages


def asks_of(seed: int, n_turns: int) -> tuple[str, ...]:
    """Something to remember, then texts to read and questions in turn."""
    draw = random.Random(seed)
    name, code = draw.choice(_NAMES), draw.randrange(1000, 10000)
    asks = [f"My name is {name} and my locker code is {code}. {filler(_SENTENCES, draw.randrange(1 << 30))}"]
    for turn in range(1, n_turns):
        read = f"Please read this text: {filler(_SENTENCES, draw.randrange(1 << 30))}"
        asks.append(read if turn % 3 == 2 else QUESTION)
    return tuple(asks)


def told(engine: MlxEngine, name: str | None, asks: tuple[str, ...]) -> Talk:
    """Hold the conversation, turn by turn in one session. Raises AssertionError where a turn does not go on from all
    of the one before, because then a state might have to be gone back in.
    """
    answers: list[str] = []
    prompts: list[np.ndarray] = []
    held = 0
    for turn in range(len(asks)):
        messages = _messages(asks[: turn + 1], answers)
        prompts.append(np.asarray(engine.tokenize(Conversation(messages)).tokens, dtype=np.int32))
        text, usage = Answer(engine, messages, name, max_tokens=MAX_TOKENS).whole()
        assert not turn or usage.cached_tokens == held, (
            f"turn {turn} of {name} went on from {usage.cached_tokens}, not {held}"
        )
        held = usage.prompt_tokens + usage.completion_tokens
        answers.append(text)
    said = engine.tokenize(
        Conversation([*_messages(asks, answers), {"role": "assistant", "content": answers[-1]}])
    ).tokens
    return Talk(name, asks, tuple(answers), tuple(prompts), np.asarray(said, dtype=np.int32))


def talks(engine: MlxEngine, n: int, n_turns: int, seed: int, say: Callable[[str], None] = print) -> list[Talk]:
    """`n` talks, every third of them unnamed."""
    say(f"{n} conversations of {n_turns} turns on a server that nothing happens to")
    draw = random.Random(seed)
    names = [None if i % 3 == 2 else f"talk-{i}" for i in range(n)]
    return [told(engine, name, asks_of(draw.randrange(1 << 30), n_turns)) for name in names]
