"""A proven body written out behind some rows of its input, which may be none at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.branches import Branch, emit_if, inside
from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.row_kinds import Fixed, Rows
from sparse_onnx.matching.row_rules import ELEMENTWISE, MICROSOFT, UNARY
from sparse_onnx.matching.rowwise import Proof
from sparse_onnx.matching.values import producer

#: Tried with 0 rows on ORT's CPU provider 1.32. Not here: Einsum, which ends the process with a division by zero when
#: two operands have 0 rows, GroupNormalization and Attention, which fail; Reshape, which depends on its target.
_PLAIN = (
    "ArgMax ArgMin AveragePool BatchNormalization CastLike Concat ConstantOfShape Conv ConvTranspose CumSum "
    "DepthToSpace Dropout Expand Flatten Gather GatherElements Gemm GlobalAveragePool GlobalMaxPool GridSample "
    "Hardmax InstanceNormalization LayerNormalization LogSoftmax LpNormalization LpPool LRN MatMul MaxPool "
    "MeanVarianceNormalization OneHot Pad RMSNormalization ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp "
    "ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Resize ScatterElements Shape "
    "SimplifiedLayerNormalization Slice Softmax SpaceToDepth Split Squeeze Tile TopK Transpose Trilu Unsqueeze"
)
_FUSED = (
    "BiasGelu FastGelu FusedConv FusedGemm FusedMatMul Gelu QuickGelu SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization"
)
RUNS_ON_NO_ROWS = frozenset(
    [("", name) for name in (*ELEMENTWISE, *UNARY, *_PLAIN.split())]
    + [(MICROSOFT, name) for name in _FUSED.split()]
)


def runs_on_no_rows(proof: Proof) -> bool:
    """Whether ORT is known to run every node of the body on 0 rows."""
    for node in _live(proof):
        if not any(isinstance(proof.kinds[value], Rows) for value in node.inputs if value is not None):
            continue
        if node.op_type == "Reshape" and node.domain == "":
            if _target(proof, node) is None and not _plain_target(proof, node):
                return False
        elif (node.domain, node.op_type) not in RUNS_ON_NO_ROWS:
            return False
    return True


def _target(proof: Proof, node: ir.Node) -> list[int] | None:
    """The target of a Reshape in numbers, rows on the first axis."""
    kind = proof.kinds[node.outputs[0]]
    if not isinstance(kind, Rows) or kind.lead != 1:
        return None
    sizes = [size for size in kind.dims[1:] if isinstance(size, int)]
    return [-1, *sizes] if len(sizes) == len(kind.dims) - 1 and 0 not in sizes else None


def _plain_target(proof: Proof, node: ir.Node) -> bool:
    """Whether the target is known to hold no -1, which ORT cannot work out of 0 elements.

    It writes one itself into targets that a Concat of sizes computes (ReshapeFusion).
    """
    target = node.inputs[1]
    if target is None or producer(target, "Shape") is not None:
        return target is not None
    kind = proof.kinds[target]
    return isinstance(kind, Fixed) and kind.array is not None and -1 not in kind.array


def _live(proof: Proof) -> list[ir.Node]:
    """The nodes that are needed, in order; not those that compute a target which is written as numbers."""
    needed = set(proof.graph.outputs)
    kept = []
    for node in reversed(list(proof.graph)):
        if any(value in needed for value in node.outputs):
            kept.append(node)
            written = node.op_type == "Reshape" and node.domain == "" and _target(proof, node) is not None
            needed.update(value for value in node.inputs[: 1 if written else None] if value is not None)
    return kept[::-1]


def emit_body(emit: Emitter, proof: Proof, inputs: Sequence[ir.Value]) -> list[ir.Value]:
    """The body's results for these rows and weights."""
    values: dict[ir.Value, ir.Value] = dict(zip(proof.graph.inputs, inputs, strict=True))
    for node in _live(proof):
        if node.op_type == "Constant" and node.domain == "":
            constant = ir.convenience.get_const_tensor(node.outputs[0])
            assert constant is not None
            values[node.outputs[0]] = emit.constant(constant.numpy())
            continue
        target = _target(proof, node) if node.op_type == "Reshape" and node.domain == "" else None
        read = node.inputs if target is None else node.inputs[:1]
        sources = [None if value is None else values[value] for value in read]
        if target is not None:
            values[node.outputs[0]] = emit.op("Reshape", sources[0], emit.ints(*target))
        else:
            attributes = dict(node.attributes)
            results = emit.ops(node.op_type, sources, len(node.outputs), domain=node.domain, **attributes)
            values.update(zip(node.outputs, results, strict=True))
        for value in node.outputs:
            values[value].type = value.type
    return [values[value] for value in proof.graph.outputs]


def guarded(emit: Emitter, hit: ir.Value, proof: Proof, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    """The same where `hit` (one boolean) says that there are rows; else 0 rows of sizes that are all known."""
    then = inside(emit, "rows")
    results = emit_body(then, proof, inputs)
    nothing: list[ir.Value] = []
    told: list[tuple[ir.DataType, list[int | None]]] = []
    for value, kind in zip(proof.graph.outputs, proof.outputs, strict=True):
        assert value.dtype is not None
        sizes = [size for size in kind.dims[1:] if isinstance(size, int)]
        nothing.append(emit.constant(np.zeros((0, *sizes), value.dtype.numpy())))
        told.append((value.dtype, [None, *sizes]))
    return emit_if(emit, hit, Branch(then, results), Branch(inside(emit, "none"), nothing), told)


def has_known_sizes(proof: Proof) -> bool:
    """Whether the sizes of a row of each result are known, as `guarded` needs them."""
    return all(isinstance(size, int) for kind in proof.outputs for size in kind.dims[1:])
