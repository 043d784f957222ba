"""Inference of ORT's own operators: what they give in ORT has the type and the shape that was inferred."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from sparse_onnx.graph.contrib import contrib_schemas
from sparse_onnx.graph.infer import infer

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
SIZES = {"B": 2, "S": 3, "P": 4}
X, NEXT, PAST = ("B", "S", 16), ("B", 1, 16), ("B", 2, "P", 8)
WEIGHT = (16,)
Dims = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """A node: inputs (None: left out; a pair with a type for what is no float), attributes, outputs by their use."""

    name: str
    inputs: tuple
    attributes: dict
    outputs: tuple[bool, ...] = (True,)
    domain: str = "com.microsoft"
    #: An output whose shape nobody infers in full.
    open: tuple[int, ...] = ()


CALLS = {
    "Attention": Call("Attention", (X, (16, 48), (48,)), {"num_heads": 2}),
    "BiasGelu": Call("BiasGelu", (X, WEIGHT), {}),
    "EmbedLayerNormalization": Call(
        "EmbedLayerNormalization",
        ((INT32, ("B", "S")), None, (9, 16), (5, 16), None, WEIGHT, WEIGHT),
        {},
        (True, True, True),
    ),
    "FastGelu": Call("FastGelu", (X, WEIGHT), {}),
    "FusedConv": Call(
        "FusedConv",
        (("B", 4, 6, 6), (5, 4, 3, 3), (5,)),
        {"activation": "Relu", "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]},
        open=(0,),
    ),
    "FusedGemm": Call("FusedGemm", (("B", 16), (5, 16), (5,)), {"transB": 1, "activation": "Sigmoid"}),
    "FusedMatMul": Call("FusedMatMul", (("B", 1, 3, 16), ("S", 16, 5)), {"alpha": 2.0}),
    "FusedMatMul-turned": Call("FusedMatMul", (("B", 16, "S"), ("B", 16, 5)), {"transA": 1}),
    "Gelu": Call("Gelu", (X,), {}),
    "GroupQueryAttention": Call(
        "GroupQueryAttention",
        (NEXT, NEXT, NEXT, PAST, PAST, (INT32, ("B",)), (INT32, ())),
        {"num_heads": 2, "kv_num_heads": 2},
        (True, True, True),
        open=(1, 2),
    ),
    "GroupQueryAttention-packed": Call(
        "GroupQueryAttention",
        (("B", 1, 32), None, None, ("B", 1, "P", 8), ("B", 1, "P", 8), (INT32, ("B",)), (INT32, ())),
        {"num_heads": 2, "kv_num_heads": 1},
        (True, True, True),
        open=(1, 2),
    ),
    "MatMulNBits": Call(
        "MatMulNBits",
        (X, (TensorProto.UINT8, (5, 1, 8)), (5,)),
        {"K": 16, "N": 5, "bits": 4, "block_size": 16},
    ),
    "MultiHeadAttention": Call("MultiHeadAttention", (X, ("B", "P", 16), ("B", "P", 24)), {"num_heads": 2}),
    "QuickGelu": Call("QuickGelu", (X,), {"alpha": 1.0}),
    "RotaryEmbedding": Call("RotaryEmbedding", (X, (INT64, ("B", "S")), (16, 4), (16, 4)), {"num_heads": 2}),
    "SimplifiedLayerNormalization": Call("SimplifiedLayerNormalization", (X, WEIGHT), {}, domain=""),
    "SkipLayerNormalization": Call(
        "SkipLayerNormalization", (X, X, WEIGHT, WEIGHT), {}, (True, False, False, True)
    ),
    "SkipSimplifiedLayerNormalization": Call(
        "SkipSimplifiedLayerNormalization", (X, X, WEIGHT), {}, (True, False, False, True)
    ),
}


def typed(given: tuple) -> tuple[int, Dims]:
    return (given[0], given[1]) if len(given) == 2 and isinstance(given[1], tuple) else (FLOAT, given)


def model_of(call: Call) -> onnx.ModelProto:
    names = [f"x{at}" if given is not None else "" for at, given in enumerate(call.inputs)]
    given = [(name, *typed(item)) for name, item in zip(names, call.inputs, strict=True) if item is not None]
    outputs = [f"y{at}" if wanted else "" for at, wanted in enumerate(call.outputs)]
    node = helper.make_node(call.name, names, outputs, domain=call.domain, **call.attributes)
    # An operator of the standard behind each output: what it gives is inferred from what was inferred.
    ends = [helper.make_node("Identity", [name], [f"{name}_end"]) for name in outputs if name]
    graph = helper.make_graph(
        [node, *ends],
        "g",
        [helper.make_tensor_value_info(*item) for item in given],
        [helper.make_empty_tensor_value_info(end.output[0]) for end in ends],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def fed(call: Call) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    feeds = {}
    for at, given in enumerate(call.inputs):
        if given is None:
            continue
        kind, dims = typed(given)
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        shape = [SIZES.get(d, d) if isinstance(d, str) else d for d in dims]
        feeds[f"x{at}"] = np.zeros(shape, dtype) if kind != FLOAT else rng.random(shape).astype(dtype)
    if call.name == "GroupQueryAttention":
        feeds["x5"][:] = SIZES["P"]
        feeds["x6"] = np.array(SIZES["P"] + 1, np.int32)
    return feeds


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_as_ort_computes_it(call: Call) -> None:
    proto = model_of(call)
    model = ir.from_proto(proto)
    infer(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    run = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = run.run(None, fed(call))
    for at, (value, result) in enumerate(zip(model.graph.outputs, results, strict=True)):
        assert value.dtype is not None and value.dtype.numpy() == result.dtype
        assert value.shape is not None and len(value.shape) == result.ndim
        known = [d if isinstance(d, int) else SIZES.get(str(d.value)) for d in value.shape]
        assert all(a in (b, None) for a, b in zip(known, result.shape, strict=True)), (known, result.shape)
        assert at in call.open or None not in known, value.shape


def test_nothing_is_left_behind() -> None:
    with contrib_schemas():
        assert onnx.defs.has("SkipLayerNormalization", "com.microsoft")
        assert onnx.defs.has("SimplifiedLayerNormalization", "")
    assert not onnx.defs.has("SkipLayerNormalization", "com.microsoft")
    assert not onnx.defs.has("SimplifiedLayerNormalization", "")


def test_a_sort_without_a_type_still_gives_integers() -> None:
    """Behind an operator that nobody knows."""
    nodes = [
        helper.make_node("Unheard", ["x"], ["u"], domain="com.example"),
        helper.make_node("TopK", ["u", "k"], ["v", "i"]),
        helper.make_node("Identity", ["i"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["T", 4])],
        [helper.make_empty_tensor_value_info("y")],
        [helper.make_tensor("k", INT64, [1], [2])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    infer(model)
    assert model.graph.outputs[0].dtype == ir.DataType.INT64
