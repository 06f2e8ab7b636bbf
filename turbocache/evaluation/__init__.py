"""`turbocache eval`: how compression changes a model's answers, compared with full precision.

A *row* is a named way to make a cache (`rows.py`): a preset of this project, or a cache of mlx-lm or mlx-vlm.
"""
