"""Neutral blocks for the tests of this room: models built with onnx.helper, weights and routings."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout, make_function

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LEVELS = (
    ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    ort.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
# Relative to the largest output. Half precision rounds products, activations and slots on the way.
TOLERANCE = {"float32": 5e-6, "float16": 1e-2, "bfloat16": 6e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A block by sizes and types. No two sizes are equal, so that mixed-up axes fail."""

    spec: ExpertSpec
    experts: int = 5
    hidden: int = 7
    inner: int = 6
    outputs: int = 9
    top_k: int = 2
    dtype: str = "float32"
    weight_dtype: str = "float32"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        def matrix(outputs: int, inputs: int) -> tuple[int, ...]:
            turned = self.spec.weight_layout == WeightLayout.IN_OUT
            return (self.experts, inputs, outputs) if turned else (self.experts, outputs, inputs)

        first = {"fc1": self.inner} if not self.spec.gated else {"fc1": 2 * self.inner}
        last = "fc2"
        if self.spec.gate_layout == GateLayout.SEPARATE:
            first, last = {"gate": self.inner, "up": self.inner}, "down"
        shapes = {}
        for role, width in first.items():
            shapes |= {role: matrix(width, self.hidden), f"{role}_bias": (self.experts, width)}
        shapes |= {last: matrix(self.outputs, self.inner), f"{last}_bias": (self.experts, self.outputs)}
        return shapes

    def weights(self, rng: np.random.Generator, biases: bool = True) -> dict[str, np.ndarray]:
        """Of size 1 / sqrt(fan in): outputs stay of order 1, so that a wrong expert is seen."""
        values = {}
        for name, shape in self.shapes.items():
            scale = 1 / math.sqrt(self.hidden if name[:3] not in ("fc2", "dow") else self.inner)
            if name.endswith("_bias"):
                scale = 0.3 * biases
            values[name] = (rng.standard_normal(shape) * scale).astype(DTYPES[self.dtype])
        return values

    def routing(self, rng: np.random.Generator, index: np.ndarray) -> dict[str, np.ndarray]:
        tokens = rng.standard_normal((len(index), self.hidden)).astype(DTYPES[self.dtype])
        weight = rng.uniform(0.2, 1.0, index.shape).astype(DTYPES[self.weight_dtype])
        return {"tokens": tokens, "expert_index": index.astype(np.int64), "expert_weight": weight}

    def node(self, output: str = "y", **changes: int) -> onnx.NodeProto:
        names = ["tokens", "expert_index", "expert_weight", *self.shapes]
        attributes = self.spec.attributes() | changes
        return helper.make_node(
            self.spec.op, names, [output], name="block", domain="sparse_onnx", **attributes
        )

    def inputs(self) -> list[onnx.ValueInfoProto]:
        dtype, weight_dtype = _number(self.dtype), _number(self.weight_dtype)
        return [
            helper.make_tensor_value_info("tokens", dtype, ["T", self.hidden]),
            helper.make_tensor_value_info("expert_index", onnx.TensorProto.INT64, ["T", self.top_k]),
            helper.make_tensor_value_info("expert_weight", weight_dtype, ["T", self.top_k]),
            *(helper.make_tensor_value_info(name, dtype, shape) for name, shape in self.shapes.items()),
        ]

    def model(self, opset: int = 18) -> onnx.ModelProto:
        """One node; everything is a graph input, so that one session serves any weights."""
        output = helper.make_tensor_value_info("y", _number(self.dtype), ["T", self.outputs])
        graph = helper.make_graph([self.node()], "moe", self.inputs(), [output])
        return with_function(graph, self.spec.op, opset)


def _number(dtype: str) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[dtype]))


def with_function(graph: onnx.GraphProto, op: str, opset: int) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("sparse_onnx", 1)]
    functions = [ir.serde.serialize_function(make_function(op, opset))]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def session(
    model: onnx.ModelProto | bytes,
    level: ort.GraphOptimizationLevel = LEVELS[-1],
    threads: int = 1,
    optimized: str = "",
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    if optimized:
        options.optimized_model_filepath = optimized
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def specs(limits: tuple[float, ...] = (0.0, 0.7)) -> Iterator[ExpertSpec]:
    """Every activation x gate layout x weight layout; with a gate also clamped and shifted, as in gpt-oss."""
    for activation, gate_layout, weight_layout in itertools.product(Activation, GateLayout, WeightLayout):
        for limit in limits if gate_layout != GateLayout.NONE else (0.0,):
            beta = 1.0 if limit else 0.0
            yield ExpertSpec(activation, gate_layout, weight_layout, limit, 1.702 if limit else 1.0, beta)


def routings(experts: int, top_k: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Expert indices of every kind; `experts` itself stands for dropped."""
    mixed = rng.integers(0, experts, (6, top_k))
    mixed[rng.random(mixed.shape) < 0.4] = experts
    return {
        "no token": np.zeros((0, top_k), np.int64),
        "one token": rng.integers(0, experts, (1, top_k)),
        "random, with duplicates": rng.integers(0, experts, (8, top_k)),
        "an expert without tokens": rng.integers(1, experts, (8, top_k)),
        "all to the last": np.full((5, top_k), experts - 1),
        "some dropped": mixed,
        "all dropped": np.full((3, top_k), experts),
    }


def close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> bool:
    """Equal types, shapes and, within the type's tolerance of the largest output, values."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    expected = expected.astype(np.float64)
    largest = np.abs(expected).max(initial=1.0)
    return bool((np.abs(actual.astype(np.float64) - expected) <= TOLERANCE[dtype] * largest).all())


def label(spec: ExpertSpec) -> str:
    clamp = "-clamped" if spec.limit else ""
    return f"{spec.name}-{spec.gate_layout.name.lower()}-{spec.weight_layout.name.lower()}{clamp}"
