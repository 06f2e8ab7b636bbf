"""What a case says about bytes, against accounts made in another way."""

from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from turbocache.backend import choose_backend
from turbocache.benchmark import shapes
from turbocache.benchmark.contenders import Contender, contenders, open_contender
from turbocache.benchmark.loops import Loop
from turbocache.benchmark.measure import SKIPPED, measure
from turbocache.benchmark.settings import Settings
from turbocache.benchmark.shapes import Shape, random_model
from turbocache.benchmark.subject import Subject, make_subject
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import PRESETS
from turbocache.store import CacheStore, ring_of

CONTEXT = 700
SETTINGS = Settings(contexts=(CONTEXT,), presets=("k4v4", "off"), max_size=320, generate=6, chunk=256)


@pytest.fixture(scope="module")
def subject(tiny_llama: Module) -> Subject:
    return Subject(tiny_llama, plan_layers(tiny_llama), "tiny", "random", "float32", 4096, 97, ())


def contender(name: str, settings: Settings = SETTINGS) -> Contender:
    return next(c for c in contenders(settings) if c.name == name)


def figures(subject: Subject, name: str, settings: Settings = SETTINGS) -> dict[str, Any]:
    chosen = contender(name, settings)
    backend = None if chosen.preset is None else choose_backend("auto", subject.plans, chosen.preset)
    return measure(subject, chosen, settings.contexts[0], settings, backend)


@pytest.mark.parametrize("name", ["kv", "rotating", "quantized-8", "quantized-4"])
def test_bytes_of_mlx_lms_caches_are_those_of_their_arrays(subject: Subject, name: str) -> None:
    """The same prompt through mlx-lm by hand: bytes of the cache's arrays once the first token is out."""
    found = figures(subject, name)
    cache = make_prompt_cache(subject.model)
    options = {}
    if name == "rotating":
        cache = [RotatingKVCache(max_size=320, keep=4) for _ in cache]
    if name.startswith("quantized"):
        options = {"kv_bits": int(name[-1]), "quantized_kv_start": 0}
    tokens = generate_step(
        mx.zeros(CONTEXT, mx.int32), subject.model, prompt_cache=cache, prefill_step_size=256, max_tokens=9, **options
    )
    next(tokens)
    arrays = [array for layer in cache for _, array in tree_flatten([layer.keys, layer.values])]
    assert found["cache_bytes"] == sum(array.nbytes for array in arrays)
    assert found["cache_bytes_half"] < found["cache_bytes"]
    # MLX's own account after the last token; a few numbers of the last step may be in it, a second copy may not.
    assert found["active_bytes"] == pytest.approx(found["cache_bytes"], rel=0.1)
    assert found["peak_bytes"] >= found["prefill_peak_bytes"] >= found["cache_bytes"]


def test_bytes_of_a_preset_are_pages_and_raw_tokens(subject: Subject) -> None:
    found = figures(subject, "k4v4")
    backend = choose_backend("auto", subject.plans, PRESETS["k4v4"])
    store = CacheStore(subject.model, subject.plans, PRESETS["k4v4"], backend, RingConfig(64, 128), 64)
    cache = store.new_cache()
    tokens = generate_step(
        mx.zeros(CONTEXT, mx.int32), subject.model, prompt_cache=cache, prefill_step_size=256, max_tokens=9
    )
    next(tokens)
    ring = ring_of(cache)
    assert ring is not None
    assert len(ring.pages) == (CONTEXT - 64 - 128) // 64
    raw_slots = 64 + 128 + 64
    n_layers, n_kv_heads, head_dim = 2, 2, 64
    raw = 2 * n_layers * n_kv_heads * head_dim * raw_slots * 4
    assert found["cache_bytes"] == len(ring.pages) * store.spec.pool.page_nbytes + raw
    # 4 bits a value and two bytes a token and head, for keys and for values.
    assert store.spec.pool.page_nbytes == 64 * 2 * n_layers * n_kv_heads * (head_dim // 2 + 2)
    assert found["cache_bytes"] < figures(subject, "off")["cache_bytes"]
    pool = 64 * store.spec.pool.page_nbytes
    assert found["active_bytes"] <= raw + pool + 4096


def test_a_rotating_preset_holds_what_max_size_says(subject: Subject) -> None:
    chosen = contender("k4v4@64/128/320")
    assert chosen.held(CONTEXT) == 320
    assert figures(subject, chosen.name)["cache_bytes"] < figures(subject, "k4v4")["cache_bytes"]


def test_rows_of_a_batch_are_sessions_of_their_own(subject: Subject) -> None:
    settings = Settings(contexts=(200,), presets=("k4v4",), max_size=256, batch=3, generate=6, chunk=128)
    alone = Settings(contexts=(200,), presets=("k4v4",), max_size=256, generate=6, chunk=128)
    assert figures(subject, "k4v4", settings)["cache_bytes"] == figures(subject, "k4v4", alone)["cache_bytes"]
    kv = figures(subject, "kv", settings)
    assert "active_bytes" not in kv
    # A row taken out of the batch has no unused slots: 200 tokens and the one that is out.
    assert kv["cache_bytes"] == 2 * 2 * 2 * 64 * 201 * 4
    with pytest.raises(ValueError, match="batching"):
        figures(subject, "quantized-4", settings)


def test_the_stop_watch_skips_the_first_steps(subject: Subject) -> None:
    opened = open_contender(contender("kv"), subject.model, subject.plans, SETTINGS, None, CONTEXT)
    seen: list[int] = []
    prompts = [[5] * 100]
    times = Loop(subject.model, opened.caches, prompts, 9, 64, {}).run(lambda cache: seen.append(cache[0].offset))
    assert len(times.tokens) == 9
    assert len(times.steps(SKIPPED)) == 9 - SKIPPED - 1
    assert 0 < times.prefilled < times.tokens[0]
    assert times.tokens == sorted(times.tokens)
    assert seen == [101]


def test_a_shape_is_the_model_whose_name_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Shape("Tiny-0B", 64, 2, 4, 2, 32, 128, vocabulary=64)
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    made = make_subject(Settings(shape="tiny", contexts=(100,), dtype="float16"), plan_layers)
    said = made.as_json()
    assert (said["id"], said["dtype"], said["layers"]) == ("Tiny-0B geometry", "float16", 2)
    assert (said["n_heads"], said["n_kv_heads"], said["head_dim"]) == (4, 2, 32)
    assert "the text is not" in said["weights"]
    again = random_model(tiny, mx.float16)
    for (name, mine), (_, theirs) in zip(
        tree_flatten(made.model.parameters()), tree_flatten(again.parameters()), strict=True
    ):
        assert mx.array_equal(mine, theirs), name
    small = make_subject(Settings(shape="tiny", contexts=(100,), weight_bits=4), plan_layers).as_json()
    assert small["parameter_bytes"] < said["parameter_bytes"] / 2
    assert type(make_prompt_cache(again)[0]) is KVCache


def test_8b_has_the_parameters_of_llama_8b() -> None:
    """Counted without making them: 8.03 billion, and 128 KiB of cache a token in half precision."""
    s = shapes.SHAPES["8b"]
    attention = s.hidden_size * s.head_dim * 2 * (s.n_heads + s.n_kv_heads)
    layer = attention + 3 * s.hidden_size * s.intermediate_size + 2 * s.hidden_size
    assert s.n_layers * layer + 2 * s.vocabulary * s.hidden_size + s.hidden_size == 8_030_261_248
    assert 2 * s.n_layers * s.n_kv_heads * s.head_dim * 2 == 131072
