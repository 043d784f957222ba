from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import layered_model, save_external
from onnx import helper, numpy_helper
from verify.variants import edited

from sparse_onnx.verify import constants
from sparse_onnx.verify.metadata import named_values
from sparse_onnx.verify.skeleton import Boundary, same_outside

BLOCKS = {
    f"layers.{n}.moe": (f"layers.{n}", (x, f"layers.{n}.index", f"layers.{n}.weight"))
    for n, x in ((0, "x"), (1, "layers.0.out"))
}


def same(first: ir.Model, second: ir.Model) -> bool:
    sides = []
    for model in (first, second):
        values = named_values(model)
        sides.append(
            {
                values[output]: Boundary(name, tuple(values[source] for source in sources))
                for output, (name, sources) in BLOCKS.items()
            }
        )
    return same_outside(first, second, *sides)


def fresh() -> ir.Model:
    return ir.from_proto(copy.deepcopy(ir.to_proto(layered_model(layers=2))))


def test_names_do_not_matter() -> None:
    model = fresh()
    for node in model.graph:
        node.name = f"other_{node.name}"
    for value in model.graph.node("other_y").inputs:
        value.name = "elsewhere"
    assert same(model, fresh())


@pytest.mark.parametrize("change", ["operator", "attribute", "constant", "wiring", "block input"])
def test_everything_else_does(change: str) -> None:
    model = fresh()
    nodes = {node.name: node for node in model.graph}
    if change == "operator":
        nodes["layers.0.out"].op_type = "Mul"
    elif change == "attribute":
        nodes["layers.1.scores"].attributes["axis"] = ir.AttrInt64("axis", 0)
    elif change == "constant":
        router = model.graph.initializers["layers.0.router"]
        changed = router.const_value.numpy().copy()
        changed[-1, -1] += np.float32(1e-3)
        router.const_value = ir.Tensor(changed, name=router.name)
    elif change == "wiring":
        nodes["layers.1.out"].replace_input_with(0, model.graph.inputs[0])
    else:
        nodes["layers.1.weight"].replace_input_with(0, nodes["layers.0.topk"].outputs[0])
    assert not same(model, fresh())


def with_projection(weights: np.ndarray) -> ir.Model:
    def edit(proto) -> None:
        proto.graph.initializer.append(numpy_helper.from_array(weights, "projection"))
        proto.graph.node.append(helper.make_node("MatMul", ["y", "projection"], ["z"], name="projected"))
        proto.graph.output[0].name = "z"

    return edited(layered_model(layers=2), edit)


def test_constants_are_compared_whole() -> None:
    weights = np.random.default_rng(0).standard_normal((16, 2000)).astype(np.float32)
    other = weights.copy()
    other.reshape(-1)[10_001] += 1
    assert same(with_projection(weights), with_projection(weights.copy()))
    assert not same(with_projection(weights), with_projection(other))


def test_the_same_bytes_of_the_same_file_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_external(with_projection(np.ones((16, 2000), np.float32)), tmp_path / "a.onnx")
    a, b = ir.load(path), ir.load(path)
    reads: list[int] = []
    real = constants._content
    monkeypatch.setattr(constants, "_content", lambda tensor: reads.append(tensor.nbytes) or real(tensor))
    assert same(a, b) and max(reads, default=0) <= 4096
    copy_of = save_external(with_projection(np.ones((16, 2000), np.float32)), tmp_path / "b.onnx")
    assert same(a, ir.load(copy_of)) and max(reads) == 16 * 2000 * 4, "weights of blocks are never read"


def test_bodies_of_functions_and_versions_count() -> None:
    def calling(op: str, version: int = 20) -> ir.Model:
        def edit(proto) -> None:
            body = [helper.make_node(op, ["u"], ["v"])]
            proto.functions.append(
                helper.make_function("mine", "F", ["u"], ["v"], body, [helper.make_opsetid("", version)])
            )
            proto.opset_import.append(helper.make_opsetid("mine", 1))
            proto.graph.node.append(helper.make_node("F", ["y"], ["z"], domain="mine", name="f"))
            proto.graph.output[0].name = "z"

        return edited(layered_model(layers=2), edit)

    assert same(calling("Relu"), calling("Relu"))
    assert not same(calling("Relu"), calling("Neg"))
    assert not same(calling("Relu"), calling("Relu", 18))
    assert not same(fresh(), edited(fresh(), lambda proto: setattr(proto.opset_import[0], "version", 21)))


def nested_loops(counter: str) -> ir.Model:
    """The inner body adds a counter to its state: its own (`i1`) or that of the loop around it (`i0`)."""
    info = helper.make_tensor_value_info
    inner = helper.make_graph(
        [
            helper.make_node("Identity", ["c1"], ["cc1"]),
            helper.make_node("Cast", [counter], ["f"], to=1),
            helper.make_node("Add", ["s1", "f"], ["ss1"]),
        ],
        "inner",
        [info("i1", 7, []), info("c1", 9, []), info("s1", 1, None)],
        [info("cc1", 9, []), info("ss1", 1, None)],
    )
    outer = helper.make_graph(
        [
            helper.make_node("Identity", ["c0"], ["cc0"]),
            helper.make_node("Loop", ["three", "", "s0"], ["ss0"], body=inner),
        ],
        "outer",
        [info("i0", 7, []), info("c0", 9, []), info("s0", 1, None)],
        [info("cc0", 9, []), info("ss0", 1, None)],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["two", "", "x"], ["y"], body=outer)],
        "g",
        [info("x", 1, ["n"])],
        [info("y", 1, None)],
        [numpy_helper.from_array(np.array(2), "two"), numpy_helper.from_array(np.array(3), "three")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def test_inputs_of_nested_bodies_are_told_apart() -> None:
    assert same_outside(nested_loops("i0"), nested_loops("i0"), {}, {})
    assert not same_outside(nested_loops("i0"), nested_loops("i1"), {}, {})
