"""The model that is served when nobody names one, and what a model's card says about it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parent / "bundled" / "tiny-recall-4bit"
"""A small model in the package. It needs no network, and knows next to nothing."""

STARTER = Path(sys.prefix, "share", "turbocache", "SmolLM2-135M-Instruct")
"""Where `turbocache starter` puts the model of a first run. Complete or absent."""

STARTER_FAILURE = STARTER.with_name("starter-failure.txt")
"""Why the last attempt to fetch it failed, in one line."""

_MAX_CHARACTERS = 200
"""Of a text from a card. Cards are other people's files."""


@dataclass(frozen=True, slots=True)
class DefaultModel:
    """The model that is served when TURBOCACHE_MODEL is not set."""

    path: Path
    reason: str
    """Why this one: one or two sentences for people."""
    is_fallback: bool = False
    """A better one could not be had."""


def default_model(in_group: bool = False) -> DefaultModel:
    """The starter model if it has been fetched, else the bundled one. A group of ranks has the bundled one: it is the
    same on all machines, and its KV heads can be shared out.
    """
    if in_group:
        return DefaultModel(BUNDLED, f"TURBOCACHE_MODEL is not set, so this group serves the bundled {BUNDLED.name}.")
    if STARTER.is_dir():
        return DefaultModel(STARTER, f"TURBOCACHE_MODEL is not set, so {STARTER.name} is served.")
    try:
        why = STARTER_FAILURE.read_text(encoding="utf-8").strip()
    except OSError:
        why = "it has not been fetched"
    return DefaultModel(
        BUNDLED,
        f"{STARTER.name} is not there ({why}), so the bundled {BUNDLED.name} is served, which knows next to nothing. "
        "Fetch it with `make starter`, or name a model in TURBOCACHE_MODEL.",
        is_fallback=True,
    )


@dataclass(frozen=True, slots=True)
class ModelCard:
    """From the front matter of a model's README.md, in the form that Hugging Face gave it."""

    license: str | None = None
    """`license_name`, else `license`."""
    origin: str | None = None
    """`origin`, a field of this project, else `base_model`."""


def read_card(folder: Path) -> ModelCard:
    """The card in a model's folder. What it does not say is None, also if there is no card or it can't be read."""
    file = folder / "README.md"
    if not file.is_file():
        return ModelCard()
    # Not at the top: it takes half a second.
    from huggingface_hub import ModelCard as HubCard

    try:
        said = HubCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no card is worth a failed start, and the parser has no common base for its errors
        return ModelCard()
    return ModelCard(
        license=_text(said.get("license_name")) or _text(said.get("license")),
        origin=_text(said.get("origin")) or _text(said.get("base_model")),
    )


def _text(value: Any) -> str | None:
    """One line of text, from a text or a list of them."""
    values = value if isinstance(value, list) else [value]
    text = ", ".join(" ".join(item.split()) for item in values if isinstance(item, str))
    return text[:_MAX_CHARACTERS] or None
