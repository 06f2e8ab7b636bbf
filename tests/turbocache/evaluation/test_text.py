from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.text import Reading, ReferenceLogits, cut_windows, read_logits, read_text, targets_of
from turbocache.mlxlm.model import LoadedModel


class Words:
    """A tokenizer that begins every text with a token of its own."""

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return ([7] if add_special_tokens else []) + [int(word) for word in text.split()]


def test_windows_do_not_overlap_and_begin_as_the_tokenizer_begins() -> None:
    text = " ".join(str(n) for n in range(100, 110))
    assert cut_windows(Words(), text, 4, 3) == [  # type: ignore[arg-type]
        [7, 100, 101, 102, 103],
        [7, 103, 104, 105, 106],
        [7, 106, 107, 108, 109],
    ]
    with pytest.raises(EvaluationError, match="the text has 10 tokens, and 4 windows of 4 need 13"):
        cut_windows(Words(), text, 4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("score_from", [0, 1, 64, 100, 149])
@pytest.mark.parametrize("chunk", [1000, 64, 37])
def test_chunks_cover_all_tokens_once_and_cut_where_scoring_begins(chunk: int, score_from: int) -> None:
    chunks = list(Reading(chunk, score_from).chunks(150))
    assert [i for start, end in chunks for i in range(start, end)] == list(range(150))
    assert all(end - start <= chunk for start, end in chunks)
    assert score_from in {start for start, _ in chunks}


@pytest.mark.parametrize("reading", [Reading(32, 0), Reading(50, 41), Reading(500, 100)])
def test_scored_logits_are_those_of_the_whole_window_at_once(bundled: LoadedModel, reading: Reading) -> None:
    window = [int(n) for n in np.random.default_rng(3).integers(10, 16000, size=121)]
    whole = np.array(bundled.model(mx.array([window[:-1]]))[0].astype(mx.float32))
    cache = make_prompt_cache(bundled.model)
    got = list(read_logits(bundled.model, cache, window, reading))
    assert np.concatenate([np.arange(i, i + len(x)) for i, x in got]).tolist() == list(range(120 - reading.score_from))
    np.testing.assert_allclose(np.concatenate([x for _, x in got]), whole[reading.score_from :], atol=2e-4)
    assert cache[0].offset == 120
    assert targets_of(window, reading).tolist() == window[reading.score_from + 1 :]


def test_reference_logits_come_back_from_their_file_bit_for_bit(bundled: LoadedModel) -> None:
    window, reading = list(range(100, 171)), Reading(32, 10)
    logits = np.concatenate(
        [x for _, x in read_logits(bundled.model, make_prompt_cache(bundled.model), window, reading)]
    )
    with ReferenceLogits(bundled.model, make_prompt_cache(bundled.model), window, reading) as reference:
        assert (reference.judge(0, logits).kld == 0).all()
        assert reference.judge(20, logits[20:30]).agree.all()
        assert reference.judge(0, logits[5:10]).kld.min() > 0.01
        np.testing.assert_array_equal(reference.judge_itself().nll, reference.judge(0, logits).nll)


def oracle(model: Any, window: list[int], score_from: int, bits: int) -> dict[str, float]:
    """Perplexity, divergence and agreement of mlx-lm's quantised cache token by token, in float64, written out."""
    caches = [make_prompt_cache(model), [QuantizedKVCache(64, bits) for _ in model.layers]]
    kld, nll, same = [], [], 0
    for i, token in enumerate(window[:-1]):
        p, q = (np.array(model(mx.array([[token]]), cache=cache)[0, 0]).astype(np.float64) for cache in caches)
        if i < score_from:
            continue
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p, q))
        kld.append(float((p * np.log(p / q)).sum()))
        nll.append(-np.log(q[window[i + 1]]))
        same += int(p.argmax() == q.argmax())
    return {
        "perplexity": float(np.exp(np.mean(nll))),
        "kld_mean": float(np.mean(kld)),
        "kld_p99": float(np.percentile(kld, 99)),
        "top1": same / len(kld),
    }


@pytest.mark.slow
def test_a_row_of_the_table_is_what_the_oracle_says(bundled: LoadedModel, measured: Callable[..., Any]) -> None:
    work, rows = measured("mlx-lm-3", context=80, score_from=30, chunk=33)
    full, row = rows
    want = oracle(bundled.model, work.windows[0], 30, 3)
    assert want["kld_mean"] > 0.005  # else there would be nothing to see
    assert {name: row[name] for name in want} == pytest.approx(want, rel=2e-3)
    assert full["perplexity"] != pytest.approx(row["perplexity"], rel=1e-3)
    assert (full["kld_mean"], full["top1"]) == (0, 1)


@pytest.mark.slow
def test_paged_rows_lie_where_they_should(measured: Callable[..., Any]) -> None:
    """Nothing compressed says the same; fewer bits say less of it."""
    _, (full, off, *compressed) = measured("off", "k8v8", "k4v4", "k2v2", context=160)
    assert off["kld_mean"] < 1e-8
    assert off["perplexity"] == pytest.approx(full["perplexity"], rel=1e-5)
    kld = [row["kld_mean"] for row in compressed]
    assert 1e-8 < kld[0] < kld[1] / 5 < kld[2] / 25


def test_what_is_wrong_with_a_text_is_said(tmp_path: Path) -> None:
    for name, content, said in (("empty", b" \n", "is empty"), ("binary", b"\xff\xfe\x00", "it is not UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EvaluationError, match=said):
            read_text(tmp_path / name)
    with pytest.raises(EvaluationError, match=r"can't read the text '.*absent': No such file"):
        read_text(tmp_path / "absent")
