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
from sparse_onnx.core.errors import OutsideError  # noqa: E402
from sparse_onnx.export import patches, random_weights  # noqa: E402


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


def test_random_weights_of_layers_without_width() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 0, bias=False), torch.nn.Linear(0, 4))
    random_weights.fill(module)
    assert module[1].bias.any()


CLAMPED = patches.FORWARDS["NllbMoeDecoderLayer"]


class Layer(torch.nn.Module):
    """The end of NLLB's decoder layer."""

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        if state.dtype == torch.float16 and torch.isinf(state).any():
            most = torch.finfo(state.dtype).max - 1000
            state = torch.clamp(state, min=-most, max=most)
        return state


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 65500.0, 1.0])
def test_a_clamp_of_infinite_states_is_a_choice(value: float, dtype: torch.dtype) -> None:
    layer, state = Layer(), torch.tensor([[value, 65500.0, -3.0]], dtype=dtype)
    expected = layer(state)
    torch.testing.assert_close(CLAMPED(layer, Layer.forward, state), expected, rtol=0, atol=0)


def test_such_a_layer_can_be_traced() -> None:
    layer = Layer()
    layer.forward = lambda state: CLAMPED(layer, Layer.forward, state)  # type: ignore[method-assign]
    program = torch.export.export(layer, (torch.ones(2, 3, dtype=torch.float16),), strict=False)
    state = torch.full((2, 3), float("inf"), dtype=torch.float16)
    torch.testing.assert_close(program.module()(state), Layer()(state), rtol=0, atol=0)


@pytest.mark.slow
def test_nllb_in_half_precision(tmp_path: Path) -> None:
    place = folder("nllb-moe", tmp_path, dtype="float16")
    report = sparse_onnx.export(place, tmp_path / "out.onnx", random_weights=True)
    assert report.verify is not None and report.verify.passed
