"""How far one model's next-token distributions are from another's, exactly, over the full vocabulary."""

from dataclasses import dataclass

import numpy as np

_BLOCK = 128
"""Positions judged at once: float64 of a vocabulary of 150,000 takes 150 MB for each array of that many."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One entry a scored position: KL divergence from the reference and negative log-likelihood of the token that
    follows, both in nats and float64, and whether the most likely token is the reference's.
    """

    kld: np.ndarray
    nll: np.ndarray
    agree: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """`[..., vocabulary]` logits to log-probabilities in float64, whatever the input's dtype."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats, of log-probabilities `[..., vocabulary]`; `[...]`, never below 0.

    A token that the reference rules out (-inf) adds nothing.
    """
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(reference), 0.0, np.exp(reference) * (reference - other))
    # Rounding takes equal distributions to -1e-17.
    result: np.ndarray = np.maximum(terms.sum(axis=-1), 0.0)
    return result


def score(reference: np.ndarray, other: np.ndarray, targets: np.ndarray) -> TokenScores:
    """Logits `[n, vocabulary]` of both against each other, and of `other` against the tokens that follow, int `[n]`.

    Raises ValueError for shapes that do not fit.
    """
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
    """Over all positions of all windows: perplexity, mean and 99th-percentile KL divergence, share of equal top-1."""
    kld, nll, agree = (np.concatenate([getattr(s, part) for s in scores]) for part in ("kld", "nll", "agree"))
    return {
        "perplexity": float(np.exp(nll.mean())),
        "kld_mean": float(kld.mean()),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "top1": float(agree.mean()),
    }
