"""Models whose experts are of any body, all run on all tokens and masked: built with onnx.helper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.matching.block import Workshop
from sparse_onnx.matching.outline import Body, FoundBodies, outline


@dataclasses.dataclass
class Graph:
    """Nodes and initializers that are being written. `op` gives the name of a node's first output."""

    rng: np.random.Generator = dataclasses.field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = dataclasses.field(default_factory=list)
    initializers: list[onnx.TensorProto] = dataclasses.field(default_factory=list)

    def ops(
        self, op_type: str, inputs: Sequence[str], outputs: int, domain: str = "", **attributes
    ) -> list[str]:
        names = [f"{op_type}_{len(self.nodes)}_{index}" for index in range(outputs)]
        node = helper.make_node(op_type, inputs, names, f"n{len(self.nodes)}", domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes) -> str:
        return self.ops(op_type, inputs, 1, domain, **attributes)[0]

    def constant(self, array) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64))

    def weight(self, *shape: int) -> str:
        """Random, of size 1 / sqrt(fan in)."""
        scale = 1 / np.sqrt(np.prod(shape[1:]) if len(shape) > 2 else shape[0])
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def vector(self, size: int) -> str:
        return self.constant((1 + 0.3 * self.rng.standard_normal(size)).astype(np.float32))


#: Writes one expert: (graph, entry, number) to its exits.
Write = Callable[[Graph, str, int], str | tuple[str, ...]]


@dataclasses.dataclass
class Written:
    """A dense-mask model and the names that a recogniser would have found in it."""

    model: onnx.ModelProto
    entries: list[str]
    exits: list[tuple[str, ...]]
    sums: list[str]
    top_k: int
    leading: int

    def ir(self) -> ir.Model:
        model = onnx.shape_inference.infer_shapes(self.model, data_prop=True)
        return ir.from_proto(model)


def dense_model(
    write: Write,
    row: Sequence[int | str] = (16,),
    out: Sequence[int | str] | None = None,
    experts: int = 4,
    top_k: int = 2,
    *,
    lead: Sequence[int | str] = ("T",),
    opset: int = 20,
    after: Callable[[Graph, Written], list[str]] | None = None,
) -> Written:
    """x ``[*lead, *row]``, index and weight ``[*lead, K]`` to sums ``[*lead, *out]``, as
    ``sum_e (sum_k where(index == e, weight, 0)) * expert_e(x)``. `after` adds nodes and names of outputs."""
    graph = Graph()
    zero = graph.constant(np.float32(0))
    exits, masks = [], []
    for expert in range(experts):
        found = write(graph, "x", expert)
        exits.append((found,) if isinstance(found, str) else tuple(found))
        chosen = graph.op("Equal", "index", graph.ints(expert))
        weight = graph.op("Where", chosen, "weight", zero)
        masks.append(graph.op("ReduceSum", weight, graph.ints(-1), keepdims=0))
    sums = []
    shapes = [list(out or row)] * len(exits[0])
    for at in range(len(exits[0])):
        axes = graph.ints(*range(len(lead), len(lead) + len(shapes[at])))
        parts = [
            graph.op("Mul", graph.op("Unsqueeze", mask, axes), each[at])
            for mask, each in zip(masks, exits, strict=True)
        ]
        sums.append(graph.op("Sum", *parts) if len(parts) > 1 else graph.op("Identity", parts[0]))
    outputs = [graph.op("Identity", name) for name in sums]
    written = Written(onnx.ModelProto(), ["x"] * experts, exits, sums, top_k, len(lead))
    extra = after(graph, written) if after is not None else []
    value = helper.make_tensor_value_info
    inputs = [
        value("x", TensorProto.FLOAT, [*lead, *row]),
        value("index", TensorProto.INT64, [*lead, top_k]),
        value("weight", TensorProto.FLOAT, [*lead, top_k]),
    ]
    results = [
        value(name, TensorProto.FLOAT, [*lead, *shape]) for name, shape in zip(outputs, shapes, strict=True)
    ]
    results += [helper.make_empty_tensor_value_info(name) for name in extra]
    proto = helper.make_graph(graph.nodes, "g", inputs, results, graph.initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    written.model = helper.make_model(proto, opset_imports=imports, ir_version=10)
    return written


def outlined(written: Written) -> tuple[ir.Model, Workshop]:
    """The model behind `outline`, given what a recogniser would have proved."""
    model = written.ir()
    values = ir.convenience.create_value_mapping(model.graph)
    shop = Workshop(model, "test")
    bodies = [
        Body(values[entry], tuple(values[name] for name in exits))
        for entry, exits in zip(written.entries, written.exits, strict=True)
    ]
    found = FoundBodies(
        "test",
        tuple(values[name] for name in written.sums),
        values["x"],
        values["index"],
        values["weight"],
        written.top_k,
        bodies,
        written.leading,
    )
    outline(found, shop)
    shop.outcome(1)
    return model, shop


def routing(
    written: Written, tokens: int | tuple[int, ...], kind: str = "random", sizes: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Inputs of the model: random, all to `one` expert, or with `dropped` slots (index = E)."""
    lead = (tokens,) if isinstance(tokens, int) else tokens
    rng = np.random.default_rng(sum(lead))
    dims = [dim.dim_value or dim.dim_param for dim in written.model.graph.input[0].type.tensor_type.shape.dim]
    row = [size if isinstance(size, int) else (sizes or {})[size] for size in dims[len(lead) :]]
    experts = len(written.exits)
    index = rng.integers(0, experts, (*lead, written.top_k))
    weight = rng.uniform(-1, 1, index.shape).astype(np.float32)
    if kind == "one":
        index[:] = experts - 1
    elif kind == "dropped":
        index[rng.random(index.shape) < 0.5] = experts
    return {
        "x": rng.standard_normal((*lead, *row)).astype(np.float32),
        "index": index.astype(np.int64),
        "weight": weight,
    }
