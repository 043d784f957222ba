from __future__ import annotations

import inspect
import json

import pytest
from click.testing import CliRunner

from sparse_onnx.cli import main
from sparse_onnx.core import registry


def test_the_list_names_every_pass() -> None:
    data = json.loads(CliRunner().invoke(main, ["passes", "--json", "-", "-q"]).stdout)
    assert data["command"] == "passes" and data["schema"] == 1
    assert [entry["name"] for entry in data["passes"]] == registry.names()
    assert all(entry["summary"] and entry["kind"] in ("exact", "lossy") for entry in data["passes"])


@pytest.mark.parametrize("name", registry.names())
def test_show_prints_the_passes_own_words(name: str) -> None:
    result = CliRunner().invoke(main, ["passes", "show", name])
    assert result.exit_code == 0
    doc = inspect.getdoc(registry.get(name))
    assert doc and doc.strip() in result.stdout.replace(" \n", "\n")


def test_an_unknown_pass_exits_2_with_a_guess() -> None:
    result = CliRunner().invoke(main, ["passes", "show", "fuse_gatng"])
    assert result.exit_code == 2 and "did you mean 'fuse_gating'?" in result.stderr
