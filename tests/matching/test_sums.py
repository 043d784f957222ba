"""Additions as trees."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from sparse_onnx.matching.sums import is_root, smallest, terms


def values(body: str, outputs: str = "float[T] y") -> dict[str, ir.Value]:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        sums (float[T] a, float[T] b, float[T] c, float[T] d) => ({outputs}) {{ {body} }}"""
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    found = {value.name or "": value for value in graph.inputs}
    return found | {value.name or "": value for node in graph for value in node.outputs}


def names(found: list[ir.Value]) -> list[str | None]:
    return [value.name for value in found]


@pytest.mark.parametrize(
    "body",
    [
        "p = Add (a, b) q = Add (p, c) y = Add (q, d)",
        "p = Add (c, d) q = Add (b, p) y = Add (a, q)",
        "p = Add (a, b) q = Add (c, d) y = Add (p, q)",
        "p = Sum (a, b, c) y = Add (p, d)",
        "y = Sum (a, b, c, d)",
    ],
)
def test_terms_in_order_however_bracketed(body: str) -> None:
    assert names(terms(values(body)["y"])) == ["a", "b", "c", "d"]


def test_a_partial_sum_that_others_read_is_one_term() -> None:
    found = values("p = Add (a, b) q = Add (p, c) z = Relu (p) y = Add (q, d)", "float[T] y, float[T] z")
    assert names(terms(found["y"])) == ["p", "c", "d"]
    found = values("p = Add (a, b) y = Add (p, c)", "float[T] y, float[T] p")
    assert names(terms(found["y"])) == ["p", "c"]


def test_a_term_twice_is_two_terms() -> None:
    assert names(terms(values("p = Add (a, b) y = Add (p, a)")["y"])) == ["a", "b", "a"]


def test_the_last_addition_is_the_root() -> None:
    found = values("p = Add (a, b) q = Add (p, c) z = Relu (q) y = Add (z, d)")
    roots = [name for name in "pqy" if is_root(found[name].producer())]
    assert roots == ["q", "y"]


def test_the_smallest_sum_that_holds_all() -> None:
    found = values("p = Add (a, b) q = Add (p, c) y = Add (q, d)")
    wanted = {"p": "ab", "q": "bc", "y": "ad"}
    for result, held in wanted.items():
        assert smallest(found["y"], [found[name] for name in held]) is found[result]
