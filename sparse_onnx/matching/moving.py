"""Which nodes may be skipped and moved into a branch, and which are worth it."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.matching.row_rules import MICROSOFT
from sparse_onnx.matching.values import attribute, scalar

_RANDOM = "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"
_PRODUCTS = (
    "Attention Conv ConvInteger ConvTranspose DeformConv Einsum GRU Gemm If LSTM Loop MatMul MatMulInteger "
    "QLinearConv QLinearMatMul RNN Scan"
)
_FUSED_PRODUCTS = (
    "Attention DynamicQuantizeMatMul FusedConv FusedGemm FusedMatMul GroupQueryAttention MatMulBnb4 "
    "MatMulIntegerToFloat MatMulNBits MoE MultiHeadAttention PackedMultiHeadAttention QAttention QGemm "
    "QLinearConv QMoE TransposeMatMul"
)
_FUSED_REST = (
    "BiasGelu BiasSoftmax DequantizeLinear EmbedLayerNormalization FastGelu Gelu NhwcMaxPool QLinearAdd "
    "QLinearGlobalAveragePool QLinearMul QuantizeLinear QuickGelu RotaryEmbedding "
    "SimplifiedLayerNormalization SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization"
)
RANDOM = frozenset(("", name) for name in _RANDOM.split())
EXPENSIVE = frozenset(
    [("", name) for name in _PRODUCTS.split()] + [(MICROSOFT, name) for name in _FUSED_PRODUCTS.split()]
)
#: Operators of ORT's own that are functions of their inputs.
_PURE = frozenset(name for names in (_FUSED_PRODUCTS, _FUSED_REST) for name in names.split())


LOWERED = "it is part of something that is lowered already"


def is_expensive(node: ir.Node) -> bool:
    """Whether the node multiplies matrices, or its body may."""
    return node.domain == DOMAIN or (node.domain, node.op_type) in EXPENSIVE


def obstacle(node: ir.Node) -> str:
    """Why the node must stay where it is; empty where it may be moved into a branch that is not always taken.

    Its results must depend on its inputs alone, and nothing else on its having run.
    """
    if FORM_KEY in node.metadata_props:
        return LOWERED
    if node.domain == "":
        if ("", node.op_type) in RANDOM or (node.op_type == "Dropout" and not _only_passes_on(node)):
            return "its results are random, and skipping it would change the numbers that others get"
    elif node.domain == MICROSOFT:
        if node.op_type not in _PURE:
            return f"{MICROSOFT}::{node.op_type} is not known to depend on its inputs alone"
    elif node.domain != DOMAIN:
        return f"operators of '{node.domain}' are not known to depend on their inputs alone"
    if is_packed_weight(node):
        return "it dequantizes the weights of a block, which stay in the graph around the branch"
    return _obstacle_of_bodies(node)


def is_packed_weight(node: ir.Node) -> bool:
    """Whether the node dequantizes a constant for blocks of the neutral form, whose lowering looks through it."""
    uses = node.outputs[0].uses() if node.op_type == "DequantizeLinear" else ()
    return len(uses) > 0 and all(use.node.domain == DOMAIN for use in uses)


def _obstacle_of_bodies(node: ir.Node) -> str:
    inner = [each for graph in bodies(node) for each in ir.traversal.RecursiveGraphIterator(graph)]
    for each in inner:
        found = obstacle(each)
        if found:
            return f"{each.op_type} in its body: {found}"
        if is_expensive(each) and any(_is_weight_of(value, node.graph) for value in each.inputs):
            return (
                "its body reads weights of the graph around it, and ORT does not prepack weights that lie two "
                "graphs out"
            )
    return ""


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The bodies of an If, Loop or Scan."""
    found: list[ir.Graph] = []
    for item in node.attributes.values():
        if item.is_ref():
            continue
        if item.type == ir.AttributeType.GRAPH:
            found.append(item.as_graph())
        elif item.type == ir.AttributeType.GRAPHS:
            found += item.as_graphs()
    return found


def _is_weight_of(value: ir.Value | None, graph: object) -> bool:
    return value is not None and value.is_initializer() and value.graph is graph


def _only_passes_on(dropout: ir.Node) -> bool:
    if len(dropout.inputs) > 2 and dropout.inputs[2] is not None:
        return scalar(dropout.inputs[2]) in (False, 0)
    return attribute(dropout, "is_test", 1) != 0
