"""Deterministic prompts, all made here: word lists, which a model can be asked to repeat for as long as one likes."""

import random
from collections.abc import Iterator, Sequence

from tests.bench.client import Endpoint, Message

_VOCABULARY = (
    "river stone cloud garden window letter silver engine harbour summer winter mountain bridge paper candle forest "
    "island market pocket signal table village thunder meadow copper lantern orchard planet ribbon saddle temple "
    "valley wagon anchor basket castle desert feather hammer jacket kettle ladder mirror needle oyster pepper quiver "
    "rabbit shadow tunnel velvet walnut yellow zipper"
)
WORDS = _VOCABULARY.split()

SHORT_TURNS = (
    "My name is Anna.",
    "What is my name?",
    "My phone number is 3791338.",
    "What is my phone number?",
    "My dog is called Bruno.",
    "How is my dog called?",
)


def word_list(seed: str, n_words: int) -> str:
    """`n_words` words in a random order that depends on `seed` only."""
    rng = random.Random(seed)
    return ", ".join(rng.choice(WORDS) for _ in range(n_words))


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": text}


def reading(seed: str, n_words: int) -> list[Message]:
    """A first turn that fills the context and asks for next to nothing."""
    return [user(f"Here is a text.\n\n{word_list(seed, n_words)}")]


def repeating(seed: str, n_words: int) -> list[Message]:
    """A turn whose answer is long: the list again (a small model loses its place in it and goes on all the same)."""
    return [user(f"Here is a list:\n{word_list(seed, n_words)}\nRepeat the list.")]


def tokens_per_word(endpoint: Endpoint) -> float:
    """Prompt tokens per listed word under the model's tokenizer, as the server counts them; the template left out."""
    few, many = (endpoint.chat(reading("ruler", n_words), 1).prompt_tokens for n_words in (50, 250))
    return (many - few) / 200


def long_answers(
    endpoints: Sequence[Endpoint],
    prefix: list[Message],
    n_words: int,
    count: int,
    max_tokens: int,
    together: int,
    session: str,
) -> list[list[Message]]:
    """`count` prompts that every endpoint answers with `max_tokens` tokens, none of them stopping early.

    Candidates (`prefix` and a list of `n_words` to repeat) are tried `together` at a time, one server after the other,
    in sessions `session`-0, -1, …, until enough are found or four times `count` (at least eight) were tried. Where too
    few last to the end, those whose shorter answer is longest fill up the list.
    """
    tried: list[tuple[int, list[Message]]] = []
    good = 0
    for batch in _batches(max(4 * count, 8), together):
        candidates = [prefix + repeating(f"{session}-{index}", n_words) for index in batch]
        lengths = [
            [answer.completion_tokens for answer in endpoint.chat_together(candidates, max_tokens, session)]
            for endpoint in endpoints
        ]
        shortest = [min(column) for column in zip(*lengths, strict=True)]
        tried += zip(shortest, candidates, strict=True)
        good += sum(length >= max_tokens for length in shortest)
        if good >= count:
            break
    tried.sort(key=lambda pair: -pair[0])
    return [messages for _, messages in tried[:count]]


def _batches(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
