"""What the documents say can be followed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "models" / "README.md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_gaps_and_no_dead_links(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "@@" not in text and "TODO" not in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), link


@pytest.mark.parametrize(
    "command", re.findall(r"^\$ make (\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
)
def test_the_readmes_commands_exist(command: str) -> None:
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
