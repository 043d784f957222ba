"""Experts of any body on all tokens and zero gates: outlined, routed, and the same function."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from any_body import Graph
from harness import assert_close, run_model
from onnx import TensorProto, helper
from onnx_ir.passes import common

from sparse_onnx.blocks import combine_blocks
from sparse_onnx.core.passes import Outcome
from sparse_onnx.passes.infer_shapes import InferShapes
from sparse_onnx.passes.recognise_dense_mask import RecogniseDenseMask
from sparse_onnx.passes.route_experts import RouteExperts

E, K, D, HIDDEN, CHANNELS = 4, 2, 8, 12, 6


def linear(g: Graph, x: str, inputs: int, outputs: int) -> str:
    return g.op("Add", g.op("MatMul", x, g.weight(inputs, outputs)), g.vector(outputs))


def mlp(g: Graph, x: str, e: int, act: str = "Relu") -> str:
    return linear(g, g.op(act, linear(g, x, D, HIDDEN)), HIDDEN, D)


def three_layers(g: Graph, x: str, e: int) -> str:
    middle = g.op("Relu", linear(g, g.op("Relu", linear(g, x, D, HIDDEN)), HIDDEN, HIDDEN))
    return linear(g, middle, HIDDEN, D)


def normed_after(g: Graph, x: str, e: int) -> str:
    return g.op("LayerNormalization", mlp(g, x, e), g.vector(D), g.vector(D), axis=-1)


def normed_before(g: Graph, x: str, e: int) -> str:
    return mlp(g, g.op("LayerNormalization", x, g.vector(D), g.vector(D), axis=-1), e)


def shifted(g: Graph, x: str, e: int) -> str:
    return mlp(g, g.op("Add", x, g.vector(D)), e)


def one_other(g: Graph, x: str, e: int) -> str:
    return mlp(g, x, e) if e != 2 else g.op("Tanh", linear(g, x, D, D))


def one_other_activation(g: Graph, x: str, e: int) -> str:
    return mlp(g, x, e, "Relu" if e != 1 else "Gelu")


def other_widths(g: Graph, x: str, e: int) -> str:
    return linear(g, g.op("Relu", linear(g, x, D, HIDDEN + 2 * e)), HIDDEN + 2 * e, D)


def flattened(g: Graph, x: str, e: int) -> str:
    """Each expert makes rows of the tokens, and its result a batch again."""
    rows = g.op("Reshape", x, g.ints(-1, D))
    return g.op("Reshape", three_layers(g, rows, e), g.op("Shape", x))


def convolutions(g: Graph, x: str, e: int) -> str:
    hidden = g.op("Conv", x, g.weight(HIDDEN, CHANNELS, 3, 3), g.vector(HIDDEN), pads=[1, 1, 1, 1])
    act = g.op("Mul", hidden, g.op("Sigmoid", hidden))
    return g.op("Conv", act, g.weight(CHANNELS, HIDDEN, 1, 1), g.vector(CHANNELS))


def convolutions_of_two_kinds(g: Graph, x: str, e: int) -> str:
    if e % 2:
        return convolutions(g, x, e)
    hidden = g.op("Conv", x, g.weight(CHANNELS, 1, 5, 5), pads=[2, 2, 2, 2], group=CHANNELS)
    return g.op("Conv", g.op("Mish", hidden), g.weight(CHANNELS, CHANNELS, 1, 1))


def copies(g: Graph, x: str, e: int) -> str:
    """An expert may leave its tokens as they are."""
    return x if e == 1 else three_layers(g, x, e)


ROWS = {
    "one copies": copies,
    "three layers": three_layers,
    "norm after": normed_after,
    "norm before": normed_before,
    "tanh": lambda g, x, e: mlp(g, x, e, "Tanh"),
    "mish": lambda g, x, e: mlp(g, x, e, "Mish"),
    "leaky relu": lambda g, x, e: mlp(g, x, e, "LeakyRelu"),
    "rows shifted by each expert": shifted,
    "one of another body": one_other,
    "one of another activation": one_other_activation,
    "other widths": other_widths,
}
IMAGES = {"convolutions": convolutions, "of two kinds": convolutions_of_two_kinds}


def gates(g: Graph, logits: str) -> str:
    """``[T, E]``: the chosen softmax scores, 0 elsewhere."""
    top, ids = g.ops("TopK", (logits, g.ints(K)), 2, axis=-1)
    base = g.op("Expand", g.constant(np.float32(0)), g.op("Shape", logits))
    return g.op("ScatterElements", base, ids, g.op("Softmax", top, axis=-1), axis=-1)


def pooled(g: Graph) -> str:
    mean = g.op("Flatten", g.op("GlobalAveragePool", "x"), axis=1)
    return g.op("MatMul", mean, g.constant(3 * g.rng.standard_normal((CHANNELS, E)).astype(np.float32)))


def chain(g: Graph, gate: str, exits: list[str], rest: int) -> str:
    """``y = sum_e gate[:, e, None, ..] * y_e``."""
    total = ""
    for e, exit in enumerate(exits):
        column = g.op("Gather", gate, g.constant(np.int64(e)), axis=-1)
        for _ in range(rest):
            column = g.op("Unsqueeze", column, g.ints(-1))
        term = g.op("Mul", column, exit)
        total = term if not total else g.op("Add", total, term)
    return total


def wheres(g: Graph, gate: str, exits: list[str], rest: int) -> str:
    """A mask around each product."""
    axes, zero, terms = g.ints(*range(-rest, 0)), g.constant(np.float32(0)), []
    for e, exit in enumerate(exits):
        column = g.op("Slice", gate, g.ints(e), g.ints(e + 1), g.ints(-1))
        column = g.op("Squeeze", column, g.ints(-1))
        column = g.op("Unsqueeze", column, axes)
        product = g.op("Mul", exit, column)
        terms.append(g.op("Where", g.op("Greater", column, zero), product, zero))
    return g.op("Sum", *terms)


def stack(g: Graph, gate: str, exits: list[str], rest: int) -> str:
    """``y = sum over axis 1 of gate[:, :, None, ..] * stack(y)``."""
    wide = g.op("Concat", *(g.op("Unsqueeze", exit, g.ints(-rest - 1)) for exit in exits), axis=-rest - 1)
    weights = g.op("Unsqueeze", gate, g.ints(*range(-rest, 0)))
    return g.op("ReduceSum", g.op("Mul", wide, weights), g.ints(-rest - 1), keepdims=0)


def einsum(g: Graph, gate: str, exits: list[str], rest: int) -> str:
    wide = g.op("Concat", *(g.op("Unsqueeze", exit, g.ints(1)) for exit in exits), axis=1)
    letters = "chwd"[:rest]
    return g.op("Einsum", gate, wide, equation=f"te,te{letters}->t{letters}")


SUMS = {"chain": chain, "wheres": wheres, "stack": stack, "einsum": einsum}


def built(
    write, total=chain, lead: tuple = ("T",), row: tuple = (D,), after=None, seen: bool = False
) -> onnx.ModelProto:
    """x ``[*lead, *row]`` to the gated sum of the experts' results."""
    g = Graph()
    image = len(row) == 3
    logits = (
        pooled(g)
        if image
        else g.op("MatMul", "x", g.constant(3 * g.rng.standard_normal((row[-1], E)).astype(np.float32)))
    )
    exits = [write(g, "x", e) for e in range(E)]
    y = total(g, gates(g, logits), exits, len(row))
    y = g.op("Identity", y) if after is None else after(g, y)
    value = helper.make_tensor_value_info
    results = [value(y, TensorProto.FLOAT, [*lead, *row])]
    if seen:
        results.append(value(exits[1], TensorProto.FLOAT, [*lead, *row]))
    graph = helper.make_graph(
        g.nodes, "g", [value("x", TensorProto.FLOAT, [*lead, *row])], results, g.initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def recognised(proto: onnx.ModelProto) -> tuple[ir.Model, Outcome]:
    model = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    common.CommonSubexpressionEliminationPass()(model)
    InferShapes()(model)
    return model, RecogniseDenseMask()(model)


def inputs(lead: tuple, row: tuple) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    sizes = {"T": 17, "B": 3, "S": 5, "H": 7, "W": 9}
    shape = [size if isinstance(size, int) else sizes[size] for size in (*lead, *row)]
    some = rng.standard_normal(shape).astype(np.float32)
    return [some, some[:1], np.repeat(some[:1], 5, axis=0), np.zeros_like(some)]


def check(proto: onnx.ModelProto, lead: tuple = ("T",), row: tuple = (D,)) -> ir.Model:
    """One stack of calls, each on its own rows behind the second pass; the numbers of the original."""
    model, outcome = recognised(proto)
    assert (outcome.matched, outcome.rewritten, outcome.refusals) == (1, 1, ())
    [block] = combine_blocks(model)
    assert (block.experts, block.top_k, len(block.calls)) == (E, K, E)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    again = RecogniseDenseMask()(model)
    assert not again.modified and again.matched == 0
    kept = ir.from_proto(ir.to_proto(model))
    InferShapes()(model)
    routed = RouteExperts()(model)
    assert (routed.rewritten, routed.refusals) == (1, ())
    before = ir.from_proto(proto)
    for x in inputs(lead, row):
        [expected] = run_model(before, {"x": x})
        assert_close(expected, run_model(kept, {"x": x})[0], 2e-6)
        assert_close(expected, run_model(model, {"x": x})[0], 2e-6)
    return model


def check_refused(proto: onnx.ModelProto, reason: str) -> None:
    """Refused with this reason, and nothing changed."""
    model = ir.from_proto(proto)
    common.CommonSubexpressionEliminationPass()(model)
    InferShapes()(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    outcome = RecogniseDenseMask()(model)
    assert not outcome.modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert [reason in refusal.reason for refusal in outcome.refusals] == [True], outcome.refusals
    assert all(refusal.hint and refusal.by == "recognise_dense_mask" for refusal in outcome.refusals)


@pytest.mark.parametrize("body", ROWS)
def test_rows(body: str) -> None:
    check(built(ROWS[body]))


@pytest.mark.parametrize("total", SUMS)
def test_sums(total: str) -> None:
    check(built(three_layers, SUMS[total]))


@pytest.mark.parametrize("body", [three_layers, flattened])
def test_batches(body) -> None:
    check(built(body, lead=("B", "S")), ("B", "S"))


@pytest.mark.parametrize("total", SUMS)
@pytest.mark.parametrize("body", IMAGES)
def test_images(body: str, total: str) -> None:
    """A token is an image: its gate is one number, of pooled channels."""
    row = (CHANNELS, 7, 9)
    check(built(IMAGES[body], SUMS[total], ("B",), row), ("B",), row)


@pytest.mark.parametrize("body", IMAGES)
def test_images_of_any_size(body: str) -> None:
    """Convolutions that keep height and width are known to give images of one size."""
    row = (CHANNELS, "H", "W")
    check(built(IMAGES[body], chain, ("B",), row), ("B",), row)


def test_images_whose_gates_are_images() -> None:
    """The router is made of convolutions and chooses along the channels of ``[B, E, 1, 1]``."""
    g, row = Graph(), (CHANNELS, 7, 9)
    kernel = g.constant(3 * g.rng.standard_normal((E, CHANNELS, 1, 1)).astype(np.float32))
    scores = g.op("Softmax", g.op("Conv", g.op("GlobalAveragePool", "x"), kernel), axis=1)
    top, ids = g.ops("TopK", (scores, g.ints(K)), 2, axis=1)
    base = g.op("Expand", g.constant(np.float32(0)), g.op("Shape", scores))
    gate = g.op("ScatterElements", base, ids, top, axis=1)
    gate = g.op("Div", gate, g.op("ReduceSum", gate, g.ints(1)))
    columns = [g.op("Slice", gate, g.ints(e), g.ints(e + 1), g.ints(1)) for e in range(E)]
    y = g.op("Sum", *(g.op("Mul", convolutions(g, "x", e), column) for e, column in enumerate(columns)))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", *row])
    result = helper.make_tensor_value_info(y, TensorProto.FLOAT, ["B", *row])
    graph = helper.make_graph(g.nodes, "g", [x], [result], g.initializers)
    check(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), ("B",), row)


def test_what_else_the_sum_holds_stays() -> None:
    model = check(built(three_layers, after=lambda g, y: g.op("Add", y, "x")))
    assert any(node.op_type == "Add" and model.graph.inputs[0] in node.inputs for node in model.graph)


def averaged(g: Graph, x: str, e: int) -> str:
    mean = g.op("ReduceMean", x, g.ints(0), keepdims=1)
    return mlp(g, g.op("Sub", x, mean), e)


def cropped(g: Graph, x: str, e: int) -> str:
    """Expert 1 sees half of the image only, in both directions: nobody knows that it does not broadcast."""
    wide = convolutions(g, x, e)
    return wide if e != 1 else g.op("MaxPool", wide, kernel_shape=[7, 9], strides=[7, 9])


def test_refused() -> None:
    check_refused(built(averaged), "not known to treat its tokens one by one: operator ReduceMean")
    check_refused(built(three_layers, seen=True), "leaves the graph")
    row = (CHANNELS, "H", "W")
    check_refused(built(cropped, chain, ("B",), row), "not proved to be of the same tokens")


def test_refused_sums() -> None:
    twice = built(three_layers, lambda g, gate, exits, rest: chain(g, gate, [*exits[:3], exits[0]], rest))
    check_refused(twice, "experts 0 and 3 are the same")
    missing = built(three_layers, lambda g, gate, exits, rest: chain(g, gate, exits[:3], rest))
    check_refused(missing, "expert 3 is missing")


def squared(g: Graph, gate: str, exits: list[str], rest: int) -> str:
    return chain(
        g,
        gate,
        [
            g.op("Mul", exit, g.op("Slice", gate, g.ints(e), g.ints(e + 1), g.ints(1)))
            for e, exit in enumerate(exits)
        ],
        rest,
    )


def test_refused_weights() -> None:
    check_refused(built(three_layers, squared), "the weight is applied twice")


def test_a_soft_mixture_of_other_bodies_is_none() -> None:
    """A soft mixture of anything, like attention over branches, is no mixture of experts: silence."""
    soft = built(
        three_layers,
        lambda g, gate, exits, rest: chain(g, g.op("Softmax", g.nodes[0].output[0]), exits, rest),
    )
    _, outcome = recognised(soft)
    assert (outcome.matched, outcome.refusals) == (0, ())
