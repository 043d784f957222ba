"""Masks, coordinates and gathered rows, however they are spelled; and what only looks like them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from sparse_onnx.matching.choice import Choices
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.hits import HitReader
from sparse_onnx.matching.lengths import Length

TOKENS, EXPERTS, TOP_K, HIDDEN = "T", 5, 2, 8


def read(*lines: str, **constants: object) -> tuple[HitReader, dict[str, ir.Value]]:
    """A reader of the graph ``x [T, 8], scores [T, 5], x3 [B, S, 8] -> ids [T, 2], w [T, 2]`` and these lines."""
    text = "\n".join(["w, ids = TopK <axis = -1> (scores, two)", *lines])
    constants = {
        "two": [TOP_K],
        "zero": 0,
        "one": 1,
        "at0": [0],
        "at1": [1],
        "last": [-1],
        "ones": [1, 1],
    } | constants
    opset = '<ir_version: 10, opset_import: ["" : 18]>'
    inputs = f"float[T, {HIDDEN}] x, float[B, S, {HIDDEN}] x3, float[T, {EXPERTS}] scores"
    model = onnx.parser.parse_model(f"{opset} g ({inputs}) => (float[T, 2] w) {{ {text} }}")
    for name, value in constants.items():
        array = np.array(value)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(array.dtype), name))
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = ir.from_proto(model).graph
    values = {value.name or "": value for node in graph for value in node.outputs}
    values |= {value.name or "": value for value in (*graph.inputs, *graph.initializers.values())}
    return HitReader(Choices(), Dims(graph)), values


MASKS = {
    "compared": (["m = Equal(ids, three)"], "s"),
    "compared the other way": (["m = Equal(three, ids)"], "s"),
    "cast indices": (["i = Cast <to = 6> (ids)", "m = Equal(i, three32)"], "s"),
    "one-hot": (
        [
            "o = OneHot <axis = -1> (ids, depth, off_on)",
            "p = Transpose <perm = [2, 1, 0]> (o)",
            "m = Gather(p, three)",
        ],
        "S",
    ),
    "one-hot by comparing": (
        [
            "u = Unsqueeze(ids, last)",
            "e = Equal(u, numbers)",
            "c = Cast <to = 7> (e)",
            "m = Gather <axis = 2> (c, three)",
        ],
        "s",
    ),
    "one-hot sliced": (
        [
            "o = OneHot <axis = -1> (ids, depth, off_on)",
            "p = Slice(o, from3, to4, last)",
            "q = Squeeze(p, last)",
            "m = Greater(q, zero)",
        ],
        "s",
    ),
    "one-hot split": (
        [
            "o = OneHot <axis = 0> (ids, depth, off_on)",
            "a, b, c, d, e = Split <axis = 0> (o, fives)",
            "m = Squeeze(d, at0)",
        ],
        "s",
    ),
    "any slot": (
        ["e = Equal(ids, three)", "c = Cast <to = 6> (e)", "m = ReduceMax <keepdims = 0> (c, last)"],
        "T",
    ),
    "counted": (
        [
            "e = Equal(ids, three)",
            "c = Cast <to = 7> (e)",
            "n = ReduceSum <keepdims = 0> (c, last)",
            "m = Greater(n, zero)",
        ],
        "T",
    ),
    "counted once": (
        [
            "e = Equal(ids, three)",
            "c = Cast <to = 7> (e)",
            "n = ReduceSum <keepdims = 0> (c, last)",
            "m = Equal(n, one)",
        ],
        "T",
    ),
    "flattened": (["f = Reshape(ids, last)", "m = Equal(f, three)"], "s"),
    "where": (["e = Equal(ids, three)", "m = Where(e, one, zero)"], "s"),
    "not zero": (["e = Equal(ids, three)", "c = Cast <to = 7> (e)", "z = Equal(c, zero)", "m = Not(z)"], "s"),
}
NUMBERS = {
    "three": 3,
    "three32": np.array(3, np.int32),
    "depth": EXPERTS,
    "off_on": [0, 1],
    "numbers": list(range(EXPERTS)),
    "from3": [3],
    "to4": [4],
    "fives": [1] * EXPERTS,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    lines, order = MASKS[name]
    reader, values = read(*lines, "h = NonZero(m)", **NUMBERS)
    node = values["h"].producer()
    assert node is not None
    found = reader.hits(node)
    assert found is not None
    hits, _ = found
    assert (hits.expert, hits.order, hits.wide) == (3, order, False)
    assert hits.index.value is values["ids"]
    assert (hits.index.top_k, hits.index.experts, hits.index.distinct) == (TOP_K, EXPERTS, True)


@pytest.mark.parametrize(
    "lines",
    [
        ["m = Less(ids, three)"],
        ["m = Equal(ids, ids)"],
        ["m = Greater(w, half)"],
        ["e = Equal(ids, three)", "c = Cast <to = 6> (e)", "m = ReduceMax <keepdims = 0> (c, at0)"],
        ["o = OneHot <axis = -1> (ids, depth, on_off)", "m = Gather <axis = 2> (o, three)"],
        ["o = OneHot <axis = -1> (ids, depth, off_on)", "m = Gather <axis = 1> (o, one)"],
        ["e = Equal(ids, three)", "o = Equal(ids, one)", "m = Or(e, o)"],
    ],
)
def test_no_masks_of_one_expert(lines: list[str]) -> None:
    reader, values = read(*lines, "h = NonZero(m)", half=np.array(0.5, np.float32), on_off=[1, 0], **NUMBERS)
    node = values["h"].producer()
    assert node is not None and reader.hits(node) is None


TOKEN_OF = {
    "transposed and split": [
        "p = Transpose <perm = [1, 0]> (h)",
        "a, b = Split <axis = 1> (p, ones)",
        "t = Squeeze(a, at1)",
        "k = Squeeze(b, last)",
    ],
    "sliced": [
        "p = Transpose <perm = [1, 0]> (h)",
        "a = Slice(p, at0, at1, at1)",
        "b = Slice(p, at1, two, at1)",
        "t = Squeeze(a, at1)",
        "k = Reshape(b, last)",
    ],
    "gathered rows": ["t = Gather(h, zero)", "k = Gather(h, one)"],
    "gathered columns": [
        "p = Transpose(h)",
        "t = Gather <axis = 1> (p, zero)",
        "k = Gather <axis = 1> (p, one)",
    ],
    "split rows": ["a, b = Split <axis = 0> (h, ones)", "t = Squeeze(a, at0)", "k = Reshape(b, last)"],
    "by the slot of all": [
        "f = Reshape(ids, last)",
        "n = Equal(f, three)",
        "g = NonZero(n)",
        "s = Squeeze(g, at0)",
        "t = Div(s, slots)",
        "k = Mod(s, slots)",
    ],
}


@pytest.mark.parametrize("name", TOKEN_OF)
def test_coordinates(name: str) -> None:
    reader, values = read("m = Equal(ids, three)", "h = NonZero(m)", *TOKEN_OF[name], slots=TOP_K, **NUMBERS)
    token, slot = reader.coordinates(values["t"]), reader.coordinates(values["k"])
    assert token is not None and slot is not None
    assert (token.kinds, slot.kinds) == (("T",), ("k",))
    assert token.labels == slot.labels == ("n",) and token.hits == slot.hits


@pytest.mark.parametrize(
    ("lines", "kinds"),
    [
        (["a = Unsqueeze(t, at1)", "b = Unsqueeze(k, at1)", "r = Concat <axis = 1> (a, b)"], ("T", "k")),
        (["a = Unsqueeze(t, at1)", "b = Unsqueeze(k, at1)", "r = Concat <axis = -1> (b, a)"], ("k", "T")),
        (["a = Mul(t, slots)", "r = Add(k, a)"], ("s",)),
        (["a = Mul(slots, t)", "r = Add(a, k)"], ("s",)),
        (["i = Shape(ids)", "n = Gather(i, one)", "a = Mul(t, n)", "r = Add(a, k)"], ("s",)),
    ],
)
def test_places(lines: list[str], kinds: tuple[str, ...]) -> None:
    reader, values = read(
        "m = Equal(ids, three)", "h = NonZero(m)", *TOKEN_OF["gathered rows"], *lines, slots=TOP_K, three=3
    )
    found = reader.coordinates(values["r"])
    assert found is not None and found.kinds == kinds


@pytest.mark.parametrize(
    "lines",
    [
        ["a = Mul(t, three)", "r = Add(a, k)"],
        ["a = Mul(k, slots)", "r = Add(a, t)"],
        ["r = Add(t, one)"],
        ["o = Equal(ids, one)", "g = NonZero(o)", "a = Mul(t, slots)", "b = Gather(g, one)", "r = Add(a, b)"],
    ],
)
def test_no_places(lines: list[str]) -> None:
    reader, values = read(
        "m = Equal(ids, three)", "h = NonZero(m)", *TOKEN_OF["gathered rows"], *lines, slots=TOP_K, three=3
    )
    assert reader.coordinates(values["r"]) is None


@pytest.mark.parametrize(
    ("lines", "labels"),
    [
        (["r = Gather <axis = 0> (x, t)"], ("n", "d")),
        (["u = Unsqueeze(t, at1)", "r = GatherND(x, u)"], ("n", "d")),
        (["u = Unsqueeze(x, at0)", "r = Gather <axis = 1> (u, t)"], ("1", "n", "d")),
        (["u = Unsqueeze(x, at0)", "g = Gather <axis = 1> (u, t)", "r = Reshape(g, rows)"], ("n", "d")),
    ],
)
def test_rows_of_tokens(lines: list[str], labels: tuple[str, ...]) -> None:
    given = {"three": 3, "rows": [-1, HIDDEN]}
    reader, values = read(
        "m = Equal(ids, three)", "h = NonZero(m)", *TOKEN_OF["gathered rows"], *lines, **given
    )
    found = reader.rows(values["r"])
    assert found is not None and found.labels == labels
    along = reader.along(found)
    assert along is not None and along[1] == "T"


def test_tokens_of_two_axes() -> None:
    """Coordinates of a batch and of a place in it gather rows of ``[B, S, D]`` only where the axes are the same."""
    lines = [
        "s3 = MatMul(x3, router)",
        "v, i3 = TopK <axis = -1> (s3, two)",
        "m = Equal(i3, three)",
        "h = NonZero(m)",
    ]
    lines += [
        "p = Transpose(h)",
        "q = Slice(p, at0, two, at1)",
        "r = GatherND(x3, q)",
        "k = GatherND(other, q)",
    ]
    router = np.zeros((HIDDEN, EXPERTS), np.float32)
    reader, values = read(*lines, three=3, router=router, other=np.zeros((3, 4, HIDDEN), np.float32))
    same, other = reader.rows(values["r"]), reader.rows(values["k"])
    assert same is not None and same.kinds == ("t0", "t1") and other is not None
    assert reader.along(same) == (values["x3"], "T")
    assert reader.along(other) is None


def test_sizes_of_computed_shapes() -> None:
    lines = [
        "f = Reshape(x3, rows)",
        "i = Shape(x3)",
        "b = Gather(i, zero)",
        "s = Gather(i, one)",
        "n = Mul(b, s)",
    ]
    lines += ["u = Unsqueeze(n, at0)", "c = Concat <axis = 0> (u, width)", "z = ConstantOfShape(c)"]
    lines += ["o = Concat <axis = 0> (at1, width)", "e = Expand(f, o)", "d = Concat <axis = 0> (two, u)"]
    lines += ["y = ConstantOfShape(d)"]
    reader, values = read(*lines, rows=[-1, HIDDEN], width=[HIDDEN])
    tokens = Length(1, ("B", "S"))
    for name in ("f", "z", "e"):
        assert reader.dims.of(values[name]) == (tokens, Length(HIDDEN)), name
    assert reader.dims.of(values["y"]) == (Length(2), tokens)
    assert reader.dims.rows(values["x3"]) == tokens
    assert reader.dims.rows(values["x"]) != tokens
