import importlib.util
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from turbocache.evaluation.rows import GROUPS, RowMaker, expand_names, full_precision
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import PRESETS
from turbocache.store import ring_of

WINDOW = [int(n) for n in np.random.default_rng(8).integers(10, 16000, size=100)]
needs_mlx_vlm = pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")


def names_of(*rows: str, **options: Any) -> list[str]:
    return expand_names(Settings(Path("text"), rows, **options))


@pytest.fixture(scope="module")
def maker(bundled: LoadedModel) -> RowMaker:
    return RowMaker(
        bundled.model, plan_layers(bundled.model), Settings(Path("text"), ("all",), keep=(4,), window=(64,))
    )


def test_groups_and_sweeps_are_written_out() -> None:
    everything = names_of("all")
    assert everything == [name for group in GROUPS.values() for name in group]
    assert set(PRESETS) | {"mlx-lm-4", "mlx-vlm-2.5", "mlx-vlm-3.5-all"} <= set(everything)
    assert names_of("k4v4", "mlx-lm", "k4v4") == ["k4v4", "mlx-lm-8", "mlx-lm-4", "mlx-lm-3", "mlx-lm-2"]
    assert names_of("off", "k4v4", "k4v3@8/64", "mlx-lm-4", keep=(0, 4), window=(0, 64)) == [
        "off", "k4v4@0/0", "k4v4@0/64", "k4v4@4/0", "k4v4@4/64", "k4v3@8/64", "mlx-lm-4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["k5v1", "mlx-lm-5", "mlx-lm-2.5", "mlx-lm-4-all", "mlx-vlm-8", "k4v4@", "full:packed", ""]
)
def test_unknown_names_are_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(EvaluationError, match=r"unknown preset .*turbo3_5.*mlx-lm-4.*mlx-vlm-2.5"):
        names_of("k4v4", name)


def test_sizes_that_can_not_be_are_told() -> None:
    with pytest.raises(EvaluationError, match="'k4v4@4/65': window must be a multiple of 64"):
        names_of("k4v4@4/65")
    with pytest.raises(EvaluationError, match=r"'k4v4@4/64/100': max_size must be at least .* = 132 tokens, not 100"):
        names_of("k4v4@4/64/100")
    with pytest.raises(EvaluationError, match="--keep and --window: window must be a multiple of 64"):
        Settings(Path("text"), ("k4v4",), window=(0, 32))


def test_a_row_has_its_own_backend_and_sizes(maker: RowMaker) -> None:
    for name, key in (
        ("k4v4", "k4v4:reference@4/64"),
        ("k4v4:packed", "k4v4:packed@4/64"),
        ("k4v3:packed@0/128", "k4v3:packed@0/128"),
        ("k4v4@4/64/150", "k4v4:reference@4/64/150"),
    ):
        row = maker.row(name)
        assert (row.name, row.key) == (name, key)
        ring = ring_of(row.open(100).layers)
        assert ring is not None
        sizes = (ring.config.keep, ring.config.window, ring.config.max_size)
        assert key[key.index("@") + 1 :] == "/".join(str(size) for size in sizes if size is not None)
    assert "stored as k4v3" in maker.row("turbo3_5:packed").note
    with pytest.raises(EvaluationError, match="auto, metal, cuda, packed, reference"):
        maker.row("k4v4:vulkan")


@pytest.mark.slow
def test_a_row_may_rotate(measured: Callable[..., Any]) -> None:
    """Without a codec nothing but what has rotated out makes a difference."""
    _, (_, small, large, plain) = measured("off@4/0/80", "off@4/0/200", "off", context=160)
    assert small["kld_mean"] > 1e-3
    assert abs(large["kld_mean"]) < 1e-9
    assert abs(plain["kld_mean"]) < 1e-9
    assert small["stored_bits"] < plain["stored_bits"]


@pytest.mark.slow
def test_a_field_of_a_preset_can_be_changed(measured: Callable[..., Any]) -> None:
    _, (_, changed, known, plain) = measured("k4v4+value_bits=2", "k4v2", "k4v4", context=160)
    assert changed["preset"] == "k4v4+value_bits=2"
    assert {**changed, "preset": ""} == {**known, "preset": ""}
    assert changed["kld_mean"] > 2 * plain["kld_mean"]
    with pytest.raises(EvaluationError, match=r"preset 'k4v4\+depth=3': .*unexpected keyword argument 'depth'"):
        names_of("k4v4+depth=3")


def logits_through(model: Module, layers: list[Any], cut: int) -> np.ndarray:
    parts = [model(mx.array([part]), cache=layers)[0] for part in (WINDOW[:cut], WINDOW[cut:])]
    return np.array(mx.concatenate(parts).astype(mx.float32))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_mlx_lm_rows_are_what_mlx_lm_generates_with(bundled: LoadedModel, maker: RowMaker, bits: int) -> None:
    """mlx-lm's own loop over its own quantised caches, greedy: the same log-probabilities, step by step."""
    row = maker.row(f"mlx-lm-{bits}").open(200).layers
    assert [(type(c), c.bits, c.group_size) for c in row] == [(QuantizedKVCache, bits, 64)] * len(bundled.model.layers)
    theirs: list[Any] = [QuantizedKVCache(64, bits) for _ in bundled.model.layers]
    prompt = mx.array(WINDOW[:40])
    # generate_step feeds the prompt's last token by itself. Other chunks round otherwise, and a code may flip.
    bundled.model(prompt[None, :-1], cache=row)
    newest = prompt[None, -1:]
    for token, logprobs in islice(
        generate_step(prompt, bundled.model, prompt_cache=theirs, kv_bits=bits, quantized_kv_start=0), 5
    ):
        logits = bundled.model(newest, cache=row)[0, -1]
        np.testing.assert_allclose(np.array(logits - mx.logsumexp(logits)), np.array(logprobs), atol=2e-3)
        newest = mx.array([[token]])


class ReadBack:
    """A plain cache of what a codec of mlx-vlm's gives back: rounded keys and values under ordinary attention."""

    def __init__(self, bits: float) -> None:
        from mlx_vlm.turboquant import TurboQuantKVCache

        self.codecs, self.native = TurboQuantKVCache(bits), KVCache()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        self.codecs._ensure_codecs(keys, values)
        pairs = ((self.codecs.key_codec, keys), (self.codecs.value_codec, values))
        return self.native.update_and_fetch(*(codec.dequantize(codec.quantize(x)) for codec, x in pairs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)


@pytest.mark.slow
@needs_mlx_vlm
@pytest.mark.parametrize(("bits", "cut"), [(4, 60), (2.5, 99)])
def test_mlx_vlm_rows_attend_over_what_its_codec_gives_back(
    bundled: LoadedModel, maker: RowMaker, bits: float, cut: int
) -> None:
    model, n_layers = bundled.model, len(bundled.model.layers)
    got = logits_through(model, maker.row(f"mlx-vlm-{bits:g}-all").open(200).layers, cut)
    whole = logits_through(model, [ReadBack(bits) for _ in range(n_layers)], cut)
    np.testing.assert_allclose(got, whole, atol=2e-3)
    assert np.abs(got - logits_through(model, make_prompt_cache(model), cut)).max() > 0.05
    # As its generation has it, the last layer is not compressed.
    but_last = logits_through(model, [*(ReadBack(bits) for _ in range(n_layers - 1)), KVCache()], cut)
    np.testing.assert_allclose(
        logits_through(model, maker.row(f"mlx-vlm-{bits:g}").open(200).layers, cut), but_last, atol=2e-3
    )
    assert np.abs(but_last - whole).max() > 0.02


def test_rows_that_can_not_run_stay_in_the_table_with_their_reason(
    measured: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("mlx_vlm") is not None:
        import mlx_vlm.turboquant  # noqa: F401  (an import that fails halfway would break later tests)
    monkeypatch.setitem(sys.modules, "mlx_vlm.turboquant", None)
    _, rows = measured("mlx-vlm-3", "k4v4")
    assert [row["preset"] for row in rows] == ["full", "mlx-vlm-3", "k4v4"]
    assert "mlx-vlm can't be imported" in rows[1]["unavailable"]
    assert "kld_mean" not in rows[1]
    assert rows[2]["kld_mean"] > 0


def test_a_model_that_mlx_lm_can_not_quantise_says_so(gemma: Module) -> None:
    from turbocache.evaluation.rows import RowUnavailable

    maker = RowMaker(gemma, plan_layers(gemma), Settings(Path("text"), ("mlx-lm-4",)))
    with pytest.raises(RowUnavailable, match="mlx-lm can't quantise this model's cache"):
        maker.row("mlx-lm-4").open(10)
    layers = full_precision(gemma).open(10).layers
    assert len(layers) == 4
