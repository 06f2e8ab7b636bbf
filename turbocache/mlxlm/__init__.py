"""Everything that enters mlx-lm: its attention, its models, its generator."""

from importlib.metadata import version

TESTED_VERSION = "0.32.2"
"""mlx-lm's pin in pyproject.toml. `batch_generator` uses private attributes, which other versions may change."""


class UnsupportedVersion(ImportError):
    """The installed mlx-lm is not the tested version. The message names both versions and the remedy."""


def check_version() -> None:
    """Raise UnsupportedVersion if the installed mlx-lm is not the tested version. Imports nothing of mlx-lm."""
    if (installed := version("mlx-lm")) != TESTED_VERSION:
        raise UnsupportedVersion(
            f"mlx-lm {installed} is installed, but turbocache needs mlx-lm {TESTED_VERSION}, because it uses private "
            f"parts of mlx-lm's generator. Install that version: pip install mlx-lm=={TESTED_VERSION}"
        )
