"""`inspect`: blocks, parameters, hazards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Shape, layered_model, save_external
from onnx import TensorProto, helper, numpy_helper

import sparse_onnx
from sparse_onnx.core.errors import ModelError
from sparse_onnx.inspect.api import inspect
from sparse_onnx.optimize.api import optimize

SHAPE = Shape(experts=4, top_k=2, hidden=16, inner=24)
EXPERT = 3 * 16 * 24


@pytest.fixture(scope="module")
def neutral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_external(layered_model(SHAPE, layers=2), tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.fixture(scope="module")
def lowered(neutral: Path) -> Path:
    out = neutral.with_name("m.cpu.onnx")
    optimize(neutral, out, verify="none")
    return out


def test_neutral_blocks(neutral: Path) -> None:
    report = inspect(neutral)
    assert [block.name for block in report.blocks] == ["layers.0.experts", "layers.1.experts"]
    block = report.blocks[0]
    assert (block.kind, block.spelling, block.form) == ("moe", "neutral", None)
    assert (block.experts, block.top_k, block.hidden, block.inner) == (4, 2, 16, 24)
    assert (block.activation, block.gated, block.router) == ("silu", True, "softmax_topk_renormalised")
    assert (block.parameters, block.active_parameters) == (4 * EXPERT, 2 * EXPERT)
    assert report.notes == []


def test_lowered_blocks_keep_their_record(neutral: Path, lowered: Path) -> None:
    before, after = inspect(neutral).blocks, inspect(lowered).blocks
    assert [block.form for block in after] == ["grouped", "grouped"]
    for old, new in zip(before, after, strict=True):
        assert (old.name, old.router, old.parameters, old.active_parameters, old.activation) == (
            *(new.name, new.router, new.parameters, new.active_parameters, new.activation),
        )


def test_parameters_are_total_and_active(neutral: Path, lowered: Path) -> None:
    router = 16 * 4
    biases = 4 * (
        2 * 24 + 16
    )  # of the neutral form, all zeros: initializers, though not parameters of an expert
    for path, extra in ((neutral, biases), (lowered, 0)):
        model = inspect(path).model
        assert model is not None
        assert model.parameters == 2 * (4 * EXPERT + router + extra)
        assert model.active_parameters == model.parameters - 2 * 2 * EXPERT


def test_tied_weights_count_once(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(np.ones((32, 32), np.float32), name) for name in ("a", "b")]
    (tmp_path / "w").write_bytes(tensors[0].raw_data)
    for tensor in tensors:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "w"), ("offset", "0"), ("length", str(32 * 32 * 4))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    save(nodes, tensors, tmp_path / "m.onnx", width=32)
    model = inspect(tmp_path / "m.onnx").model
    assert model is not None and model.parameters == model.active_parameters == 32 * 32


def test_a_model_without_blocks(tmp_path: Path) -> None:
    save([helper.make_node("Relu", ["x"], ["y"])], [], tmp_path / "m.onnx")
    report = inspect(tmp_path / "m.onnx")
    assert report.blocks == [] and report.model is not None and report.model.parameters == 0


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"this is text")
    with pytest.raises(ModelError):
        inspect(tmp_path / "m.onnx")


def test_the_package_is_the_function(neutral: Path) -> None:
    assert sparse_onnx.inspect(neutral).to_json() == inspect(neutral).to_json()


def save(nodes: list, tensors: list, path: Path, width: int = 8, inputs: list | None = None) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x, *(inputs or [])], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_what_optimize_would_refuse_is_told_and_the_model_left_alone(tmp_path: Path) -> None:
    model = layered_model(SHAPE, layers=1)
    model.graph.inputs.append(next(v for name, v in model.graph.initializers.items() if "fc2" in name))
    path = save_external(model, tmp_path / "m.onnx")
    report = inspect(path)
    [refusal] = report.refusals
    assert refusal.by == "fuse_gating" and "run time" in refusal.reason and refusal.hint
    assert [block.spelling for block in report.blocks] == ["neutral"]
    assert report.refusals == optimize(path, None, dry_run=True).refusals


def test_nothing_is_refused_of_a_model_that_can_be_lowered(neutral: Path, lowered: Path) -> None:
    assert inspect(neutral).refusals == inspect(lowered).refusals == []
