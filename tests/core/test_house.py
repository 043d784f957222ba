"""The house keeps its own rules."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDERS = {"sparse_onnx.passes": ROOT / "passes", "sparse_onnx.models": ROOT / "models"}

#: Rooms by height: a room imports from its own height and below.
HEIGHT = {
    "core": 0,
    "graph": 1,
    "blocks": 1,
    "targets": 1,
    "matching": 1,
    "sparsify": 1,
    "passes": 2,
    "models": 2,
}
HEIGHT |= dict.fromkeys(("optimize", "export", "verify", "bench", "inspect", "calibrate", "package"), 3) | {
    "cli": 4
}


def sources() -> list[Path]:
    return [
        *(ROOT / "sparse_onnx").rglob("*.py"),
        *(ROOT / "passes").rglob("*.py"),
        *(ROOT / "models").rglob("*.py"),
    ]


def test_packages_are_the_folders_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"sparse_onnx", *FOLDERS}
    for init in (ROOT / "sparse_onnx").rglob("__init__.py"):
        found.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(listed) == found and listed == sorted(listed)


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] in ("passes", "models") else (parts[1] if len(parts) > 2 else "")


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = _room(path)
    for name in _imports(path):
        parts = name.split(".")
        assert parts[0] not in ("passes", "models"), f"bare '{name}' would be a second module object"
        if parts[0] == "sparse_onnx" and len(parts) > 1 and room in HEIGHT and parts[1] in HEIGHT:
            assert HEIGHT[parts[1]] <= HEIGHT[room], f"{room} imports {name}"
        if parts[0] in ("torch", "transformers", "safetensors"):
            assert room in ("export", "models", "bench"), f"{room} imports {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_about_one_thing(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
