"""Sessions that go to disk and come back: the same to the last bit, or refused with a reason."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from safetensors import safe_open

import turbocache.store
from kernels.codec.layout import LAYOUT_VERSION
from kernels.codec.rotation import ROTATION_SEED
from kernels.lanes.expanded import ExpandedAttentionLanes
from tests.models.tiny import build
from turbocache.cache.outline import PLAIN, Outline
from turbocache.cache.pool import PoolExhausted
from turbocache.cache.ring import RingConfig
from turbocache.codebooks.scalar import levels_for, zooms_for
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.plan import plan_layers
from turbocache.mlxlm.prompt_cache import leaves
from turbocache.presets import preset
from turbocache.storage.session_codec import VERSION, SessionFiles, State, fingerprint
from turbocache.storage.session_file import (
    PARTIAL,
    SUFFIX,
    SessionFileError,
    open_checked,
    piece,
    remove_partial,
    write,
)
from turbocache.store import CacheStore, fork, ring_of

RINGS = {
    "raw only": (RingConfig(8, 64), 40),
    "pages": (RingConfig(8, 64), 300),
    "rotated": (RingConfig(8, 64, 200), 500),
}


def some(seed: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 90, n)]


class Place:
    """A model's store with files."""

    def __init__(
        self, bundled: LoadedModel, model: Module, ring: RingConfig, backend: str = "reference", name: str = "k4v4"
    ) -> None:
        self.loaded = replace(bundled, model=model)
        self.store = CacheStore(model, plan_layers(model), preset(name), backend, ring, n_pages=40)
        self.files = SessionFiles(self.loaded, self.store)

    def save(self, path: Path, cache: list[Any], tokens: list[int]) -> int:
        return self.files.save(path, [State("session", np.array(tokens), cache)])

    def load(self, path: Path) -> list[Any]:
        (state,) = self.files.load(path)
        return list(state.cache)

    def session(self, tokens: list[int]) -> list[Any]:
        cache = self.store.new_cache()
        for at in range(0, len(tokens), 120):
            self.logits(cache, tokens[at : at + 120])
        return cache

    def logits(self, cache: list[Any], tokens: list[int]) -> np.ndarray:
        out = self.loaded.model(mx.array([tokens]), cache=cache)[0, -1]
        mx.eval(out, [leaf.state for leaf in leaves(cache)])
        return np.array(out.astype(mx.float32))


@pytest.mark.parametrize("backend", ["reference", "packed"])
@pytest.mark.parametrize("name", RINGS)
def test_a_session_comes_back_the_same(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path, name: str, backend: str
) -> None:
    ring, n = RINGS[name]
    place, path = Place(bundled, tiny_llama, ring, backend), tmp_path / f"a{SUFFIX}"
    tokens = some(1, n)
    cache = place.session(tokens)
    assert place.save(path, cache, tokens) == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    # To another process's store, as after a restart.
    there = Place(bundled, tiny_llama, ring, backend)
    (saved,) = there.files.load(path)
    assert saved.tokens.tolist() == tokens
    before, after = ring_of(cache), ring_of(saved.cache)
    assert before is not None
    assert after is not None
    assert (before.offset, before.gone, before.flushed) == (after.offset, after.gone, after.flushed)
    there.store.spec.check_integrity()
    for more in ([5], some(2, 150), [7], [9]):
        np.testing.assert_array_equal(there.logits(list(saved.cache), more), place.logits(cache, more))


def test_an_outline_comes_back(bundled: LoadedModel, tiny_llama: Module, tmp_path: Path) -> None:
    """With a checkpoint from before, which has another. The release before wrote rings without one."""
    outline, path = Outline(150, (150, 260, 380), (200,)), tmp_path / f"a{SUFFIX}"
    place, tokens = Place(bundled, tiny_llama, RingConfig(8, 64, 400)), some(1, 620)
    cache = place.store.new_cache()
    ring = ring_of(cache)
    assert ring is not None
    ring.describe(outline.before(300))
    place.logits(cache, tokens[:300])
    earlier = fork(cache)
    ring.describe(outline)
    place.logits(cache, tokens[300:])
    states = [State("session", np.array(tokens), cache), State("prompt", np.array(tokens[:300]), earlier)]
    place.files.save(path, states)
    there = Place(bundled, tiny_llama, RingConfig(8, 64, 400))
    for saved, state in zip(there.files.load(path), states, strict=True):
        before, after = ring_of(state.cache), ring_of(saved.cache)
        assert before is not None
        assert after is not None
        assert (before.outline, before.pinned, before.gone) == (after.outline, after.pinned, after.gone)
        assert before.pinned == 3
        np.testing.assert_array_equal(there.logits(list(saved.cache), [5]), place.logits(list(state.cache), [5]))
    manifest, arrays = open_checked(path)
    for record in manifest["states"]:
        del record["outline"], record["ring"]["pinned"]
    write(path, {name: piece(array) for name, array in arrays.items()}, {**manifest, "version": 4})
    after = ring_of(there.files.load(path)[0].cache)
    assert after is not None
    assert (after.outline, after.pinned) == (PLAIN, 0)


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text", "falcon_h1", "deepseek_v3"])
def test_other_kinds_of_layers_come_back(bundled: LoadedModel, tmp_path: Path, name: str) -> None:
    """Recurrent states, sliding windows in pages, several caches in a layer, latent attention."""
    model, path = build(name), tmp_path / f"a{SUFFIX}"
    place, there = (Place(bundled, model, RingConfig(8, 64)) for _ in range(2))
    assert len(place.store.specs) == 1 + (name == "gemma3_text")
    tokens = some(1, 330)
    cache = place.session(tokens)
    place.save(path, cache, tokens)
    pools = [spec.pool for spec in there.store.specs]
    others = [pool.take(i) for i, pool in enumerate(pools)]  # so that page ids differ from pool to pool
    back = there.load(path)
    for pool, pages in zip(pools, others, strict=True):
        pool.release(pages)
    for spec in there.store.specs:
        spec.check_integrity()
    for more in ([5], some(2, 60), [7]):
        np.testing.assert_array_equal(there.logits(back, more), place.logits(cache, more))


def test_what_is_taken_off_biased_keys_comes_back(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, path = RingConfig(8, 64), tmp_path / f"a{SUFFIX}"
    place, there = (Place(bundled, tiny_llama, ring) for _ in range(2))
    tokens = some(1, 300)
    cache = place.session(tokens)
    kept = ring_of(cache)
    assert kept is not None
    assert kept.centre is not None
    kept.centre.settle()
    # As if this layer's keys had been biased: what is stored is what must come back.
    kept.centre.means = {1: mx.random.normal((1, 2, 1, 64))}
    place.save(path, cache, tokens)
    back = ring_of(there.load(path))
    assert back is not None
    assert back.centre is not None
    assert back.centre.n_heads == kept.centre.n_heads
    np.testing.assert_array_equal(np.array(back.centre.means[1]), np.array(kept.centre.means[1]))


def test_any_reader_of_safetensors_opens_it(bundled: LoadedModel, tiny_llama: Module, tmp_path: Path) -> None:
    place, path = Place(bundled, tiny_llama, RingConfig(8, 64)), tmp_path / f"a{SUFFIX}"
    tokens = some(1, 300)
    place.save(path, place.session(tokens), tokens)
    with safe_open(str(path), "numpy") as file:
        assert file.get_tensor("state.0.tokens").tolist() == tokens
        assert set(file.metadata()) == {"manifest", "head", "digest"}


def test_files_of_something_else_are_refused(bundled: LoadedModel, tiny_llama: Module, tmp_path: Path) -> None:
    ring, path = RingConfig(8, 64), tmp_path / f"a{SUFFIX}"
    place, tokens = Place(bundled, tiny_llama, ring), some(1, 300)
    place.save(path, place.session(tokens), tokens)
    others = {
        "other_layout": [
            Place(bundled, tiny_llama, RingConfig(16, 64)),
            Place(bundled, tiny_llama, RingConfig(8, 64, 256)),
            Place(bundled, tiny_llama, ring, "packed"),
            Place(bundled, tiny_llama, ring, name="k8v4"),
        ],
        "other_model": [Place(bundled, build("llama"), ring)],
    }
    for code, places in others.items():
        for other in places:
            with pytest.raises(SessionFileError) as refused:
                other.files.load(path)
            assert refused.value.code == code
            assert other.store.spec.pool.n_used == 0
    with pytest.raises(SessionFileError) as refused:
        place.files.load(tmp_path / f"b{SUFFIX}")
    assert refused.value.code == "missing"


CHANGED: dict[str, tuple[str, Any, str]] = {
    "manifest": ("turbocache.storage.session_codec.VERSION", VERSION + 1, "other_version"),
    "pages": ("turbocache.storage.session_codec.LAYOUT_VERSION", LAYOUT_VERSION + 1, "other_version"),
    "rotation seed": ("turbocache.storage.session_codec.ROTATION_SEED", ROTATION_SEED + 1, "other_rotation"),
    "levels": ("turbocache.backend.levels_for", lambda *args: 1.25 * levels_for(*args), "other_codebook"),
    "zooms": ("turbocache.backend.zooms_for", lambda *args: (*zooms_for(*args), 1.5), "other_codebook"),
}
"""What another release may have changed: its name, its value there, and the refusal."""


@pytest.mark.parametrize("changed", CHANGED)
def test_files_of_another_format_are_refused(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    ring, path, (name, value, code) = RingConfig(8, 64), tmp_path / f"a{SUFFIX}", CHANGED[changed]
    place, tokens = Place(bundled, tiny_llama, ring), some(1, 300)
    place.save(path, place.session(tokens), tokens)
    monkeypatch.setattr(name, value)
    other = Place(bundled, tiny_llama, ring)
    with pytest.raises(SessionFileError) as refused:
        other.files.load(path)
    assert refused.value.code == code
    assert other.store.spec.pool.n_used == 0
    # It reads its own files, and the first release doesn't.
    other.save(path, other.session(tokens), tokens)
    other.load(path)
    monkeypatch.undo()
    with pytest.raises(SessionFileError) as refused:
        place.files.load(path)
    assert refused.value.code == code


def test_the_seed_of_the_sketch_counts_where_keys_have_one(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, tokens, codes = RingConfig(8, 64), some(1, 300), list[str | None]()
    for name in ("k4v4", "k4v4_qjl"):
        place, path = Place(bundled, tiny_llama, ring, name=name), tmp_path / f"{name}{SUFFIX}"
        place.save(path, place.session(tokens), tokens)
        with monkeypatch.context() as patch:
            patch.setattr("turbocache.storage.session_codec.SKETCH_SEED", 7)
            other = Place(bundled, tiny_llama, ring, name=name)
        try:
            other.load(path)
            codes.append(None)
        except SessionFileError as error:
            codes.append(error.code)
    assert codes == [None, "other_rotation"]


def test_pages_without_codes_depend_on_no_seed(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring, path, tokens = RingConfig(8, 64), tmp_path / f"a{SUFFIX}", some(1, 300)
    place = Place(bundled, tiny_llama, ring, name="off")
    cache = place.session(tokens)
    place.save(path, cache, tokens)
    monkeypatch.setattr("turbocache.storage.session_codec.ROTATION_SEED", 7)
    other = Place(bundled, tiny_llama, ring, name="off")
    np.testing.assert_array_equal(other.logits(other.load(path), [5]), place.logits(cache, [5]))


def test_partly_expanded_lanes_tell_their_codebooks_apart(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over expanded pages all backends have one name, and their codes still mean different levels."""
    make, ring, path, tokens = turbocache.store.lanes_for, RingConfig(8, 64), tmp_path / f"a{SUFFIX}", some(1, 300)
    monkeypatch.setattr(turbocache.store, "lanes_for", lambda *args: ExpandedAttentionLanes(make(*args), ["attend"]))
    place = Place(bundled, tiny_llama, ring)
    place.save(path, place.session(tokens), tokens)
    Place(bundled, tiny_llama, ring).load(path)
    with pytest.raises(SessionFileError) as refused:
        Place(bundled, tiny_llama, ring, "packed").files.load(path)
    assert refused.value.code == "other_codebook"


def test_files_without_a_format_are_of_another_version(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path
) -> None:
    """Releases before version 4 wrote neither the layout's version nor the seeds nor a digest of the codebooks."""
    place, path, tokens = Place(bundled, tiny_llama, RingConfig(8, 64)), tmp_path / f"a{SUFFIX}", some(1, 300)
    place.save(path, place.session(tokens), tokens)
    manifest, arrays = open_checked(path)
    for name in ("layout_version", "rotation", "codebooks"):
        del manifest[name]
    for version in (3, VERSION):
        write(path, {name: piece(array) for name, array in arrays.items()}, {**manifest, "version": version})
        with pytest.raises(SessionFileError) as refused:
            place.files.load(path)
        assert refused.value.code == "other_version"


def test_one_changed_weight_is_another_model(bundled: LoadedModel, llama_of: Any) -> None:
    one, two = llama_of(), llama_of()
    assert fingerprint(replace(bundled, model=one)) == fingerprint(replace(bundled, model=two))
    two.model.norm.weight = two.model.norm.weight + 1e-3
    assert fingerprint(replace(bundled, model=one)) != fingerprint(replace(bundled, model=two))


def test_a_full_pool_is_told_apart_from_a_bad_file(bundled: LoadedModel, tiny_llama: Module, tmp_path: Path) -> None:
    place, path = Place(bundled, tiny_llama, RingConfig(8, 64)), tmp_path / f"a{SUFFIX}"
    tokens = some(1, 300)
    place.save(path, place.session(tokens), tokens)
    taken = place.store.spec.pool.take(place.store.spec.pool.n_free - 1)
    with pytest.raises(PoolExhausted):
        place.files.load(path)
    place.store.spec.pool.release(taken)
    assert place.store.spec.pool.n_used == 0


def test_every_damage_is_refused(bundled: LoadedModel, tiny_llama: Module, tmp_path: Path) -> None:
    """Bits anywhere, more of them in the header than its share; ends anywhere; and bytes too many."""
    place, path = Place(bundled, tiny_llama, RingConfig(8, 64)), tmp_path / f"a{SUFFIX}"
    tokens, dice = some(1, 200), random.Random(1)
    place.save(path, place.session(tokens), tokens)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    codes: dict[str, int] = {}
    for i in range(500):
        bad = bytearray(good)
        if i % 5 == 4:
            bad = bad[: dice.randrange(len(bad))]
        else:
            at = dice.randrange(header if i % 2 else len(bad))
            bad[at] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(bad))
        with pytest.raises(SessionFileError) as refused:
            place.files.load(path)
        codes[refused.value.code] = codes.get(refused.value.code, 0) + 1
    # Without the entry `head` it is a file from before there was one.
    assert set(codes) <= {"truncated", "corrupt", "other_version"}
    path.write_bytes(good + b"\0")
    with pytest.raises(SessionFileError):
        place.files.load(path)
    path.write_bytes(good)
    (back,) = place.files.load(path)
    assert back.tokens.tolist() == tokens
    del back
    assert place.store.spec.pool.n_used == 0


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / f"a{SUFFIX}"
    write(path, {"x": piece(mx.arange(10))}, {"n": 1})

    def fail() -> mx.array:
        raise OSError("injected")

    with pytest.raises(OSError, match="injected"):
        write(path, {"x": replace(piece(mx.arange(10)), make=fail)}, {"n": 2})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert open_checked(path)[0] == {"n": 1}


def test_of_a_file_that_is_replaced_while_it_is_read_the_new_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server may do that; the check of one file says nothing of another's arrays."""
    path, load = tmp_path / f"a{SUFFIX}", mx.load
    write(path, {"x": piece(mx.full((10,), 1))}, {"n": 1})

    def late(name: str) -> Any:
        monkeypatch.undo()
        write(path, {"x": piece(mx.full((10,), 2))}, {"n": 2})
        return load(name)

    monkeypatch.setattr(mx, "load", late)
    manifest, arrays = open_checked(path)
    assert (manifest["n"], arrays["x"].tolist()) == (2, [2] * 10)


WRITER = """
    import sys
    from pathlib import Path
    import mlx.core as mx
    from turbocache.storage.session_file import write, piece
    path = Path(sys.argv[1])
    print("ready", flush=True)
    n = 0
    while True:
        n += 1
        write(path, {f"x{i}": piece(mx.full((50_000,), n)) for i in range(20)}, {"n": n})
"""


def test_a_killed_writer_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    """SIGKILL at random moments; the server's own stop and spill use the same write."""
    path, dice, found = tmp_path / f"a{SUFFIX}", random.Random(2), 0
    for _ in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(dice.uniform(0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert remove_partial(tmp_path) <= 1
        assert not list(tmp_path.glob(f"*{PARTIAL}"))
        if path.exists():
            found += 1
            manifest, arrays = open_checked(path)
            for array in arrays.values():
                assert bool((array == manifest["n"]).all())
    assert found > 10


def test_a_fork_saves_what_it_holds(bundled: LoadedModel, tiny_llama: Module, tmp_path: Path) -> None:
    place, path = Place(bundled, tiny_llama, RingConfig(8, 64)), tmp_path / f"a{SUFFIX}"
    tokens = some(1, 300)
    cache = place.session(tokens)
    other = fork(cache)
    place.logits(cache, some(3, 80))
    place.save(path, other, tokens)
    back = place.load(path)
    np.testing.assert_array_equal(place.logits(back, [4]), place.logits(other, [4]))


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_checkpoints_come_back_with_their_session(bundled: LoadedModel, tmp_path: Path, name: str) -> None:
    """After rotation, when what the checkpoint has can't be had from the session any more; shared pages lie there once,
    also in the pool. Where there are too few pages for all, the session comes back alone.
    """
    model, path, ring = build(name), tmp_path / f"a{SUFFIX}", RingConfig(8, 64, 300)
    place, there = (Place(bundled, model, ring) for _ in range(2))
    tokens = some(1, 300)
    cache = place.session(tokens)
    kept = fork(cache)
    more = some(2, 120)
    place.logits(cache, more)
    states = [State("session", np.array(tokens + more), cache), State("prompt", np.array(tokens), kept)]
    place.files.save(path, states)
    used = place.store.spec.pool.n_used
    back = there.files.load(path)
    assert [(state.kind, state.tokens.tolist()) for state in back] == [(s.kind, s.tokens.tolist()) for s in states]
    assert there.store.spec.pool.n_used == used
    there.store.spec.check_integrity()
    for state, original in zip(back, states, strict=True):
        for next_tokens in ([5], some(3, 90)):
            got = there.logits(list(state.cache), next_tokens)
            np.testing.assert_array_equal(got, place.logits(list(original.cache), next_tokens))
    del back, state
    few = Place(bundled, model, ring)
    taken = few.store.spec.pool.take(few.store.spec.pool.n_free - used + 1)
    (alone,) = few.files.load(path)
    assert alone.kind == "session"
    few.store.spec.pool.release(taken)
    few.store.spec.check_integrity()


def test_what_is_said_of_a_session_is_checked_without_reading_it_all(
    bundled: LoadedModel, tiny_llama: Module, tmp_path: Path
) -> None:
    """A server that knew a session by the wrong tokens would never ask for it again."""
    place, path = Place(bundled, tiny_llama, RingConfig(8, 64)), tmp_path / f"a{SUFFIX}"
    tokens, dice = some(1, 200), random.Random(3)
    about = {"id": "anna", "turns": 3}
    place.files.save(path, [State("session", np.array(tokens), place.session(tokens))], about)
    said, found = place.files.peek(path)
    assert (said, found.tolist()) == (about, tokens)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    start, n_whole = good.index(np.array(tokens, dtype=np.int32).tobytes(), header), 0
    for i in range(200):
        bad = bytearray(good)
        at = dice.randrange(header) if i % 2 else start + dice.randrange(4 * len(tokens))
        bad[at] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(bad))
        try:
            said, found = place.files.peek(path)
            assert (said, found.tolist()) == (about, tokens)
            n_whole += 1
        except SessionFileError:
            pass
    assert n_whole < 20  # the digest of everything is not looked at here, and some bits of JSON say the same
