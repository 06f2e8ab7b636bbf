"""What the tests of suites share: material of the bundled model, and rows with small sinks and windows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

from turbocache.evaluation.rows import Row, RowMaker
from turbocache.evaluation.settings import Settings
from turbocache.evaluation.suites.suite import Material
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.plan import plan_layers


@pytest.fixture(scope="session")
def material_of(bundled: LoadedModel, text: Path) -> Callable[..., Material]:
    """Material for small suites."""
    hay = list(bundled.tokenizer.encode(text.read_text(), add_special_tokens=False, verbose=False))

    def make(**options: Any) -> Material:
        given = {"suites": ("all",), "suite_trials": 1, "suite_context": 640, "answer_lengths": (12, 24), **options}
        return Material(bundled, hay, Settings(text, ("off",), keep=(4,), window=(0,), **given))

    return make


@pytest.fixture(scope="session")
def material(material_of: Callable[..., Material]) -> Material:
    return material_of()


@pytest.fixture(scope="session")
def row_of(bundled: LoadedModel, material: Material) -> Callable[[str], Row]:
    return RowMaker(bundled.model, plan_layers(bundled.model), material.settings).row


@pytest.fixture(scope="session")
def generated(bundled: LoadedModel) -> Callable[..., list[int]]:
    """Greedy tokens from mlx-lm's own loop over a given cache, without the `banned` ones."""

    def generate(prompt: Sequence[int], cache: list[Any], n: int, banned: Sequence[int] = ()) -> list[int]:
        def ban(_: mx.array, logits: mx.array) -> mx.array:
            if banned:
                logits[:, mx.array(list(banned))] = -mx.inf
            return logits

        steps = generate_step(
            mx.array(list(prompt)), bundled.model, prompt_cache=cache, max_tokens=n, logits_processors=[ban]
        )
        return [int(token) for token, _ in steps]

    return generate
