"""Reads windows of text through a cache in chunks. Computes logits only where they are scored."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.tokenizer_utils import TokenizerWrapper

from turbocache.evaluation.divergence import TokenScores, score
from turbocache.evaluation.settings import EvaluationError
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import evaluate


def read_text(path: Path) -> str:
    """The text of a file. Raises EvaluationError if it can't be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise EvaluationError(f"can't read the text {str(path)!r}: {reason}") from error
    if not text.strip():
        raise EvaluationError(f"the text {str(path)!r} is empty")
    return text


def cut_windows(tokenizer: TokenizerWrapper, text: str, context: int, n_windows: int) -> list[list[int]]:
    """The first `n_windows` windows of `context` tokens without overlap, each with the token that follows it.

    Each begins with the tokenizer's own prefix. Raises EvaluationError if the text is too short.
    """
    prefix = list(tokenizer.encode(""))
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    step = context - len(prefix)
    if len(ids) < n_windows * step + 1:
        raise EvaluationError(
            f"the text has {len(ids)} tokens, and {n_windows} windows of {context} need {n_windows * step + 1}: "
            f"give a longer text, a smaller --context or fewer --windows"
        )
    return [prefix + ids[i * step : (i + 1) * step + 1] for i in range(n_windows)]


def prompt_tokens(tokenizer: TokenizerWrapper, messages: Sequence[dict[str, str]], opening: str = "") -> list[int]:
    """Tokens of a chat, with the model's turn next, which begins with `opening` without its leading white space.

    Without a chat template: the messages' contents, one a line, and `opening` as it is.
    """
    if tokenizer.has_chat_template:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text + opening.lstrip(), add_special_tokens=False, verbose=False))
    return list(tokenizer.encode("\n".join(message["content"] for message in messages) + opening, verbose=False))


@dataclass(frozen=True, slots=True)
class Reading:
    """How a window is read."""

    chunk: int
    """Tokens of a forward pass."""
    score_from: int
    """The first position with a scored prediction."""

    def chunks(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """Start and end of each chunk. One starts exactly at `score_from`."""
        for first, last in ((0, self.score_from), (self.score_from, n_tokens)):
            for start in range(first, last, self.chunk):
                yield start, min(start + self.chunk, last)


def read_logits(
    model: Module, cache: PromptCache, window: Sequence[int], reading: Reading
) -> Iterator[tuple[int, np.ndarray]]:
    """Read a window without its last token through `cache`, which then holds it.

    Yields float32 logits `[n, vocabulary]` of scored positions, each with the index of the first (0 is `score_from`).
    The head is not computed for other positions.
    """
    n_tokens = len(window) - 1
    for start, end in reading.chunks(n_tokens):
        logits = model(mx.array([list(window[start:end])]), cache=cache)
        if start >= reading.score_from:
            yield start - reading.score_from, np.array(logits[0].astype(mx.float32))
        del logits
        evaluate(cache)


def targets_of(window: Sequence[int], reading: Reading) -> np.ndarray:
    """The tokens that follow the scored positions, int64 `[n]`."""
    return np.array(window[reading.score_from + 1 :], dtype=np.int64)


class ReferenceLogits:
    """One window's full-precision logits, float32 `[n, vocabulary]`, in a temporary file to save memory."""

    def __init__(self, model: Module, cache: PromptCache, window: Sequence[int], reading: Reading) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (held until this object is left)
        self._targets = targets_of(window, reading)
        for _, logits in read_logits(model, cache, window, reading):
            self._file.write(np.ascontiguousarray(logits).tobytes())
        self._file.flush()
        shape = (len(self._targets), self._file.tell() // (4 * len(self._targets)))
        self._logits = np.memmap(self._file, dtype=np.float32, mode="r", shape=shape)

    def __enter__(self) -> "ReferenceLogits":
        return self

    def __exit__(self, *_: object) -> None:
        del self._logits
        self._file.close()

    def judge(self, index: int, logits: np.ndarray) -> TokenScores:
        """Scores of `logits` `[n, vocabulary]`, which begin at position `index`."""
        here = slice(index, index + len(logits))
        return score(self._logits[here], logits, self._targets[here])

    def judge_itself(self) -> TokenScores:
        """Scores of the full-precision row: its own perplexity, no divergence."""
        return self.judge(0, np.asarray(self._logits))

    def judge_cache(self, model: Module, cache: PromptCache, window: Sequence[int], reading: Reading) -> TokenScores:
        """Read the window through `cache` and score it."""
        parts = [self.judge(index, logits) for index, logits in read_logits(model, cache, window, reading)]
        return TokenScores(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("kld", "nll", "agree")))
