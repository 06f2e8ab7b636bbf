"""`turbocache bench`: memory and speed of this project's presets and mlx-lm's own caches on this device.

Everything runs through mlx-lm's own generation loop. Each measurement has its own process, because peak memory is a
figure of a process.
"""
