"""What a dense gate holds where an expert was not chosen, and which views of it are one expert's column."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx_ir.passes import common

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.gate import Gate
from sparse_onnx.matching.gate_sources import distinct, experts_of
from sparse_onnx.matching.gates import Gates

CONSTANTS = {
    "k": np.array([2]),
    "last": np.array([-1]),
    "one": np.array([1]),
    "two": np.array([2]),
    "three": np.array(3),
    "numbers": np.arange(4),
    "count": np.array(4),
    "flat": np.array([-1, 4]),
    "mixed": np.array([4, -1]),
    "zero": np.float32(0),
    "half": np.float32(0.5),
    "low": np.float32(-np.inf),
    "fill": np.float32(-1e4),
    "values": np.array([0, 1], np.float32),
    "table": np.array([[0, 3], [2, 1]]),
}
ROUTER = "top, ids = TopK <axis = -1> (logits, k) w = Softmax <axis = -1> (top) shape = Shape (logits)"


def read(body: str, dtype: str = "float") -> tuple[Gate | None, dict[str, ir.Value]]:
    """The gate of the last value, g, of a body over logits ``[B, T, 4]`` and others ``[B, T, 4]``, ``[B, 1, 4]``."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        gates ({dtype}[B, T, 4] logits, {dtype}[B, T, 4] other, {dtype}[B, 1, 4] common)
        => ({dtype} g) {{ {ROUTER} {body} }}"""
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in CONSTANTS.items() if n in used)
    proto.graph.output[0].ClearField("type")
    model = ir.from_proto(proto)
    common.ShapeInferencePass()(model)
    found = {value.name or "": value for node in model.graph for value in node.outputs}
    return Gates(Dims()).read(found["g"]), found


SCATTER = "base = Expand (zero, shape) s = ScatterElements <axis = -1> (base, ids, w)"
MASKED = "base = Expand (low, shape) s = ScatterElements <axis = -1> (base, ids, top)"

SPARSE = {
    "scatter": f"{SCATTER} g = Identity (s)",
    "times anything": f"{SCATTER} g = Mul (other, s)",
    "times what is the same for all tokens": f"{SCATTER} g = Mul (s, common)",
    "divided": f"{SCATTER} q = ReduceSum (s, last) g = Div (s, q)",
    "cast": f"{SCATTER} g = Cast <to = 11> (s)",
    "softmax over minus infinity": f"{MASKED} g = Softmax <axis = 2> (s)",
    "sigmoid of minus infinity": f"{MASKED} g = Sigmoid (s)",
    "exp of minus infinity": f"{MASKED} g = Exp (s)",
    "relu of something negative": f"{MASKED.replace('low', 'fill')} g = Relu (s)",
    "one-hot": "h = OneHot (ids, count, values) g = ReduceSum <keepdims = 0> (h, two)",
    "equal": "u = Unsqueeze (ids, last) h = Equal (u, numbers) c = Cast <to = 1> (h) "
    "g = ReduceSum <keepdims = 0> (c, two)",
    "mask": f"{SCATTER} m = Greater (s, zero) g = Where (m, other, zero)",
    "mask the other way round": f"{SCATTER} m = Equal (s, zero) g = Where (m, zero, other)",
}

DENSE = {
    "half": f"{SCATTER.replace('zero', 'half')} g = Identity (s)",
    "sum with something": f"{SCATTER} g = Add (s, other)",
    "sum with a number": f"{SCATTER} g = Add (s, half)",
    "softmax over zeros": f"{SCATTER} g = Softmax <axis = -1> (s)",
    "softmax over a finite fill": f"{MASKED.replace('low', 'fill')} g = Softmax <axis = -1> (s)",
    "exp of zeros": f"{SCATTER} g = Exp (s)",
    "mask inverted": f"{SCATTER} m = Equal (s, zero) g = Where (m, other, zero)",
    "softmax over all": "g = Softmax <axis = -1> (logits)",
    "k-th largest": "b = Gather <axis = -1> (top, one) m = GreaterOrEqual (logits, b) g = Where (m, logits, zero)",
    "no gate": "g = Add (logits, other)",
    "softmax over tokens": f"{MASKED} g = Softmax <axis = 1> (s)",
    "tokens turned": f"{SCATTER} g = Transpose <perm = [1, 0, 2]> (s)",
    "experts mixed with tokens": f"{SCATTER} g = Reshape (s, mixed)",
}


@pytest.mark.parametrize("name", SPARSE)
def test_zero_where_not_chosen(name: str) -> None:
    gate, found = read(SPARSE[name])
    assert gate is not None and gate.sparse and gate.experts == 4
    assert (gate.slots, gate.expert, gate.column) == (2, 2, None)
    assert gate.ids is not None and gate.ids.name in ("ids", "u")
    assert found["g"].shape is None or len(found["g"].shape) == 3


@pytest.mark.parametrize("name", DENSE)
def test_not_zero_where_not_chosen(name: str) -> None:
    gate, _ = read(DENSE[name])
    assert gate is None or not gate.sparse


@pytest.mark.parametrize(
    ("view", "expert"),
    [
        ("g = Transpose <perm = [2, 0, 1]> (s)", 0),
        ("g = Unsqueeze (s, one)", 3),
        ("g = Unsqueeze (s, last)", 2),
        ("g = Reshape (s, flat)", 1),
        ("t = Transpose <perm = [2, 0, 1]> (s) g = Reshape (t, mixed)", 0),
    ],
)
def test_the_experts_axis_is_followed(view: str, expert: int) -> None:
    gate, _ = read(f"{SCATTER} {view}")
    assert gate is not None and gate.sparse
    assert (gate.expert, gate.experts) == (expert, 4)


@pytest.mark.parametrize(
    "column",
    [
        "g = Gather <axis = -1> (s, three)",
        "a, b, c, g = Split <axis = 2, num_outputs = 4> (s)",
        "t = Transpose <perm = [2, 0, 1]> (s) g = Gather (t, three)",
        "h = Equal (ids, three) c = Where (h, w, zero) g = ReduceSum (c, last)",
    ],
)
def test_columns(column: str) -> None:
    gate, found = read(f"{SCATTER} {column}")
    assert gate is not None and gate.sparse
    assert (gate.expert, gate.column) == (None, 3)
    assert gate.inside is (None if gate.inside is None else found["w"])


def test_the_weights_inside() -> None:
    """Known where they are one for each slot, and nothing has changed them."""
    for body, known in (
        (f"{SCATTER} g = Unsqueeze (s, last)", True),
        (f"{SCATTER} g = Mul (s, other)", False),
        (f"{SCATTER} g = Mul (s, half)", False),
        (
            "h = OneHot (ids, count, values) u = Unsqueeze (w, last) p = Mul (u, h) g = ReduceSum (p, two)",
            False,
        ),
    ):
        gate, found = read(body)
        assert gate is not None and (gate.inside is found["w"]) == known
    gate, found = read(
        "h = OneHot (ids, count, values) u = Unsqueeze (w, last) p = Mul (u, h) g = ReduceSum (p, two)"
    )
    assert gate is not None and gate.inside is found["u"]


def test_what_a_mask_holds() -> None:
    gate, _ = read(f"{MASKED} g = Identity (s)")
    assert gate is not None and gate.outside == -math.inf and gate.distinct
    gate, _ = read(f"{MASKED} g = Softmax <axis = -1> (s)")
    assert gate is not None and gate.outside == 0 and gate.inside is None


def test_a_scatter_of_fewer_tokens_is_flawed() -> None:
    gate, _ = read(
        "base = Expand (zero, shape) i = Gather <axis = 1> (ids, one) v = Gather <axis = 1> (w, one) "
        "g = ScatterElements <axis = -1> (base, i, v)"
    )
    assert gate is not None and "other tokens" in gate.flaw


@pytest.mark.parametrize(
    ("ids", "experts", "differ"),
    [
        ("g = Identity (ids)", 4, True),
        ("g = Cast <to = 6> (ids)", 4, True),
        ("g = Unsqueeze (ids, last)", 4, True),
        ("g = ArgMax <axis = -1> (logits)", 4, False),
        (
            "a = ArgMax <axis = -1> (logits) b = ArgMax <axis = -1> (other) g = Concat <axis = -1> (a, b)",
            4,
            False,
        ),
        ("g = Gather (table, ids)", 4, False),
        ("g = Add (ids, one)", None, False),
        ("g = Transpose <perm = [0, 2, 1]> (ids)", None, False),
    ],
)
def test_what_is_proved_of_indices(ids: str, experts: int | None, differ: bool) -> None:
    _, found = read(ids)
    assert experts_of(found["g"]) == experts
    assert distinct(found["g"], 2) == differ
    assert distinct(found["g"], 1)
