"""Sorts, their inverses, chains of arithmetic on indices, and what is proved of ids."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.integers import evaluated, quotient
from sparse_onnx.matching.order import bounded, inverse_of, order_of
from sparse_onnx.matching.values import producer


def values(body: str, inputs: str = "int64[N] a", constants: str = "") -> dict[str, ir.Value]:
    """All values of a graph in ONNX's text form, with inferred types."""
    holder = f"<{constants}>" if constants else ""
    text = f'<ir_version: 10, opset_import: ["" : 18]> g ({inputs}) => (y) {holder} {{ {body} }}'
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    graph = ir.from_proto(proto).graph
    found = {value.name or "": value for value in (*graph.inputs, *graph.initializers.values())}
    return found | {value.name or "": value for node in graph for value in node.outputs}


THREE = "int64 k = {3}, float f = {3.0}, int64 zero = {0}, bool yes = {1}"


@pytest.mark.parametrize(
    "body",
    [
        "y = Div(a, k)",
        "d = Cast<to=1>(a) c = Div(d, f) b = Floor(c) y = Cast<to=7>(b)",
        "r = Mod(a, k) s = Sub(a, r) y = Div(s, k)",
        "l = Less(a, zero) e = Equal(l, yes) m = Mod(a, k) c = Cast<to=9>(m) n = And(e, c) i = Cast<to=7>(n)"
        " d = Div(a, k) y = Sub(d, i)",
        "l = Less(a, zero) m = Mod(a, k) n = Neg(a) w = Where(l, n, a) y = Div(w, k)",
    ],
)
def test_floor_division_however_it_is_written(body: str) -> None:
    found = values(body, constants=THREE)
    assert quotient(found["y"], found["a"]) == 3


@pytest.mark.parametrize(
    "body",
    [
        "d = Cast<to=1>(a) c = Div(d, f) b = Round(c) y = Cast<to=7>(b)",
        "s = Add(a, yes1) y = Div(s, k)",
        "d = Div(a, k) y = Clip(d, zero, many)",
        "d = Div(a, k) l = Less(a, far) y = Where(l, d, zero)",
        "y = Mul(a, k)",
        "y = Div(a, a)",
        "d = Div(a, k) y = Sub(d, far)",
    ],
)
def test_what_is_no_floor_division(body: str) -> None:
    constants = THREE + ", int64 many = {100000}, int64 far = {70001}, int64 yes1 = {1}"
    found = values(body, constants=constants)
    assert quotient(found["y"], found["a"]) is None


def test_an_index_is_itself_divided_by_one() -> None:
    found = values("y = Identity(a)")
    assert quotient(found["y"], found["a"]) == 1


def test_reshaped_operands_do_not_meet_position_by_position() -> None:
    body = "r = Unsqueeze(a, first) c = Unsqueeze(a, second) y = Sub(r, c)"
    found = values(body, constants="int64[1] first = {0}, int64[1] second = {1}")
    assert evaluated(found["y"], lambda item: np.arange(4) if item is found["a"] else None) is None


@pytest.mark.parametrize(
    ("count", "sorts"),
    [
        ("n = Shape(a)", True),
        ("s = Shape(a) g = Gather(s, last) n = Reshape(g, ones)", True),
        ("s = Size(a) n = Reshape(s, ones)", True),
        ("n = Shape(z)", False),
        ("s = Shape(a) n = Div(s, two)", False),
        ("n = Identity(ones)", False),
    ],
)
def test_a_sort_takes_all_elements(count: str, sorts: bool) -> None:
    constants = "int64 last = {-1}, int64[1] ones = {1}, int64[1] two = {2}"
    body = f"{count} s1, o = TopK<largest=0>(a, n) y = Identity(o)"
    found = values(body, "int64[N] a, int64[M] z", constants)
    node = producer(found["o"])
    assert node is not None
    order = order_of(node, Dims())
    assert (order is not None) == sorts
    if order is not None:
        assert order.ascending and order.permutation is found["o"]


ROUTER = "v, i = TopK<axis=1>(scores, two) "


@pytest.mark.parametrize(
    ("body", "limit", "inside"),
    [
        (ROUTER + "y = Identity(i)", 5, True),
        (ROUTER + "y = Identity(i)", 4, False),
        (ROUTER + "y = Cast<to=6>(i)", 5, True),
        (ROUTER + "y = Cast<to=3>(i)", 300, False),
        (ROUTER + "y = Mod(i, three)", 3, True),
        (ROUTER + "y = Clip(i, zero, three)", 4, True),
        (ROUTER + "y = Clip(i, minus, three)", 4, False),
        (ROUTER + "y = Add(i, zero)", 6, False),
        (ROUTER + "l = Less(i, three) y = Where(l, i, five)", 5, False),
        ("y = ArgMax<axis=1>(scores)", 5, True),
        ("p = ArgMax<axis=1>(scores) q = ArgMin<axis=1>(scores) y = Concat<axis=1>(p, q)", 5, True),
        ("y = ArgMax<axis=0>(scores)", 5, False),
        ("s = Shape(scores) y = Gather(table, s)", 8, True),
        ("s = Shape(scores) y = Gather(table, s)", 7, False),
    ],
)
def test_bounds_of_ids(body: str, limit: int, inside: bool) -> None:
    constants = (
        "int64[1] two = {2}, int64 three = {3}, int64 zero = {0}, int64 minus = {-1}, int64 five = {5},"
        " int64[3] table = {7, 0, 1}"
    )
    found = values(body, "float[N,5] scores", constants)
    assert bounded(found["y"], limit) == inside


@pytest.mark.parametrize(
    ("body", "inverse"),
    [
        ("z = Expand(zero, n) y = ScatterND(z, c, r)", True),
        ("z = ConstantOfShape(n) y = ScatterElements<axis=0>(z, o, r)", True),
        ('z = Expand(zero, n) y = ScatterND<reduction="add">(z, c, r)', True),
        ('z = Expand(two, n) y = ScatterND<reduction="add">(z, c, r)', False),
        ('z = Expand(zero, n) y = ScatterND<reduction="max">(z, c, r)', False),
        ("z = Expand(zero, n) t = Range(one, e, one) y = ScatterND(z, c, t)", False),
        ("z = Expand(zero, n) d = Mul(r, two) y = ScatterND(z, c, d)", False),
        ("m = Mul(n, two) z = Expand(zero, m) y = ScatterND(z, c, r)", False),
        ("w, y = TopK<largest=0>(o, n)", True),
        ("w, y = TopK<largest=1>(o, n)", False),
        ("y, w = TopK<largest=0>(o, n)", False),
    ],
)
def test_inverses(body: str, inverse: bool) -> None:
    constants = "int64 zero = {0}, int64 one = {1}, int64[1] two = {2}, int64[1] last = {-1}"
    before = "n = Shape(a) s, o = TopK<largest=0>(a, n) c = Unsqueeze(o, last) l = Squeeze(n) r = Range(zero, l, one)"
    found = values(f"{before} e = Add(l, one) {body}", constants=constants)
    assert inverse_of(found["y"], Dims()) is (found["o"] if inverse else None)
