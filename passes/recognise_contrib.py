"""ONNX Runtime's own operators `com.microsoft::MoE` and `QMoE`, lifted to the neutral form.

The router inside of them is written out as their CPU kernels compute it, in float32:

    MoE     p = softmax(logits) over all experts; the k largest, divided by their sum where normalize_routing_weights
    QMoE    the k largest logits, softmax over these; or, with router_weights, its values at the chosen experts

Of equal scores the expert with the higher number is taken. A slot whose weight is not above 0 (QMoE: 1e-8) is dropped:
the kernels never run that expert, whatever it would give. So logits of -10000 for experts that are not meant are right.

    relu, gelu (tanh), silu         no gate
    swiglu, swiglu_fusion 1         gate and up interleaved in fc1, with alpha, beta and limit
    swiglu_fusion 2; 0 with fc3     gate and up in halves of fc1; up in fc3
    silu with fc3                   silu(fc1 x) * (fc3 x)

The last two lines run on CUDA only; of equal scores they take the lower number.

Quantized weights keep their bytes: unsigned 2, 4 or 8 bit integers, lowest bits first, rows of inputs, behind a
DequantizeLinear with a scale for each block of a row or each row. QMoE needs opset 21, with 2-bit weights 25.

Refused: use_sparse_mixer, the identity activation, attributes that are not known, weights that are not constants,
shapes and types that do not fit, floating-point or mixed quantization, weights ordered for a GPU; QMoE without
normalize_routing_weights, whose meaning depends on the provider; and QMoE whose CPU kernel rounds activations to 8 bits
(accuracy_level 4, and 8-bit weights in blocks), about 1 % off what exact arithmetic gives. 2-bit and 8-bit weights are
left to the operator unless `any_width` is set: at full accuracy every other form on CPU is many times slower.
Nodes that this tool made itself are left in silence. Enters If, Loop and Scan bodies. Functions were inlined before.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import make_node
from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.blocks.moe import SPELLING_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array
from sparse_onnx.graph.retyped import retyped
from sparse_onnx.matching.block import Workshop
from sparse_onnx.matching.contrib import Contrib, Unlike
from sparse_onnx.matching.contrib_read import read_contrib
from sparse_onnx.matching.naming import block_name
from sparse_onnx.matching.values import rank, tensor

_OLDEST = 18
_FLOAT = ir.DataType.FLOAT
#: Measured on ORT 1.32, 2 threads, 8 experts of 1024 x 1024, one token: the operator takes 2 ms with 8-bit rows and
#: 0.1 ms with 2-bit blocks, MatMulNBits at full accuracy 40 and 60 ms. With 4 bits it is 0.3 and 0.4 ms.
_SLOWER = (2, 8)
#: Weights up to these are dropped by the kernels.
_MOE_LEAST, _QMOE_LEAST = 0.0, 1e-8


@dataclasses.dataclass(frozen=True)
class RecogniseContrib(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "recognise_contrib"
    summary: ClassVar[str] = "com.microsoft::MoE and QMoE, lifted to the neutral form"

    any_width: bool = dataclasses.field(
        default=False,
        metadata={"help": "2-bit and 8-bit QMoE too, which is slower in any other exact form on CPU"},
    )

    def call(self, model: ir.Model) -> Outcome:
        shop = Workshop(model, self.name)
        opset = model.opset_imports.get("", 0)
        nodes = [node for graph in model.graphs() for node in graph if _is_contrib(node)]
        for node in nodes:
            try:
                if opset < _OLDEST:
                    raise Unlike(
                        f"opset {opset} has no neutral form", f"convert the model to opset {_OLDEST}"
                    )
                found = read_contrib(node, opset)
                if found.bits in _SLOWER and found.on_cpu and not self.any_width:
                    raise Unlike(
                        f"{found.bits}-bit experts run several times faster in the operator itself than in other forms",
                        "ask for the pass with any_width=true where the target lacks the operator",
                    )
                _lift(found, shop)
                shop.rewritten += 1
            except Unlike as problem:
                shop.refuse(f"{node.domain}::{node.op_type}: {problem.reason}", node, problem.hint)
        return shop.outcome(len(nodes))


def _is_contrib(node: ir.Node) -> bool:
    if node.domain != "com.microsoft" or node.op_type not in ("MoE", "QMoE") or node.overload:
        return False
    return FORM_KEY not in node.metadata_props


def _lift(found: Contrib, shop: Workshop) -> None:
    node, inputs = found.node, found.inputs
    assert isinstance(node.graph, ir.Graph | ir.Function)
    name = shop.names.free(block_name([node], node))
    emit = Emitter(node.graph, shop.names, name, {SPELLING_KEY: "contrib"})
    tokens = inputs["input"]
    flat = rank(tokens) == 2
    if not flat:
        tokens = _rows(emit, tokens, found.hidden)
    index, weight = _router(emit, found)
    weights = {}
    for role, projection in found.roles.items():
        weights[role] = _matrix(emit, found, projection, name)
        weights[f"{role}_bias"] = inputs.get(f"{projection}_bias") or _zeros(
            emit, found, projection, shop.names
        )
    lifted = make_node(found.spec, tokens, index, weight, weights, name=name)
    lifted.metadata_props.update(emit.metadata)
    result = lifted.outputs[0]
    result.name = shop.names.free(f"{name}/output")
    emit.nodes.append(lifted)
    if not flat:
        # A size of 0 is meant as it stands, not as "copy the axis".
        result = emit.op("Reshape", result, emit.op("Shape", inputs["input"]), allowzero=1)
    shop.put(node, emit)
    shop.replace(node.outputs[0], result)
    for value in inputs.values():
        if value.is_initializer() and not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            assert isinstance(value.graph, ir.Graph)
            value.graph.initializers.pop(value.name or "")


def _rows(emit: Emitter, tokens: ir.Value, width: int) -> ir.Value:
    rows = emit.op("Reshape", tokens, emit.ints(-1, width))
    rows.type = tokens.type
    rows.shape = ir.Shape([None, width])
    return rows


def _router(emit: Emitter, found: Contrib) -> tuple[ir.Value, ir.Value]:
    """Index and weight ``[T, K]`` as the kernel has them."""
    experts, top_k = found.experts, found.top_k
    scores = _as_float(emit, found.inputs["router_probs"])
    picked = found.inputs.get("router_weights")
    softmax_first = not found.bits or not found.on_cpu
    if softmax_first and picked is None:
        scores = emit.op("Softmax", scores, axis=-1)
    if found.on_cpu:  # TopK takes the first of equals, the kernel the last
        ends = (emit.ints(-1), emit.ints(-(2**62)), emit.ints(-1), emit.ints(-1))
        scores = emit.op("Slice", scores, *ends)
    if scores.producer() in emit.nodes:
        scores.dtype, scores.shape = _FLOAT, ir.Shape([None, experts])
    chosen, index = emit.ops("TopK", (scores, emit.ints(top_k)), 2, axis=-1)
    if found.on_cpu:
        index = emit.op("Sub", emit.constant(np.asarray(experts - 1, np.int64)), index)
    if picked is not None:
        chosen = emit.op("GatherElements", _as_float(emit, picked), index, axis=1)
    chosen.dtype, chosen.shape = _FLOAT, ir.Shape([None, top_k])
    weight = chosen
    if picked is None and not softmax_first:
        weight = emit.op("Softmax", chosen, axis=-1)
    elif found.normalize:
        total = emit.op("ReduceSum", chosen, emit.ints(1), keepdims=1)
        if picked is not None:  # weights that cancel become 0
            cancelled = emit.op("Equal", total, emit.scalar(0.0, _FLOAT))
            total = emit.op("Where", cancelled, emit.scalar(math.inf, _FLOAT), total)
        weight = emit.op("Div", chosen, total)
    if found.on_cpu:
        least = _QMOE_LEAST if found.bits else _MOE_LEAST
        kept = emit.op("Greater", weight, emit.scalar(least, _FLOAT))
        index = emit.op("Where", kept, index, emit.constant(np.asarray(experts, np.int64)))
    for value, dtype in ((index, ir.DataType.INT64), (weight, _FLOAT)):
        value.dtype = dtype
        value.shape = ir.Shape([None, top_k])
    return index, weight


def _as_float(emit: Emitter, value: ir.Value) -> ir.Value:
    return value if value.dtype == _FLOAT else emit.op("Cast", value, to=int(_FLOAT))


def _matrix(emit: Emitter, found: Contrib, projection: str, name: str) -> ir.Value:
    """``[E, N, K]``: as it is, or dequantized from the same bytes."""
    if not found.bits:
        return found.inputs[projection]
    rows, width, block = found.outputs(projection), found.width(projection), found.blocks[projection]
    blocks = -(-width // block)
    data, scales = tensor(found.inputs[projection]), tensor(found.inputs[f"{projection}_scales"])
    assert data is not None and scales is not None
    shape, grid = (found.experts, rows, width), (found.experts, rows, blocks)
    inputs = [
        _constant(emit, retyped(data, found.stored, shape, f"{name}/{projection}")),
        _constant(emit, retyped(scales, scales.dtype, grid, f"{name}/{projection}.scale")),
        _constant(emit, _zero_points(found, projection, grid, f"{name}/{projection}.zero_point")),
    ]
    matrix = emit.op("DequantizeLinear", *inputs, axis=2, block_size=block)
    matrix.dtype, matrix.shape = scales.dtype, ir.Shape(shape)
    return matrix


def _zero_points(found: Contrib, projection: str, grid: tuple[int, ...], name: str) -> ir.TensorProtocol:
    """``[E, N, blocks]``: the middle of the range where the node gives none."""
    given = found.inputs.get(f"{projection}_zero_points")
    bits, each = found.bits, 8 // found.bits
    dtype = found.stored
    if given is None:
        middle = np.full(grid, 1 << (bits - 1), np.uint8)
        return ir.Tensor(middle.astype(dtype.numpy()), dtype, name=name)
    held = tensor(given)
    assert held is not None
    # Rows of zero points begin with a byte; with one a row, so do those of an expert.
    experts, rows, blocks = grid
    if each == 1 or (len(held.shape) == 3 and blocks % each == 0):
        return retyped(held, dtype, grid, name)
    stored = read_array(held)
    lines = (experts, rows) if stored.ndim == 2 else (experts, rows, blocks)
    apart = stored[..., None] >> (np.arange(each, dtype=np.uint8) * bits) & (1 << bits) - 1
    points = apart.reshape(*lines[:-1], -1)[..., : lines[-1]].reshape(grid)
    return ir.Tensor(points.astype(dtype.numpy()), dtype, name=name)


def _constant(emit: Emitter, held: ir.TensorProtocol) -> ir.Value:
    graph = emit.graph
    return emit.names.initializer(graph, held.name, held)


def _zeros(emit: Emitter, found: Contrib, projection: str, names: Namespace) -> ir.Value:
    """``[E, N]``, one for all blocks of the graph with these sizes."""
    held = tensor(found.inputs["fc1_scales" if found.bits else "fc1"])
    assert held is not None
    shape, dtype = (found.experts, found.outputs(projection)), held.dtype
    zeros = ir.Tensor(np.zeros(shape, dtype.numpy()), dtype, name=f"sparse_onnx/zeros[{shape[0]}x{shape[1]}]")
    return names.initializer(emit.graph, ("zeros", dtype, *shape), zeros)
