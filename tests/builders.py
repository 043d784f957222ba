"""Models with neutral blocks, built with onnx.helper: no code shared with the product's emitters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.blocks import attach_functions

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size and kind of a block. `activation`, `gate_layout`, `weight_layout` are the attributes' numbers."""

    experts: int = 4
    top_k: int = 2
    hidden: int = 16
    inner: int = 24
    activation: int = 0
    gate_layout: int = 1
    weight_layout: int = 0
    biases: bool = False
    separate: bool = False
    limit: float = 0.0
    alpha: float = 1.0
    beta: float = 0.0
    dtype: str = "float32"
    weight_dtype: str = "float32"


def expert_weights(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights of size 1 / sqrt(fan in): activations stay of order 1, so a swapped expert is seen."""
    dtype = DTYPES[shape.dtype]

    def matrix(rows: int, columns: int) -> np.ndarray:
        packed = rng.standard_normal((shape.experts, rows, columns)) / np.sqrt(columns)
        if shape.weight_layout == 1:
            packed = packed.transpose(0, 2, 1)
        return np.ascontiguousarray(packed).astype(dtype)

    def bias(size: int) -> np.ndarray:
        values = rng.standard_normal((shape.experts, size)) * 0.3
        return (values if shape.biases else np.zeros_like(values)).astype(dtype)

    d, i = shape.hidden, shape.inner
    if shape.separate:
        return {
            "gate": matrix(i, d),
            "gate_bias": bias(i),
            "up": matrix(i, d),
            "up_bias": bias(i),
            "down": matrix(d, i),
            "down_bias": bias(d),
        }
    first = i if shape.gate_layout == 0 else 2 * i
    return {"fc1": matrix(first, d), "fc1_bias": bias(first), "fc2": matrix(d, i), "fc2_bias": bias(d)}


def neutral_node(shape: Shape, name: str, inputs: list[str], output: str) -> onnx.NodeProto:
    attributes = {"activation": shape.activation, "weight_layout": shape.weight_layout}
    if not shape.separate:
        attributes["gate_layout"] = shape.gate_layout
    node = helper.make_node(
        "GatedMoE" if shape.separate else "MoE",
        inputs,
        [output],
        name=name,
        domain="sparse_onnx",
        limit=float(shape.limit),
        alpha=float(shape.alpha),
        beta=float(shape.beta),
        **attributes,
    )
    entry = node.metadata_props.add()
    entry.key, entry.value = "sparse_onnx.block", name
    return node


def _type(dtype: str) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[dtype]))


def finish(graph: onnx.GraphProto, opset: int = 20) -> ir.Model:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("sparse_onnx", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    attach_functions(model)
    return model


def routed_model(shape: Shape = Shape(), seed: int = 0, opset: int = 20) -> ir.Model:
    """tokens `[T, D]`, index `[T, K]`, weight `[T, K]` -> y `[T, D]`. Nothing proves the index: it is an input."""
    weights = expert_weights(shape, np.random.default_rng(seed))
    graph = helper.make_graph(
        [neutral_node(shape, "block", ["tokens", "index", "weight", *weights], "y")],
        "routed",
        [
            helper.make_tensor_value_info("tokens", _type(shape.dtype), ["T", shape.hidden]),
            helper.make_tensor_value_info("index", TensorProto.INT64, ["T", shape.top_k]),
            helper.make_tensor_value_info("weight", _type(shape.weight_dtype), ["T", shape.top_k]),
        ],
        [helper.make_tensor_value_info("y", _type(shape.dtype), ["T", shape.hidden])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return finish(graph, opset)


def layered_model(shape: Shape = Shape(), layers: int = 2, seed: int = 0, opset: int = 20) -> ir.Model:
    """x `[T, D]` -> layers of (softmax router, TopK, renormalised, block, residual) -> y `[T, D]`, float32."""
    rng = np.random.default_rng(seed)
    nodes, initializers = [], {"k": np.asarray([shape.top_k]), "last": np.asarray([-1])}
    x = "x"
    for layer in range(layers):
        p = f"layers.{layer}."
        weights = {p + role: array for role, array in expert_weights(shape, rng).items()}
        router = rng.standard_normal((shape.hidden, shape.experts)) * 3 / np.sqrt(shape.hidden)
        initializers |= weights | {p + "router": router.astype(np.float32)}
        nodes += [
            helper.make_node("MatMul", [x, p + "router"], [p + "logits"], name=p + "logits"),
            helper.make_node("Softmax", [p + "logits"], [p + "scores"], name=p + "scores", axis=-1),
            helper.make_node("TopK", [p + "scores", "k"], [p + "top", p + "index"], name=p + "topk", axis=-1),
            helper.make_node("ReduceSum", [p + "top", "last"], [p + "sum"], name=p + "sum", keepdims=1),
            helper.make_node("Div", [p + "top", p + "sum"], [p + "weight"], name=p + "weight"),
            neutral_node(shape, p + "experts", [x, p + "index", p + "weight", *weights], p + "moe"),
            helper.make_node("Add", [x, p + "moe"], [p + "out"], name=p + "out"),
        ]
        x = p + "out"
    nodes.append(helper.make_node("Identity", [x], ["y"], name="y"))
    graph = helper.make_graph(
        nodes,
        "layered",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", shape.hidden])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", shape.hidden])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
        value_info=[
            helper.make_tensor_value_info(f"layers.{layer}.{name}", dtype, ["T", size])
            for layer in range(layers)
            for name, dtype, size in (
                ("scores", TensorProto.FLOAT, shape.experts),
                ("index", TensorProto.INT64, shape.top_k),
                ("weight", TensorProto.FLOAT, shape.top_k),
            )
        ],
    )
    return finish(graph, opset)


def save_external(model: ir.Model, path: Path) -> Path:
    """With its weights in one file beside it, as exporters write it."""
    ir.save(model, path, external_data=f"{path.stem}.data", size_threshold_bytes=64)
    return path


def onnx_save(model: ir.Model, path: Path) -> None:
    """As it is: external tensors stay where they are."""
    onnx.save(ir.to_proto(model), path)
