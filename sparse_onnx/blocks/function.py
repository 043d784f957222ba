"""The neutral operators as model-local functions: what makes a model in neutral form run anywhere."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from sparse_onnx.blocks.body import body_text
from sparse_onnx.blocks.combine import COMBINE, is_combine
from sparse_onnx.blocks.combine_function import combine_text
from sparse_onnx.blocks.moe import is_neutral
from sparse_onnx.blocks.spec import DOMAIN, DOMAIN_VERSION
from sparse_onnx.blocks.thresholded import MIN_OPSET as THRESHOLDED_OPSET
from sparse_onnx.blocks.thresholded import is_thresholded, thresholded_text
from sparse_onnx.blocks.thresholded_experts import (
    EXPERTS_N_BITS,
    EXPERTS_OPSET,
    experts_text,
    is_of_experts,
    widened,
)
from sparse_onnx.blocks.thresholded_gated import GATED_OPSET, gated_text, is_gated
from sparse_onnx.core.errors import ModelError

MIN_OPSET = 18


def make_function(op: str, opset: int, wide: ir.DataType | None = ir.DataType.INT16) -> ir.Function:
    """The definition of a neutral operator.

    Args:
        op: ``MoE``, ``GatedMoE``, ``Combine``, ``ThresholdedLinear``, ``ThresholdedGatedMLP``,
            ``ThresholdedExpertLinear``, or one of the last three with ``NBits`` behind it.
        opset: the model's version of the default domain.
        wide: what ``ThresholdedExpertLinearNBits`` casts integers to, see `widened`; others ignore it.

    Raises:
        ModelError: an opset that the body cannot be written in: below 18, of the n-bit layers below 21.
    """
    oldest = (THRESHOLDED_OPSET | GATED_OPSET | EXPERTS_OPSET).get(op, MIN_OPSET)
    if opset < oldest:
        raise ModelError(
            f"opset {opset} is too old for {DOMAIN}::{op}, which needs {oldest}",
            "convert the model to a newer opset first",
        )
    if op == COMBINE:
        return ir.serde.deserialize_function(onnx.parser.parse_function(combine_text(DOMAIN, opset)))
    if op in THRESHOLDED_OPSET:
        return ir.serde.deserialize_function(onnx.parser.parse_function(thresholded_text(op, opset)))
    if op in GATED_OPSET:
        return ir.serde.deserialize_function(onnx.parser.parse_function(gated_text(op, opset)))
    text = experts_text(op, opset, wide) if op in EXPERTS_OPSET else body_text(op, DOMAIN, opset)
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    (loop,) = (node for node in function if node.op_type == "Loop")
    count, condition, _ = loop.attributes["body"].as_graph().inputs
    # The text format cannot say rank 0, and ORT refuses a Loop whose counter has no shape.
    count.shape = condition.shape = ir.Shape(())
    return function


def attach_functions(model: ir.Model) -> bool:
    """Adds the definitions of the neutral operators that the model uses and lacks.

    Nodes in subgraphs and in other functions count too; whatever holds one imports the domain afterwards.

    Returns:
        Whether the model changed.

    Raises:
        ModelError: the model uses a neutral operator and its opset is too old for it.
    """
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    holders = []
    used: set[str] = set()
    stored: set[ir.DataType | None] = set()  # by experts' layers
    for scope in scopes:
        nodes = ir.traversal.RecursiveGraphIterator(scope)
        neutral = (is_neutral, is_combine, is_thresholded, is_gated, is_of_experts)
        own = [node for node in nodes if any(kind(node) for kind in neutral)]
        found = {node.op_type for node in own}
        stored |= {_type(node.inputs[2]) for node in own if node.op_type == EXPERTS_N_BITS}
        if found:
            holders.append(scope)
        used |= found
    if not used:
        return False
    wide = widened(stored)
    lacking = [op for op in sorted(used) if not _has(model, op, wide)]
    functions = [make_function(op, model.opset_imports.get("", 0), wide) for op in lacking]
    changed = bool(functions)
    for function in functions:
        model.functions[function.identifier()] = function
    for holder in (model.graph, *holders):
        if DOMAIN not in holder.opset_imports:
            holder.opset_imports[DOMAIN] = DOMAIN_VERSION
            changed = True
    return changed


def _type(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.dtype if value.const_value is None else value.const_value.dtype


def _has(model: ir.Model, op: str, wide: ir.DataType | None) -> bool:
    """Whether the model has the operator's definition; that of integers must widen them as its layers need it."""
    function = model.functions.get((DOMAIN, op, ""))
    if function is None or op != EXPERTS_N_BITS:
        return function is not None
    casts = {node.attributes["to"].as_int() for node in function if node.op_type == "Cast"}
    return casts == (set() if wide is None else {int(wide)})
