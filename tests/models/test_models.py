"""Every architecture of mlx-lm is planned, and its compressed layers say what mlx-lm's own caches say.

`python -m tests.models` writes what is found here into docs/models.md. The whole takes over a minute; `-m "not slow"`
leaves one architecture for each way of using caches.
"""

from functools import cache

import mlx.core as mx
import pytest

from tests.models.checks import complaints, examine
from tests.models.report import COMMAND, DOCUMENT, N_TEXT_COLUMNS, row, text_columns
from tests.models.tiny import architectures, build
from turbocache.mlxlm.plan import plan_layers

NAMES = architectures()
FAST = {
    *("llama", "llama4", "llama4_text", "mistral3", "mixtral", "qwen3", "qwen3_next", "qwen2_vl"),  # the common ones
    *("gemma2", "gemma3", "gemma3n", "gemma4", "gpt_oss", "mimo_v2_flash"),  # windows, soft caps, shared keys, sinks
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41"),  # latent attention, indexers, a cache of its own
    *("falcon_h1", "jamba", "lfm2", "mamba2", "rwkv7"),  # recurrent states
    *("afm7", "gpt_bigcode", "nemotron-nas", "olmo", "openelm", "phi", "phi3small", "plamo"),  # oddities
}


@cache
def _committed() -> dict[str, list[str]]:
    return {cells[0]: cells for cells in text_columns(DOCUMENT.read_text())}


def _marked(name: str) -> object:
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", [_marked(name) for name in NAMES])
def test_compressed_layers_say_what_mlx_lms_own_caches_say(name: str) -> None:
    model = build(name)
    outcome = examine(model)
    assert complaints(outcome) == []
    # Nothing is left to the proof that makes a whole model fall back.
    assert outcome.plans == plan_layers(model)
    assert all(plan.reason for plan in outcome.plans)
    if mx.default_device() == mx.cpu:  # some models run with Metal only, which a CPU's table says
        text = row(name, outcome)[:N_TEXT_COLUMNS]
        assert _committed().get(f"`{name}`") == text, f"docs/models.md is stale: run {COMMAND}"


def test_the_committed_table_has_every_architecture_and_no_other() -> None:
    assert set(_committed()) == {f"`{name}`" for name in NAMES}
    assert len(NAMES) > 120
    assert set(NAMES) >= FAST
