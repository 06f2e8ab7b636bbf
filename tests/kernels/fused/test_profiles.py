"""Profiles over device infos of many chips, in the form that `mx.device_info()` gives them."""

from typing import Any

import mlx.core as mx
import pytest

from kernels.fused.profiles import PROFILES, MissingDeviceKey, Profile, choose_profile, device_value, missing_key

GB = 10**9
GIB = 2**30


def apple(name: str, architecture: str, memory_gib: int) -> dict[str, Any]:
    """An Apple chip; Metal recommends two thirds of up to 36 GB and three quarters of more."""
    share = 2 / 3 if memory_gib <= 36 else 3 / 4
    return {
        "device_name": f"Apple {name}",
        "architecture": f"applegpu_{architecture}",
        "memory_size": memory_gib * GIB,
        "max_recommended_working_set_size": int(memory_gib * GIB * share),
        "max_buffer_length": memory_gib * GIB // 2,
        "resource_limit": 499000,
    }


def nvidia(name: str, capability: str, memory_gb: int) -> dict[str, Any]:
    return {
        "device_name": f"NVIDIA {name}",
        "architecture": f"sm_{capability}",
        "compute_capability_major": int(capability.rstrip("a")[:-1]),
        "compute_capability_minor": int(capability.rstrip("a")[-1]),
        "total_memory": memory_gb * GB,
        "free_memory": memory_gb * GB - GB,
    }


DEVICES: list[tuple[dict[str, Any], str, str]] = [
    (apple("M1", "g13g", 8), "mac", "base"),
    (apple("M1", "g13g", 16), "mac", "base"),
    (apple("M1 Pro", "g13s", 16), "sustained", "Pro"),
    (apple("M1 Pro", "g13s", 32), "sustained", "Pro"),
    (apple("M1 Max", "g13s", 64), "wide", "Max"),
    (apple("M1 Ultra", "g13d", 128), "wide", "Ultra"),
    (apple("M2", "g14g", 24), "mac", "base"),
    (apple("M2 Pro", "g14s", 32), "sustained", "Pro"),
    (apple("M2 Max", "g14s", 96), "wide", "Max"),
    (apple("M2 Ultra", "g14d", 192), "wide", "Ultra"),
    (apple("M3", "g15g", 24), "mac", "base"),
    (apple("M3 Pro", "g15s", 36), "sustained", "Pro"),
    (apple("M3 Max", "g15s", 128), "wide", "Max"),
    (apple("M3 Ultra", "g15d", 512), "wide", "Ultra"),
    (apple("M4", "g16g", 16), "mac", "base"),
    (apple("M4 Pro", "g16s", 48), "sustained", "Pro"),
    (apple("M4 Max", "g16s", 64), "wide", "Max"),
    (apple("M5", "g17g", 32), "mac", "base"),
    (apple("M5 Pro", "g17s", 24), "sustained", "Pro"),
    (apple("M5 Max", "g17s", 128), "wide", "Max"),
    (apple("A17 Pro", "g16p", 8), "portable", "phone"),
    (apple("A18 Pro", "g17p", 8), "portable", "phone"),
    (apple("M9 Something", "g21x", 64), "portable", "unknown Apple chip"),
    (nvidia("A100-SXM4-80GB", "80", 85), "cuda", "8.0 or later"),
    (nvidia("GeForce RTX 3090", "86", 25), "cuda", "8.0 or later"),
    (nvidia("GeForce RTX 4090", "89", 25), "cuda", "8.0 or later"),
    (nvidia("L4", "89", 24), "cuda", "8.0 or later"),
    (nvidia("H200", "90", 150), "cuda", "8.0 or later"),
    (nvidia("H100", "90a", 85), "cuda", "8.0 or later"),
    (nvidia("B200", "100", 192), "cuda", "8.0 or later"),
    (nvidia("GeForce RTX 5090", "120", 34), "cuda", "8.0 or later"),
    (nvidia("Tesla T4", "75", 16), "portable", "older"),
    (nvidia("Tesla V100", "70", 16), "portable", "older"),
    ({"architecture": "x86_64", "device_name": "AMD EPYC"}, "none", "CPU"),
    ({"architecture": "arm64", "device_name": "Apple M2"}, "none", "CPU"),
    ({"architecture": "aarch64", "device_name": "Neoverse-V1"}, "none", "CPU"),
    ({"architecture": "gfx942", "device_name": "AMD Instinct MI300X"}, "portable", "unknown chip 'gfx942'"),
    ({"architecture": "", "device_name": "?"}, "portable", "unknown chip ''"),
]


@pytest.mark.parametrize(("info", "name", "said"), DEVICES, ids=[str(d[0]["device_name"]) for d in DEVICES])
def test_every_chip_gets_its_row_and_is_told_why(info: dict[str, Any], name: str, said: str) -> None:
    profile, reason = choose_profile(info)
    assert profile.name == name
    assert said in reason
    assert info["architecture"] in reason
    assert missing_key(info) is None


def test_the_border_between_pro_and_max_is_the_working_set() -> None:
    info = apple("M", "g16s", 64)
    for size, name in ((40 * GIB - 1, "sustained"), (40 * GIB, "wide")):
        assert choose_profile({**info, "max_recommended_working_set_size": size})[0].name == name


@pytest.mark.parametrize(
    ("info", "key"),
    [
        ({}, "architecture"),
        ({"device_name": "NVIDIA H200"}, "architecture"),
        ({"architecture": None}, "architecture"),
        ({"architecture": "applegpu_g16s"}, "max_recommended_working_set_size"),
        ({"architecture": "applegpu_g16s", "max_recommended_working_set_size": "much"}, "max_recommended_working_set"),
    ],
)
def test_a_missing_key_is_named_and_the_portable_geometry_taken(info: dict[str, Any], key: str) -> None:
    profile, reason = choose_profile(info)
    assert profile.name == "portable"
    assert key in reason
    assert key in (missing_key(info) or "")
    with pytest.raises(MissingDeviceKey, match=key):
        device_value(info, "architecture" if key == "architecture" else "max_recommended_working_set_size", int)


def test_this_machine_has_a_profile() -> None:
    profile, reason = choose_profile(mx.device_info())
    assert profile is PROFILES[profile.name]
    assert reason


@pytest.mark.parametrize("profile", [p for p in PROFILES.values() if p.name != "none"], ids=lambda p: str(p.name))
def test_splits_fill_the_device_and_stay_within_bounds(profile: Profile) -> None:
    for n_groups in (1, 8, 64, 100_000):
        before = 1
        for n_pages in (0, 1, 7, 64, 512, 2048, 20_000):
            n = profile.splits(n_pages, n_groups)
            assert before <= n <= profile.max_splits
            assert n == 1 or (n - 1) * profile.min_pages < n_pages
            assert n == 1 or n * n_groups <= profile.threadgroups
            assert n <= profile.splits(n_pages, n_groups, n_raw=4) <= n + 4
            before = n
    assert profile.splits(20_000, 1) == min(profile.max_splits, profile.threadgroups)
    assert profile.splits(20_000, 100_000) == 1
    assert PROFILES["none"].splits(20_000, 1) == 1
