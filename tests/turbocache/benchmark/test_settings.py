"""What can't be asked for, in one sentence each."""

from typing import Any

import pytest

from turbocache.benchmark.contenders import contenders
from turbocache.benchmark.settings import BenchmarkError, Settings, parse_bytes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"contexts": (1,)}, "--contexts must be 2 tokens or more"),
        ({"contexts": ()}, "--contexts must be 2 tokens or more"),
        ({"repeat": 0}, "--repeat must be at least 1, not 0"),
        ({"budget": 0}, "--budget must be at least 1"),
        ({"warm_up": 1}, "--warm-up must be 2 tokens or more"),
        ({"timeout": 0}, "--timeout must be more than 0 seconds"),
        ({"shape": "9b"}, "--shape '9b': there are 1b, 3b, 8b, 70b"),
        ({"shape": "8b", "model": "somewhere"}, "--model and --shape exclude each other"),
        ({"weight_bits": 4}, "--weight-bits and --dtype go with --shape"),
        ({"against": ("vllm",)}, "--against 'vllm': there are kv, rotating"),
        ({"max_size": 200}, "max_size must be at least keep .* 256 tokens, not 200"),
        ({"window": 100}, "window must be a multiple of 64"),
        ({"presets": (), "against": ()}, "nothing to measure"),
    ],
)
def test_what_cant_be_says_why(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BenchmarkError, match=said):
        Settings(**given)


@pytest.mark.parametrize("name", ["k5v5", "k4v4@64/100", "mlx-lm-4"])
def test_an_unknown_preset_is_named(name: str) -> None:
    with pytest.raises(BenchmarkError, match=f"--presets: .*{name}"):
        contenders(Settings(presets=(name,)))


def test_rotating_caches_have_one_max_size() -> None:
    found = contenders(Settings(contexts=(4096, 1024), presets=("k8v4:reference", "k2v2")))
    assert {c.name: c.max_size for c in found} == {
        "kv": None,
        "rotating": 512,
        "quantized-8": None,
        "quantized-4": None,
        "rotating-quantized-4": 512,
        "k8v4:reference": None,
        "k2v2": None,
        "k8v4:reference@64/128/512": 512,
    }
    (rotating,) = (c for c in found if c.ours and c.max_size)
    assert (rotating.label, rotating.backend) == ("k8v4:reference, 512 tokens", "reference")
    assert [c.max_size for c in contenders(Settings(contexts=(64,), against=("rotating",), presets=()))] == [256]


def test_a_preset_that_rotates_by_itself_is_there_once() -> None:
    found = contenders(Settings(presets=("k4v4@64/128/512",), against=("rotating",)))
    assert [c.name for c in found] == ["rotating", "k4v4@64/128/512"]


def test_settings_go_to_the_worker_and_back() -> None:
    settings = Settings(contexts=(5, 6), against=("kv",), max_size=512, shape="1b", timeout=1.5)
    assert Settings.from_json(settings.as_json()) == settings


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("8gb", 8 * 10**9), ("1.5kib", 1536), ("77", 77)]
)
def test_bytes_are_read(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "4 TiB", "-1", "1e9", "4GiB!"])
def test_what_are_no_bytes_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="no number of bytes"):
        parse_bytes(text)
