"""What compression does to a model's answers: text and needles read through a cache, against full precision.

`turbocache eval` is the command. A *row* is a named way to make a cache (`rows.py`): a preset of this project, or one
of the caches of mlx-lm and mlx-vlm that it is compared with.
"""
