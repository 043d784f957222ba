"""Graphs that a recogniser once took for something else: each must come out exact, or as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from changes import NearMiss, case
from checking import differences, optimized
from onnx import TensorProto, helper, numpy_helper
from spellings import Built, spoiled
from test_near_misses import fed
from writer import Writer

from sparse_onnx.graph.infer import infer
from sparse_onnx.matching.order import bounded

EIGHT_BITS = TensorProto.FLOAT8E4M3FN
CASES = {
    "gathered": case("gathered", "gathered=slots", "combine=Mul", opset=20),
    "grouped": case("grouped", "stages=layers", "put-back=inverse", "weight-early=yes", opset=20),
    "per-expert-loop": case("per-expert-loop", "accumulate=scatter-elements-add", opset=20),
    "dense-mask": case("dense-mask", "dense=columns", "gates=scatter", opset=20),
    "gshard": case("gshard", "order=slots", "place=clipped", opset=20),
}


def exact(built: Built, folder: Path) -> Any:
    out, report = optimized(built.model, folder)
    for name, value in differences(built.model, str(out), fed(built)).items():
        assert value <= 1e-5, (name, value)
    return report


def recognised(report: Any) -> bool:
    return any(record.rewritten for record in report.passes if record.name.startswith("recognise_"))


def test_places_that_begin_at_one_leave_no_seat_for_the_last(tmp_path: Path) -> None:
    def later(g: Writer, seen: tuple[str, str]) -> tuple[str, str]:
        return g.op("Add", seen[0], g.int(1)), seen[1]

    plain = case("gshard", "order=slots", "place=clipped", "dispatch=mask", "slot-product=MatMul")
    miss = NearMiss("places-from-one", plain, {"seen": later}, None)
    assert recognised(exact(miss.build(), tmp_path))


@pytest.mark.parametrize("spelling", CASES)
def test_eight_bits_are_not_looked_through(spelling: str, tmp_path: Path) -> None:
    def rounded(g: Writer, value: str) -> str:
        return g.cast(g.cast(value, EIGHT_BITS), TensorProto.FLOAT)

    built = spoiled(CASES[spelling], {"hidden": rounded})
    report = exact(built, tmp_path)
    assert all(block.activation is None for block in report.blocks if recognised(report))


def test_rows_times_the_weights_of_all_rows(tmp_path: Path) -> None:
    """``[S, D] * [S, 1, 1]`` is ``[S, S, D]``."""
    spelled = case("grouped", "stages=layers", "put-back=inverse", "weight-early=yes", opset=18)
    model = onnx.ModelProto.FromString(spoiled(spelled, {}).model.SerializeToString())
    shapes = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    products = [
        (node, at)
        for node in model.graph.node
        for at, name in enumerate(node.input)
        if node.op_type == "Mul" and len(shapes.get(name, ())) == 2 and shapes[name][-1] == 1
    ]
    assert len(products) == 1
    [(node, at)] = products
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    wider = helper.make_node("Unsqueeze", [node.input[at], "one"], ["wider"])
    node.input[at] = "wider"
    model.graph.node.insert(list(model.graph.node).index(node), wider)
    del model.graph.value_info[:]
    built = dataclasses.replace(spoiled(spelled, {}), model=model)
    assert not recognised(exact(built, tmp_path))


@pytest.mark.parametrize("seed", range(3))
def test_gate_times_up_of_all_rows(seed: int, tmp_path: Path) -> None:
    """``[.., 1, I] * [.., n, I]`` looks elementwise behind reshapes, and is an outer product."""

    def outer(g: Writer, pair: tuple[str, str]) -> tuple[str, str]:
        return g.op("Unsqueeze", pair[0], g.ints(1)), pair[1]

    spelled = dataclasses.replace(CASES["grouped"], gated="separate", layout="in_out", seed=seed)
    built = spoiled(spelled, {"gate-and-up": outer})
    _, report = optimized(built.model, tmp_path)
    assert not recognised(report)


def test_no_token_in_a_batch(tmp_path: Path) -> None:
    """Experts of any body, tokens ``[B, S, D]``: a reshape to B, 0, D is none to the length of the input."""
    spelled = case("dense-mask", "dense=columns", "gates=scatter", "column=Slice", rank=3)

    def halved(g: Writer, value: str) -> str:
        return g.op("Round", value)

    built = spoiled(spelled, {"hidden": halved})
    out, report = optimized(built.model, tmp_path)
    assert recognised(report)
    empty = {f"{b} x {s}": {"x": np.zeros((b, s, 8), np.float32)} for b, s in ((1, 0), (0, 3))}
    assert all(value == 0 for value in differences(built.model, str(out), empty).values())


@pytest.mark.parametrize(
    ("low", "high", "inside"),
    [(0, 3, True), (None, 3, True), (0, None, True), (5, None, False), (None, -1, False), (-1, 3, False)],
)
def test_clipped_ids(low: int | None, high: int | None, inside: bool) -> None:
    scores = ir.val("scores", ir.DataType.FLOAT, ["T", 4])
    best = ir.node("ArgMax", [scores], {"axis": 1, "keepdims": 0})

    def number(value: int | None) -> ir.Value | None:
        return None if value is None else ir.node("Constant", [], {"value_int": value}).outputs[0]

    clip = ir.node("Clip", [best.outputs[0], number(low), number(high)])
    clip.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    assert bounded(clip.outputs[0], 4) == inside
    best.inputs[0].name = "x"
    computed = ir.node("Clip", [best.outputs[0], ir.val("n", ir.DataType.INT64, [])])
    assert not bounded(computed.outputs[0], 4)


@pytest.mark.parametrize("overridable", [True, False])
def test_no_shape_follows_from_a_default(overridable: bool) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    target = helper.make_tensor_value_info("target", TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["a", "b"])
    nodes = [helper.make_node("Reshape", ["x", "target"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    column = numpy_helper.from_array(np.array([-1, 1]), "target")
    graph = helper.make_graph(nodes, "g", [x, target] if overridable else [x], [y], [column])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    infer(model)
    shape = model.graph.node(0).outputs[0].shape
    assert shape is not None and (shape[1] == 1) != overridable
