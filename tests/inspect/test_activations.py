"""Sparsity that is no mixture of experts: named where it is plain, and counted as active."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Shape, layered_model, save_external
from text_graphs import graph

from sparse_onnx.core.report import BlockRecord, Report
from sparse_onnx.inspect.api import inspect
from sparse_onnx.optimize.api import optimize

RNG = np.random.default_rng(0)
STORED = {
    "w1": RNG.standard_normal((16, 24)),
    "w2": RNG.standard_normal((24, 16)),
    "wide": RNG.standard_normal((16, 48)),
    "b1": RNG.standard_normal(24),
    "b2": RNG.standard_normal(16),
    "router": RNG.standard_normal((16, 1)),
    "k": [8],
    "last": [-1],
    "zero": 0.0,
    "one": 1.0,
    "two": 2.0,
    "threshold": 0.25,
    "below": -0.25,
    "half": [24, 24],
    "rows": [0, 2, 4],
    "few": [3],
    "shape": [1, 3, 16],
}
INPUTS = "float[B,S,16] x"


def inspected(folder: Path, *parts: str, inputs: str = INPUTS) -> Report:
    path = folder / "m.onnx"
    onnx.save(graph("\n".join(parts), "float[B,S,16] y", STORED, inputs), path)
    return inspect(path)


def only(report: Report) -> BlockRecord:
    [block] = report.blocks
    assert report.refusals == []
    assert (block.experts, block.router, block.form, block.active_parameters) == (None, None, None, None)
    assert report.model is not None and report.model.active_parameters == report.model.parameters
    assert any(note.startswith(f"{block.kind}: ") for note in report.notes)
    return block


FFN = {
    "relu": ("a = MatMul(x, w1)\n h = Add(a, b1)\n f = Relu(h)", "relu", False),
    "max": ("h = MatMul(x, w1)\n f = Max(zero, h)", "relu", False),
    "clip": ("h = MatMul(x, w1)\n f = Clip(h, zero)", "relu", False),
    "relu2": ("h = MatMul(x, w1)\n r = Relu(h)\n f = Mul(r, r)", "relu2", False),
    "pow": ("h = MatMul(x, w1)\n r = Relu(h)\n f = Pow(r, two)", "relu2", False),
    "thresholded": ("h = MatMul(x, w1)\n f = ThresholdedRelu<alpha=0.1>(h)", "thresholded_relu", False),
    "where": (
        "h = MatMul(x, w1)\n m = Greater(h, threshold)\n f = Where(m, h, zero)",
        "thresholded_relu",
        False,
    ),
    "where-not": (
        "h = MatMul(x, w1)\n m = LessOrEqual(h, threshold)\n f = Where(m, zero, h)",
        "thresholded_relu",
        False,
    ),
    "times-mask": (
        "h = MatMul(x, w1)\n m = Greater(h, zero)\n c = Cast<to=1>(m)\n f = Mul(h, c)",
        "relu",
        False,
    ),
    "gated": ("g = MatMul(x, w1)\n r = Relu(g)\n u = MatMul(x, w1)\n f = Mul(u, r)", "relu", True),
    "packed": (
        "p = MatMul(x, wide)\n g, u = Split<axis=-1>(p, half)\n r = Relu(g)\n f = Mul(r, u)",
        "relu",
        True,
    ),
}


@pytest.mark.parametrize(("body", "activation", "gated"), FFN.values(), ids=FFN)
def test_feed_forward(body: str, activation: str, gated: bool, tmp_path: Path) -> None:
    block = only(inspected(tmp_path, body, "o = MatMul(f, w2)\n y = Add(o, b2)"))
    assert (block.kind, block.spelling, block.top_k) == ("relu-ffn", "relu-ffn", None)
    assert (block.hidden, block.inner, block.activation, block.gated) == (16, 24, activation, gated)
    biases = 16 + (24 if "b1" in body else 0)
    assert block.parameters == 16 * 24 * (3 if gated else 2) + biases


NOT_FFN = {
    "not-zero": "h = MatMul(x, w1)\n f = Sigmoid(h)",
    "leaky": "h = MatMul(x, w1)\n f = LeakyRelu(h)",
    "clipped-above": "h = MatMul(x, w1)\n f = Clip(h, below)",
    "below": "h = MatMul(x, w1)\n m = Greater(h, below)\n f = Where(m, h, zero)",
    "small-kept": "h = MatMul(x, w1)\n m = Less(h, zero)\n f = Where(m, h, zero)",
    "not-linear": "e = Concat<axis=-1>(x, other)\n f = Relu(e)",
    "other-rows": "g = MatMul(x, w1)\n r = Relu(g)\n n = Neg(x)\n u = MatMul(n, w1)\n f = Mul(u, r)",
    "input-matrix": "h = MatMul(x, given)\n f = Relu(h)",
    "some-rows": "s = Gather<axis=1>(x, rows)\n h = MatMul(s, w1)\n f = Relu(h)",
}


@pytest.mark.parametrize("body", NOT_FFN.values(), ids=NOT_FFN)
def test_no_feed_forward(body: str, tmp_path: Path) -> None:
    inputs = f"{INPUTS}, float[16,24] given, float[B,S,8] other"
    report = inspected(tmp_path, body, "y = MatMul(f, w2)", inputs=inputs)
    assert report.blocks == [] and report.refusals == [] and report.notes == []


TOPK = """
    a = MatMul(x, w1)
    h = Add(a, b1)
    v, i = TopK<axis=-1>(h, k)
    r = Relu(v)
    s = Shape(h)
    z = Expand(zero, s)
    f = ScatterElements<axis=-1>(z, i, r)
    o = MatMul(f, w2)
    y = Add(o, b2)
"""


def test_topk_activation(tmp_path: Path) -> None:
    block = only(inspected(tmp_path, TOPK))
    assert (block.kind, block.spelling) == ("topk-activation", "topk-activation")
    assert (block.top_k, block.hidden, block.inner, block.activation) == (8, 16, 24, "relu")
    assert block.parameters == 2 * 16 * 24 + 24 + 16
    bare = TOPK.replace("i, r)", "i, v)")
    block = only(inspected(tmp_path, bare))
    assert (block.kind, block.activation) == ("topk-activation", None)
    early = bare.replace("v, i = TopK<axis=-1>(h", "e = Relu(h)\n v, i = TopK<axis=-1>(e")
    assert only(inspected(tmp_path, early)).activation == "relu"
    late = bare.replace("f = Scatter", "e = Scatter").replace("o = MatMul", "f = Relu(e)\n o = MatMul")
    assert only(inspected(tmp_path, late)).activation == "relu"
    mask = "c = Shape(i)\n e = Expand(one, c)\n m = ScatterElements<axis=-1>(z, i, e)\n f = Mul(h, m)\n o = MatMul"
    lines = bare.replace("    f = ScatterElements<axis=-1>(z, i, v)\n", "").replace("o = MatMul", mask)
    assert only(inspected(tmp_path, lines)).kind == "topk-activation"
    assert inspected(tmp_path, lines.replace("Expand(one", "Expand(two")).blocks == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("TopK<axis=-1>", "TopK<axis=-1, largest=0>"),
        ("Expand(zero, s)", "Expand(threshold, s)"),
        ("(z, i, r)", "(h, i, r)"),
        ("(z, i, r)", "(z, i, n)"),
    ],
)
def test_no_topk_activation(old: str, new: str, tmp_path: Path) -> None:
    text = TOPK.replace("s = Shape(h)", "s = Shape(h)\n n = Neg(v)").replace(old, new)
    assert inspected(tmp_path, text).blocks == []


DEPTHS = """
    scores3 = MatMul(x, router)
    scores = Squeeze(scores3, last)
    v, i = TopK<axis=1>(scores, few)
    column = Unsqueeze(i, last)
    i3 = Expand(column, shape)
    chosen = GatherElements<axis=1>(x, i3)
    h = MatMul(chosen, w1)
    r = Sigmoid(h)
    o = MatMul(r, w2)
    weight = Unsqueeze(v, last)
    weighted = Mul(o, weight)
    y = ScatterElements<axis=1, reduction="add">(x, i3, weighted)
"""


def test_mixture_of_depths(tmp_path: Path) -> None:
    block = only(inspected(tmp_path, DEPTHS))
    assert (block.kind, block.spelling) == ("mixture-of-depths", "mixture-of-depths")
    assert (block.top_k, block.hidden, block.inner) == (3, 16, None)
    assert block.parameters == 2 * 16 * 24
    by_sigmoid = DEPTHS.replace("Squeeze(scores3", "Squeeze(gates").replace(
        "scores =", "gates = Sigmoid(scores3)\n scores ="
    )
    assert only(inspected(tmp_path, by_sigmoid)).kind == "mixture-of-depths"
    for old, new in (
        ("TopK<axis=1>", "TopK<axis=1, largest=0>"),
        ("GatherElements<axis=1>(x,", "GatherElements<axis=1>(negative,"),  # of other rows than are routed
        ("Mul(o, weight)", "Mul(free, weight)"),  # what is scattered was not gathered
    ):
        changed = DEPTHS.replace(old, new).replace("h = MatMul", "free = Identity(given)\n h = MatMul")
        inputs = f"{INPUTS}, float[B,3,16] given, float[B,S,16] negative"
        assert inspected(tmp_path, changed, inputs=inputs).blocks == []


def test_optimize_lists_what_it_handles(tmp_path: Path) -> None:
    inspected(tmp_path, TOPK)
    report = optimize(tmp_path / "m.onnx", None, dry_run=True)
    assert report.blocks == [] and report.refusals == []


def test_experts_of_a_lowered_block_are_no_blocks(tmp_path: Path) -> None:
    shape = Shape(activation=3, gate_layout=0)  # relu, no gate
    path = save_external(layered_model(shape, layers=1), tmp_path / "m.onnx")
    optimize(path, tmp_path / "o.onnx", verify="none")
    for model in (path, tmp_path / "o.onnx"):
        assert [(block.kind, block.activation) for block in inspect(model).blocks] == [("moe", "relu")]


def test_beside_experts_they_count_as_active(tmp_path: Path) -> None:
    model = onnx.load(save_external(layered_model(Shape(), layers=1), tmp_path / "m.onnx"))
    node = onnx.helper.make_node
    model.graph.node.extend(
        [node("MatMul", ["y", "w1"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "w2"], ["z"])]
    )
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(STORED[name].astype(np.float32), name) for name in ("w1", "w2")
    )
    model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "more.onnx")
    old, report = inspect(tmp_path / "m.onnx").model, inspect(tmp_path / "more.onnx")
    assert [block.kind for block in report.blocks] == ["moe", "relu-ffn"]
    assert old is not None and report.model is not None and old.active_parameters is not None
    assert report.model.active_parameters == old.active_parameters + 2 * 16 * 24


def test_many_layers_behind_one_another(tmp_path: Path) -> None:
    """Neither the depth of a sum nor of a stack matters."""
    layers = [
        f"h{at} = MatMul(x{at}, w1)\n r{at} = Relu(h{at})\n o{at} = MatMul(r{at}, w2)\n x{at + 1} = Add(x{at}, o{at})"
        for at in range(1200)
    ]
    report = inspected(tmp_path, "x0 = Identity(x)", *layers, "y = Identity(x1200)")
    assert len(report.blocks) == 1200 and {block.kind for block in report.blocks} == {"relu-ffn"}
