"""The cache itself: page pool, rings, a batch of them, and the view of one layer. Knows nothing of mlx-lm."""

from kernels.codec import PAGE as PAGE
