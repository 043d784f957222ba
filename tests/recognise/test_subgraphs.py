"""Blocks inside If, Loop and Scan bodies and in model-local functions: found there, and exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from checking import optimized
from cores import structural
from family import Array, Case, tokens
from onnx import TensorProto, helper, numpy_helper
from spellings import Built, build, error, session

FLOAT = TensorProto.FLOAT
CASES = {
    spelling: Case(spelling, bias=spelling != "contrib", seed=11, force=(("residual", "no"), *force))
    for spelling, force in {
        "gathered": (("gathered", "rows"),),
        "grouped": (("stages", "layers"),),
        "per-expert-loop": (("accumulate", "scatter-elements-add"), ("hits", "Equal")),
        "dense-mask": (("dense", "columns"), ("gates", "scatter")),
        "gshard": (("dispatch", "Greater"),),
        "contrib": (),
    }.items()
}


def info(name: str, shape: list[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    built: Built,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto],
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "outer", inputs, [info("y", None)], weights)
    graph.output[0].CopyFrom(info("y", [f"n{i}" for i in range(_rank(nodes))]))
    opsets = list(built.model.opset_import)
    if functions:
        opsets.append(helper.make_opsetid("layers", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))
    onnx.checker.check_model(model)
    return model


def _rank(nodes: list[onnx.NodeProto]) -> int:
    return 3 if nodes[-1].op_type == "Scan" else 2


def body(built: Built, x: str, name: str, inside: bool) -> onnx.GraphProto:
    """The block as a body that reads `x`, with its weights inside or left to the outer graph."""
    graph = onnx.GraphProto.FromString(built.model.graph.SerializeToString())
    del graph.input[:], graph.value_info[:]
    graph.name = name
    for node in graph.node:
        _rename(node, {"x": x, "y": f"{name}_y"})
    graph.output[0].name = f"{name}_y"
    if not inside:
        del graph.initializer[:]
    return graph


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    for field in (node.input, node.output):
        renamed = [names.get(name, name) for name in field]
        del field[:]
        field.extend(renamed)


def in_if(built: Built, inside: bool) -> tuple[onnx.ModelProto, Callable[[Array, bool], dict[str, Array]]]:
    """The block in one branch, its input in the other."""
    weights = list(built.model.graph.initializer)
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "else", [], [info("z", ["T", 8])])
    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=body(built, "x", "then", inside), else_branch=other
    )
    inputs = [info("x", ["T", 8]), info("c", [], TensorProto.BOOL)]
    model = model_of(built, [node], inputs, [] if inside else weights)
    return model, lambda x, on: {"x": x, "c": np.array(on)}


def in_loop(built: Built, inside: bool) -> tuple[onnx.ModelProto, Callable[[Array, bool], dict[str, Array]]]:
    """The block applied to its own result, as often as an input says."""
    weights = list(built.model.graph.initializer)
    graph = body(built, "state", "body", inside)
    graph.node.append(helper.make_node("Identity", ["going"], ["on"]))
    states = [
        info("turn", [], TensorProto.INT64),
        info("going", [], TensorProto.BOOL),
        info("state", ["T", 8]),
    ]
    graph.input.extend(states)
    graph.output.insert(0, info("on", [], TensorProto.BOOL))
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], body=graph)
    inputs = [info("x", ["T", 8]), info("n", [], TensorProto.INT64)]
    model = model_of(built, [node], inputs, [] if inside else weights)
    return model, lambda x, on: {"x": x, "n": np.array(2 if on else 1)}


def in_scan(built: Built, inside: bool) -> tuple[onnx.ModelProto, Callable[[Array, bool], dict[str, Array]]]:
    """The block on each of a sequence of token sets."""
    weights = list(built.model.graph.initializer)
    graph = body(built, "state", "body", inside)
    graph.input.append(info("state", ["T", 8]))
    node = helper.make_node("Scan", ["x"], ["y"], body=graph, num_scan_inputs=1)
    model = model_of(built, [node], [info("x", ["B", "T", 8])], [] if inside else weights)
    return model, lambda x, on: {"x": np.stack([x, x[::-1]]) if on else x[None]}


def in_function(
    built: Built, inside: bool
) -> tuple[onnx.ModelProto, Callable[[Array, bool], dict[str, Array]]]:
    """The block in a function with its weights as inputs, called twice; or as constants of the function."""
    weights = list(built.model.graph.initializer)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in built.model.graph.node]
    names = [tensor.name for tensor in weights]
    if inside:
        constants = [helper.make_node("Constant", [], [t.name], value=t) for t in weights]
        nodes, names = [*constants, *nodes], []
    opsets = list(built.model.opset_import)
    function = helper.make_function("layers", "Block", ["x", *names], ["y"], nodes, opsets)
    calls = [
        helper.make_node("Block", ["x", *names], ["h"], domain="layers"),
        helper.make_node("Block", ["h", *names], ["y"], domain="layers"),
    ]
    model = model_of(built, calls, [info("x", ["T", 8])], [] if inside else weights, (function,))
    return model, lambda x, on: {"x": x}


PLACES = {"If": (in_if, 1), "Loop": (in_loop, 1), "Scan": (in_scan, 1), "function": (in_function, 2)}


@pytest.mark.parametrize("inside", [True, False], ids=["weights-inside", "weights-outside"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", CASES)
def test_found_inside(spelling: str, place: str, inside: bool, tmp_path: Path) -> None:
    built = build(CASES[spelling])
    make, count = PLACES[place]
    model, fed = make(built, inside)
    old = session(model)
    out, report = optimized(model, tmp_path)
    assert not report.refusals, report.refusals
    assert [block.spelling for block in report.blocks] == [spelling] * count
    new = session(str(out))
    for number, rows in enumerate((1, 2, 7, 33)):
        x = tokens(built.case, built.weights, rows, seed=rows)
        values = fed(x, number % 2 == 0)
        assert error(old.run(None, values)[0], new.run(None, values)[0]) <= 1e-5, rows


def without_residual(case: Case) -> Case:
    force = tuple(pair for pair in case.force if pair[0] != "residual")
    return dataclasses.replace(case, force=(*force, ("residual", "no")))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["If", "Loop", "Scan"])
@pytest.mark.parametrize("case", [case for case in structural() if case.rank == 2], ids=str)
def test_every_form_inside(case: Case, place: str, tmp_path: Path) -> None:
    """With weights and constants outside: what bodies know least of."""
    built = build(without_residual(case))
    model, fed = PLACES[place][0](built, False)
    out, report = optimized(model, tmp_path)
    assert not report.refusals, report.refusals
    assert [block.spelling for block in report.blocks] == [case.spelling]
    old, new = session(model), session(str(out))
    for rows in (1, 7):
        values = fed(tokens(built.case, built.weights, rows, seed=rows), True)
        limit = 2e-2 if case.dtype == "float16" else 1e-5
        assert error(old.run(None, values)[0], new.run(None, values)[0]) <= limit, rows


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spelling", CASES)
def test_the_models_are_right(spelling: str, place: str) -> None:
    """The place does what it says: else the tests above would compare nothing."""
    built = build(CASES[spelling])
    model, fed = PLACES[place][0](built, True)
    x = tokens(built.case, built.weights, 5, seed=3)
    once = built.expected(x)
    y = session(model).run(None, fed(x, False))[0]
    if place == "If":
        assert np.array_equal(y, x)
    elif place == "function":
        assert error(built.expected(once), y) < 1e-4
    else:
        assert error(once[None] if place == "Scan" else once, y) < 1e-5


def test_a_weight_that_a_body_computes_is_none(tmp_path: Path) -> None:
    """In a Loop, a matrix may be carried from turn to turn: it is no constant there."""
    built = build(CASES["dense-mask"])
    graph = body(built, "state", "body", True)
    [matrix, *_] = [t for t in graph.initializer if list(t.dims) == [4, 12, 8]]
    value = numpy_helper.to_array(matrix)
    graph.initializer.remove(matrix)
    half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
    graph.initializer.append(half)
    graph.node.append(helper.make_node("Identity", ["going"], ["on"]))
    graph.node.append(helper.make_node("Mul", [matrix.name, "half"], ["smaller"]))
    graph.input.extend(
        [
            info("turn", [], TensorProto.INT64),
            info("going", [], TensorProto.BOOL),
            info("state", ["T", 8]),
            info(matrix.name, [4, 12, 8]),
        ]
    )
    graph.output.insert(0, info("on", [], TensorProto.BOOL))
    graph.output.append(info("smaller", [4, 12, 8]))
    first = numpy_helper.from_array(value, "first")
    node = helper.make_node("Loop", ["n", "", "x", "first"], ["y", "last"], body=graph)
    model = model_of(built, [node], [info("x", ["T", 8]), info("n", [], TensorProto.INT64)], [first])
    out, report = optimized(model, tmp_path)
    assert not report.blocks
    assert report.refusals, "silence"
    x = tokens(built.case, built.weights, 7, seed=3)
    values = {"x": x, "n": np.array(3)}
    assert np.array_equal(session(model).run(None, values)[0], session(str(out)).run(None, values)[0])
