"""Memory and speed of caches on this device: this project's presets next to mlx-lm's own caches.

Everything runs through mlx-lm's own generation loop. Each measurement has a process of its own, because peak memory is
a process's.
"""
