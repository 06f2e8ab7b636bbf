"""Exact divergence between two models' next-token distributions, over the whole vocabulary."""

from dataclasses import dataclass

import numpy as np

_BLOCK = 128
"""Positions scored at once. Each float64 array takes 150 MB for a vocabulary of 150,000."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One entry for each scored position. `kld` and `nll` are float64, in nats."""

    kld: np.ndarray
    """KL divergence from the reference."""
    nll: np.ndarray
    """Negative log-likelihood of the token that follows."""
    agree: np.ndarray
    """Whether the most likely token is the reference's."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64 of logits `[..., vocabulary]` of any dtype."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats, `[...]`, never below 0. Inputs are log-probabilities `[..., vocabulary]`.

    A token with the reference at -inf adds nothing.
    """
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(reference), 0.0, np.exp(reference) * (reference - other))
    # Rounding turns 0 into -1e-17.
    result: np.ndarray = np.maximum(terms.sum(axis=-1), 0.0)
    return result


def score(reference: np.ndarray, other: np.ndarray, targets: np.ndarray) -> TokenScores:
    """Scores of logits `[n, vocabulary]` against the reference's and the next tokens, int `[n]`. Raises ValueError."""
    if reference.shape != other.shape or targets.shape != other.shape[:1]:
        raise ValueError(f"logits {reference.shape} and {other.shape} do not fit each other and {len(targets)} targets")
    kld, nll, agree = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, dtype=bool)]
    for start in range(0, len(targets), _BLOCK):
        here = slice(start, start + _BLOCK)
        p, q = log_softmax(reference[here]), log_softmax(other[here])
        kld.append(divergence(p, q))
        nll.append(-np.take_along_axis(q, targets[here, None], axis=-1)[:, 0])
        agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    return TokenScores(np.concatenate(kld), np.concatenate(nll), np.concatenate(agree))


def summary(scores: list[TokenScores]) -> dict[str, float]:
    """Perplexity, mean and 99th-percentile KL divergence, and share of equal top-1, over all positions."""
    kld, nll, agree = (np.concatenate([getattr(s, part) for s in scores]) for part in ("kld", "nll", "agree"))
    return {
        "perplexity": float(np.exp(nll.mean())),
        "kld_mean": float(kld.mean()),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "top1": float(agree.mean()),
    }
