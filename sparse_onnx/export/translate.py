"""An exported program to an ONNX model in neutral form.

torch's exporter is called without its optimizer: onnxscript's `_no_op` rules compare constants with a
tolerance of 1e-8 absolute and 1e-5 relative, and so remove `x + 1e-12` and `x * 1.000001`. The passes below
are the others of that optimizer, none of which compares floating-point constants.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import _constant_folding
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    _basic_rules,
    _broadcast_to_matmul,
    _cast_constant_of_shape,
    _collapse_slices,
    _materialize_reshape_shape,
)

from sparse_onnx import blocks
from sparse_onnx.blocks.moe import NAME_KEY
from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import experts, subgraph_outputs

_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
_FOLD_INPUT, _FOLD_OUTPUT = 1 << 13, 1 << 18
#: What torch notes on every node and of no use in a deployed model: file paths of the exporting machine,
#: source lines.
_DROPPED_METADATA = (
    "pkg.torch.onnx.stack_trace",
    "pkg.torch.onnx.fx_node",
    "pkg.torch.onnx.original_node_name",
    "pkg.onnxscript.rewriter.rule_name",
)


def to_onnx(
    program: torch.export.ExportedProgram,
    *,
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str] = (),
    table: Mapping[Any, Any] | None = None,
) -> ir.Model:
    """Translates without optimizing.

    Args:
        program: may hold `sparse_onnx::moe` nodes, which become `MoE` nodes without a definition as yet.
        opset: version of the default domain.
        input_names: of the graph, in order.
        output_names: of the graph, in order; may be empty.
        table: further translations, by torch operator.
    """
    blocks.register_schemas()
    # Without gradients: torch would split the bodies of scans into what a backward pass needs.
    with quiet(), torch.no_grad():
        onnx_program = torch.onnx.export(
            program,
            args=(),
            input_names=list(input_names),
            output_names=list(output_names) or None,
            custom_translation_table={**(table or {}), torch.ops.sparse_onnx.moe.default: _moe},
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert onnx_program is not None
    model = onnx_program.model
    if model.opset_imports.get("") != opset:  # torch only warns where it cannot convert
        raise ImpossibleError(
            f"torch gives opset {model.opset_imports.get('')} for this model, not {opset}",
            "leave --opset out, or try another",
        )
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's and transformers' remarks on their own internals off the user's terminal: logs, warnings,
    and the graphs that torch.export prints when it fails."""
    before = logging.root.manager.disable
    # Not the level of "torch": each of its loggers has one of its own, and prints tracebacks of what we report.
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _moe(
    tokens: Any,
    expert_index: Any,
    expert_weight: Any,
    fc1: Any,
    fc1_bias: Any,
    fc2: Any,
    fc2_bias: Any,
    activation: int,
    gate_layout: int,
    weight_layout: int,
    limit: float,
    alpha: float,
    beta: float,
) -> Any:
    """The translation of `sparse_onnx::moe`. A bias that the model lacks is zeros, as the neutral form wants
    it."""
    op: Any = onnxscript.opset18
    neutral: Any = onnxscript.values.Opset(blocks.DOMAIN, 1)

    def bias_or_zeros(bias: Any, weight: Any) -> Any:
        if bias is not None:
            return bias
        outputs = weight.shape[1 if weight_layout == blocks.WeightLayout.OUT_IN else 2]
        shape = op.Constant(value_ints=[int(weight.shape[0]), int(outputs)])
        return op.ConstantOfShape(shape, value=ir.tensor(np.zeros(1, weight.dtype.numpy())))

    return neutral.MoE(
        tokens,
        expert_index,
        expert_weight,
        fc1,
        bias_or_zeros(fc1_bias, fc1),
        fc2,
        bias_or_zeros(fc2_bias, fc2),
        activation=activation,
        gate_layout=gate_layout,
        weight_layout=weight_layout,
        limit=limit,
        alpha=alpha,
        beta=beta,
    )


def tidy(model: ir.Model) -> None:
    """Removes what tracing leaves behind, in place. Weights stay as they are: nothing that reads one is
    folded."""
    weights = {id(value) for value in model.graph.initializers.values() if _is_weight(value)}

    def should_fold(node: ir.Node) -> bool | None:
        # Resize: onnx's reference implementation, which folds, needs minutes for one node.
        reads_weight = any(id(value) in weights for value in node.inputs)
        return False if reads_weight or node.op_type == "Resize" else None

    fold = _constant_folding.FoldConstantsPass(
        shape_inference=True,
        input_size_limit=_FOLD_INPUT,
        output_size_limit=_FOLD_OUTPUT,
        should_fold=should_fold,
    )
    rules = [
        *_collapse_slices.rules,
        *_materialize_reshape_shape.rules,
        *_cast_constant_of_shape.rules,
        *_broadcast_to_matmul.rules,
        _basic_rules.no_op_cast_rule,
        _basic_rules.no_op_expand_rule,
        _basic_rules.reshape_reshape_rule,
        _basic_rules.squeeze_reshape_1d_rule,
        _basic_rules.no_op_transpose_rule,
        _basic_rules.transpose_transpose_rule,
        _basic_rules.unsqueeze_unsqueeze_rule,
    ]
    clean: tuple[ir.passes.PassBase, ...] = (common.IdentityEliminationPass(), common.RemoveUnusedNodesPass())
    lift: tuple[ir.passes.PassBase, ...] = (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
    )
    finish: tuple[ir.passes.PassBase, ...] = (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )
    with quiet():
        _apply(model, common.InlinePass(), fold, *clean, RewritePass(rules), fold, *clean, *lift)
        _share_zero_biases(model.graph)
        _share_constants(model.graph)
        subgraph_outputs.own(model)
        _apply(model, *finish)


def _apply(model: ir.Model, *passes: ir.passes.PassBase) -> None:
    for step in passes:
        step(model)


def _is_weight(value: ir.Value) -> bool:
    """Parameters, and buffers big enough to matter."""
    return value.metadata_props.get(_KIND) == "PARAMETER" or (
        value.const_value is not None and value.const_value.size > _FOLD_INPUT
    )


def _share_constants(graph: ir.Graph) -> None:
    """One initializer for equal constants of the trace; what the module calls by a name keeps it."""
    first: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if (
            tensor is None
            or _KIND in value.metadata_props
            or value.is_graph_output()
            or value.is_graph_input()
        ):
            continue
        key = (str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del graph.initializers[name]


def _share_zero_biases(graph: ir.Graph) -> None:
    """The zeros of blocks without bias: one initializer a shape, which every reader of the file recognises as
    such."""
    for node in list(graph):
        if node.op_type != "ConstantOfShape" or not any(_is_bias(*use) for use in node.outputs[0].uses()):
            continue
        size = node.inputs[0]
        shape = None if size is None else ir.convenience.get_const_tensor(size)
        if shape is None:
            continue
        sizes = [int(size) for size in shape.numpy()]
        dtype = node.attributes["value"].as_tensor().dtype
        name = f"sparse_onnx/zeros_{'x'.join(map(str, sizes))}_{dtype.name.lower()}"
        if name not in graph.initializers:
            tensor = ir.Tensor(np.zeros(sizes, dtype.numpy()), dtype=dtype, name=name)
            graph.register_initializer(
                ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(dtype), const_value=tensor)
            )
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)


def _is_bias(node: ir.Node, position: int) -> bool:
    return blocks.is_neutral(node) and position in (4, 6)


def label(model: ir.Model, symbols: Mapping[str, str], found: Sequence[experts.Experts]) -> None:
    """Names for people: dynamic axes, and on each block's node the path of its module.

    Args:
        model: changed in place.
        symbols: torch's symbol of each dynamic axis -> its name, such as ``s72 -> batch``.
        found: the experts modules, to name a block whose node lost its scope by its weights' prefix.
    """
    paths = {entry.path for entry in found}
    for node in model.graph.all_nodes():
        for key in _DROPPED_METADATA:
            node.metadata_props.pop(key, None)
        for value in node.outputs:
            value.metadata_props.clear()
            _rename_axes(value, symbols)
        if blocks.is_neutral(node):
            path = _scope(node, paths)
            node.metadata_props[NAME_KEY] = path
            node.name = f"{path}/MoE" if path else "MoE"
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        _rename_axes(value, symbols)
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    common.NameFixPass()(model)


def _scope(node: ir.Node, paths: set[str]) -> str:
    with contextlib.suppress(ValueError, SyntaxError):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        for scope in reversed(scopes):
            if scope in paths:
                return str(scope)
    weight = node.inputs[3]
    return (weight.name or "").rpartition(".")[0] if weight is not None else ""


def _rename_axes(value: ir.Value, symbols: Mapping[str, str]) -> None:
    if value.shape is None:
        return
    renamed: list[int | str | None] = []
    for dim in value.shape:
        text = None if isinstance(dim, int) else dim.value
        renamed.append(
            dim
            if isinstance(dim, int)
            else text and re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), text)
        )
    value.shape = ir.Shape(renamed)
