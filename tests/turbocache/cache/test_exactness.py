"""Whole models: the preset `off` is mlx-lm token for token, and every preset runs in mlx-lm's unchanged generators."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.generate import BatchGenerator, generate_step, stream_generate
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from kernels.codec.layout import PAGE
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore, fork

MakeCache = Callable[[], list[Any]]

TALK = (
    "The warehouse in Lisbon keeps the green crates, the one in Oslo keeps the red ones. The code for the gate in "
    "Lisbon is 4471 and the code for the gate in Oslo is 9038. Maria drives the truck on Mondays and Jonas on "
    "Thursdays. The blue folder with the invoices lies in the third drawer of the desk beside the window. "
)
QUESTIONS = (
    TALK * 2 + "What is the code for the gate in Oslo?",
    "My favourite number is 62. What is my favourite number?",
    TALK + "Who drives the truck on Mondays?",
)


def store_of(
    model: Module, ring: RingConfig, name: str = "off", backend: str = "packed", n_pages: int = 400
) -> CacheStore:
    return CacheStore(model, plan_layers(model), preset(name), backend, ring, n_pages)


def chat(loaded: LoadedModel, text: str) -> list[int]:
    tokens: list[int] = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )
    return tokens


def greedy(model: Module, prompt: Sequence[int], cache: list[Any], n: int, step: int = 2048) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=cache, prefill_step_size=step)
    return [int(token) for token, _ in steps]


def batched(
    model: Module, prompts: Sequence[Sequence[int]], caches: list[list[Any]], n: Sequence[int], **options: Any
) -> tuple[list[list[int]], list[list[Any]]]:
    """Greedy tokens and final caches of a BatchGenerator, in the order of the prompts."""
    generator = BatchGenerator(model, **options)
    uids = generator.insert([list(p) for p in prompts], max_tokens=list(n), caches=caches)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    finished: dict[int, list[Any]] = {}
    while len(finished) < len(uids):
        for response in generator.next_generated():
            tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                finished[response.uid] = response.prompt_cache
    generator.close()
    return [tokens[uid] for uid in uids], [finished[uid] for uid in uids]


# --- the bundled model, preset off ---


def test_off_generates_what_mlx_lm_generates(bundled: LoadedModel) -> None:
    """Longer than sink and window, so most of what is read comes from pages; also cut into short prefill steps."""
    ring = RingConfig(keep=16, window=0)
    store = store_of(bundled.model, ring)
    for question, n in zip(QUESTIONS, (24, 12, 24), strict=True):
        prompt = chat(bundled, question)
        want = greedy(bundled.model, prompt, make_prompt_cache(bundled.model), n)
        cache = store.new_cache()
        assert greedy(bundled.model, prompt, cache, n, step=50) == want
        if len(prompt) > 16 + PAGE:
            assert store.spec.pool.n_used > 0
    assert store.spec.pool.n_used == len(cache[0].batch.rings[0].pages)


def test_off_streams_what_mlx_lm_streams(bundled: LoadedModel) -> None:
    store = store_of(bundled.model, RingConfig(keep=0, window=64))
    prompt = chat(bundled, QUESTIONS[2])
    texts = []
    for cache in (store.new_cache(), make_prompt_cache(bundled.model)):
        chunks = stream_generate(bundled.model, bundled.tokenizer, prompt, max_tokens=16, prompt_cache=cache)
        texts.append("".join(chunk.text for chunk in chunks))
    assert texts[0] == texts[1]
    assert texts[0].strip()


def test_off_in_batches_with_a_second_turn(bundled: LoadedModel) -> None:
    """Ragged prompts in one BatchGenerator, rows that end at different times, then a second turn from their caches."""
    store = store_of(bundled.model, RingConfig(keep=16, window=64))
    prompts = [chat(bundled, question) for question in QUESTIONS]
    second = bundled.tokenizer.encode("And what is the code for the gate in Lisbon?")
    lengths = [20, 6, 13]
    results = []
    for make in (store.new_cache, lambda: make_prompt_cache(bundled.model)):
        first, caches = batched(bundled.model, prompts, [make() for _ in prompts], lengths, prefill_step_size=64)
        again, _ = batched(bundled.model, [second] * 3, caches, [8] * 3)
        results.append((first, again))
    assert results[0] == results[1]
    alone = greedy(bundled.model, prompts[0], store.new_cache(), lengths[0])
    assert results[0][0][0] == alone


def test_off_rotates_like_mlx_lms_rotating_cache(bundled: LoadedModel) -> None:
    ring = RingConfig(keep=0, window=0, max_size=100)
    store = store_of(bundled.model, ring)
    prompt = chat(bundled, QUESTIONS[2])
    assert len(prompt) > 100
    theirs = [RotatingKVCache(max_size=100) for _ in bundled.model.layers]
    assert greedy(bundled.model, prompt, store.new_cache(), 24, step=40) == greedy(
        bundled.model, prompt, theirs, 24, step=40
    )


# --- random models: logits, every preset and backend ---


def logits_after(model: Module, tokens: Sequence[int], cache: list[Any], cut: Sequence[int]) -> np.ndarray:
    out, start = [], 0
    for n in cut:
        out.append(model(mx.array([list(tokens[start : start + n])]), cache=cache))
        mx.eval(out[-1], [layer.state for layer in cache])
        start += n
    return np.array(mx.concatenate(out, axis=1))[0]


@pytest.fixture(params=["tiny_llama", "tiny_qwen3"])
def tiny(request: pytest.FixtureRequest) -> Module:
    model: Module = request.getfixturevalue(request.param)
    return model


def test_off_has_mlx_lms_logits(tiny: Module) -> None:
    tokens = np.random.default_rng(0).integers(0, 97, size=300).tolist()
    for cut in ([300], [200, 1, 1, 98], [7] * 42 + [6]):
        store = store_of(tiny, RingConfig(keep=4, window=64))
        got = logits_after(tiny, tokens, store.new_cache(), cut)
        want = logits_after(tiny, tokens, make_prompt_cache(tiny), cut)
        np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_logits_do_not_depend_on_how_the_prompt_is_cut(tiny: Module, backend: str) -> None:
    """Keys of deeper layers come out of attention, whose last bits depend on the cut: a coordinate at a boundary may
    get the other code. So the tolerance is not that of one layer; the effect of compression is far above it.
    """
    tokens = np.random.default_rng(1).integers(0, 97, size=330).tolist()
    ring = RingConfig(keep=4, window=0, max_size=290)
    first = logits_after(tiny, tokens, store_of(tiny, ring, "k4v4", backend).new_cache(), [330])
    spread = np.abs(first).max()
    for cut in ([100, 1, 1, 1, 200, 27], [64] * 5 + [10], [329, 1]):
        other = logits_after(tiny, tokens, store_of(tiny, ring, "k4v4", backend).new_cache(), cut)
        assert np.abs(other - first).max() < 5e-3 * spread
        assert np.median(np.abs(other - first)) < 1e-5 * spread
    off = logits_after(tiny, tokens, store_of(tiny, ring).new_cache(), [330])
    assert np.abs(off - first).max() > 2e-2 * spread


@pytest.mark.parametrize("backend", ["packed", "reference"])
@pytest.mark.parametrize("max_size", [None, 180])
def test_the_batch_generator_runs_unchanged_and_equals_single(tiny: Module, backend: str, max_size: int | None) -> None:
    store = store_of(tiny, RingConfig(keep=4, window=64, max_size=max_size), "k4v4", backend)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 97, size=n).tolist() for n in (250, 3, 140, 90)]
    lengths = [30, 70, 5, 40]
    # Fewer rows at once than prompts: rows leave, others join a batch that is already decoding.
    options = {"completion_batch_size": 3, "prefill_batch_size": 2, "prefill_step_size": 100}
    together, caches = batched(tiny, prompts, [store.new_cache() for _ in prompts], lengths, **options)
    store.spec.check_integrity()
    alone_caches = [store.new_cache() for _ in prompts]
    alone = [greedy(tiny, p, c, n) for p, c, n in zip(prompts, alone_caches, lengths, strict=True)]
    assert together == alone
    turn = rng.integers(0, 97, size=20).tolist()
    again, _ = batched(tiny, [turn] * 4, caches, [10] * 4)
    # generate_step has computed one token more than it has given out.
    for tokens, prompt, generated in zip(again, prompts, together, strict=True):
        assert tokens == greedy(tiny, [*prompt, *generated, *turn], store.new_cache(), 10, step=100)
    del caches, alone_caches, tokens
    store.spec.check_integrity()


def test_forked_sessions_go_separate_ways(tiny: Module) -> None:
    store = store_of(tiny, RingConfig(keep=4, window=0), "k4v4")
    rng = np.random.default_rng(3)
    shared, left, right = (rng.integers(0, 97, size=n).tolist() for n in (200, 70, 90))
    trunk = store.new_cache()
    logits_after(tiny, shared, trunk, [200])
    used = store.spec.pool.n_used
    branches = [fork(trunk), fork(trunk)]
    assert store.spec.pool.n_used == used
    got = [logits_after(tiny, tail, branch, [len(tail)]) for tail, branch in zip((left, right), branches, strict=True)]
    for tail, logits in zip((left, right), got, strict=True):
        cache = store.new_cache()
        logits_after(tiny, shared, cache, [200])
        np.testing.assert_allclose(logits, logits_after(tiny, tail, cache, [len(tail)]), atol=1e-4, rtol=1e-4)
    store.spec.check_integrity()


def test_half_precision_models_run(tiny: Module, llama_of: Callable[..., Module]) -> None:
    """A bfloat16 model: raw tokens in its dtype, outputs in its dtype, logits near those of mlx-lm's cache."""
    model = llama_of(head_dim=64)
    model.set_dtype(mx.bfloat16)
    tokens = np.random.default_rng(4).integers(0, 97, size=150).tolist()
    want = model(mx.array([tokens]), cache=make_prompt_cache(model)).astype(mx.float32)
    for name, tolerance in (("off", 0.1), ("k8v8", 0.15)):
        store = store_of(model, RingConfig(keep=4, window=0), name)
        cache = store.new_cache()
        assert cache[0].batch.raw[0][0].dtype == mx.bfloat16
        out = model(mx.array([tokens]), cache=cache)
        assert out.dtype == mx.bfloat16
        error = np.abs(np.array(out.astype(mx.float32)) - np.array(want)).max()
        assert error < tolerance * float(mx.abs(want).max())
        step = model(mx.array([[5]]), cache=cache)
        assert step.dtype == mx.bfloat16
        assert bool(mx.isfinite(step).all())
