"""Long prompts with planted sentences, and questions about them that share their beginning."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from mlx_lm.tokenizer_utils import TokenizerWrapper

from turbocache.evaluation.needles import FIRST_WORDS, SECOND_WORDS
from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.suites.suite import Material
from turbocache.evaluation.text import prompt_tokens

Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Wording:
    """A question as text."""

    messages: Callable[[str], Messages]
    """From the document's text."""
    opening: str
    """The beginning of the model's turn."""
    answer: str
    """The right continuation of the opening."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question as tokens."""

    ids: tuple[int, ...]
    """What follows the document's shared beginning, with the opening of the answer."""
    answer: str
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Questions whose prompts share a beginning, which is read once."""

    shared: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return len(self.shared) + max(len(q.ids) + len(q.answer_ids) for q in self.questions)

    def n_tokens(self, passes: int) -> int:
        """Tokens to read if each question and its answer is read `passes` times."""
        return len(self.shared) + passes * sum(len(q.ids) + len(q.answer_ids) for q in self.questions)


def planted(tokenizer: TokenizerWrapper, hay: Sequence[int], sentences: Sequence[str]) -> str:
    """The hay's text with the sentences in it at equal distances."""
    cuts = [round(len(hay) * i / (len(sentences) + 1)) for i in range(len(sentences) + 2)]
    pieces = [tokenizer.decode(list(hay[start:end])) for start, end in pairwise(cuts)]
    parts = [pieces[0].strip()]
    for sentence, piece in zip(sentences, pieces[1:], strict=True):
        parts += [sentence, piece.strip()]
    return " ".join(parts).strip()


def make_document(
    material: Material, chance: random.Random, context: int, sentences: Sequence[str], wordings: Sequence[Wording]
) -> Document:
    """A document whose longest prompt has at most `context` tokens. Raises EvaluationError if that can't be."""
    tokenizer, hay = material.loaded.tokenizer, some_hay(material, chance, context)
    n_hay = context
    while n_hay > 0:
        text = planted(tokenizer, hay[:n_hay], sentences)
        prompts = [prompt_tokens(tokenizer, wording.messages(text), wording.opening) for wording in wordings]
        excess = max(len(prompt) for prompt in prompts) - context
        if excess <= 0:
            return _document(tokenizer, prompts, text, wordings)
        n_hay -= excess
    raise EvaluationError(f"--suite-context {context} has no room for {len(sentences)} sentences and a question")


def some_hay(material: Material, chance: random.Random, n: int) -> list[int]:
    """`n` consecutive tokens of the text. Raises EvaluationError if it is too short."""
    if len(material.hay) < n:
        raise EvaluationError(f"the text has {len(material.hay)} tokens, and the suites need {n}: give a longer text")
    start = chance.randrange(len(material.hay) - n + 1)
    return material.hay[start : start + n]


def _document(
    tokenizer: TokenizerWrapper, prompts: list[list[int]], text: str, wordings: Sequence[Wording]
) -> Document:
    # Every question has tokens of its own, so that there is something to read behind the shared ones.
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    n_shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    questions = []
    for prompt, wording in zip(prompts, wordings, strict=True):
        whole = prompt_tokens(tokenizer, wording.messages(text), wording.opening + wording.answer)
        # A token may span the end of the opening. Then the answer is encoded by itself.
        follows = whole[len(prompt) :] if whole[: len(prompt)] == prompt else None
        answer_ids = follows or tokenizer.encode(wording.answer, add_special_tokens=False)
        questions.append(Question(tuple(prompt[n_shared:]), wording.answer, tuple(answer_ids)))
    return Document(tuple(prompts[0][:n_shared]), tuple(questions))


def chance_of(material: Material, name: str) -> random.Random:
    """The random numbers of one task."""
    return random.Random(f"{material.settings.seed} {name}")


def some_names(chance: random.Random, n: int) -> list[str]:
    """Different names of two words, such as `amber anchor`."""
    return chance.sample([f"{first} {second}" for first in FIRST_WORDS for second in SECOND_WORDS], n)
