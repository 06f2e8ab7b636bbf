"""Sessions, their checkpoints, and the folder they are saved in."""
