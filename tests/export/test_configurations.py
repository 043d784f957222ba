"""Configurations that nobody publishes and somebody writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import sparse_onnx  # noqa: E402
from sparse_onnx.bench.coverage import registry, tiny  # noqa: E402
from sparse_onnx.core.errors import ModelError, OutsideError  # noqa: E402
from sparse_onnx.export import random_weights  # noqa: E402


def folder(name: str, path: Path, **changes: Any) -> Path:
    found = {each.name: each for each in registry.architectures()}
    place = tiny.write(found[name], path / name)
    config = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps(config))
    return place


def test_a_model_that_does_not_run_says_so(tmp_path: Path) -> None:
    """DeepSeek V2's code in transformers has no such method of choosing experts."""
    place = folder("deepseek_v2", tmp_path, topk_method="noaux_tc")
    with pytest.raises(OutsideError) as caught:
        sparse_onnx.export(place, tmp_path / "out.onnx", random_weights=True)
    assert "the model raised UnboundLocalError" in str(caught.value)


def test_a_configuration_that_transformers_refuses_says_why(tmp_path: Path) -> None:
    """The reason is in the second line of its error."""
    place = folder("zaya", tmp_path, num_experts_per_tok=2)
    with pytest.raises(
        ModelError, match=r"'validate_architecture': ValueError: ZAYA currently supports"
    ) as caught:
        sparse_onnx.export(place, tmp_path / "out.onnx", random_weights=True)
    assert "\n" not in caught.value.message


def test_random_weights_of_layers_without_width() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 0, bias=False), torch.nn.Linear(0, 4))
    random_weights.fill(module)
    assert module[1].bias.any()
