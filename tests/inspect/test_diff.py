"""`diff`: what changed between two models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Shape, layered_model, save_external
from onnx import numpy_helper

from sparse_onnx.inspect.api import diff
from sparse_onnx.optimize.api import optimize


@pytest.fixture(scope="module")
def neutral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Large enough that a tensor is sampled, not hashed whole.
    shape = Shape(experts=4, top_k=2, hidden=64, inner=96)
    return save_external(layered_model(shape, layers=2), tmp_path_factory.mktemp("model") / "m.onnx")


def test_a_model_does_not_differ_from_itself(neutral: Path) -> None:
    found = diff(neutral, neutral).diff
    assert found is not None
    size = found["bytes"]["from"]
    assert found["nodes"] == {"added": {}, "removed": {}} and found["blocks"] == []
    assert found["weights"] == {"bytes_shared": size, "bytes_added": 0, "bytes_removed": 0} and size > 0
    for key in ("inputs", "outputs", "functions"):
        assert found[key] == {"added": [], "removed": []}


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_lowering_cuts_weights_and_adds_none(neutral: Path, weights: str) -> None:
    out = neutral.with_name(f"{weights}.onnx")
    optimize(neutral, out, weights=weights, verify="none")  # type: ignore[arg-type]
    found = diff(neutral, out).diff
    assert found is not None
    assert found["blocks"] == [
        {"name": f"layers.{layer}.experts", "from": "neutral", "to": "grouped"} for layer in range(2)
    ]
    assert found["nodes"]["removed"]["sparse_onnx::MoE"] == 2
    assert found["nodes"]["added"]["Gemm"] >= 2 * 4 * 2
    assert found["functions"]["removed"] == ["sparse_onnx::MoE"] and found["functions"]["added"] == []
    experts = 2 * 4 * 3 * 64 * 96 * 4
    assert found["weights"]["bytes_shared"] >= experts
    assert found["weights"]["bytes_added"] < 1024, "constants of the dispatch, at most"
    backwards = diff(out, neutral).diff
    assert backwards is not None and backwards["weights"]["bytes_shared"] >= experts
    assert backwards["blocks"][0] == {"name": "layers.0.experts", "from": "grouped", "to": "neutral"}


def test_changed_weights_are_found(neutral: Path, tmp_path: Path) -> None:
    proto = onnx.load(neutral)
    changed = next(tensor for tensor in proto.graph.initializer if tensor.name == "layers.1.fc2")
    array = numpy_helper.to_array(changed) + np.float32(1)
    changed.CopyFrom(numpy_helper.from_array(array, changed.name))
    onnx.save(proto, tmp_path / "b.onnx")
    found = diff(neutral, tmp_path / "b.onnx").diff
    assert found is not None
    assert found["weights"]["bytes_added"] == found["weights"]["bytes_removed"] == array.nbytes


def test_inputs_and_outputs(neutral: Path, tmp_path: Path) -> None:
    proto = onnx.load(neutral)
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    onnx.save(proto, tmp_path / "b.onnx")
    found = diff(neutral, tmp_path / "b.onnx").diff
    assert found is not None
    assert found["outputs"] == {
        "added": ["y: FLOAT[rows,64]"],
        "removed": ["y: FLOAT[T,64]"],
    }
    assert found["inputs"] == {"added": [], "removed": []}
