"""The rules of import that need "only these modules may": the arrows between packages are import-linter's."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "turbocache", "kernels")

HTTP = ("server.app", "server.http*", "server.api*", "server.process.stopping")
# Foreign package -> the modules that may import it.
ALLOWED = {
    "mlx_lm": (
        *("turbocache.mlxlm.*", "turbocache.store", "turbocache.evaluation.*", "turbocache.benchmark.*"),
        *("server.engine*", "server.text*"),
    ),
    "fastapi": HTTP,
    "starlette": HTTP,
}
# What each package may import of the others.
BELOW = {"server": {"turbocache"}, "turbocache": {"kernels"}, "kernels": set[str]()}


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(source: str) -> Iterator[tuple[str, int]]:
    """Top-level names of the absolute imports in a module, also of those inside functions, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0], node.lineno


def violations(module: str, source: str) -> list[str]:
    package = module.partition(".")[0]
    found = []
    for name, line in imported(source):
        if name in ALLOWED and not any(fnmatchcase(module, pattern) for pattern in ALLOWED[name]):
            found.append(f"{module}:{line} imports {name}, which only {', '.join(ALLOWED[name])} may")
        if name in PACKAGES and name not in {package} | BELOW[package]:
            found.append(f"{module}:{line} imports {name}, which is not directly below {package}")
    return found


def test_imports_follow_the_rules() -> None:
    assert [found for module, path in modules() for found in violations(module, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.lanes.packed", "import mlx_lm.models.base"),
        ("server.sessions", "def f():\n    from mlx_lm import load"),
        ("server.sessions.registry", "from starlette.responses import Response"),
        ("turbocache.cache", "import fastapi"),
        ("turbocache.cache.view", "from mlx_lm.models.cache import KVCache"),
        ("server.engine", "from kernels import probe"),
        ("turbocache.cache", "import server"),
        ("kernels.probe.probe", "from turbocache.codebooks.scalar import levels"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.engine_loop", "from mlx_lm import load\nimport turbocache"),
        ("server.api.openai.chat", "import fastapi, starlette"),
        ("turbocache.mlxlm.seam", "import mlx_lm, kernels.probe.probe"),
        ("turbocache.cache", "from . import ring"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(module, source) == []


# The only modules that read private attributes of mlx-lm's objects.
PRIVATE = ("turbocache.mlxlm.batch_generator", "turbocache.mlxlm.model")
# Documented in spite of their names: os._exit, namedtuple._replace, ctypes.CDLL._handle.
STANDARD = {"_exit", "_replace", "_handle"}


def foreign_privates(source: str) -> list[str]:
    """Private attributes that a module reads from other objects than its own classes make."""
    tree = ast.parse(source)
    attributes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    ]

    def is_own(node: ast.Attribute) -> bool:
        return ast.unparse(node.value) in ("self", "cls", "super()")

    own = {node.attr for node in attributes if is_own(node)}
    return [ast.unparse(node) for node in attributes if not is_own(node) and node.attr not in own | STANDARD]


def test_one_adapter_uses_private_attributes() -> None:
    found = {module: foreign_privates(path.read_text()) for module, path in modules() if module not in PRIVATE}
    assert {module: names for module, names in found.items() if names} == {}
    assert foreign_privates("class A:\n    def f(self): return self._b._generation_batch") == [
        "self._b._generation_batch"
    ]
    assert foreign_privates("class A:\n    def f(self, a): return self._b + a._b") == []


def test_kernels_init_is_empty() -> None:
    # transformers looks for a PyPI package of this name and would take it for that one.
    assert (ROOT / "kernels" / "__init__.py").read_bytes() == b""
