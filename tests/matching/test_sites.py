"""Which layers are one site, what they are called, and which are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model
from text_graphs import graph

from sparse_onnx import targets
from sparse_onnx.graph import io
from sparse_onnx.graph.infer import infer
from sparse_onnx.matching.sites import Sites, sites
from sparse_onnx.optimize import runner

W = np.zeros((8, 8))
WIDE = np.zeros((8, 40))
TABLE = np.zeros((40, 8))


def read(body: str, constants: dict[str, Any], inputs: str = "float[T, 8] x", outputs: str = "y") -> Sites:
    model = ir.from_proto(graph(body, outputs, constants, inputs))
    infer(model)
    return sites(model)


def test_layers_that_read_one_value_are_one_site() -> None:
    found = read(
        """
        q = MatMul (x, layer.q.weight) k = MatMul (x, layer.k.weight) s = Reshape (x, shape)
        v = MatMul (s, layer.v.weight) a = Mul (q, k) n = Mul (a, v) r = Relu (n) o = MatMul (r, layer.o.weight)
        y = Relu (o)
        """.replace("layer.", "layer_").replace(".weight", "_weight"),
        {f"layer_{name}_weight": W for name in "qkvo"} | {"shape": np.asarray([-1, 8])},
    )
    first, second = found
    assert first.input is not None and first.input.name == "x" and len(first.layers) == 3
    assert (first.rows, first.columns, first.nbytes) == (8, (8, 8, 8), 3 * 256)
    assert second.input is not None and second.input.name == "r" and not found.refusals


LEFT_ALONE = {
    "a router of two layers": (
        "h = MatMul (x, w1) t = Tanh (h) l = MatMul (t, w2) v, i = TopK (l, k) m = MatMul (x, w3) y = Mul (m, v)",
        {"w1": W, "w2": WIDE, "w3": W, "k": np.asarray([1])}, ["router", "router"], ["w3"], "float[T, 8] x",
    ),
    "a soft router": (
        "l = MatMul (x, w1) p = Softmax (l) m = MatMul (x, w2) y = Mul (p, m)",
        {"w1": W, "w2": W}, ["router"], ["w2"], "float[T, 8] x",
    ),
    "a head": (
        "x = Gather (t, ids) h = MatMul (x, w1) r = Relu (h) l = MatMul (r, w2) c = Cast <to = 1> (l) y = Mul (c, s)",
        {"t": TABLE, "w1": W, "w2": WIDE, "s": np.asarray(0.5)}, ["head"], ["w1"], "int64[B, S] ids",
    ),
    "a head that is the table": (
        "x = Gather (t, ids) h = MatMul (x, w1) r = Relu (h) l = Gemm <transB = 1> (r, t) e = Exp (l) y = Mul (l, e)",
        {"t": TABLE, "w1": W}, ["embedding"], ["w1"], "int64[T] ids",
    ),
    "a classifier": (
        "h = MatMul (x, w1) r = Relu (h) l = Gemm (r, w2, b) y = Softmax (l)",
        {"w1": W, "w2": np.zeros((8, 3)), "b": np.zeros(3)}, ["head"], ["w1"], "float[T, 8] x",
    ),
    "one-hot rows": (
        "d = Constant <value = int64 {8}> () v = Constant <value = float[2] {0.0, 1.0}> ()"
        " x = OneHot (ids, d, v) h = MatMul (x, w1) r = Relu (h) m = MatMul (r, w2) y = Relu (m)",
        {"w1": W, "w2": W}, ["embedding"], ["w2"], "int64[T] ids",
    ),
    "a gate of one number": (
        "g = MatMul (x, w1) p = Sigmoid (g) m = MatMul (x, w2) y = Mul (m, p)",
        {"w1": np.zeros((8, 1)), "w2": W}, ["one result"], ["w2"], "float[T, 8] x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_routers_heads_and_embeddings_are_left_alone(name: str) -> None:
    body, constants, reasons, kept, inputs = LEFT_ALONE[name]
    found = read(body, constants, inputs)
    assert [weight for site in found for weight in site.weights] == kept
    assert len(found.refusals) == len(reasons)
    for refusal, reason in zip(found.refusals, reasons, strict=True):
        assert reason in refusal.reason


KEPT = {
    "one layer is no model with a head": ("y = MatMul (x, w)", {"w": W}, 1),
    "back into the space of the input": (
        "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)", {"w1": WIDE, "w2": TABLE}, 2,
    ),
    "values of a cache that attention reads as well": (
        "v = MatMul (x, w1) s = Reshape (v, shape) y = Transpose <perm = [1, 0, 2]> (s) r = Relu (v)"
        " o = MatMul (r, w2) z = Relu (o)",
        {"w1": W, "w2": W, "shape": np.asarray([-1, 2, 4])}, 2,
    ),
    "queries and keys whose sizes make the mask": (
        """
        q = MatMul (x, w1) k = MatMul (x, w2) t = Transpose (k) s = MatMul (q, t) sizes = Shape (q)
        ones = ConstantOfShape <value = float[1] {1.0}> (sizes) mask = MatMul (ones, t) m = Mul (mask, none)
        a = Add (s, m) p = Softmax (a) y = MatMul (p, k)
        """, {"w1": W, "w2": W, "none": np.asarray(0.0)}, 1,
    ),
    "a norm between": ("h = MatMul (x, w1) n = LayerNormalization (h, g) y = MatMul (n, w2)",
                       {"w1": W, "w2": W, "g": np.ones(8)}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_looks_like_a_head_is_kept(name: str) -> None:
    body, constants, count = KEPT[name]
    found = read(body, constants, outputs="y, z" if "z =" in body else "y")
    assert len([name for site in found for name in site.weights]) >= count and not found.refusals
    assert len(list(found)) == count


def test_experts_are_two_sites_a_block_and_their_router_is_none() -> None:
    shape = Shape(experts=4, hidden=16, inner=24)
    found = sites(layered_model(shape, layers=2))
    assert [site.name for site in found] == [
        f"layers.{layer}.experts.{half}" for layer in range(2) for half in ("up", "down")
    ]
    up, down = list(found)[:2]
    assert up.input is not None and (up.rows, up.columns, up.roles) == (16, (48,), ("fc1",))
    assert down.input is None and (down.rows, down.columns, down.roles) == (24, (16,), ("fc2",))
    assert (up.nbytes, down.nbytes) == (4 * 48 * 16 * 4, 4 * 24 * 16 * 4)
    assert [refusal.node for refusal in found.refusals] == ["layers.0.logits", "layers.1.logits"]


def test_names_do_not_depend_on_what_was_done_to_the_model_before(tmp_path: Path) -> None:
    model = layered_model(Shape(), layers=2)
    io.save(model, tmp_path / "m.onnx")

    def names() -> list[tuple[str, str | None]]:
        loaded = io.load(tmp_path / "m.onnx")
        steps = runner.plan(targets.get("cpu").forms)
        runner.run(loaded, [item for item in steps if item.step.phase in ("prepare", "recognise")])
        return [(site.name, site.input and site.input.name) for site in sites(loaded)]

    assert names() == names() and len(set(names())) == 4
