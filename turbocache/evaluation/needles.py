"""Needles: a number hidden in a long prompt, with a question about it at the end. The answer is greedy."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.tokenizer_utils import TokenizerWrapper

from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.text import prompt_tokens
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import evaluate

ANSWER_TOKENS = 48
"""Maximum tokens of an answer."""

OTHER = "other"
"""The context of prompts outside a grid of lengths and depths."""

FIRST_WORDS = (
    "amber",
    "brave",
    "calm",
    "dusty",
    "early",
    "fancy",
    "gentle",
    "hollow",
    "ivory",
    "jolly",
    "lively",
    "mellow",
)
SECOND_WORDS = (
    "anchor",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jacket",
    "mirror",
)


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt with a hidden number."""

    id: str
    context: str
    """A length in tokens, or `OTHER`."""
    depth: float | None
    """The number's position as a share of the context."""
    ids: tuple[int, ...]
    """Tokens of the prompt."""
    answer: str
    """The text that a correct answer contains."""

    @property
    def key(self) -> str:
        """The id with a digest of the prompt and its answer."""
        digest = hashlib.sha256(json.dumps([self.ids, self.answer]).encode()).hexdigest()[:12]
        return f"{self.id}-{digest}"


def load_needles(path: Path, tokenizer: TokenizerWrapper) -> list[Needle]:
    """Prompts of a JSON-lines file. Raises EvaluationError for a file of another form."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"can't read the needles {str(path)!r}: {getattr(error, 'strerror', error)}") from error
    needles = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            ids = _prompt(tokenizer, item["messages"])
            context, depth = item.get("context"), item.get("depth")
            answer = str(item["answer"])
            depth = None if depth is None else float(depth)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"line {number} of {str(path)!r} is no needle ({type(error).__name__}: {error}); "
                "each line is a JSON object with messages and answer, and context and depth if it is of a grid"
            ) from error
        name = str(item.get("id", f"{path.stem}-{number}"))
        needles.append(Needle(name, OTHER if context is None else str(context), depth, tuple(ids), answer))
    if not needles:
        raise EvaluationError(f"there are no needles in {str(path)!r}")
    return needles


def make_needles(
    tokenizer: TokenizerWrapper, text: str, trials: dict[int, int], depths: Sequence[float], seed: int
) -> list[Needle]:
    """Needles in pieces of `text`: `trials[length]` for each depth, in prompts of at most `length` tokens.

    The same seed gives the same needles. Raises EvaluationError if the text is too short.
    """
    hay = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    made = []
    for length, n_trials in trials.items():
        if len(hay) < length:
            raise EvaluationError(f"the text has {len(hay)} tokens, too few to hide needles in {length} of them")
        for depth in depths:
            for trial in range(n_trials):
                name = f"needle-{length}-{round(100 * depth)}-{trial}"
                chance = random.Random(f"{seed} {name}")
                made.append(_hidden(tokenizer, hay, length, depth, chance, name))
    return made


def _hidden(
    tokenizer: TokenizerWrapper, hay: list[int], length: int, depth: float, chance: random.Random, name: str
) -> Needle:
    key = f"{chance.choice(FIRST_WORDS)} {chance.choice(SECOND_WORDS)}"
    number = str(chance.randrange(1_000_000, 10_000_000))
    start = chance.randrange(len(hay) - length + 1)

    def prompt(n: int) -> list[int]:
        before, after = (
            tokenizer.decode(hay[start + first : start + last])
            for first, last in ((0, round(n * depth)), (round(n * depth), n))
        )
        content = (
            f"A special magic number is hidden within the following text. Memorize it.\n\n{before.rstrip()} "
            f"The special magic number for {key} is {number}. {after.lstrip()}\n\n"
            f"What is the special magic number for {key}?"
        )
        return _prompt(tokenizer, [{"role": "user", "content": content}], f" The special magic number for {key} is")

    n_hay = length - len(prompt(0))
    while n_hay > 0:
        ids = prompt(n_hay)
        if len(ids) <= length:
            return Needle(name, str(length), depth, tuple(ids), number)
        n_hay -= max(1, len(ids) - length)  # the text of cut tokens may have other tokens
    raise EvaluationError(f"a prompt of {length} tokens has no room for a needle")


def _prompt(tokenizer: TokenizerWrapper, messages: list[dict[str, str]], begun: str = "") -> list[int]:
    """Tokens of a chat, with the model's turn next. A model without a chat template continues `begun`."""
    return prompt_tokens(tokenizer, messages, "" if tokenizer.has_chat_template else begun)


def ask(model: Module, tokenizer: TokenizerWrapper, cache: PromptCache, needle: Needle, chunk: int) -> bool:
    """Whether the greedy answer over `cache` contains the needle's answer."""
    prompt = list(needle.ids)
    for start in range(0, len(prompt) - 1, chunk):
        model(mx.array([prompt[start : min(start + chunk, len(prompt) - 1)]]), cache=cache)
        evaluate(cache)
    token = prompt[-1]
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS:
        token = int(mx.argmax(model(mx.array([[token]]), cache=cache)[0, -1]))
        if token in tokenizer.eos_token_ids:
            return False
        answer.append(token)
        if needle.answer in tokenizer.decode(answer):
            return True
    return False


def recall(outcomes: dict[tuple[str, float | None], list[bool]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Recall by context, and `[correct, asked]` by context and depth, from outcomes by context and depth."""
    by_context: dict[str, list[bool]] = {}
    cells: dict[str, dict[str, list[int]]] = {}
    for (context, depth), correct in outcomes.items():
        by_context.setdefault(context, []).extend(correct)
        cells.setdefault(context, {})["-" if depth is None else f"{depth:g}"] = [sum(correct), len(correct)]
    return {context: sum(correct) / len(correct) for context, correct in by_context.items()}, cells
