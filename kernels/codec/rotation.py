"""The random rotation that makes all coordinates of a key or value alike, so that one codebook fits them all."""

import math

import mlx.core as mx
import numpy as np

ROTATION_SEED = 0x7042
"""Part of the stored format. Another seed can't read the cache."""


class Rotation:
    """y = (Q ⊗ H) (s ⊙ x): seeded signs s, Walsh-Hadamard H on blocks of 2**k, and Q across the m blocks.

    `dim = m * 2**k` with m odd; any dim >= 1. Q = I - (2/m) 11^T is a Householder reflection (for m = 1 the identity).
    It mixes the blocks of a head dim that is not a power of two, without padding. Both factors are symmetric and
    orthogonal, so norms and inner products stay, and `inverse` runs the same passes backwards.
    Source: TurboQuant (arXiv 2504.19874) asks for a random rotation; the Hadamard form is PolarQuant's (2502.02617).
    """

    def __init__(self, dim: int, seed: int = ROTATION_SEED) -> None:
        if dim < 1:
            raise ValueError(f"a rotation needs a positive dimension, not {dim}")
        self.dim = dim
        self.block = dim & -dim
        self.n_blocks = dim // self.block
        bits = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, size=dim)
        self.signs = mx.array((1 - 2 * bits).astype(np.float32))

    def apply(self, x: mx.array) -> mx.array:
        """`[..., dim]` of any float type to its rotation in float32."""
        return self._mix(x.astype(mx.float32) * self.signs)

    def inverse(self, y: mx.array) -> mx.array:
        """`[..., dim]` back from the rotated basis, float32."""
        return self._mix(y.astype(mx.float32)) * self.signs

    def _mix(self, x: mx.array) -> mx.array:
        if self.n_blocks == 1:
            return mx.hadamard_transform(x)
        blocks = x.reshape(*x.shape[:-1], self.n_blocks, self.block)
        blocks = mx.hadamard_transform(blocks, scale=1 / math.sqrt(self.block))
        return (blocks - 2 * blocks.mean(axis=-2, keepdims=True)).reshape(x.shape)
