"""How a page is stored: the packed layout, the codes and the rotation."""

# Here and not in layout.py, which loads MLX: settings need it too.
PAGE = 64
"""Tokens in one page of the pool."""
