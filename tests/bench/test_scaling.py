"""Graphs of many layers: repeated as they should be, and measured in a process of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench import contestants, scaling, spelled  # noqa: E402
from sparse_onnx.core.errors import VerificationError  # noqa: E402


def single(path: Path) -> ir.Model:
    """One small layer by hand: y = x + relu(x W)."""
    x, y = (ir.val(name, ir.DataType.FLOAT, ("T", 4)) for name in ("x", "y"))
    weight = ir.val("w", const_value=ir.tensor(np.random.default_rng(0).normal(size=(4, 4)).astype("f")))
    product = ir.node("MatMul", [x, weight], name="product")
    relu = ir.node("Relu", product.outputs, name="relu")
    total = ir.node("Add", [x, relu.outputs[0]], outputs=[y], name="total")
    for node, name in ((product, "p"), (relu, "r")):
        node.outputs[0].name = name
    graph = ir.Graph(
        [x], [y], nodes=[product, relu, total], initializers=[weight], opset_imports={"": 18}, name="one"
    )
    model = ir.Model(graph, ir_version=8)
    ir.save(model, path)
    return model


def test_layers_follow_each_other(tmp_path: Path) -> None:
    model = single(tmp_path / "one.onnx")
    repeated = scaling.repeat(model, 3)
    ir.save(repeated, tmp_path / "three.onnx")
    onnx.checker.check_model(tmp_path / "three.onnx", full_check=True)
    assert [node.op_type for node in repeated.graph] == ["MatMul", "Relu", "Add"] * 3
    assert len(repeated.graph.initializers) == 3, "each layer has weights of its own"
    assert len(model.graph) == 3, "the single layer stays as it is"
    x = expected = np.random.default_rng(1).normal(size=(5, 4)).astype("f")
    one, three = (contestants.create(tmp_path / f"{name}.onnx", 1) for name in ("one", "three"))
    for _ in range(3):
        expected = one.run(None, {"x": expected})[0]
    np.testing.assert_allclose(three.run(None, {"x": x})[0], expected, rtol=1e-5)


def test_a_size_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    scaling.write(spelled.LOOP, 2, 4, path)
    found = scaling.run("per-expert-loop", 2, 4, path)
    nodes = onnx.load(path).graph.node
    assert found.nodes == len(nodes) and sum(node.op_type == "NonZero" for node in nodes) == 8
    assert found.seconds["recognise"] >= found.seconds["recognise_expert_loop"] > 0
    assert found.total_s > sum(found.seconds[name] for name in ("prepare and finish", "recognise", "lower"))
    row = scaling.as_text([found]).splitlines()[-1]
    assert "per-expert-loop, 2 x 4" in row and str(found.nodes) in row
    with pytest.raises(VerificationError, match="per-expert-loop, 4 experts, grouped"):
        scaling.run("per-expert-loop", 3, 4, path)


def test_a_graph_of_another_kind_is_an_error(tmp_path: Path) -> None:
    single(tmp_path / "one.onnx")
    with pytest.raises(VerificationError, match="no block"):
        scaling.run("gathered", 1, 4, tmp_path / "one.onnx")
    with pytest.raises(VerificationError, match="nowhere"):
        scaling.run("gathered", 1, 4, tmp_path / "nowhere.onnx")


def test_the_table_names_the_slowest_passes() -> None:
    seconds = {"prepare and finish": 3.0, "infer_shapes": 2.0, "fold_shapes": 1.0, "recognise": 4.5}
    item = scaling.Scaled("grouped", 12, 32, 1000, 200, seconds, 9.25, None)
    row = scaling.as_text([item, dataclasses.replace(item, layers=48)]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("grouped, 12 x 32", "1000", "200", "3.0", "4.5", "", "9.2", ""),
        "infer_shapes 2.0, fold_shapes 1.0",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("spelling", spelled.ALL, ids=lambda spelling: spelling.spelling)
def test_many_layers_are_recognised(spelling: spelled.Spelling, tmp_path: Path) -> None:
    """More layers than a recogniser may follow values back through."""
    path = tmp_path / "model.onnx"
    scaling.write(spelling, 48, 8, path)
    scaling.run(spelling.spelling, 48, 8, path)
