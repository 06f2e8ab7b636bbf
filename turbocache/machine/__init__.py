"""The machine below MLX: its BLAS, its memory, its launcher."""
