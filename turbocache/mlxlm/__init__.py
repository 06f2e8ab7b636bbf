"""Everything that enters mlx-lm: its attention, its models, its generator."""
