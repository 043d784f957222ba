"""Models with one com.microsoft::MoE or QMoE node, built with onnx.helper, and packing of integers below a byte."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import helper, numpy_helper

MOE = ("input", "logits", "fc1", "fc1_bias", "fc2", "fc2_bias", "fc3", "fc3_bias")
QMOE = (
    "input", "logits", "fc1", "fc1_scales", "fc1_bias", "fc2", "fc2_scales", "fc2_bias",
    "fc3", "fc3_scales", "fc3_bias", "fc1_zero_points", "fc2_zero_points", "fc3_zero_points", "router_weights",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """`bits` 0 is MoE. `block` 0 is one scale a row. `kind` is activation_type. `without` become inputs."""

    kind: str = "swiglu"
    experts: int = 6
    top_k: int = 2
    hidden: int = 32
    inner: int = 48
    normalize: int = 1
    biases: bool = True
    bits: int = 0
    block: int = 0
    points: bool = False
    router_weights: bool = False
    rank: int = 2
    dtype: type = np.float32
    opset: int = 21
    fc3: bool = False
    fusion: int = 1
    extra: tuple[tuple[str, Any], ...] = ()
    without: tuple[str, ...] = ()


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers along the last axis packed into bytes, the first in the lowest bits."""
    each = 8 // bits
    rows = np.concatenate(
        [values, np.zeros((*values.shape[:-1], -values.shape[-1] % each), np.uint8)], axis=-1
    )
    result = np.zeros((*rows.shape[:-1], rows.shape[-1] // each), np.uint8)
    for place in range(each):
        result |= (rows[..., place::each] << (bits * place)).astype(np.uint8)
    return result


def weights(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    first = 2 * case.inner if case.kind == "swiglu" and not case.fc3 else case.inner
    sizes = {"fc1": (first, case.hidden), "fc2": (case.hidden, case.inner)}
    if case.fc3:
        sizes["fc3"] = (case.inner, case.hidden)
    made: dict[str, np.ndarray] = {}
    for name, (rows, columns) in sizes.items():
        if case.biases:
            made[f"{name}_bias"] = (rng.standard_normal((case.experts, rows)) * 0.3).astype(case.dtype)
        if not case.bits:
            made[name] = (rng.standard_normal((case.experts, rows, columns)) / np.sqrt(columns)).astype(
                case.dtype
            )
            continue
        blocks = -(-columns // case.block) if case.block else 1
        limit = 1 << case.bits
        made[name] = packed(rng.integers(0, limit, (case.experts, rows, columns)).astype(np.uint8), case.bits)
        scales = rng.uniform(0.5, 1.5, (case.experts, rows, blocks)) * 2 / limit / np.sqrt(columns)
        made[f"{name}_scales"] = (scales if case.block else scales[..., 0]).astype(case.dtype)
        if case.points:
            points = rng.integers(0, limit, (case.experts, rows, blocks)).astype(np.uint8)
            made[f"{name}_zero_points"] = packed(points if case.block else points[..., 0], case.bits)
    return made


def model(case: Case, seed: int = 0, **replaced: np.ndarray) -> ir.Model:
    """input `[T, D]` or `[B, S, D]`, logits `[T, E]` -> y. `replaced` puts other constants in."""
    constants = weights(case, np.random.default_rng(seed)) | replaced
    attributes: dict[str, Any] = {
        "k": case.top_k, "activation_type": case.kind, "normalize_routing_weights": case.normalize,
        "swiglu_fusion": case.fusion if case.kind == "swiglu" else 0,
    }  # fmt: skip
    if case.bits:
        attributes["expert_weight_bits"] = case.bits
        if case.block:
            attributes["block_size"] = case.block
    attributes |= dict(case.extra)
    given = set(constants) | {"input", "logits"} | ({"router_weights"} if case.router_weights else set())
    names = [name if name in given else "" for name in (QMOE if case.bits else MOE)]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        "QMoE" if case.bits else "MoE",
        names,
        ["y"],
        name="/model/layers.0/moe/node",
        domain="com.microsoft",
        **attributes,
    )
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    leading = ["T"] if case.rank == 2 else ["B", "S"]
    inputs = [
        helper.make_tensor_value_info("input", dtype, [*leading, case.hidden]),
        helper.make_tensor_value_info("logits", dtype, ["T", case.experts]),
    ]
    if case.router_weights:
        inputs.append(helper.make_tensor_value_info("router_weights", dtype, ["T", case.experts]))
    inputs += [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(constants[name].dtype), constants[name].shape
        )
        for name in case.without
    ]
    output = helper.make_tensor_value_info("y", dtype, [*leading, case.hidden])
    initializers = [
        numpy_helper.from_array(array, name) for name, array in constants.items() if name not in case.without
    ]
    graph = helper.make_graph([node], "contrib", inputs, [output], initializers)
    imports = [helper.make_opsetid("", case.opset), helper.make_opsetid("com.microsoft", 1)]
    version = 13 if case.opset >= 25 else 10
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=version))


def feeds(case: Case, tokens: int, kind: str = "random", seed: int = 1) -> dict[str, np.ndarray]:
    """`kind`: random; ties (some scores alike); zeros; far (scores that underflow to weight 0); broken (NaN, inf)."""
    rng = np.random.default_rng(seed)
    shape = (tokens, case.hidden) if case.rank == 2 else (1, tokens, case.hidden)
    logits = rng.standard_normal((tokens, case.experts))
    if kind == "ties":
        logits = np.round(logits * 0.7)
    elif kind == "zeros":
        logits[:] = 0
    elif kind == "far":
        logits = np.where(rng.random(logits.shape) < 0.6, -10000.0, logits)
    elif kind == "broken" and tokens:
        logits[0] = np.nan
        logits[-1] = -np.inf
    made = {"input": rng.standard_normal(shape).astype(case.dtype), "logits": logits.astype(case.dtype)}
    if case.router_weights:
        made["router_weights"] = rng.uniform(-0.2, 1, logits.shape).astype(case.dtype)
    return made
