import numpy as np
import pytest
from scipy import special

from turbocache.evaluation.divergence import divergence, log_softmax, score, summary

rng = np.random.default_rng(5)


def logits_of(n: int, vocabulary: int, spread: float = 4.0) -> np.ndarray:
    return (rng.normal(size=(n, vocabulary)) * spread + rng.normal(size=(n, 1)) * 1e4).astype(np.float32)


def exactly(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence in extended precision, by its definition."""
    p, q = (
        np.exp(x.astype(np.longdouble) - x.max(axis=-1, keepdims=True).astype(np.longdouble))
        for x in (reference, other)
    )
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    return (p * np.log(p / q)).sum(axis=-1)


def test_log_probabilities_are_float64s() -> None:
    logits = logits_of(7, 5000)
    assert log_softmax(logits).dtype == np.float64
    np.testing.assert_allclose(log_softmax(logits), special.log_softmax(logits.astype(np.float64), axis=-1), atol=1e-11)


@pytest.mark.parametrize("apart", [1e-3, 1e-1, 3.0])
def test_divergence_is_exact_for_near_and_far(apart: float) -> None:
    """Near ones are where float32 fails: it has no digit of a divergence of 1e-7."""
    reference = logits_of(300, 3000)  # more positions than are judged at once
    other = (reference + rng.normal(size=reference.shape) * apart).astype(np.float32)
    targets = rng.integers(3000, size=300)
    got = score(reference, other, targets)
    np.testing.assert_allclose(got.kld, exactly(reference, other).astype(np.float64), rtol=1e-6)
    wanted = -special.log_softmax(other.astype(np.float64), axis=-1)[np.arange(300), targets]
    np.testing.assert_allclose(got.nll, wanted, rtol=1e-9)
    np.testing.assert_array_equal(got.agree, reference.argmax(axis=-1) == other.argmax(axis=-1))


def test_direction_is_from_the_reference() -> None:
    p, q = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]])
    assert divergence(p, q)[0] == pytest.approx(0.25 * np.log(2))
    lopsided = np.log([[0.9, 0.05, 0.05]])
    assert divergence(lopsided, p)[0] == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))


def test_what_the_reference_rules_out_adds_nothing_and_what_only_the_other_does_is_infinite() -> None:
    ruled_out, all_possible = log_softmax(np.array([[0.0, 0.0, -np.inf]])), log_softmax(np.zeros((1, 3)))
    assert divergence(ruled_out, all_possible)[0] == pytest.approx(np.log(1.5))
    with np.errstate(divide="ignore"):
        assert divergence(all_possible, ruled_out)[0] == np.inf


def test_equal_logits_do_not_diverge() -> None:
    logits = logits_of(50, 2000)
    got = score(logits, logits + np.float32(0), rng.integers(2000, size=50))
    assert (got.kld == 0).all()
    assert got.agree.all()


def test_summary_is_over_all_positions_of_all_windows() -> None:
    scores = [score(logits_of(n, 40), logits_of(n, 40), rng.integers(40, size=n)) for n in (30, 170)]
    kld, nll = (np.concatenate([getattr(s, part) for s in scores]) for part in ("kld", "nll"))
    told = summary(scores)
    assert told["perplexity"] == pytest.approx(np.exp(np.sum(nll) / 200))
    assert told["kld_mean"] == pytest.approx(np.sum(kld) / 200)
    assert np.sum(kld <= told["kld_p99"]) == 198
    assert told["top1"] == (scores[0].agree.sum() + scores[1].agree.sum()) / 200


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        score(np.zeros((3, 9)), np.zeros((3, 8)), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="and 2 targets"):
        score(np.zeros((3, 9)), np.zeros((3, 9)), np.zeros(2, dtype=int))
