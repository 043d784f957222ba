"""Lengths of axes: what a graph proves to be equally long, and what it does not."""

import onnx
import onnx_ir as ir
import pytest

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.lengths import ONE, Length, named, product

INPUTS = "float[B, S, 8] x, float[T, 8] r, float[T, 2] w, int64[T, 2] i, int64[A] a, float[4, 2] c, bool[T] m"
CONSTANTS = """
    int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] open = {-1},
    int64 first = {0}, int64 second = {1}, int64[1] zero = {0}, int64[1] far = {9223372036854775807},
    int64[2] rows = {-1, 8}, int64[2] pairs = {-1, 2}, int64[2] fours = {4, -1}, int64[3] minus = {-1, -1, 8},
    int64[3] ones = {1, 1, 1}, float zeros = {0.0}
"""


def read(body: str, infer: bool = True) -> tuple[Dims, dict[str, ir.Value]]:
    """The values of a graph by name. Without `infer`, nothing but inputs and constants has a shape."""
    text = f'<ir_version: 10, opset_import: ["" : 18]> g ({INPUTS}) => (float y) <{CONSTANTS}> {{ {body} }}'
    model = onnx.parser.parse_model(text)
    if infer:
        model = onnx.shape_inference.infer_shapes(model, data_prop=False)
    graph = ir.from_proto(model).graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return Dims(graph), {value.name or "": value for value in values}


BOTH = "d = Shape(x) b = Gather(d, first) s = Gather(d, second) n = Mul(b, s) u = Unsqueeze(n, zero)"

#: A body, and what of it holds units of (value, elements each) that are as many as those of another.
EQUAL: dict[str, tuple[str, tuple[str, int | None], tuple[str, int | None]]] = {
    "slots and rows": ("", ("i", 2), ("r", None)),
    "slots, one by one": ("v = Reshape(i, open)", ("v", 2), ("r", None)),
    "a softmax of a reshape": (
        "v = Reshape(w, fours) p = Softmax(v) q = Reshape(p, pairs)",
        ("q", 2),
        ("r", None),
    ),
    "two axes and their product": ("v = Reshape(x, rows)", ("v", None), ("x", None)),
    "a computed product": (
        f"{BOTH} k = Concat <axis = 0> (u, eight) v = ConstantOfShape(k)",
        ("v", None),
        ("x", None),
    ),
    "Expand to a Shape": ("d = Shape(i) v = Expand(zeros, d)", ("v", 2), ("r", None)),
    "a mask that is chosen by": (
        "v = Reshape(w, pairs) g = Unsqueeze(m, open) k = Where(g, v, zeros) p, q = TopK(k, one)",
        ("q", 1),
        ("r", None),
    ),
    "torch's Expand": (
        "d = Shape(r) e = Equal(d, open) h = Where(e, one, d) v = Expand(r, h)",
        ("v", None),
        ("r", None),
    ),
    "a sort": ("v = Reshape(i, open) n = Size(v) p, q = TopK(v, n)", ("q", 2), ("r", None)),
    "a count": ("n = Size(i) f = Squeeze(n) v = Range(first, f, second)", ("v", 2), ("w", None)),
    "a slice of columns": ("v = Slice(r, zero, four, one)", ("v", None), ("i", 2)),
    "every row": ("v = Slice(r, zero, far, zero)", ("v", None), ("i", 2)),
    "scores scattered": (
        "p, q = TopK(w, one) v = ScatterElements <axis = 1> (w, q, p)",
        ("v", 2),
        ("r", None),
    ),
    "rows gathered": ("v = Gather(c, i)", ("v", None), ("w", 1)),
}
DIFFERENT: dict[str, tuple[str, tuple[str, int | None], tuple[str, int | None]]] = {
    "another unknown": ("", ("i", 2), ("a", 1)),
    "half as many": ("", ("i", 1), ("r", None)),
    "one axis of two": ("v = ReduceMax <keepdims = 0> (x, one)", ("v", None), ("x", None)),
    "rows broken up": ("v = Reshape(r, pairs)", ("v", None), ("r", None)),
    "one row at most": ("v = Slice(r, zero, one, zero)", ("v", None), ("c", 8)),
    "four rows at most": ("v = Slice(r, zero, four, zero)", ("v", None), ("c", 2)),
    "either may be one": ("t = Gather(r, a) v = Add(t, r)", ("v", None), ("r", None)),
    "or the other": ("t = Gather(r, a) v = Add(t, r)", ("v", None), ("a", 1)),
    "four of unknown length": ("v = Concat <axis = 0> (r, r, r, r)", ("v", None), ("c", 2)),
    "rows joined": ("v = Concat <axis = 0> (r, r)", ("v", None), ("r", None)),
    "a sort of fewer": (
        "v = Reshape(i, open) n = Size(a) h = Reshape(n, one) p, q = TopK(v, h)",
        ("q", 2),
        ("r", None),
    ),
    "a shape that may be four": (
        "d = Shape(r) e = Equal(d, four) h = Where(e, one, d) v = ConstantOfShape(h)",
        ("v", None),
        ("r", None),
    ),
    "a truth as a length": (
        "d = Shape(i) e = Cast <to = 9> (d) f = Cast <to = 7> (e) v = ConstantOfShape(f)",
        ("v", 2),
        ("r", None),
    ),
    "half of an unknown": (
        "d = Shape(a) h = Div(d, two) k = Mul(h, two) v = ConstantOfShape(k)",
        ("v", 1),
        ("a", 1),
    ),
    "what NonZero finds": ("p = NonZero(m) v = Transpose(p)", ("v", None), ("r", None)),
    "unknown shapes of one kind": ("p = NonZero(m) q = NonZero(m)", ("p", 1), ("q", 1)),
}


@pytest.mark.parametrize("infer", [True, False], ids=["inferred", "bare"])
@pytest.mark.parametrize("name", EQUAL)
def test_as_many(name: str, infer: bool) -> None:
    body, (a, per_a), (b, per_b) = EQUAL[name]
    dims, values = read(body, infer)
    assert dims.as_many(values[a], per_a, values[b], per_b)
    assert dims.as_many(values[b], per_b, values[a], per_a)


@pytest.mark.parametrize("infer", [True, False], ids=["inferred", "bare"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_not_proved(name: str, infer: bool) -> None:
    body, (a, per_a), (b, per_b) = DIFFERENT[name]
    dims, values = read(body, infer)
    assert not dims.as_many(values[a], per_a, values[b], per_b)


def test_a_name_that_inference_invented_is_a_product() -> None:
    dims, values = read("v = Reshape(x, rows) p = Softmax(v) q = Sigmoid(v)")
    p, q = values["p"], values["q"]
    q.producer().replace_input_with(0, None)  # type: ignore[union-attr]
    assert dims.of(q) == dims.of(p) == (Length(1, ("B", "S")), Length(8))


def test_names_of_outputs_are_claims() -> None:
    body = "v = Reshape(x, rows) y = Softmax(v)"
    dims, values = read(body)
    values["y"].shape = ir.Shape(["T", 8])
    dims = Dims()
    assert dims.of(values["y"]) == (Length(1, ("B", "S")), Length(8))
    assert not dims.as_many(values["r"], None, values["x"], None)


def test_covers_and_rows() -> None:
    dims, values = read("g = Unsqueeze(m, open) s = ReduceSum(w, one) t = Transpose(r)")
    assert dims.covers(values["r"], values["g"]) and dims.covers(values["r"], values["s"])
    assert dims.same_rows(values["r"], values["g"]) and not dims.same(values["r"], values["g"])
    assert not dims.covers(values["r"], values["t"]) and not dims.same_rows(values["t"], values["r"])
    assert dims.as_many_rows(values["r"], values["i"]) and not dims.as_many_rows(values["r"], values["x"])
    assert (
        dims.rank(values["x"]) == 3 and dims.size(values["x"], -1) == 8 and dims.size(values["x"], 0) is None
    )


def test_products() -> None:
    two = Length(2, ("s",))
    assert named("2*s") == two and named("s + 1") == Length(1, ("s + 1",))
    assert product([two, Length(3, ("a",))]) == Length(6, ("a", "s")) == Length(3, ("a",)) * two
    assert Length(6, ("a", "s")).over(two) == Length(3, ("a",)) and two.over(Length(4)) is None
    assert two.over(Length(1, ("t",))) is None and two.over(two) == ONE
