"""Rotating compressed KV caches for MLX models."""

from turbocache.machine import blas

# MLX binds its matrix products while it is being imported, so this comes before every import that reaches it.
blas.prefer_fast()
