"""Linear layers and stored matrices in all the ways in which exporters write them."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.graph.annotate import annotate
from sparse_onnx.matching.linear import linear, matrix


def graph(body: str, opset: int = 18, **initializers: np.ndarray) -> ir.Graph:
    text = f"""
    <ir_version: 9, opset_import: ["": {opset}, "com.microsoft": 1]>
    g (float[n, 4] x) => (float y) {{ {body} }}
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    for name, array in initializers.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.Tensor(array, name=name)
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        model.graph.register_initializer(value)
    annotate(model)
    return model.graph


W = np.arange(20, dtype=np.float32).reshape(4, 5)
T = np.ascontiguousarray(W.T)
PACKED = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
BIAS = np.arange(5, dtype=np.float32)

SPELLINGS = {
    "matmul": ("y = MatMul (x, w)", {"w": W}, False),
    "transposed": ("t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", {"w": T}, True),
    "gemm": ("y = Gemm (x, w)", {"w": W}, False),
    "gemm transB": ("y = Gemm <transB = 1> (x, w)", {"w": T}, True),
    "twice turned": ("t = Transpose (w) y = Gemm <transB = 1> (x, t)", {"w": W}, False),
    "fused": ("y = com.microsoft.FusedMatMul <transB = 1> (x, w)", {"w": T}, True),
    "einsum": ('y = Einsum <equation = "ti,io->to"> (x, w)', {"w": W}, False),
    "einsum turned": ('y = Einsum <equation = "oi, ti -> to"> (w, x)', {"w": T}, True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_layer_is_read_whatever_its_spelling(name: str) -> None:
    body, weights, out_in = SPELLINGS[name]
    found = linear(graph(body, **weights).outputs[0])
    assert found is not None
    assert (found.x.name, found.weight.source.name, found.out_in, found.bias) == ("x", "w", out_in, None)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("first", [True, False])
def test_a_bias_may_be_added_from_either_side(name: str, first: bool) -> None:
    body, weights, _ = SPELLINGS[name]
    order = "b, p" if first else "p, b"
    found = linear(graph(body.replace("y =", "p =") + f" y = Add ({order})", b=BIAS, **weights).outputs[0])
    assert found is not None and found.bias is not None and found.bias.source.name == "b"


NOT_LAYERS = {
    "scaled": ("y = Gemm <alpha = 0.5> (x, w)", {"w": W}),
    "scaled bias": ("y = Gemm <beta = 2.0> (x, w, b)", {"w": W, "b": BIAS}),
    "fused scale": ("y = com.microsoft.FusedMatMul <alpha = 0.5> (x, w)", {"w": W}),
    "of the other side": ("y = MatMul (w, x)", {"w": np.zeros((5, 3), np.float32)}),
    "batched": ("y = MatMul (x, w)", {"w": PACKED}),
    "two biases": ("p = Gemm (x, w, b) y = Add (p, b)", {"w": W, "b": BIAS}),
    "a bias for each row": ("p = MatMul (x, w) y = Add (p, b)", {"w": W, "b": np.zeros((2, 5), np.float32)}),
    "einsum over rows": ('y = Einsum <equation = "ti,io->o"> (x, w)', {"w": W}),
    "einsum by element": ('y = Einsum <equation = "ti,io->tio"> (x, w)', {"w": W}),
    "computed weights": ("t = Exp (w) y = MatMul (x, t)", {"w": W}),
}


@pytest.mark.parametrize("name", NOT_LAYERS)
def test_what_is_no_plain_layer_is_none(name: str) -> None:
    body, weights = NOT_LAYERS[name]
    assert linear(graph(body, **weights).outputs[0]) is None


def test_weights_that_a_caller_may_set_are_not_constant() -> None:
    found = graph("y = MatMul (x, w)", w=W)
    found.inputs.append(found.initializers["w"])
    assert linear(found.outputs[0]) is None


ONE = "one = Constant <value_ints = [1]> () two = Constant <value_ints = [2]> () zero = Constant <value_ints = [0]> ()"
SLICES = {
    "split, squeeze": f"{ONE} a, b, c = Split <axis = 0, num_outputs = 3> (w) m = Squeeze (b, zero)",
    "gather of a scalar": "at = Constant <value = int64 {1}> () m = Gather (w, at)",
    "negative index": "at = Constant <value = int64 {-2}> () m = Gather (w, at)",
    "gather, squeeze": f"{ONE} g = Gather (w, one) m = Squeeze (g, zero)",
    "slice, squeeze": f"{ONE} s = Slice (w, one, two, zero) m = Squeeze (s, zero)",
    "slice, reshape": f"{ONE} to = Constant <value_ints = [4, 5]> () s = Slice (w, one, two, zero) m = Reshape (s, to)",
}


@pytest.mark.parametrize("name", SLICES)
def test_one_expert_of_a_packed_tensor(name: str) -> None:
    found = graph(f"{SLICES[name]} y = MatMul (x, m)", w=PACKED)
    stored = matrix(next(node for node in found if node.op_type == "MatMul").inputs[1])
    assert stored is not None and (stored.source.name, stored.index, stored.transposed) == ("w", 1, False)
    layer = linear(found.outputs[0])
    assert layer is not None and layer.weight == stored


NOT_SLICES = {
    "two at once": f"{ONE} s = Slice (w, zero, two, zero) m = Squeeze (s)",
    "of another axis": "at = Constant <value = int64 {1}> () m = Gather <axis = 1> (w, at)",
    "out of range": "at = Constant <value = int64 {7}> () m = Gather (w, at)",
}


@pytest.mark.parametrize("name", NOT_SLICES)
def test_other_cuts_are_no_expert(name: str) -> None:
    found = graph(f"{NOT_SLICES[name]} y = MatMul (x, m)", w=PACKED)
    assert matrix(next(node for node in found if node.op_type == "MatMul").inputs[1]) is None
