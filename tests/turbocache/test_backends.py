"""The table of backends: importable without MLX, and consistent with the lanes classes that it names."""

import subprocess
import sys

import pytest

from turbocache.backends import BACKENDS, CHOICES, FALLBACK, REFERENCE, one_of


def test_names_and_texts_load_no_mlx() -> None:
    code = "import turbocache.backends, sys; sys.exit('mlx' in {name.partition('.')[0] for name in sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_names_its_lanes(name: str) -> None:
    spec = BACKENDS[name]
    assert spec.name == name == spec.lanes().name
    assert spec.fused == (spec.device is not None)
    assert isinstance(spec.available(), bool)


def test_auto_can_always_fall_back_and_never_takes_the_reference() -> None:
    automatic = [spec for spec in BACKENDS.values() if spec.automatic]
    assert automatic[-1].name == FALLBACK
    assert automatic[-1].available()
    assert not automatic[-1].fused
    assert not BACKENDS[REFERENCE].automatic


def test_help_texts_list_every_name() -> None:
    assert ("auto", *BACKENDS) == CHOICES
    assert one_of() == f"{', '.join(CHOICES[:-1])} or {CHOICES[-1]}"
    assert one_of("auto").startswith("auto (the default), metal, cuda, ")
    assert "packed (the default)" in one_of("packed")
