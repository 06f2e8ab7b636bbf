"""The texts themselves, for every width and head dim: Metal's by the strict pass, CUDA's by NVRTC without a GPU."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels.codec.layout import PAGE
from tests.kernels.fused.cases import SETTINGS, Language, Setting, emulated, make_step, need
from tests.metal import Kernel, check
from tests.metal.arrays import NUMPY
from tests.metal.nvrtc import ARCHITECTURES, compile_cuda, has_nvrtc

pytestmark = pytest.mark.slow

BITS = (2, 2.5, 3, 3.5, 4, 8)
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (256, 128), (64, 256))
BASE = Setting("base", 4, 4)
OF_BITS = [replace(BASE, name=f"k{k}v{v}", key_bits=k, value_bits=v) for k, v in product(BITS, BITS)]
OF_DIMS = [
    replace(BASE, name=f"{k}/{v}-{bits}", key_bits=bits, value_bits=bits, key_dim=k, value_dim=v, n_repeats=4)
    for (k, v), bits in product(DIMS, (3.5, 8))
]


def texts(setting: Setting, language: Language) -> list[Kernel]:
    """All kernels that the lanes of a setting launch. Nothing is run: every output is 0."""

    def zeros(kernel: Kernel, inputs: Sequence[Any]) -> list[Any]:
        return [np.zeros(a.shape, NUMPY[a.dtype]) for a in kernel.outputs]

    step = make_step(setting, [(1, 1)], seed=0)
    tokens = [
        mx.zeros((1, setting.n_kv_heads, PAGE, dim), dtype=setting.dtype)
        for dim in (setting.key_dim, setting.value_dim)
    ]
    with emulated(zeros) as launches:
        lanes = setting.lanes(language)
        pages = lanes.encode(*tokens)
        lanes.expand(pages, setting.dtype)
        lanes.expand_rows(pages, mx.zeros((1, 1), dtype=mx.int32), setting.dtype, tokens)
        with suppress(AssertionError):  # its answer is 0 as well
            step.attend(lanes)
    return list(launches.texts().values())


@pytest.mark.parametrize("setting", [*SETTINGS, *OF_BITS, *OF_DIMS], ids=lambda s: s.name)
def test_metal_takes_the_text(setting: Setting) -> None:
    need("plain")
    kernels = texts(setting, "metal")
    assert len(kernels) == 5  # encode, expand with and without raw tokens, attend, merge
    for kernel in kernels:
        check(kernel)


@pytest.mark.slow
@pytest.mark.skipif(not has_nvrtc(), reason="no libnvrtc: nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_nvrtc_takes_the_text(setting: Setting, architecture: str) -> None:
    for kernel in texts(setting, "cuda"):
        assert compile_cuda(kernel, architecture).startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.skipif(not has_nvrtc(), reason="no libnvrtc: nvidia-cuda-nvrtc is not installed")
def test_no_name_clashes_with_what_mlx_includes() -> None:
    for kernel in texts(BASE, "cuda"):
        assert compile_cuda(kernel, "sm_80", whole=True).startswith(b"\x7fELF")
