"""Turns of sessions with a model, without the engine around them."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from server.protocol import Prompt
from server.sessions.checkpoints import Kind
from server.sessions.registry import Claim, SessionRegistry
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore, fork


class Talk:
    """Turns of sessions with a model, the way the engine takes them."""

    def __init__(self, model: Module, ring: RingConfig, preset_name: str = "k4v4") -> None:
        self.model = model
        self.store = CacheStore(model, plan_layers(model), preset(preset_name), "reference", ring, n_pages=200)
        self.registry = SessionRegistry(self.store)

    def feed(self, cache: list[Any], tokens: Sequence[int]) -> mx.array:
        """The logits after the last of the tokens."""
        logits: mx.array = self.model(mx.array([list(tokens)]), cache=cache)[0, -1]
        mx.eval(logits)
        return logits

    def begin(self, name: str | None, prompt: Sequence[int], system_end: int = 0) -> Claim:
        claim = self.registry.claim(name, Prompt(prompt, system_end))
        assert claim is not None
        return claim

    def turn(
        self, name: str | None, prompt: Sequence[int], answer: Sequence[int] = (), system_end: int = 0
    ) -> tuple[Claim, np.ndarray]:
        """A prompt and an answer of given tokens; returns the claim and the logits after the prompt."""
        claim = self.begin(name, prompt, system_end)
        return claim, self.finish(claim, prompt, answer)

    def finish(
        self, claim: Claim, prompt: Sequence[int], answer: Sequence[int] = (), kind: Kind = "prompt"
    ) -> np.ndarray:
        logits = self.feed(claim.cache, prompt[claim.cached :])
        if self.store.can_checkpoint:
            self.registry.checkpoint(claim.session, kind, prompt, fork(claim.cache))
        for token in answer:
            self.feed(claim.cache, [token])
        self.registry.put_back(claim.session, claim.cache, [*prompt, *answer])
        for spec in self.store.specs:
            spec.check_integrity()
        return np.array(logits.astype(mx.float32))


def some(seed: int, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, 90, n)]
