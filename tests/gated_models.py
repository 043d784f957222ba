"""Small models of gated feed-forward layers, and what they compute by numpy alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Nodes = list[onnx.NodeProto]


@dataclasses.dataclass(frozen=True)
class Net:
    """x + down(act(norm(x) gate) * (norm(x) up)), layer by layer.

    Attributes:
        spelling: of products: matmul, gemm or transposed.
        bare: neither norm nor residual: a layer reads the layer before it.
        spoil: what is done to make the last layer none that can be proved; see `_spoilt`.
    """

    width: int = 32
    units: int = 72
    layers: int = 2
    activation: str = "silu"
    spelling: str = "matmul"
    biases: bool = True
    dtype: str = "float32"
    bare: bool = False
    spoil: str = ""
    seed: int = 0


def numbers(net: Net) -> dict[str, np.ndarray]:
    """Matrices ``[K, N]`` and biases by name, in the net's type."""
    rng = np.random.default_rng(net.seed)
    found: dict[str, np.ndarray] = {}
    for at in range(net.layers):
        for role, (k, n) in {
            "gate": (net.width, net.units),
            "up": (net.width, net.units),
            "down": (net.units, net.width),
        }.items():
            found[f"layers.{at}.{role}"] = (rng.standard_normal((k, n)) / np.sqrt(k)).astype(net.dtype)
            found[f"layers.{at}.{role}.bias"] = (rng.standard_normal(n) * 0.2).astype(net.dtype)
    return found


def gated_model(net: Net = Net()) -> onnx.ModelProto:
    """x `[T, width]` -> y `[T, width]`."""
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[net.dtype]
    stored = {"norm": np.ones(net.width, net.dtype)}
    nodes: Nodes = []
    every, x, extra = numbers(net), "x", []
    for at in range(net.layers):
        p, spoil = f"layers.{at}.", net.spoil if at == net.layers - 1 else ""
        n = x if net.bare else p + "n"
        if not net.bare:
            nodes.append(helper.make_node("LayerNormalization", [x, "norm"], [n], name=n, axis=-1))
        read = {"gate": n, "up": x if spoil == "other rows" else n}
        for role in ("gate", "up"):
            nodes += _linear(net, p + role, read[role], every, stored)
        gate, up = p + "gate.result", p + "up.result"
        if spoil.startswith("clamped"):
            stored |= {p + "limit": np.array(0.5, net.dtype), p + "least": np.array(-0.5, net.dtype)}
            nodes.append(helper.make_node("Min", [gate, p + "limit"], [p + "low"], name=p + "low"))
            gate = p + "low"
        if spoil == "clamped both":
            given = [up, p + "least", p + "limit"]
            nodes.append(helper.make_node("Clip", given, [p + "clip"], name=p + "clip"))
            up = p + "clip"
        nodes += _activated(net, p, gate, p + "a", stored)
        product = [up, p + "a"] if at % 2 else [p + "a", up]
        nodes.append(helper.make_node("Mul", product, [p + "h"], name=p + "h"))
        h = p + "h"
        if spoil == "reshaped":
            stored[p + "shape"] = np.array([-1, net.units])
            nodes.append(helper.make_node("Reshape", [h, p + "shape"], [p + "r"], name=p + "r"))
            h = p + "r"
        nodes += _linear(net, p + "down", h, every, stored)
        if not net.bare:
            nodes.append(helper.make_node("Add", [x, p + "down.result"], [p + "out"], name=p + "out"))
        x = p + ("down.result" if net.bare else "out")
        extra = {"up is read": [up], "the product is read": [p + "h"]}.get(spoil, extra)
    nodes.append(helper.make_node("Identity", [x], ["y"], name="y"))
    outputs = [helper.make_tensor_value_info("y", kind, ["T", net.width])]
    for name in extra:
        nodes.append(helper.make_node("Neg", [name], ["other"], name="other"))
        outputs.append(helper.make_tensor_value_info("other", kind, ["T", net.units]))
    graph = helper.make_graph(
        nodes,
        "gated",
        [helper.make_tensor_value_info("x", kind, ["T", net.width])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def _linear(
    net: Net, name: str, x: str, every: dict[str, np.ndarray], stored: dict[str, np.ndarray]
) -> Nodes:
    weight = every[name]
    stored[f"{name}.weight"] = weight if net.spelling == "matmul" else np.ascontiguousarray(weight.T)
    inputs = [x, f"{name}.weight"]
    if net.biases:
        stored[f"{name}.bias"] = every[f"{name}.bias"]
    result = [f"{name}.result"]
    if net.spelling == "gemm":
        given = [*inputs, f"{name}.bias"] if net.biases else inputs
        return [helper.make_node("Gemm", given, result, name=name, transB=1)]
    nodes = []
    if net.spelling == "transposed":
        nodes.append(helper.make_node("Transpose", [inputs[1]], [f"{name}.t"], name=f"{name}.t", perm=[1, 0]))
        inputs[1] = f"{name}.t"
    if not net.biases:
        return [*nodes, helper.make_node("MatMul", inputs, result, name=name)]
    nodes.append(helper.make_node("MatMul", inputs, [f"{name}.p"], name=name))
    return [*nodes, helper.make_node("Add", [f"{name}.p", f"{name}.bias"], result, name=f"{name}.add")]


def _activated(net: Net, p: str, gate: str, to: str, stored: dict[str, np.ndarray]) -> Nodes:
    def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=output, **attributes)

    if net.activation == "silu":
        return [node("Sigmoid", [gate], p + "s"), node("Mul", [gate, p + "s"], to)]
    if net.activation == "erf":
        stored |= {
            "root": np.array(math.sqrt(2), net.dtype),
            "one": np.array(1, net.dtype),
            "half": np.array(0.5, net.dtype),
        }
        return [
            node("Div", [gate, "root"], p + "d"),
            node("Erf", [p + "d"], p + "e"),
            node("Add", [p + "e", "one"], p + "f"),
            node("Mul", [gate, p + "f"], p + "g"),
            node("Mul", [p + "g", "half"], to),
        ]
    if net.activation == "gelu_tanh":
        return [node("Gelu", [gate], to, approximate="tanh")]
    return [node({"relu": "Relu", "gelu": "Gelu", "odd": "Softsign"}[net.activation], [gate], to)]


def activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def expected(net: Net, x: np.ndarray, taus: list[float]) -> np.ndarray:
    """The net with a threshold a layer, in float64; -1 skips nothing."""
    every = {name: array.astype(np.float64) for name, array in numbers(net).items()}
    x = x.astype(np.float64)
    for at, tau in enumerate(taus):
        n = x
        if not net.bare:
            n = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)

        def linear(role: str, rows: np.ndarray, p: str = f"layers.{at}.") -> np.ndarray:
            bias = every[f"{p}{role}.bias"] if net.biases else 0.0
            return rows @ every[p + role] + bias

        a = activation(net.activation, linear("gate", n))
        h = np.where(np.abs(a) <= tau, 0, a * linear("up", n))
        x = linear("down", h) + (0 if net.bare else x)
    return x


def rows(net: Net, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((tokens, net.width)).astype(net.dtype)}


def quantized(net: Net, bits: int, op: str) -> onnx.ModelProto:
    """All products as MatMulNBits, or as MatMul of DequantizeLinear with a scale for each 16 inputs."""
    model = gated_model(net)
    kept = {item.name: item for item in model.graph.initializer}
    rng = np.random.default_rng(3)
    nodes = []
    for node in model.graph.node:
        if node.op_type != "MatMul":
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(kept.pop(node.input[1]))
        k, n = weight.shape
        codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
        scales = (rng.uniform(0.5, 1, (n, k // 8 if op == "dq" else k // 16)) / 2**bits / np.sqrt(k)).astype(
            np.float32
        )
        name = node.name
        if op == "nbits":
            low, high = codes[:, 0::2], codes[:, 1::2]
            packed = (low | high << 4) if bits == 4 else codes
            kept[f"{name}.q"] = numpy_helper.from_array(packed.reshape(n, k // 16, -1), f"{name}.q")
            kept[f"{name}.s"] = numpy_helper.from_array(scales, f"{name}.s")
            sizes = {"K": k, "N": n, "bits": bits, "block_size": 16}
            given = [node.input[0], f"{name}.q", f"{name}.s"]
            nodes.append(
                helper.make_node(
                    "MatMulNBits", given, node.output, name=name, domain="com.microsoft", **sizes
                )
            )
            continue
        data = (codes.T.astype(np.int16) - 128).astype(np.int8)
        kept[f"{name}.q"] = numpy_helper.from_array(np.ascontiguousarray(data), f"{name}.q")
        kept[f"{name}.s"] = numpy_helper.from_array(np.ascontiguousarray(scales.T), f"{name}.s")
        nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.q", f"{name}.s"],
                [f"{name}.w"],
                name=f"{name}.dq",
                axis=0,
                block_size=8,
            )
        )
        nodes.append(helper.make_node("MatMul", [node.input[0], f"{name}.w"], node.output, name=name))
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept.values())
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.opset_import[0].version = 21
    return model
