"""The card of the converted model: where it comes from, under which licence, and what was done to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SOURCE = "https://huggingface.co/{0}"

_CARD = """---
license: {license}
base_model: {base}
base_model_relation: quantized
origin: {source}
language: [{languages}]
library_name: mlx
pipeline_tag: text-generation
---

# {name}

{base} by {organization}, {source}, licence {license}.

The weights are those of `{file}` in the Python package `{requirement}`. `turbocache starter` repacked them for MLX: the
same quantised values, with the rows of the query and key projections in mlx-lm's order, and norms in float16.
"""


def write_card(folder: Path, said: Mapping[str, Any], file: str, lock: Path) -> None:
    """Write README.md into a converted model's folder. `said` is the metadata of the GGUF `file`."""
    lines = [line.partition("\\")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    requirement = next(line for line in lines if "==" in line)
    organization = said["general.organization"]
    base = f"{organization}/{folder.name}"
    card = _CARD.format(
        license=said["general.license"],
        base=base,
        source=_SOURCE.format(base),
        languages=", ".join(said.get("general.languages", [])),
        name=folder.name,
        organization=organization,
        file=file,
        requirement=requirement,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
